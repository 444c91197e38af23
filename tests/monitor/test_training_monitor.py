import numpy as np
import pytest
import torch

from b2t.monitor import training
from b2t.monitor.context import StepContext
from b2t.monitor.training import TrainingMonitor, peak_flops
from tests.monitor.checkpointed import checkpointed

WEIGHTS = {"reconstruction": 0.5, "commitment": 0.2, "diversity": 0.0}


def context(number, phase="p", **fields):
    values = np.random.default_rng(number).uniform(0.5, 2, 3)
    losses = dict(zip(WEIGHTS, map(torch.tensor, values), strict=True))
    losses["total"] = sum(WEIGHTS[name] * losses[name] for name in WEIGHTS)
    return StepContext(phase=phase, losses=losses, weights=WEIGHTS, **fields)


def run(monitor, contexts):
    for one in contexts:
        monitor.update(one)
    return monitor


@pytest.mark.parametrize("steps", [3, 10, 27])
def test_shares_ratio_smooth_and_trend_equal_numpy(steps):
    contexts = [context(n) for n in range(steps)]
    found = run(TrainingMonitor(window=10, smoothing=0.8), contexts).metrics()
    course = {n: np.array([float(c.losses[n]) for c in contexts]) for n in contexts[0].losses}
    mean = {name: values[-10:].mean() for name, values in course.items()}
    total = sum(WEIGHTS[n] * mean[n] for n in WEIGHTS)
    for name in WEIGHTS:
        assert found[f"loss_share/{name}"] == pytest.approx(WEIGHTS[name] * mean[name] / total)
    assert found["loss/vq_ratio"] == pytest.approx(mean["commitment"] / mean["reconstruction"])
    powers = 0.8 ** np.arange(steps)[::-1]
    for name, values in course.items():
        assert found[f"loss_smooth/{name}"] == pytest.approx((powers @ values) / powers.sum())
        last = values[-10:]
        slope = np.polyfit(np.arange(len(last)), last, 1)[0] * 1000 / mean[name]
        assert found[f"loss_trend/{name}"] == pytest.approx(slope)


def test_the_codebook_loss_belongs_to_the_quantizer():
    one = context(1)
    one.losses["codebook"] = torch.tensor(3.0)
    found = run(TrainingMonitor(), [one]).metrics()
    expected = (float(one.losses["commitment"]) + 3) / float(one.losses["reconstruction"])
    assert found["loss/vq_ratio"] == pytest.approx(expected)


def test_the_codebook_loss_has_its_share():
    """The gradient rule adds it to the total with weight 1; no configuration names it."""
    losses = {"reconstruction": 2.0, "commitment": 5.0, "codebook": 3.0}
    losses = {name: torch.tensor(value) for name, value in losses.items()}
    losses["total"] = 0.5 * losses["reconstruction"] + 0.2 * losses["commitment"] + 3.0
    one = StepContext(phase="p", losses=losses, weights=WEIGHTS)
    found = run(TrainingMonitor(), [one]).metrics()
    shares = {n.split("/")[1]: v for n, v in found.items() if n.startswith("loss_share/")}
    assert shares == pytest.approx({"reconstruction": 0.2, "commitment": 0.2, "codebook": 0.6})
    found = run(TrainingMonitor(), [StepContext("p", losses, {"codebook": 0.0})]).metrics()
    assert found["loss_share/codebook"] == 0.0, "unless its weight is named"


def test_gradient_norms_are_those_of_the_last_step():
    norms = {"encoder": torch.tensor(2.0), "global": 3.5}
    found = run(TrainingMonitor(), [context(1), context(2, grad_norms=norms)]).metrics()
    assert found["optim/grad_norm/encoder"] == 2.0 and found["optim/grad_norm"] == 3.5


def test_a_new_phase_starts_a_new_window():
    contexts = [context(n) for n in range(5)] + [context(9, "q")]
    alone = run(TrainingMonitor(), [context(9, "q")]).metrics()
    assert run(TrainingMonitor(), contexts).metrics() == alone


