import math

import numpy as np
import pytest
import torch

from b2t.monitor.context import StepContext
from b2t.monitor.reconstruction import ReconstructionMonitor, spectral_distance_db
from tests.monitor.checkpointed import checkpointed


def batch(number, phase="p", rows=3, bins=40, channels=4):
    generator = torch.Generator().manual_seed(number)
    target = torch.randn(rows, bins, channels, generator=generator)
    output = 0.8 * target + 0.3 * torch.randn(rows, bins, channels, generator=generator)
    mask = torch.ones(rows, bins, dtype=torch.bool)
    mask[0, 25:] = False
    mask[1:2, :7] = False
    output[~mask], target[~mask] = math.nan, 1e30
    return StepContext(
        phase=phase,
        reconstruction=output,
        target=target,
        signal_mask=mask,
    )


def run(monitor, contexts):
    for context in contexts:
        monitor.update(context)
    return monitor


def test_windowed_values_equal_numpy_over_recorded_bins():
    contexts = [batch(n) for n in range(9)]
    found = run(ReconstructionMonitor(50.0, window=4, every=1), contexts).metrics()
    outputs, targets, step_o, step_t = [], [], [], []
    for context in contexts[-4:]:
        for row in range(3):
            keep = context.signal_mask[row]
            o = context.reconstruction[row, keep].double().numpy()
            t = context.target[row, keep].double().numpy()
            outputs.append(o.ravel()), targets.append(t.ravel())
            step_o.append(np.diff(o, axis=0).ravel()), step_t.append(np.diff(t, axis=0).ravel())
    o, t = np.concatenate(outputs), np.concatenate(targets)
    do, dt = np.concatenate(step_o), np.concatenate(step_t)
    expected = {
        "mse": ((o - t) ** 2).mean(),
        "snr_window_db": 10 * np.log10((t**2).sum() / ((o - t) ** 2).sum()),
        "cosine": (o @ t) / np.linalg.norm(o) / np.linalg.norm(t),
        "temporal_consistency": (do @ dt) / np.linalg.norm(do) / np.linalg.norm(dt),
        "snr_drop_db": 0.0,
    }
    for name, value in expected.items():
        assert found[f"reconstruction/{name}"] == pytest.approx(value, rel=1e-5), name


def test_only_every_nth_step_is_measured():
    contexts = [batch(n) for n in range(23)]
    sparse = run(ReconstructionMonitor(50.0, window=15, every=5), contexts)
    dense = run(ReconstructionMonitor(50.0, window=3, every=1), contexts[10::5])
    assert sparse.metrics() == dense.metrics()


def test_a_gap_in_the_recording_is_no_step():
    context = batch(1, rows=1, bins=10, channels=1)
    context.signal_mask = torch.tensor([[1, 1, 0, 1, 1, 0, 0, 0, 0, 1]]).bool()
    context.target = torch.tensor([0.0, 1, 9, 5, 6, 9, 9, 9, 9, 20]).reshape(1, 10, 1)
    context.reconstruction = torch.tensor([0.0, 2, 7, 5, 4, 7, 7, 7, 7, -3]).reshape(1, 10, 1)
    found = run(ReconstructionMonitor(50.0), [context]).metrics()
    expected = (1 * 2 + 1 * -1) / (math.sqrt(2) * math.sqrt(5))
    assert found["reconstruction/temporal_consistency"] == pytest.approx(expected)


def test_spectral_distance_equals_numpy_by_band():
    context = batch(5)
    bands = [(0.0, 4.0), (4.0, 8.0), (13.0, 30.0)]
    found = spectral_distance_db(
        context.reconstruction, context.target, context.signal_mask, 50.0, bands
    )
    for (low, high), value in zip(bands, found.tolist(), strict=True):
        power = np.zeros((2, 4))
        for row in range(3):
            keep = context.signal_mask[row]
            for which, signal in enumerate((context.reconstruction, context.target)):
                x = signal[row, keep].double().numpy()
                frequency = np.fft.rfftfreq(len(x), 1 / 50.0)
                inside = (frequency >= low) & (frequency < high) & (frequency > 0)
                power[which] += (np.abs(np.fft.rfft(x - x.mean(0), axis=0)) ** 2)[inside].sum(0)
        expected = np.abs(10 * np.log10(power[0] / power[1])).mean()
        assert value == pytest.approx(expected, rel=1e-5)


