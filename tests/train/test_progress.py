import json
import math

import pytest

from b2t.config import EarlyStoppingConfig
from b2t.train.progress import Best, Progress


def test_best_keeps_the_lowest_and_counts_the_waiting():
    best = Best()
    answers = [best.update(v, step) for step, v in enumerate([3.0, 2.0, 2.0, 2.5, 1.0])]
    assert answers == [True, True, False, False, True]
    assert (best.value, best.step, best.waited) == (1.0, 4, 0)


def test_best_keeps_the_highest():
    best = Best(mode="max")
    assert [best.update(v, 0) for v in (1.0, 3.0, 2.0)] == [True, True, False]
    assert best.value == 3.0 and best.waited == 1


def test_a_change_within_min_delta_does_not_count():
    best = Best(min_delta=0.5)
    assert [best.update(v, 0) for v in (3.0, 2.6, 2.4)] == [True, False, True]
    assert best.value == 2.4


@pytest.mark.parametrize("mode", ["min", "max"])
def test_nan_is_never_best(mode):
    best = Best(mode=mode)
    assert not best.update(math.nan, 1) and best.value is None and best.waited == 1
    assert best.update(1.0, 2) and not best.update(math.nan, 3)
    assert best.value == 1.0


def test_a_new_phase_starts_its_clocks_and_keeps_those_of_the_run():
    progress = Progress(phase_step=9, step=9, consumed=11, skipped=2, seconds=4.0)
    progress.best.update(1.0, 9)
    rule = EarlyStoppingConfig(metric="val/wer", mode="max", min_delta=0.25)
    progress.enter_phase(1, "max", rule)
    assert (progress.phase, progress.phase_step, progress.consumed) == (1, 0, 0)
    assert (progress.step, progress.skipped, progress.seconds) == (9, 2, 4.0)
    assert progress.best == Best(mode="max")
    assert progress.stopping == Best(mode="max", min_delta=0.25)
    progress.enter_phase(2, "min", None)
    assert progress.stopping == Best()


def test_clocks_survive_json():
    progress = Progress(phase=1, step=7, consumed=8, skipped=1, seconds=2.5, finished=True)
    progress.best.update(0.5, 7)
    progress.stopping.update(math.inf, 7)
    assert Progress.from_dict(json.loads(json.dumps(progress.to_dict()))) == progress
