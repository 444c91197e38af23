import json
import math

from b2t.config import EarlyStoppingConfig
from b2t.train.best import Best
from b2t.train.early_stopping import EarlyStopping
from b2t.train.progress import Progress


def test_a_new_phase_starts_its_clocks_and_keeps_those_of_the_run():
    progress = Progress(phase_step=9, step=9, consumed=11, skipped=2, seconds=4.0)
    progress.phase_seconds = 3.0
    progress.best.update(1.0, 9)
    rule = EarlyStoppingConfig(metric="val/wer", mode="max", min_delta=0.25)
    progress.enter_phase(1, "val/per", "max", rule)
    assert (progress.phase, progress.phase_step, progress.consumed) == (1, 0, 0)
    assert (progress.step, progress.skipped, progress.seconds) == (9, 2, 4.0)
    assert progress.phase_seconds == 0.0
    assert progress.best == Best("val/per", "max")
    assert progress.stopping == EarlyStopping("val/wer", "max", patience=5, min_delta=0.25)
    progress.enter_phase(2, "val/loss", "min", None)
    assert progress.stopping is None


def test_clocks_survive_json():
    progress = Progress(phase=1, step=7, consumed=8, skipped=1, seconds=2.5, finished=True)
    progress.best.update(0.5, 7)
    assert Progress.from_dict(json.loads(json.dumps(progress.to_dict()))) == progress
    progress.stopping = EarlyStopping("val/wer", "max")
    progress.stopping.update(math.inf, 7)
    assert Progress.from_dict(json.loads(json.dumps(progress.to_dict()))) == progress


def test_a_best_with_the_fields_of_older_checkpoints_is_understood():
    values = Progress(best=Best("val/per", "max", 0.5, 7)).to_dict()
    values["best"] |= {"patience": 5, "min_delta": 0.0, "waited": 3}
    assert Progress.from_dict(values).best == Best("val/per", "max", 0.5, 7)


def test_the_best_starts_anew_where_it_is_chosen_by_something_else():
    progress = Progress(best=Best("val/per", "min", 0.5, 7))
    assert progress.choose_best_by("val/per", "min") is None and progress.best.best == 0.5
    for metric, mode in (("val/per", "max"), ("val/wer", "max")):
        former = progress.best
        assert progress.choose_best_by(metric, mode) is former
        assert progress.best == Best(metric, mode)
