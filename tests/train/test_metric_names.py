"""What a run can log, and what may therefore be asked of it."""

import re
from types import SimpleNamespace

import pytest
import torch

from b2t.config import load_config
from b2t.config.alert_rules import AlertRule, Condition
from b2t.errors import UserError
from b2t.monitor.rules import BUILT_IN
from b2t.train import metric_names
from b2t.train.admission import prepare_run
from b2t.train.build import build
from b2t.train.callbacks import Callback
from b2t.train.monitoring import Watch, build_monitors
from b2t.train.signals import StopSignals
from b2t.train.trainer import Stopped, Trainer
from b2t.train.validation import decoding_due
from tests.train.small_runs import SMALL, zero2

RUN = """
    codebook_start.after_steps=1 phases.0.steps=14 phases.1.steps=4 phases.2.steps=8 log.every=1
    evaluation.every=2 evaluation.decode_every=4 evaluation.decode_trials=4
    evaluation.max_new_tokens=4 checkpoint.best_metric=val/wer stability.dry_batch=false
""".split()  # noqa: SIM905  # as one text it is easier to read


class Records(Callback):
    def __init__(self):
        self.seen = []

    def on_log(self, trainer, record):
        self.seen.append((trainer.progress.step, trainer.phase.name, dict(record)))

    on_eval = on_log


def configured(data, folder, *overrides):
    return load_config("demo", [f"data.path={data}", f"run.dir={folder}", *SMALL, *overrides])


@pytest.fixture
def start(tiny_trials, tmp_path, one_rank):
    def make(name, *overrides, stop=None):
        config = configured(tiny_trials, tmp_path / name, *RUN, *overrides)
        materials = build(config)
        watch = Watch(build_monitors(config, materials, one_rank))
        trainer = Trainer(
            config, zero2(tmp_path, 4, 2), materials, one_rank, [watch, Records()], stop
        )
        prepare_run(trainer, "auto")
        return trainer

    return make


@pytest.fixture
def whole(start):
    trainer = start("whole")
    trainer.fit()
    return trainer


def test_the_lists_are_what_a_run_logs(whole):
    for phase in whole.config.phases:
        of_phase = [found for _, name, found in whole.callbacks[1].seen if name == phase.name]
        logged = {name for found in of_phase for name in found}
        asked = (whole.config, whole.materials, phase)
        listed = metric_names.record_names(*asked) | metric_names.validation_names(*asked)
        extra = {"val/per"} if phase.name == "codebook" else set()  # see below
        assert logged - listed - extra == set()
        absent = listed - logged - metric_names._ON_SOME_MACHINES
        # The quantizer has no weights under the EMA rule; short phases have no trend and no move.
        late = "(optim/(lr|grad_norm)/quantizer|loss_trend/.*|ema/movement.*|.*_trend|ema/.*)"
        assert [name for name in sorted(absent) if not re.fullmatch(late, name)] == []


def test_decoding_between_the_ends_of_phases_chooses_the_best(whole):
    decoded = [
        (step, found["val/wer"]) for step, _, found in whole.callbacks[1].seen if "val/wer" in found
    ]
    assert [step for step, _ in decoded] == [16, 18, 20, 24, 26]
    joint = [pair for pair in decoded if pair[0] > 18]
    best = min(joint, key=lambda pair: (pair[1], pair[0]))
    progress = whole.progress.best
    assert (progress.metric, progress.best_step, progress.best) == ("val/wer", *best)


def test_a_phase_without_text_goes_by_its_loss(start):
    trainer = start("rules")
    assert trainer.best_by == [("val/loss", "min"), ("val/wer", "min"), ("val/wer", "min")]


def test_early_stopping_on_decoded_text_is_exact_over_a_resume(start):
    overrides = [
        "phases.0.steps=2", "phases.1.steps=2", "phases.2.steps=20", "checkpoint.every=1",
        "phases.2.early_stopping={metric: val/wer, patience: 1, min_delta: 100}",
    ]  # fmt: skip
    alone = start("alone", *overrides)
    alone.fit()
    stop = StopSignals()
    first = start("again", *overrides, stop=stop)

    class AtStep9(Callback):
        def on_step(self, trainer, context):
            stop.requested |= trainer.progress.step == 9

    first.callbacks.append(AtStep9())
    try:
        with pytest.raises(Stopped):
            first.fit()
    finally:
        stop.close()
    again = start("again", *overrides)
    assert again.progress.step == 10
    again.fit()
    mine, other = alone.progress.to_dict(), again.progress.to_dict()
    assert {**mine, "seconds": 0} == {**other, "seconds": 0}
    assert alone.progress.step == 12, "decodings at 4 (the phase before), 8 and 12; one to wait"
    assert all(torch.equal(alone.masters[name], again.masters[name]) for name in alone.masters)


