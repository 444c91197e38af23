"""What a step divides by, what its dropout is seeded with, and which clock anneals what."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from b2t.config import load_config
from b2t.quantize.pending import PendingStats
from b2t.quantize.schedules import anneal
from b2t.train.budget import PhaseBudget
from b2t.train.progress import Progress
from b2t.train.step import COUNTED, OptimizerStep


class Engine:
    """Runs nothing; remembers what each micro-batch was divided by, and torch's seed then."""

    dtype = torch.float32
    stats, applied = None, True

    def __init__(self):
        self.norms, self.seeds = [], []

    def __call__(self, batch, norms, weights, text_from_labels):
        self.norms.append(norms)
        self.seeds.append(torch.initial_seed())
        return SimpleNamespace(loss=torch.tensor(0.0), stats=self.stats)

    def backward(self, loss):
        pass

    def step(self):
        return self.applied

    def whole(self, *modules):
        return nullcontext()


class Travelling(PendingStats):
    """Counts how often it was waited for."""

    def __init__(self):
        self.waited = 0

    def wait(self):
        self.waited += 1


class Usage(int):
    def __add__(self, other):
        return Usage(int(self) + int(other))

    def all_reduce(self):
        return Usage(2 * self)


class Quantizer:
    """Remembers what it was told."""

    initialized = True

    def begin_update(self, stats):
        self.begun = Travelling()
        return self.begun

    def soft_usage(self, latents, mask, ids, frames):
        return Usage(len(latents))

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
        adapter=None,
        encoder=torch.nn.Identity(),
        latents=lambda signal, *rest, **known: (signal[:, None, None], None),
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


def test_progress_follows_the_minutes_that_are_further_than_the_steps():
    steps = ("phases.0.steps=10", "phases.1.steps=10", "phases.2.steps=20", "phases.1.minutes=1")
    quantizer = Quantizer()
    clocks = Progress(phase=1, phase_step=2, step=12, phase_seconds=30.0)
    a_step(clocks, *steps, quantizer=quantizer).set_clocks()
    assert quantizer.share == pytest.approx((10 + 10 / 2) / 40)


def test_a_phases_time_is_the_mean_of_the_ranks():
    step = a_step(Progress(), "phases.0.minutes=1")
    step.budget.elapsed = lambda: 10.0
    step.totals([], None, False)
    assert step.progress.phase_seconds == 10.0


def two_batches():
    empty = {"signal_mask": None, "session": None, "frames": None}
    ids = torch.arange(3)
    return [Batch(signal=torch.zeros(3), row_ids=ids, **empty) for _ in range(2)]


@pytest.mark.parametrize(("applied", "waited"), [(True, 0), (False, 1)])
def test_sums_that_travel_are_waited_for_where_no_update_will(applied, waited):
    step = a_step(Progress(phase=2), quantizer=Quantizer())
    step.engine.stats, step.engine.applied = 1, applied
    result = step.take(two_batches(), dict.fromkeys(COUNTED, 1.0))
    assert result.stats is step.model.quantizer.begun and result.stats.waited == waited


def test_statistics_of_a_frozen_quantizer_stay_at_home():
    step = a_step(Progress(phase=2), "phases.2.trainable=[encoder]", quantizer=Quantizer())
    step.engine.stats = 1
    assert step.take(two_batches(), dict.fromkeys(COUNTED, 1.0)).stats == 2


@pytest.mark.parametrize(
    ("diversity", "perplexity", "exact", "batches", "usage"),
    [
        (0.1, 0.0, True, 2, 12),
        (0.0, 0.1, True, 2, 12),
        (0.0, 0.0, True, 2, None),
        (0.1, 0.1, False, 2, None),
        (0.1, 0.1, True, 1, None),
    ],
)
def test_usage_of_the_whole_step_is_found_where_a_loss_needs_it(
    diversity, perplexity, exact, batches, usage
):
    step = a_step(
        Progress(phase=2), f"phases.2.losses.diversity={diversity}",
        f"phases.2.losses.perplexity={perplexity}", f"phases.2.exact_regularizers={exact}",
        quantizer=Quantizer(), accumulation=batches,
    )  # fmt: skip
    step.take(two_batches()[:batches], dict.fromkeys(COUNTED, 1.0))
    assert [norms.usage for norms in step.engine.norms] == [usage] * batches
