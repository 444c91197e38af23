"""Training on real EEG, two ranks, from the files to an evaluation."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed


def b2t(*arguments: object) -> str:
    command = [sys.executable, "-m", "b2t.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def train(repository: Path, run: Path, data: Path, *overrides: str) -> None:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
        *("--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0"),
        str(repository / "train_ds.py"),
        *("--deepspeed_config", str(repository / "ds_configs" / "zero2_cpu.json")),
        *("--config", "demo", f"run.dir={run}", f"data.path={data}"),
        *("phases.0.steps=12", "phases.1.steps=4", "phases.2.steps=4", "log.every=4"),
        *("codebook_start.after_steps=4", "codebook_start.frames_per_code=4"),
        *("model.encoder.dim=32", "model.encoder.depth=1", "model.text_decoder.dim=32"),
        *("model.quantizer.codebook_size=32", "model.text_decoder.depth=1"),
        *overrides,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=repository)
    assert done.returncode == 0, done.stderr[-3000:]


def evaluation(run: Path) -> dict:
    b2t("evaluate", run)
    return json.loads((run / "evaluation.json").read_text("utf-8"))


def test_words_from_eeg_epochs(real_data, repository, tmp_path):
    data = tmp_path / "wordpair"
    b2t("prepare", real_data / "wordpair", data, "--text-column", "association")
    train(repository, tmp_path / "run", data)
    result = evaluation(tmp_path / "run")
    assert result["rows"] == 20
    assert result["simulated"] is False
    assert result["wer"] is not None and result["wer_noise"] is not None
    assert len(result["utilization"]) == len(result["perplexity"]) == 4
    lines = (tmp_path / "run" / "predictions.jsonl").read_text("utf-8").splitlines()
    assert all(json.loads(line)["target"] for line in lines) and len(lines) == 20


def test_a_tokenizer_from_continuous_eeg_without_text(real_data, repository, tmp_path):
    data = tmp_path / "p300"
    b2t("prepare", real_data / "p300_fif", data, "--window", "2", "--resample", "128")
    train(repository, tmp_path / "run", data, "model.encoder.patch_size=8")
    result = evaluation(tmp_path / "run")
    assert result["wer"] is None and result["rows"] == 5
    assert result["snr_db"] is not None
    assert min(result["utilization"]) > 0.3