@pytest.mark.parametrize(
    ("every", "decode_every", "expected"),
    [
        (500, 0, []),
        (500, 1, [500, 1000, 1500, 2000, 2500, 3000]),
        (500, 500, [500, 1000, 1500, 2000, 2500, 3000]),
        (500, 1000, [1000, 2000, 3000]),
        (500, 700, [1000, 1500, 2500, 3000]),
    ],
)
def test_each_decoding_goes_with_the_first_validation_after_it_is_due(
    every, decode_every, expected
):
    section = SimpleNamespace(every=500, decode_every=decode_every)
    found = [
        step
        for step in range(every, 3001, every)
        if decoding_due(section, SimpleNamespace(evaluate_every=every), step)
    ]
    assert found == expected


@pytest.fixture(scope="module")
def small(tiny_trials):
    """The model and data of the tests, and a function that checks a configuration against them."""
    materials = build(configured(tiny_trials, "none"))

    def check(*overrides):
        return metric_names.best_rules(configured(tiny_trials, "none", *overrides), materials)

    return SimpleNamespace(check=check, materials=materials, data=tiny_trials)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["checkpoint.best_metric=val/lost"],
            ["checkpoint.best_metric: no validation of this run says val/lost", "mean val/loss",
             "there are ", "val/codebook/utilization/1", "val/snr_db"],
        ),
        (["checkpoint.best_metric=val/wer"], ["val/wer; it needs evaluation.decode_every above 0"]),
        (
            ["evaluation.decode_every=5", "checkpoint.best_metric=val/wer"],
            ["val/wer; it needs decode_trials above 0"],
        ),
        (
            ["evaluation.decode_every=5", "evaluation.decode_trials=4",
             "phases.0.early_stopping.metric=val/wer"],
            ["phases.0.early_stopping.metric: no validation of phase tokenizer says val/wer; it "
             "needs a phase that trains the text decoder"],
        ),
        (
            ["phases.1.early_stopping.metric=val/per"],
            ["phases.1.early_stopping.metric", "it needs evaluation.decode_every above 0"],
        ),
        (["checkpoint.best_metric=loss/total"], ["no validation of this run says loss/total"]),
    ],
)  # fmt: skip
def test_what_no_validation_says_is_refused(small, overrides, says):
    with pytest.raises(UserError) as caught:
        small.check(*overrides)
    for text in says:
        assert text in str(caught.value)


def test_what_a_validation_says_is_taken(small):
    small.check("checkpoint.best_metric=val/codebook/utilization/1")
    small.check(
        "evaluation.decode_every=5", "evaluation.decode_trials=4",
        "checkpoint.best_metric=val/per", "phases.2.early_stopping.metric=val/wer",
    )  # fmt: skip


def fitting(small, rules, *overrides, own=()):
    config = configured(small.data, "none", *overrides)
    return metric_names.fitting_rules(rules, config, small.materials, own)


def rule(metric, **more):
    return AlertRule(name="mine", metric=metric, threshold=1.0, message="m", **more)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (rule("loss/totl"), "rule mine watches loss/totl, which this run never logs; did you mean"),
        (rule("val/loss"), "rules see the records of log steps, not validations"),
        (rule("los/*"), "watches los/*"),
        (
            rule("loss/total", also=(Condition(metric="ema/worm", threshold=1.0),)),
            "watches ema/worm, which this run never logs; did you mean ema/warm",
        ),
    ],
)
def test_a_rule_on_what_is_never_logged_is_refused(small, wrong, says):
    with pytest.raises(UserError, match=re.escape(says)):
        fitting(small, [wrong], own=["mine"])
    silent = wrong.model_copy(update={"expected": False})
    assert fitting(small, [silent], own=["mine"]) == [silent]


def test_rules_on_what_comes_are_kept(small):
    assert fitting(small, [rule("loss/*"), rule("optim/lr/encoder")], own=["mine"])
    kept = {r.name for r in fitting(small, BUILT_IN)}
    assert kept == {r.name for r in BUILT_IN} - {"texts-left-out"}, "no CTC lays texts on frames"
    text = fitting(small, [rule("text/token_accuracy")], own=["mine"])[0]
    assert not text.expected, "it comes in the second phase, and is not missing before"


def test_built_in_rules_on_what_is_not_trained_are_left_out(small):
    off = [f"phases.{n}.losses.reconstruction=0" for n in range(3)]
    left = {r.name for r in BUILT_IN} - {r.name for r in fitting(small, BUILT_IN, *off)}
    watched = ("reconstruction/", "loss/vq", "text/left_out")
    assert left == {r.name for r in BUILT_IN if r.metric.startswith(watched)} and left
    frozen = [f"phases.{n}.trainable=[encoder, signal_decoder]" for n in range(3)]
    kept = fitting(small, BUILT_IN, *frozen)
    assert not [r.name for r in kept if r.metric.startswith(("codebook/", "ema/"))]
