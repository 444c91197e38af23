"""`b2t export`: the model of any checkpoint of a run, on its own."""

import pytest
import torch

from b2t.errors import UserError
from b2t.evaluate import export_command
from b2t.model import BrainToText
from b2t.train.checkpoint import Checkpoint, CheckpointStore
from tests.evaluate.saved_runs import call, save_dataset, save_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose checkpoint of step 7 holds other weights than the best."""
    root = tmp_path_factory.mktemp("run")
    run = save_run(root / "demo", save_dataset(root / "data"))
    model = BrainToText.from_pretrained(run / "checkpoints" / "best")
    torch.manual_seed(7)
    weights = {name: torch.randn_like(value) for name, value in model.named_parameters()}
    state = {"progress": {"step": 7}}
    store = CheckpointStore(run / "checkpoints")
    store.save(7, Checkpoint({**weights, **dict(model.named_buffers())}, {}, state))
    return run


def test_the_model_of_a_step_is_what_the_checkpoint_holds(run, tmp_path, capsys):
    assert call(export_command, run, tmp_path / "seven", "--step", 7) == 0
    assert "step 7 of" in capsys.readouterr().out
    call(export_command, run, tmp_path / "best")
    held = CheckpointStore(run / "checkpoints").load().weights
    exported = BrainToText.from_pretrained(tmp_path / "seven")
    assert exported.tokenizer is not None
    found = {**dict(exported.named_parameters()), **dict(exported.named_buffers())}
    assert [name for name, value in held.items() if not torch.equal(found[name], value)] == []
    best = BrainToText.from_pretrained(run / "checkpoints" / "best").state_dict()
    again = BrainToText.from_pretrained(tmp_path / "best").state_dict()
    assert [name for name in best if not torch.equal(best[name], again[name])] == []
    differ = [name for name, value in exported.named_parameters() if not best[name].equal(value)]
    assert len(differ) == len(list(exported.parameters())), "two models, not one twice"


def test_nothing_is_replaced_or_left_half_written(run, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there: exists already"):
        call(export_command, run, tmp_path / "there")
    with pytest.raises(UserError, match="none of that step; found 7"):
        call(export_command, run, tmp_path / "new", "--step", 8)
    with pytest.raises(UserError, match="--step last: expected the number"):
        call(export_command, run, tmp_path / "new", "--step", "last")

    def cut(self, folder, **_):
        folder.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(BrainToText, "save_pretrained", cut)
    with pytest.raises(KeyboardInterrupt):
        call(export_command, run, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    call(export_command, run, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "there"]
