"""The quantizer in a loop of one's own: the README's, and what it forgets."""

import logging
import re

import pytest
import torch

from b2t import log
from b2t.quantize import ResidualVQ
from b2t.quantize.reminders import FORWARDS


@pytest.fixture
def told(monkeypatch, caplog):
    monkeypatch.setattr(log, "_said", set())
    with caplog.at_level(logging.WARNING, "b2t"):
        yield caplog


def quantizer():
    return ResidualVQ(dim=8, codebook_size=16, num_quantizers=2, seed=1)


def test_the_loop_of_the_readme_learns_with_living_codes(repository, told):
    text = (repository / "README.md").read_text()
    block = re.search(r"( {4}import torch\n(?: {4}.*\n)*? {4}.*quantizer\.update.*\n)", text)[1]
    code = "\n".join(line[4:] for line in block.splitlines())
    torch.manual_seed(0)
    place = {}
    exec(code, place)  # what a reader would paste
    first = place["signal"].square().mean()
    final = (place["decoder"](place["out"].quantized) - place["signal"]).square().mean()
    assert float(final.detach()) < 0.5 * float(first)
    used = place["out"].codes.flatten(0, 1)
    assert all(len(layer.unique()) > 32 for layer in used.T)
    assert int(place["quantizer"].codebooks.updates) == 200
    assert told.messages == []


@pytest.mark.parametrize("form", ["list", "tensor", "pairs", "generator"])
def test_bare_latents_start_as_those_with_a_mask_do(form):
    x = torch.randn(4, 40, 8, generator=torch.Generator().manual_seed(3))
    expected, found = quantizer(), quantizer()
    expected.initialize([(x, torch.ones(4, 40, dtype=torch.bool))], progress=False)
    forms = {"list": [x], "tensor": x, "pairs": [(x, None)], "generator": iter([x[:1], x[1:]])}
    found.initialize(forms[form], progress=False)
    assert found.initialized
    assert torch.equal(found.codebooks.embed, expected.codebooks.embed)


def test_a_quantizer_that_is_never_started_says_so_once(told):
    one = quantizer()
    x = torch.randn(2, 5, 8)
    one.eval()(x)
    assert told.messages == []
    for _ in range(3):
        out = one.train()(x)
    assert torch.equal(out.quantized, x) and (out.codes == -1).all()
    assert [message for message in told.messages if "initialize([latents])" in message] != []
    assert len(told.messages) == 1


def test_a_trainer_that_starts_it_later_is_not_reminded(told):
    one = quantizer()
    one.reminders.start_follows = True
    one.train()(torch.randn(2, 5, 8))
    assert told.messages == []


def test_a_quantizer_that_is_never_updated_says_so_once(told):
    one, x = quantizer(), torch.randn(2, 20, 8)
    one.initialize(x, progress=False)
    told.clear()
    for _ in range(FORWARDS - 1):
        out = one(x)
    one.update(out.stats)
    for _ in range(FORWARDS - 1):
        one(x)
    for _ in range(FORWARDS):
        one.eval()(x)
    assert told.messages == []
    for _ in range(FORWARDS):
        one.train()(x)
    assert len(told.messages) == 1 and "without update" in told.messages[0]
