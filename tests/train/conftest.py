"""What the tests of training share that run in this process: a process group, small runs."""

import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from b2t.config import load_config
from b2t.train.build import build
from b2t.train.callbacks import MetricsFile
from b2t.train.ranks import join, leave
from b2t.train.trainer import Trainer
from tests.train.interrupted import SETTINGS
from tests.train.small_runs import SMALL, zero2


@pytest.fixture(scope="session")
def one_rank():
    """A process group of one, whose traces are removed.

    One for all modules: DeepSpeed keeps the groups that it made for the first, and cannot use
    another one's.
    """
    environment = dict(os.environ)
    os.environ["B2T_THREADS"] = "1"
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    threads = torch.get_num_threads()
    yield join()
    leave()
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def ds_file(tmp_path):
    """Makes DeepSpeed files: accumulation of 4, fp16 where asked for."""
    return partial(zero2, tmp_path, 2, 4)


@pytest.fixture
def start(tiny_trials, tmp_path, one_rank, monkeypatch):
    """Starts or continues a run in the folder of this name, up to where it is told to stop."""
    from deepspeed.accelerator import get_accelerator

    # DeepSpeed refuses fp16 on CPUs; its engine and loss scaler work there all the same.
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)

    def trainer_of(name, ds_file, *overrides):
        places = [f"data.path={tiny_trials}", f"run.dir={tmp_path / name}"]
        config = load_config("demo", [*places, *SMALL, *SETTINGS, *overrides])
        run = config.run.dir
        stop = SimpleNamespace(requested=False)
        trainer = Trainer(config, ds_file, build(config), one_rank, [MetricsFile(run)], stop)
        run.mkdir(exist_ok=True)
        found = trainer.store.load()
        if found is not None:
            trainer.restore(found)
        return trainer

    return trainer_of


@pytest.fixture
def orders(monkeypatch):
    """What is done to a run after an applied step, by step."""
    todo = {}
    after = Trainer._after_applied

    def after_applied(self, *arguments):
        after(self, *arguments)
        if self.progress.step in todo:
            todo[self.progress.step](self)

    monkeypatch.setattr(Trainer, "_after_applied", after_applied)
    return todo
