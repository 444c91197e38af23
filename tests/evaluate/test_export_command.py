"""`b2t export`: the model of any checkpoint of a run, on its own."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml

from b2t.errors import UserError
from b2t.evaluate import evaluate_command, export_command
from b2t.model import BrainToText
from b2t.model import program as program_module
from b2t.train.checkpoint import Checkpoint, CheckpointStore
from tests.evaluate.saved_runs import CHANNELS, call, save_dataset, save_run


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


def test_auto_model_reads_the_folder_and_says_the_same_bit_for_bit(run, tmp_path):
    """In a process of its own, with `import b2t` alone; outputs of the same signals, float32."""
    call(export_command, run, tmp_path / "shared")
    torch.manual_seed(1)
    signal = torch.randn(2, 30, CHANNELS)
    torch.save(signal, tmp_path / "signal.pt")
    script = (
        "import sys, torch, b2t\n"
        "from transformers import AutoModel\n"
        "model = AutoModel.from_pretrained(sys.argv[1]).eval()\n"
        "encoded = model.encode(torch.load(sys.argv[2]), session='day1')\n"
        "texts = model.transcribe(torch.load(sys.argv[2]), session='day1')\n"
        "torch.save((encoded.codes, encoded.quantized, encoded.latents, texts), sys.argv[3])\n"
    )
    places = [str(tmp_path / name) for name in ("shared", "signal.pt", "said.pt")]
    subprocess.run([sys.executable, "-c", script, *places], check=True, capture_output=True)
    said = torch.load(tmp_path / "said.pt")
    model = BrainToText.from_pretrained(run / "checkpoints" / "best").eval()
    assert next(model.parameters()).dtype == torch.float32
    encoded = model.encode(signal, session="day1")
    for found, wanted in zip(said[:3], encoded_of(encoded), strict=True):
        assert torch.equal(found, wanted)
    assert said[3] == model.transcribe(signal, session="day1")


def encoded_of(encoded):
    return encoded.codes, encoded.quantized, encoded.latents


def test_the_card_tells_results_controls_data_and_licence(run, tmp_path):
    call(export_command, run, tmp_path / "before")
    card = (tmp_path / "before" / "README.md").read_text()
    assert "was not evaluated" in card and "None was stated" in card
    call(evaluate_command, run)
    call(export_command, run, tmp_path / "after", "--license", "cc-by-4.0")
    card = (tmp_path / "after" / "README.md").read_text()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["license"] == "cc-by-4.0" and header["library_name"] == "b2t"
    record = json.loads((run / "evaluation.json").read_text())
    metrics = {m["type"]: m["value"] for m in header["model-index"][0]["results"][0]["metrics"]}
    assert metrics == {
        "per": round(100 * record["per"], 2),
        "wer": round(100 * record["wer"], 2),
    }
    assert f"**{record['verdict']}.**" in card and "**Simulated recordings**" in card
    spectrum = f"{100 * record['controls']['spectrum']['wer']:.1f} %"
    assert (
        f"| noise of equal spectrum | {100 * record['controls']['spectrum']['per']:.1f} %" in card
    )
    assert spectrum in card and f"- channels: {CHANNELS}" in card and 'session="day0"' in card
    call(export_command, run, tmp_path / "seven", "--step", 7)
    assert "was not evaluated" in (tmp_path / "seven" / "README.md").read_text()


def test_the_program_says_the_models_codes(run, tmp_path, capsys, monkeypatch):
    """Other signals, lengths and sessions than those that the export itself has compared."""
    call(export_command, run, tmp_path / "shared", "--program")
    assert "tokenizer.pt2: the model's own codes" in capsys.readouterr().out
    program = torch.export.load(tmp_path / "shared" / "tokenizer.pt2").module()
    model = BrainToText.from_pretrained(run / "checkpoints" / "best").eval()
    for bins, session in ((13, 1), (33, -1), (90, 0)):
        signal = 3 * torch.randn(1, bins, CHANNELS)
        codes, quantized = program(signal, torch.tensor([session]))
        encoded = model.encode(signal, session=np.array([session]))
        assert torch.equal(codes, encoded.codes[0])
        assert torch.allclose(quantized, encoded.quantized[0], atol=1e-5)
    monkeypatch.setattr(
        program_module.Tokenizer,
        "forward",
        lambda self, signal, session: (
            torch.zeros(1, 3, dtype=torch.int64) + signal.long().sum() * 0,
            signal.sum(),
        ),
    )
    with pytest.raises(UserError, match=r"differs|cannot hold"):
        call(export_command, run, tmp_path / "other", "--program")
    assert not (tmp_path / "other").exists()


def test_the_folder_goes_to_the_hub_private_unless_told(run, tmp_path, monkeypatch, capsys):
    calls = []

    class Hub:
        def create_repo(self, name, private, exist_ok):
            calls.append((name, private))
            return f"https://hub/{name}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    call(export_command, run, tmp_path / "a", "--push-to-hub", "me/a")
    assert calls[0] == ("me/a", True) and calls[1][0] == "me/a"
    assert {"README.md", "config.json", "model.safetensors"} <= {*calls[1][1]}
    assert 'from_pretrained("me/a")' in (tmp_path / "a" / "README.md").read_text()
    call(export_command, run, tmp_path / "b", "--push-to-hub", "me/b", "--public")
    assert calls[2] == ("me/b", False)

    def refuse(*_, **__):
        raise OSError("401 Unauthorized\nmore")

    monkeypatch.setattr(Hub, "create_repo", refuse)
    with pytest.raises(UserError, match=r"401 Unauthorized; the folder .* is whole"):
        call(export_command, run, tmp_path / "c", "--push-to-hub", "me/c")
    assert (tmp_path / "c" / "config.json").is_file()
