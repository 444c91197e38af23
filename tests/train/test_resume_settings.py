"""Settings that a resumed run may change, and those that it may not."""

import pytest

from b2t.config import load_config
from b2t.errors import UserError
from b2t.train import trainer as trainer_module
from b2t.train.admission import prepare_run, refuse_other_run
from b2t.train.best import Best
from b2t.train.build import build
from b2t.train.trainer import Trainer
from tests.train.small_runs import SMALL, zero2


@pytest.fixture
def start(tiny_trials, tmp_path, one_rank):
    """A trainer of the same run folder, as the same command makes it."""

    def make(*overrides, **deepspeed):
        places = [f"data.path={tiny_trials}", f"run.dir={tmp_path / 'run'}"]
        config = load_config("demo", [*places, *SMALL, *overrides])
        ds_file = zero2(tmp_path, 4, 2, **deepspeed)
        return Trainer(config, ds_file, build(config), one_rank)

    return make


@pytest.fixture
def saved(start):
    """A run folder with one checkpoint, whose best so far is 0.5 at step 3."""
    trainer = start()
    prepare_run(trainer, "auto")
    trainer._enter_phase(0)
    trainer.progress.step = trainer.progress.phase_step = 4
    trainer.progress.best.update(0.5, 3)
    trainer._saving.save_between_phases(trainer)
    trainer.wait_for_checkpoint()


@pytest.fixture
def said(monkeypatch):
    """Lines that the trainer logs, whatever the level of the log."""
    lines = []
    for name in ("info", "warning"):
        monkeypatch.setattr(trainer_module.log, name, lambda text, *args: lines.append(text % args))
    return lines


@pytest.mark.parametrize(
    ("metric", "mode", "better"), [("val/snr_db", "max", -3.0), ("val/loss", "max", 0.4)]
)
def test_another_metric_or_direction_chooses_the_best_anew(
    start, saved, said, metric, mode, better
):
    resumed = start(f"checkpoint.best_metric={metric}", f"checkpoint.best_mode={mode}")
    prepare_run(resumed, "auto")
    assert resumed.progress.step == 4
    assert resumed.progress.best == Best(metric, mode)
    anew = [line for line in said if "chosen anew" in line]
    assert len(anew) == 1 and f"by {metric} ({mode})" in anew[0], said
    assert "val/loss (min), 0.5 at step 3" in anew[0]
    assert resumed.progress.best.update(better, 5), "nothing of the old metric is compared with"


def test_the_same_metric_goes_on(start, saved, said):
    resumed = start()
    prepare_run(resumed, "auto")
    assert resumed.progress.best == Best("val/loss", "min", best=0.5, best_step=3)
    assert not any("anew" in line for line in said)


def test_another_clipping_is_named_among_what_changed(start, saved):
    with pytest.raises(UserError, match=r"differs:\n  gradient_clipping: 1 then, 5 now \(.*json\)"):
        prepare_run(start(gradient_clipping=5.0), "auto")


def test_a_run_of_before_a_key_came_goes_on(start, saved):
    """A checkpoint lacks the keys that came after it, and may say true where a kind stands now."""
    trainer = start()
    state = trainer.store.load().state
    quantizer = state["config"]["model"]["quantizer"]
    for later in ("kmeans_iters", "revival_until", "codebook_gradient_scale"):
        del quantizer[later]
    quantizer["revival"] = True
    admitted = (trainer.config, trainer.ds_file, 1, trainer.materials.fingerprint)
    refuse_other_run(state, *admitted)
    quantizer["revival"] = False
    with pytest.raises(UserError, match=r"model\.quantizer\.revival: null then, split now"):
        refuse_other_run(state, *admitted)
