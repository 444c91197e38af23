from types import SimpleNamespace

import pytest
import torch

from b2t.monitor.codebook import CodebookMonitor
from b2t.monitor.context import StepContext
from b2t.monitor.monitors import Monitors
from b2t.monitor.reconstruction import ReconstructionMonitor
from b2t.monitor.rvq import RVQMonitor
from b2t.monitor.training import TrainingMonitor
from b2t.quantize import ResidualVQ
from tests.monitor.checkpointed import checkpointed


def quantizer():
    rvq = ResidualVQ(8, codebook_size=16, num_quantizers=2, seed=1).train()
    generator = torch.Generator().manual_seed(0)
    frames = [(torch.randn(4, 100, 8, generator=generator), None) for _ in range(4)]
    rvq.initialize(frames, progress=False)
    return rvq


def steps(rvq, numbers):
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(4, 60, 8, generator=generator)
        mask = torch.rand(4, 60, generator=generator) > 0.2
        out = rvq(x, mask)
        report = rvq.update(out.stats)
        target = torch.randn(4, 60, 3, generator=generator)
        yield StepContext(
            phase="p",
            losses={"total": x.mean().abs(), "reconstruction": x.var(), "commitment": x.var()},
            weights={"reconstruction": 1.0, "commitment": 0.2},
            counts=report.counts,
            update_report=report,
            reconstruction=target * 0.9,
            target=target,
            signal_mask=mask,
        )


def monitors(rvq):
    return Monitors(
        {
            "rvq": RVQMonitor(rvq, window=5),
            "reconstruction": ReconstructionMonitor(50.0, window=5),
            "training": TrainingMonitor(window=5),
        }
    )


def test_a_real_quantizers_counts_reach_the_monitor():
    rvq = quantizer()
    monitor, total = CodebookMonitor(window=100), 0
    for context in steps(rvq, range(10)):
        monitor.update(context)
        total += int(context.signal_mask.sum())
    assert monitor.usage().sum(1).tolist() == [total, total]


@pytest.mark.parametrize(("used", "grade"), [(16, 0.0), (9, 1.0), (3, 2.0)])
def test_health_is_the_worst_grade_of_the_codebooks(used, grade):
    rvq = quantizer()
    monitor = RVQMonitor(rvq)
    counts = torch.full((2, 16), 100)
    counts[1, used:] = 0
    report = SimpleNamespace(applied=True, revived=[0, 0])
    monitor.update(StepContext(phase="p", counts=counts, update_report=report))
    found = monitor.metrics()
    assert found["codebook/utilization_worst"] == used / 16
    assert found["codebook/health"] == grade


def test_everything_together_is_json_and_resumes_exactly(monkeypatch):
    straight, rvq = None, quantizer()
    straight = monitors(rvq)
    for context in steps(rvq, range(20)):
        straight.update(context)
    again = quantizer()
    first = monitors(again)
    for context in steps(again, range(13)):
        first.update(context)
    state = checkpointed(first.state_dict())
    second = monitors(again)
    second.load_state_dict(state)
    for context in steps(again, range(13, 20)):
        second.update(context)
    expected = straight.metrics()
    assert {"codebook/health", "ema/movement", "reconstruction/mse", "loss/vq_ratio"} <= set(
        expected
    )
    assert second.metrics() == expected
    assert straight.check(20, expected) == second.check(20, expected)


def test_updates_never_read_the_device(monkeypatch):
    """Between log steps nothing may wait: on a GPU each of these calls would."""
    rvq = quantizer()
    contexts = list(steps(rvq, range(12)))
    all_monitors = monitors(rvq)
    read = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy", "nonzero"):
        original = getattr(torch.Tensor, name)

        def probe(self, *args, original=original, name=name, **kwargs):
            read.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, probe)
    for context in contexts:
        all_monitors.update(context)
    assert read == []
    all_monitors.metrics()
    assert read, "the probe must see what metrics() reads"
