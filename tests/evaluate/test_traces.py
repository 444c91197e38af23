import numpy as np
import pytest
import torch

from b2t.evaluate.traces import collect_traces


def test_traces_are_the_recorded_bins_of_the_liveliest_channels():
    target = torch.zeros(3, 100, 5)
    target[:, ::2] = torch.tensor([1.0, 5.0, 2.0, 0.0, 3.0])
    mask = torch.ones(3, 100, dtype=torch.bool)
    mask[0, 70:] = False
    found = collect_traces(["a", "b", "c"], target + 0.5, target, mask, 50.0)
    assert [trial["row"] for trial in found["trials"]] == ["a", "b"]
    first = found["trials"][0]
    assert first["channels"] == [1, 2, 4]
    assert np.shape(first["target"]) == (3, 70)
    assert first["reconstruction"][0][0] == 5.5


def test_the_spectrum_shows_a_tone_at_its_frequency():
    time = torch.arange(256) / 50.0
    tone = torch.sin(2 * torch.pi * 12.5 * time)[None, :, None].repeat(2, 1, 3)
    mask = torch.ones(2, 256, dtype=torch.bool)
    found = collect_traces(["a", "b"], 0.1 * tone, tone, mask, 50.0)["spectrum"]
    peak = int(np.argmax(found["target"]))
    assert found["hz"][peak] == pytest.approx(12.5)
    gap = np.array(found["target"]) - np.array(found["reconstruction"])
    assert gap[peak] == pytest.approx(20.0, abs=0.01)


def test_trials_too_short_for_a_spectrum_have_none():
    x = torch.zeros(1, 10, 2)
    found = collect_traces(["a"], x, x, torch.ones(1, 10, dtype=torch.bool), 50.0)
    assert "spectrum" not in found and len(found["trials"]) == 1