def test_halving_a_signal_is_six_decibels_in_every_band():
    context = batch(6)
    context.reconstruction = context.target * 0.5
    found = run(ReconstructionMonitor(50.0), [context]).metrics()
    bands = {k: v for k, v in found.items() if "spectral" in k}
    assert len(bands) == 4 and "reconstruction/spectral_distance_db/30-100Hz" not in bands
    assert list(bands.values()) == pytest.approx([20 * math.log10(2)] * 4)
    assert found["reconstruction/temporal_consistency"] == pytest.approx(1.0)


def test_a_blurred_signal_loses_temporal_consistency():
    context = batch(7)
    context.reconstruction = torch.zeros_like(context.target) + 0.1
    found = run(ReconstructionMonitor(50.0), [context]).metrics()
    assert "reconstruction/temporal_consistency" not in found


def test_the_drop_is_from_the_best_log_step_of_the_phase():
    monitor = ReconstructionMonitor(50.0, window=1, every=1)
    values = []
    for number, scale in enumerate((0.5, 0.1, 0.9), 1):
        context = batch(number)
        context.reconstruction = context.target * (1 - scale)
        values.append(run(monitor, [context]).metrics()["reconstruction/snr_drop_db"])
    assert values == pytest.approx([0, 0, 20 * math.log10(9)], abs=1e-4)
    context.phase = "next"
    assert run(monitor, [context]).metrics()["reconstruction/snr_drop_db"] == 0.0


def test_all_masked_and_absent_reconstructions_give_no_number():
    monitor = ReconstructionMonitor(50.0)
    monitor.update(StepContext(phase="p"))
    assert monitor.metrics() == {}
    context = batch(1)
    context.signal_mask = torch.zeros_like(context.signal_mask)
    assert run(monitor, [context]).metrics() == {}


@pytest.mark.parametrize("stop", range(1, 9))
def test_resume_goes_on_exactly(stop):
    contexts = [batch(n, "p" if n < 5 else "q") for n in range(9)]
    straight = run(ReconstructionMonitor(50.0, window=3, every=1), contexts)
    first = run(ReconstructionMonitor(50.0, window=3, every=1), contexts[:stop])
    first.metrics(), straight.metrics()
    second = ReconstructionMonitor(50.0, window=3, every=1)
    second.load_state_dict(checkpointed(first.state_dict()))
    resumed = run(second, contexts[stop:]).metrics()
    for name, value in straight.metrics().items():
        if name != "reconstruction/snr_drop_db":
            assert resumed[name] == value, name


@pytest.mark.parametrize("stop", [1, 3, 7])
def test_resume_keeps_the_rhythm_of_measurements(stop):
    contexts = [batch(n) for n in range(12)]
    straight = run(ReconstructionMonitor(50.0, window=9, every=3), contexts)
    first = run(ReconstructionMonitor(50.0, window=9, every=3), contexts[:stop])
    second = ReconstructionMonitor(50.0, window=9, every=3)
    second.load_state_dict(checkpointed(first.state_dict()))
    assert run(second, contexts[stop:]).metrics() == straight.metrics()


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_log_step_between_measurements_says_the_same_after_a_resume(stop):
    contexts = [batch(n) for n in range(stop + 1)]
    straight = run(ReconstructionMonitor(50.0, window=9, every=5), contexts)
    first = run(ReconstructionMonitor(50.0, window=9, every=5), contexts[:stop])
    second = ReconstructionMonitor(50.0, window=9, every=5)
    second.load_state_dict(checkpointed(first.state_dict()))
    resumed = run(second, contexts[stop:]).metrics()
    assert resumed == straight.metrics()
    assert any("spectral" in name for name in resumed)


@pytest.mark.parametrize("before", range(1, 6))
def test_the_first_step_of_a_phase_is_measured_wherever_the_last_one_ended(before):
    contexts = [batch(n, "a") for n in range(before)]
    monitor = run(ReconstructionMonitor(50.0, window=6, every=3), [*contexts, batch(9, "b")])
    alone = run(ReconstructionMonitor(50.0, window=6, every=3), [batch(9, "b")])
    assert monitor.metrics() == alone.metrics()
