import json
import math

import pytest
import torch

from b2t.data.batches import Batch
from b2t.model import BrainToText
from b2t.model.configuration import BrainToTextConfig
from b2t.quantize import ResidualVQ
from tests.script_modules import script


@pytest.fixture(scope="module")
def study(repository):
    with script(repository, "phoneme_bitrate") as module:
        yield module


def test_rates_of_known_counts(study):
    """Four codes of 8 used alike are 2 bits by entropy and 3 as stored; one code alone is none."""
    from bitrate.bench import rates

    counts = torch.zeros(2, 8, dtype=torch.int64)
    counts[0, :4], counts[1, 0] = 25, 100
    found = rates(counts, frames=10.0)
    assert found["bits"] == 60.0
    assert found["bits_entropy"] == pytest.approx(20.0)
    assert found["utilization"] == pytest.approx(1 / 8)
    assert set(rates(None, 10.0).values()) == {None}


def result(rate, bits):
    used = None if bits is None else 1.0
    return {
        "per_val": rate,
        "per_test": rate,
        "per_interval": [rate, rate],
        "bits": bits,
        "bits_entropy": bits,
        "utilization": used,
    }


def test_costs_are_over_latents_of_as_many_steps(study, tmp_path):
    lines = [
        {"plan": {"point": point, "steps": steps, "seed": seed}, "result": result(rate, bits)}
        for point, steps, seed, rate, bits in [
            ("none", 0, 0, 0.10, None),
            ("4x256", 0, 0, 0.15, 400.0),
            ("none", 40, 0, 0.08, None),
            ("4x256", 40, 0, 0.09, 400.0),
            ("4x256", 40, 1, 0.10, 400.0),
        ]
    ]
    (tmp_path / "RESULTS.md").write_text(f"kept\n{study.write_report.__globals__['BEGIN']}\n")
    study.write_report(lines, tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    assert text.startswith("kept\n")
    assert "| 0 | 4x256 | 1 | 15.0 % (15.0–15.0) | +5.0 |" in text
    assert "| 40 | 4x256 | 2 | 9.5 % (9.0–9.0) | +1.5 |" in text
    assert (tmp_path / "phoneme_bitrate.png").stat().st_size > 0
    study.write_report(lines, tmp_path)
    assert (tmp_path / "RESULTS.md").read_text() == text


def small_model():
    torch.manual_seed(0)
    config = BrainToTextConfig(
        channels=6,
        sessions=["a"],
        encoder={"dim": 16, "depth": 1, "heads": 2, "patch_size": 2, "patch_stride": 2},
        quantizer={"enabled": False},
        text_decoder={"enabled": False},
        signal_decoder={"depth": 0, "heads": 2},
    )
    return BrainToText(config).eval()


def test_projections_of_the_head_keep_what_tells_classes_apart(study):
    from bitrate.bench import look_as_the_head

    model = small_model()
    head = model.phoneme_head
    with torch.no_grad():
        head.norm.weight.uniform_(0.5, 2.0)
        head.classify.weight.copy_(torch.randn(41, 3) @ torch.randn(3, 16) + torch.randn(16))
    latents = torch.randn(5, 16)
    for width, keeps in ((3, True), (2, False)):
        model.quantizer = ResidualVQ(16, 8, 1, codebook_dim=width)
        look_as_the_head(model)
        kept = model.quantizer.project_out(model.quantizer.project_in(latents))
        scores = [(x * head.norm.weight) @ head.classify.weight.T for x in (latents, kept)]
        apart = [score - score[:, :1] for score in scores]
        assert torch.allclose(*apart, atol=1e-4) is keeps


def test_the_first_layers_loss_is_the_loss_of_one_layer(study):
    """With one layer both losses are the same function of the latents, gradient included."""
    from bitrate.bench import first_layer_loss

    model = small_model()
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, 30:] = False
    batch = Batch(
        signal=torch.randn(2, 40, 6),
        target=torch.zeros(2, 40, 6),
        signal_mask=mask,
        session=torch.zeros(2, dtype=torch.int64),
        tokens=torch.full((2, 1), -100),
        phonemes=torch.tensor([[3, 4, 5], [7, 0, 0]]),
        phoneme_lengths=torch.tensor([3, 1]),
        rows=["a/0/0", "a/0/1"],
        texts=[None, None],
        row_ids=torch.arange(2),
    )
    model.quantizer = ResidualVQ(16, 8, 1, rotation_trick=False, revival=None)
    latents, frames = model.latents(batch.signal, batch.signal_mask, batch.session)
    model.quantizer.initialize([(latents.detach(), frames)], progress=False)
    output = model(batch, weights={"phoneme": 1.0})
    parameters = [p for p in model.parameters() if p.requires_grad]
    own = torch.autograd.grad(output.loss, parameters, retain_graph=True, allow_unused=True)
    first = first_layer_loss(model, batch, output)
    torch.testing.assert_close(first, output.loss)
    other = torch.autograd.grad(first, parameters, allow_unused=True)
    for a, b in zip(own, other, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_point_that_is_known_is_not_run_again(study, tmp_path, monkeypatch):
    from bitrate import bench

    class Stand:
        made = 0

        def __init__(self, run, data):
            Stand.made += 1

        def measured(self, plan):
            return result(0.1, None if plan["quantizer"] is None else 100.0)

    monkeypatch.setattr(bench, "Bench", Stand)
    out = tmp_path / "points.jsonl"
    line = [str(tmp_path), "--out", str(out), "--points", "none", "1x256"]
    assert study.main(line) == 0 and study.main(line) == 0
    assert Stand.made == 1
    found = [json.loads(text) for text in out.read_text().splitlines()]
    assert [row["plan"]["point"] for row in found] == ["none", "1x256"]
    assert found[1]["plan"]["quantizer"]["codebook_size"] == 256
    assert study.main([*line, "--steps", "3"]) == 0 and Stand.made == 2


def test_stored_bits_are_layers_times_log2_of_codes(study):
    for name, point in study.POINTS.items():
        if point["quantizer"] is not None and name[0].isdigit():
            layers, codes = map(int, name.split("x"))
            assert point["quantizer"]["num_quantizers"] == layers
            assert point["quantizer"]["codebook_size"] == codes
            assert math.log2(codes).is_integer()
