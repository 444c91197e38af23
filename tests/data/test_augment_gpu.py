"""Augmentation where training happens: on a GPU, and what can be known of one without it."""

import numpy as np
import pytest
import torch

from b2t.data.augment import Augment
from b2t.data.augment_batch import _projected, _transformed
from b2t.data.augment_figure import OFF
from b2t.data.batches import TrialRows, collate
from tests.data.test_augment_batch import EVERYTHING
from tests.data.test_batches import SESSIONS, Bytes, trials

QUIET = {"noise_std": 0.0, "offset_std": 0.0, "random_walk_std": 0.0}
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def batch_of(rows, options=EVERYTHING):
    examples = TrialRows(trials(), Bytes(), SESSIONS, Augment(**options), seed=3)
    return collate([examples.example(0, row) for row in rows])


def test_nothing_is_asked_of_the_device_and_nothing_left_off_it(monkeypatch):
    # A tensor without memory refuses to be read and to be mixed with others of the CPU.
    monkeypatch.setattr("b2t.data.augment_batch.Generator", lambda device: torch.Generator())
    moved = batch_of(range(9)).to("meta", torch.float16)
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 8 and all(tensor.is_meta for tensor in tensors)
    assert moved.signal.shape == moved.target.shape == (*moved.signal_mask.shape, 3)
    assert moved.signal.dtype == torch.float16


@pytest.mark.parametrize(
    ("bins", "bands"),
    [
        (40, [(1, 3)]), (41, [(1, 21)]), (40, [(18, 21)]), (40, [(1, 21)]), (997, [(40, 61)]),
        (90, [(3, 8), (5, 12)]), (90, [(3, 8), (8, 9), (40, 46)]), (2, [(1, 2)]), (1, [(1, 1)]),
    ],
)  # fmt: skip
def test_bands_are_removed_as_by_a_transform(bins, bands):
    signal = torch.from_numpy(np.random.default_rng(bins).standard_normal((bins, 5)))
    expected = _transformed(signal, bands)
    torch.testing.assert_close(_projected(signal, bands), expected, rtol=0, atol=1e-12)
    single = _projected(signal.float(), bands)
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=5e-6)


@on_gpu
def test_a_new_length_takes_no_longer_than_one_met_before():
    row = torch.randn(4001, 64, device="cuda")
    _projected(row[:3001].clone(), [(5, 60)])
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda.synchronize()
    events[0].record()
    for bins in (1009, 2003, 3989):
        _projected(row[:bins].clone(), [(5, 60)])
    events[1].record()
    torch.cuda.synchronize()
    assert events[0].elapsed_time(events[1]) < 50  # ms; plans took hundreds


@on_gpu
def test_a_gpu_augments_without_waiting():
    batch = batch_of(range(9)).pin_memory()
    batch.to("cuda")  # plans of the transforms, and memory
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = batch.to("cuda", torch.float16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert moved.signal.isfinite().all() and moved.signal.dtype == torch.float16


@on_gpu
def test_a_gpu_does_what_a_cpu_does_but_for_noise():
    batch = batch_of(range(9), {**EVERYTHING, **QUIET})
    there, here = batch.to("cuda"), batch.to("cpu")
    torch.testing.assert_close(there.signal.cpu(), here.signal, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(there.target.cpu(), here.target, rtol=1e-5, atol=1e-5)


PARTS = {
    "cut and stretch": {"random_cut_ms": 60, "time_stretch": (0.8, 1.25)},
    "noise": {"noise_std": 0.5, "offset_std": 0.3},
    "walk": {"random_walk_std": 0.1},
    "smoothing": {"smoothing_bins": 1.5},
    "bands": {"frequency_masks": 2, "frequency_mask_fraction": 0.3},
    "silence": {"time_masks": 2, "time_mask_fraction": 0.2, "channel_dropout": 0.3},
    "everything": EVERYTHING,
}


@on_gpu
@pytest.mark.parametrize("part", PARTS)
def test_a_row_comes_out_the_same_in_any_batch_on_a_gpu(part):
    options = {**OFF, **PARTS[part]}
    together = batch_of(range(9), options).to("cuda")
    for place in range(9):
        alone = batch_of([place], options).to("cuda")
        bins = alone.signal.shape[1]
        assert torch.equal(together.signal[place, :bins], alone.signal[0])
        assert torch.equal(together.target[place, :bins], alone.target[0])


@on_gpu
def test_noise_of_a_gpu_has_the_deviation_asked_for():
    options = {**EVERYTHING, **QUIET, "noise_std": 0.5, "smoothing_bins": 0.0, "time_masks": 0}
    options |= {"frequency_masks": 0, "array_dropout": 0.0, "channel_dropout": 0.0}
    moved = batch_of(range(24), options).to("cuda")
    noise = (moved.signal - moved.target)[moved.signal_mask].cpu().numpy()
    assert np.std(noise) == pytest.approx(0.5, rel=0.1) and abs(np.mean(noise)) < 0.1
