"""Settings that reach the parts of a run by `build`, each against what it says it does."""

import pytest

from b2t.config import load_config
from b2t.errors import UserError
from b2t.train.build import build
from b2t.train.monitoring import alert_rules
from tests.train.small_runs import SMALL


def built(data, *overrides):
    return build(load_config("demo", [f"data.path={data}", *SMALL, *overrides]))


def test_splits_are_those_that_are_named(tiny_trials):
    usual = built(tiny_trials)
    swapped = built(tiny_trials, "data.train_split=val", "data.validation_split=train")
    assert (len(usual.train), len(usual.validation)) == (36, 6)
    assert (len(swapped.train), len(swapped.validation)) == (6, 36)
    assert swapped.model.config.data["train_split"] == "val"
    for key in ("train_split", "validation_split"):
        with pytest.raises(UserError, match=r"'?tset'?.*train"):
            built(tiny_trials, f"data.{key}=tset")


@pytest.mark.parametrize("part", ["encoder", "signal_decoder"])
def test_feed_forward_layers_are_as_wide_as_asked_for(tiny_trials, part):
    def widths(ratio):
        model = built(tiny_trials, f"model.{part}.mlp_ratio={ratio}").model
        return {size for p in getattr(model, part).parameters() for size in p.shape}

    assert widths(5.5) - widths(2.5) == {88} and widths(2.5) - widths(5.5) == {40}


def test_disabled_rules_are_silent_and_must_exist():
    config = load_config("demo", ["monitor.disabled_rules=[vq-ratio]"]).monitor
    names = {rule.name for rule in alert_rules(config)}
    everything = {rule.name for rule in alert_rules(load_config("demo").monitor)}
    assert everything - names == {"vq-ratio"}
    wrong = load_config("demo", ["monitor.disabled_rules=[vq-ration]"]).monitor
    with pytest.raises(UserError, match=r"disabled_rules: no rule named 'vq-ration'.*vq-ratio"):
        alert_rules(wrong)
