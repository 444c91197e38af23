"""States of hooks in checkpoints: how they are kept, and those that older versions wrote."""

import json
from pathlib import Path

import pytest
import torch

from b2t.config import load_config
from b2t.train.callback import Callback
from b2t.train.checkpoint import Checkpoint, CheckpointStore
from b2t.train.hook_states import given_back, require_names, taken_from
from b2t.train.monitoring import Watch
from b2t.train.wandb_run import Wandb
from tests.monitor.test_monitors import monitors, quantizer, steps

OLD = Path(__file__).with_name("old_hook_states.json")
"""`callbacks` of a state.json after 13 steps, with tensors packed into it, and the metrics then."""


class Keeper(Callback):
    key = "keeper"

    def __init__(self, state=None):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def test_states_come_back_bit_for_bit_with_their_tensors_in_safetensors(tmp_path):
    state = {
        "seen": 3,
        "mean": torch.tensor([0.1, torch.nan, -0.0]),
        "inner": {"a/b": torch.arange(4).view(2, 2).T, "a": {"b": torch.tensor(1e300).double()}},
        "list": [None, "text", torch.zeros(0, 2, dtype=torch.int32)],
        "none": None,
    }
    values, tensors = taken_from([Keeper(state)])
    state["mean"].add_(1)  # what goes on in training changes no checkpoint
    checkpoint = Checkpoint({}, {"weight/exp_avg": torch.ones(2), **tensors}, {"callbacks": values})
    path = CheckpointStore(tmp_path).save(1, checkpoint)
    assert "0.1" not in (path / "state.json").read_text()
    read = CheckpointStore(tmp_path).load()
    found = Keeper()
    given_back([found], read.state["callbacks"], read.moments)
    state["mean"] = torch.tensor([0.1, torch.nan, -0.0])
    assert str(found.state) == str(state)
    for mine, theirs in zip(leaves(found.state), leaves(state), strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        assert mine.numpy().tobytes() == theirs.contiguous().numpy().tobytes()


def leaves(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from leaves(inner)


def test_monitors_go_on_from_what_older_versions_kept(tmp_path):
    old, rvq = json.loads(OLD.read_text()), quantizer()
    for context in steps(rvq, range(13)):
        del context
    watch, wandb = Watch(monitors(rvq)), Wandb(load_config("demo", []).log, tmp_path)
    given_back([watch, wandb], old["callbacks"], {})
    assert watch.monitors.metrics() == pytest.approx(old["metrics"], rel=1e-5)
    assert len(old["metrics"]) > 40 and wandb.run_id == "3k2j1h"


def test_a_hook_of_older_versions_was_named_by_its_class():
    found = Keeper()
    tensors = {"Keeper:mean": torch.ones(2), "weight/exp_avg": torch.zeros(2)}
    given_back([found], {"Keeper": {"seen": 3}}, tensors)
    assert found.state.keys() == {"seen", "mean"} and found.state["mean"].sum() == 2


def test_hooks_that_keep_a_state_have_names_of_their_own():
    class Nameless(Keeper):
        key = None

    class Alike(Keeper):
        pass

    require_names([Keeper(), Callback(), Callback()])
    with pytest.raises(ValueError, match="Nameless keeps a state"):
        require_names([Nameless()])
    with pytest.raises(ValueError, match="Keeper and Alike both declare the key 'keeper'"):
        require_names([Keeper(), Alike()])
