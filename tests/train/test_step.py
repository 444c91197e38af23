"""What a step divides by, what its dropout is seeded with, and which clock anneals what."""

from types import SimpleNamespace

import pytest
import torch

from b2t.config import load_config
from b2t.quantize.schedules import anneal
from b2t.train.budget import PhaseBudget
from b2t.train.progress import Progress
from b2t.train.step import COUNTED, OptimizerStep


class Engine:
    """Runs nothing; remembers what each micro-batch was divided by, and torch's seed then."""

    dtype = torch.float32

    def __init__(self):
        self.norms, self.seeds = [], []

    def __call__(self, batch, norms, weights, text_from_labels):
        self.norms.append(norms)
        self.seeds.append(torch.initial_seed())
        return SimpleNamespace(loss=torch.tensor(0.0), stats=None)

    def backward(self, loss):
        pass

    def step(self):
        return True


class Quantizer:
    """Remembers what it was told."""

    def set_progress(self, share):
        self.share = share

    def set_temperature(self, value):
        self.temperature = value


class Twins:
    """Two ranks that do the same."""

    world = 2
    device = torch.device("cpu")

    def __init__(self, rank=0):
        self.rank = rank

    def sum(self, values):
        return [2 * value for value in values]

    def meet(self, place):
        pass


def a_step(progress, *overrides, rank=0, accumulation=2, quantizer=None):
    config = load_config("demo", overrides)
    model = SimpleNamespace(
        quantizer=quantizer,
        counts=lambda batch: {name: batch.signal.numel() + n for n, name in enumerate(COUNTED)},
    )
    phase = config.phases[progress.phase]
    window = SimpleNamespace(add=lambda output, accumulation: None)
    return OptimizerStep(
        model, Engine(), config, progress, SimpleNamespace(accumulation=accumulation),
        Twins(rank), window, PhaseBudget(phase, progress),
    )  # fmt: skip


class Batch(SimpleNamespace):
    def to(self, device, dtype):
        return self


def test_losses_are_divided_by_the_mean_count_of_all_micro_batches_on_all_ranks():
    step = a_step(Progress(phase=2))
    batches = [Batch(signal=torch.zeros(size)) for size in (10, 30)]
    totals = step.totals(batches, None, False)
    step.take(batches, totals)
    for norms in step.engine.norms:
        assert dict(norms.counts) == {name: 20.0 + n for n, name in enumerate(COUNTED)}
        assert norms.micro_batches == 2
    assert totals["padded"] == 80.0


def seed(rank=0, micro_batch=0, run_seed=0, **clocks):
    step = a_step(Progress(**clocks), f"run.seed={run_seed}", rank=rank)
    batches = [Batch(signal=torch.zeros(1))] * (micro_batch + 1)
    step.take(batches, step.totals(batches, None, False))
    return step.engine.seeds[-1]


def test_dropout_is_a_function_of_seed_phase_batch_micro_batch_and_rank_alone():
    found = [
        seed(), seed(run_seed=1), seed(phase=1), seed(consumed=1), seed(micro_batch=1),
        seed(rank=1),
    ]  # fmt: skip
    assert len(set(found)) == len(found)
    assert seed(step=7, phase_step=5, skipped=2, seconds=3.0) == found[0]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_temperature_goes_by_applied_steps_and_progress_by_planned_ones(schedule):
    steps = ("phases.0.steps=10", "phases.1.steps=10", "phases.2.steps=20")
    course = f"phases.1.temperature={{start: 2.0, end: 0.5, schedule: {schedule}}}"
    quantizer = Quantizer()
    # The first phase stopped after 4 of its 10 steps; 6 steps of this one, after 3 skipped ones.
    clocks = Progress(phase=1, phase_step=6, step=10, consumed=9, skipped=3)
    a_step(clocks, *steps, course, quantizer=quantizer).set_clocks()
    assert quantizer.temperature == anneal(2.0, 0.5, 0.6, schedule)
    assert quantizer.share == pytest.approx((10 + 6) / 40)
    assert quantizer.revival_enabled
    a_step(clocks, "phases.1.revival=false", quantizer=quantizer).set_clocks()
    assert not quantizer.revival_enabled
