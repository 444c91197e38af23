"""A process that is killed while it replaces the best model: whenever, one whole model is left."""

import itertools
import shutil
from pathlib import Path

import pytest
import torch

from b2t.errors import UserError
from b2t.evaluate.checkpoints import choose_checkpoint
from b2t.model import BrainToText, BrainToTextConfig
from b2t.run_files import BEST
from b2t.train.checkpoint import CheckpointStore
from b2t.train.export import export_model


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the process runs after it."""


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return BrainToText(
        BrainToTextConfig(
            channels=2,
            encoder={"dim": 4, "depth": 1, "heads": 1, "patch_size": 2, "patch_stride": 2},
            signal_decoder={"depth": 1, "heads": 1},
            phoneme_head={"enabled": False},
            text_decoder={"enabled": False},
        )
    )


@pytest.fixture
def kill_at(monkeypatch):
    """Kills at the n-th write, rename or removal of a folder; the last is then half done."""
    rename, rmtree, save = Path.rename, shutil.rmtree, BrainToText.save_pretrained
    left = [None]

    def due():
        if left[0] is None:
            return False
        left[0] -= 1
        return left[0] < 0

    def renamed(path, target):
        if due():
            raise Killed
        return rename(path, target)

    def removed(path, *_, **__):
        if Path(path).exists():
            if due():
                for file in Path(path).glob("*.safetensors"):
                    file.unlink()
                raise Killed
            rmtree(path)

    def saved(self, folder, **options):
        save(self, folder, **options)
        if due():
            (Path(folder) / "model.safetensors").write_bytes(b"half")
            raise Killed

    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(shutil, "rmtree", removed)
    monkeypatch.setattr(BrainToText, "save_pretrained", saved)
    return lambda number: left.__setitem__(0, number)


def exported(run, model, value, phase):
    masters = {name: torch.full_like(p, value) for name, p in model.named_parameters()}
    model.config.chosen = {"phase": phase, "step": int(value), "metric": "val/loss", "value": 0.0}
    export_model(run / "checkpoints" / BEST, model, masters, None, phase)


def values_in(folder):
    loaded = BrainToText.from_pretrained(folder)
    return {float(p.detach().mean()) for p in loaded.parameters()}, loaded.config.chosen["step"]


@pytest.mark.parametrize("second_phase", ["one", "two"])
def test_killed_twice_there_is_still_a_best_model(tmp_path, model, kill_at, second_phase):
    points = 0
    for first, second in itertools.product(range(5), range(5)):
        run = tmp_path / f"{first}-{second}"
        kill_at(None)
        exported(run, model, 1.0, "one")
        killed = 0
        for number, value in ((first, 2.0), (second, 3.0)):
            kill_at(number)
            try:
                exported(run, model, value, second_phase)
            except Killed:
                killed += 1
            kill_at(None)
            found, step = values_in(choose_checkpoint(run, "best"))
            assert found == {float(step)}, (first, second)
        points += killed == 2
        CheckpointStore(run / "checkpoints").recover()
        assert (run / "checkpoints" / BEST).is_dir()
        assert values_in(run / "checkpoints" / BEST)[1] >= 1
        exported(run, model, 4.0, second_phase)
        assert values_in(run / "checkpoints" / BEST) == ({4.0}, 4)
        left = {path.name for path in (run / "checkpoints").iterdir()}
        assert left == ({"best"} if second_phase == "one" else {"best", "best-one"})
    assert points >= 4, "kills that hit, both"


def test_the_best_of_an_earlier_phase_stays(tmp_path, model):
    for value, phase in ((1.0, "one"), (2.0, "one"), (3.0, "a/b"), (4.0, "a/b"), (5.0, "last")):
        exported(tmp_path, model, value, phase)
    for which, value in (("best", 5.0), ("best-last", 5.0), ("best-a/b", 4.0), ("best-one", 2.0)):
        assert values_in(choose_checkpoint(tmp_path, which)) == ({value}, int(value)), which
    with pytest.raises(UserError, match="found best-a%2Fb, best-one, best-last"):
        choose_checkpoint(tmp_path, "best-two")
    (tmp_path / "checkpoints" / "best-last").mkdir()  # of a session that was gone back behind
    assert values_in(choose_checkpoint(tmp_path, "best-last")) == ({5.0}, 5)
