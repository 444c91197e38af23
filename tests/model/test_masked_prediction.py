from dataclasses import replace

import pytest
import torch

from b2t.quantize import StepNorms
from tests.model.test_brain_to_text import batch_of, build, part

WEIGHTS = {"masked": 1.0}


@pytest.fixture
def model():
    return build().eval()


@pytest.fixture
def batch():
    batch = batch_of([30, 20])
    hidden = torch.zeros_like(batch.signal_mask)
    hidden[0, 6:12] = hidden[0, 18:21] = hidden[1, 9:15] = True
    return replace(batch, hidden=hidden, _counts=None)


def changed(batch, where, field):
    values = getattr(batch, field).clone()
    values[where] += 5.0
    return replace(batch, **{field: values})


def test_the_loss_is_the_error_of_hidden_bins_alone(model, batch):
    output = model(batch, weights=WEIGHTS)
    signal = batch.signal.clone()
    adapted = model.adapter(signal, batch.session)
    adapted[batch.hidden] = 0.0
    found = model.signal_decoder(*model.encoder(adapted, batch.signal_mask), 30)
    expected = (found - batch.target)[batch.hidden].square().mean()
    torch.testing.assert_close(output.loss, expected)
    assert output.losses.keys() == {"masked"} and output.codes is None


def test_hidden_bins_are_not_seen_and_others_are_not_asked_for(model, batch):
    loss = model(batch, weights=WEIGHTS).loss
    shown = batch.signal_mask & ~batch.hidden
    for same in (
        changed(batch, batch.hidden, "signal"),
        changed(batch, shown, "target"),
        changed(batch, ~batch.signal_mask, "signal"),
        replace(batch, tokens=batch.tokens * 0, phonemes=batch.phonemes * 0),
    ):
        assert torch.equal(model(same, weights=WEIGHTS).loss, loss)
    for other in (changed(batch, shown, "signal"), changed(batch, batch.hidden, "target")):
        assert not torch.equal(model(other, weights=WEIGHTS).loss, loss)


def test_parts_of_a_step_add_up_to_the_step(model, batch):
    """As ranks and micro-batches share it: each divides by the mean of all counts."""
    model(batch, weights=WEIGHTS).loss.backward()
    whole = model.encoder.embed.weight.grad.clone()
    counts = {name: value / 2 for name, value in model.counts(batch).items()}
    model.zero_grad()
    for row in range(2):
        each = part(batch, row, row + 1)
        each = replace(each, hidden=batch.hidden[row : row + 1], _counts=None)
        (model(each, StepNorms(counts), WEIGHTS).loss / 2).backward()
    torch.testing.assert_close(model.encoder.embed.weight.grad, whole)


def test_beside_other_losses_it_leaves_them_as_they_are(model, batch):
    both = model(batch, weights={"masked": 0.5, "reconstruction": 1.0, "commitment": 0.2})
    alone = model(batch, weights={"reconstruction": 1.0, "commitment": 0.2})
    for name in ("reconstruction", "commitment"):
        assert torch.equal(both.losses[name], alone.losses[name])
    masked = model(batch, weights=WEIGHTS).loss
    torch.testing.assert_close(both.loss, alone.loss + 0.5 * masked)
    nothing = replace(batch, hidden=None, _counts=None)
    assert model(nothing, weights=WEIGHTS).loss == 0
