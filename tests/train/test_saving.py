"""Checkpoints that are written while training goes on."""

import threading
from types import SimpleNamespace

import pytest
import torch

from b2t.config import load_config
from b2t.train import checkpoint as checkpoints
from b2t.train.build import build
from b2t.train.callback import Callback
from b2t.train.trainer import Stopped, Trainer
from tests.train.small_runs import SMALL, zero2

SETTINGS = """
    codebook_start.after_steps=1 evaluation.every=100 phases.0.steps=6 phases.1.steps=1
    phases.2.steps=1 checkpoint.every=2 checkpoint.keep=9 log.every=3 optim.weight_ema=0.9
    stability.dry_batch=false
""".split()  # noqa: SIM905


@pytest.fixture
def trainer(tiny_trials, tmp_path, one_rank):
    places = [f"data.path={tiny_trials}", f"run.dir={tmp_path / 'run'}"]
    config = load_config("demo", [*places, *SMALL, *SETTINGS])
    stop = SimpleNamespace(requested=False)
    return Trainer(config, zero2(tmp_path, 4, 1), build(config), one_rank, [], stop)


class SlowDisk(Callback):
    """Holds back the first checkpoint until a later step, and notes what is on the disk when."""

    def __init__(self, monkeypatch, until):
        self.gate, self.reached, self.until = threading.Event(), threading.Event(), until
        self.on_disk, self.held = {}, []
        write = checkpoints.write_safetensors

        def slow(path, tensors):
            self.held.append(path.parent.name)
            self.reached.set()
            assert self.gate.wait(60), "nothing opened the gate"
            return write(path, tensors)

        monkeypatch.setattr(checkpoints, "write_safetensors", slow)

    def on_step(self, trainer, context):
        step = trainer.progress.step
        self.on_disk[step] = trainer.store.steps()
        if step == self.until:
            self.gate.set()


def test_steps_go_on_and_change_nothing_in_what_is_being_written(trainer, monkeypatch):
    """Step 2 is on its way to the disk while step 3 moves weights, moments, codes and averages."""
    state = {}

    class Look(Callback):
        def after_step(self, trainer, last):
            if trainer.progress.step == 2:
                state.update(trainer.engine.read_masters())
                state.update({n: b.clone() for n, b in trainer.model.named_buffers()})

    disk = SlowDisk(monkeypatch, until=3)
    trainer.callbacks += [Look(), disk]
    trainer.fit()
    assert disk.on_disk[3] == [], "step 3 came before the checkpoint of step 2 was written"
    assert disk.on_disk[6][:2] == [2, 4] or disk.on_disk[6] == [2]
    assert trainer.store.steps() == [2, 4, 6, 7, 8]
    trainer.store.steps = lambda: [2]
    kept = trainer.store.load().weights
    assert state and all(torch.equal(kept[name], value) for name, value in state.items())
    after = trainer.masters
    assert [name for name in after if not torch.equal(kept[name], after[name])], "training went on"


def test_the_next_phase_changes_nothing_in_what_is_written_between_phases(trainer, monkeypatch):
    """On a CPU in float32 the weights that are handed on are the model's own."""
    trainer.config.checkpoint.every = trainer._saving.every = 100
    handed_on, moved = {}, []

    class Look(Callback):
        def on_phase_end(self, trainer, phase):
            if trainer.progress.step == 6:
                handed_on.update(trainer.engine.read_masters())

        def on_step(self, trainer, context):
            if trainer.progress.step == 7:
                now = trainer.engine.read_masters()
                moved.extend(n for n in now if not torch.equal(now[n], handed_on.get(n, now[n])))

    disk = SlowDisk(monkeypatch, until=7)
    trainer.callbacks += [Look(), disk]
    trainer.fit()
    assert disk.on_disk[7] == [] and moved, "step 7 came before what step 6 handed on was written"
    trainer.store.steps = lambda: [6]
    kept = trainer.store.load().weights
    assert [n for n, value in handed_on.items() if not torch.equal(kept[n], value)] == []


def test_a_second_checkpoint_waits_for_the_first(trainer, monkeypatch):
    disk = SlowDisk(monkeypatch, until=-1)
    trainer.callbacks.append(disk)
    begun = threading.Timer(1.0, disk.gate.set)
    waiting = trainer._saving.wait
    seen = []

    def wait():
        if trainer.progress.step == 4 and not seen:
            assert disk.reached.wait(60), "nothing is written"
            seen.append(list(disk.held))
            begun.start()
        waiting()

    monkeypatch.setattr(trainer._saving, "wait", wait)
    trainer.fit()
    assert set(seen[0]) == {".writing-step-00000002"}, "one is being written when the next is due"
    assert trainer.store.steps() == [2, 4, 6, 7, 8]


def test_whoever_is_asked_to_stop_waits_for_the_checkpoint(trainer, monkeypatch):
    disk = SlowDisk(monkeypatch, until=-1)
    trainer.callbacks.append(disk)
    trainer.stop.requested = True
    threading.Timer(1.0, disk.gate.set).start()
    with pytest.raises(Stopped):
        trainer.fit()
    assert trainer.store.steps() == [1] and trainer.store.load().state["progress"]["step"] == 1