def test_pace_is_over_the_window():
    seconds = [0.5, 0.1, 0.1, 0.3]
    contexts = [context(n, step_time_s=s) for n, s in enumerate(seconds)]
    found = run(TrainingMonitor(window=3), contexts).metrics()
    assert found["throughput/steps_per_s"] == pytest.approx(3 / 0.5)


def test_mfu_only_on_a_known_device(monkeypatch):
    contexts = [context(n, step_time_s=0.5, frames=1000.0) for n in range(4)]
    flops = 1e8
    options = {
        "flops_per_frame": {"p": flops, "q": 7.0},
        "recomputed": {"p": 1 / 3, "q": 0.0},
        "world": 2,
    }
    unknown = run(TrainingMonitor(**options), contexts).metrics()
    assert not [name for name in unknown if "fu" in name.split("/")[-1]]
    monkeypatch.setattr(training, "peak_flops", lambda device: 1e12)
    known = run(TrainingMonitor(**options), contexts).metrics()
    assert known["throughput/mfu"] == pytest.approx(flops * 2000 / 2e12)
    assert known["throughput/hfu"] == pytest.approx(known["throughput/mfu"] * 4 / 3)


def test_peaks_are_matched_to_the_most_specific_name(monkeypatch):
    for name, peak in (
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA RTX A5500", 136.4e12),
        ("NVIDIA RTX A5500 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("Tesla T4", 65e12),
        ("NVIDIA T400 4GB", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA A10G", None),
        ("GeForce GTX 1080", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda")) == peak
    assert peak_flops(torch.device("cpu")) is None


# Multiprocessors, boost clock in GHz, and dense 16-bit multiply-adds (accumulated in float32) per
# multiprocessor and clock: 512 in Volta, Turing and the workstation cards of Ampere and Ada, half
# of that in GeForce cards, 1,024 in A100 and 2,048 in Hopper.
CHIPS = {
    "H200": (132, 1.83, 2048),
    "H100 80GB HBM3": (132, 1.83, 2048),
    "H100 PCIe": (114, 1.62, 2048),
    "A100-SXM4-40GB": (108, 1.41, 1024),
    "L40S": (142, 2.52, 512),
    "RTX 4090": (128, 2.52, 256),
    "RTX 3090": (82, 1.695, 256),
    "RTX A6000": (84, 1.80, 512),
    "RTX A5500": (80, 1.665, 512),
    "RTX A5000": (64, 1.695, 512),
    "V100-SXM2-16GB": (80, 1.53, 512),
    "T4": (40, 1.59, 512),
}


def test_peaks_are_what_the_chips_can_do(monkeypatch):
    assert len(CHIPS) == len(training.PEAK_FLOPS)
    for name, (processors, ghz, per_clock) in CHIPS.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        expected = processors * ghz * 1e9 * per_clock * 2
        assert peak_flops(torch.device("cuda")) == pytest.approx(expected, rel=0.015), name


@pytest.mark.parametrize("stop", [1, 4, 9, 12])
def test_resume_goes_on_exactly(stop):
    contexts = [context(n) for n in range(14)]
    straight = run(TrainingMonitor(window=5), contexts)
    first = run(TrainingMonitor(window=5), contexts[:stop])
    second = TrainingMonitor(window=5)
    second.load_state_dict(checkpointed(first.state_dict()))
    assert second.metrics() == first.metrics()
    assert run(second, contexts[stop:]).metrics() == straight.metrics()


def test_no_step_no_metrics_and_nan_is_shown():
    assert TrainingMonitor().metrics() == {}
    one = context(1)
    one.losses["reconstruction"] = torch.tensor(float("nan"))
    found = run(TrainingMonitor(), [one, one, one]).metrics()
    assert found["loss_smooth/reconstruction"] != found["loss_smooth/reconstruction"]
