import json

import numpy as np
import pytest
import torch
from datasets import DatasetDict, load_from_disk

from b2t.config import Config
from b2t.data.trials import trial_features
from b2t.errors import UserError
from b2t.evaluate import decode_command, evaluate_command, tokenize_command
from b2t.model import BrainToText
from tests.evaluate.saved_runs import TEXTS, call, save_dataset, save_run, trials


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    return save_run(root / "demo", save_dataset(root / "data"))


def test_evaluate_prints_and_writes_everything(run, tmp_path, capsys):
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, 30):
            record = {"step": step, "loss/total": 3 / step, "loss/reconstruction": 1 / step}
            layers = {f"codebook/utilization/{q}": step / (30 + q) for q in range(3)}
            file.write(json.dumps({**record, **layers, "codebook/utilization_worst": 0.1}) + "\n")
        file.write('{"step": 30, "loss/tot')
    assert call(evaluate_command, run, "--out", tmp_path, "--batch-size", 2) == 0
    printed = capsys.readouterr().out
    assert "SIMULATED DATA" in printed and "noise" in printed and "water please" in printed
    assert "[ok]" in printed, "markup in a sentence must not be swallowed"
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert record["split"] == "test" and record["simulated"] is True and record["rows"] == 5
    assert record["wer"] is not None and record["wer_noise"] is not None
    assert len(record["utilization"]) == len(record["perplexity"]) == 3
    assert record["decoding"] == {"num_beams": 1, "max_new_tokens": 12}
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").open()]
    assert {row["row"] for row in rows} == {f"day{i % 2}/1/{i}" for i in range(5)}
    assert all(row["noise_prediction"] is not None for row in rows)
    assert (tmp_path / "evaluation.png").read_bytes().startswith(b"\x89PNG")


def test_results_do_not_depend_on_the_batch_size(run, tmp_path):
    for size in (1, 5):
        call(evaluate_command, run, "--out", tmp_path / str(size), "--batch-size", size)
    one, five = (
        json.loads((tmp_path / size / "evaluation.json").read_text()) for size in ("1", "5")
    )
    for name in ("wer", "per", "wer_noise", "distinct_ratio", "utilization"):
        assert one[name] == five[name], name
    assert one["snr_db"] == pytest.approx(five["snr_db"], abs=1e-4)


def test_the_default_split_is_val_where_test_has_no_text(run, tmp_path):
    data = save_dataset(tmp_path / "data", test_text=False)
    call(evaluate_command, run, "--data", data, "--out", tmp_path, "--no-noise")
    assert json.loads((tmp_path / "evaluation.json").read_text())["split"] == "val"


def test_a_tokenizer_only_run_is_evaluated_without_text(tmp_path, capsys):
    data = save_dataset(tmp_path / "data")
    run = save_run(tmp_path / "run", data, text=False)
    assert call(evaluate_command, run) == 0
    record = json.loads((run / "evaluation.json").read_text())
    assert record["wer"] is None and record["per"] is None and record["snr_db"] is not None
    assert "no text decoder" in capsys.readouterr().out
    with pytest.raises(UserError, match="no text decoder"):
        call(decode_command, run, data)


def test_decode_prints_every_row_in_the_order_of_the_dataset(run, tmp_path, capsys):
    data = run.parent / "data"
    call(decode_command, run, data, "--split", "val")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == [f"day{i % 2}/1/{i}" for i in range(4)]
    call(decode_command, run, data, "--split", "val", "--beams", 2, "--out", tmp_path / "o.jsonl")
    assert [json.loads(line)["row"] for line in (tmp_path / "o.jsonl").open()] == [
        line.split("\t")[0] for line in lines
    ]


def test_tokenize_writes_the_models_own_codes(run, tmp_path):
    data = run.parent / "data"
    call(tokenize_command, run, data, tmp_path / "tokens", "--batch-size", 3)
    tokens = load_from_disk(str(tmp_path / "tokens"))
    assert set(tokens) == {"train", "val", "test"} and "signal" not in tokens["val"].column_names
    model = BrainToText.from_pretrained(run / "checkpoints" / "best").eval()
    source = load_from_disk(str(data))["val"]
    for i, row in enumerate(tokens["val"]):
        signal = torch.tensor(np.asarray(source[i]["signal"]))[None]
        with torch.no_grad():
            encoded = model.encode(signal, None, torch.tensor([i % 2]))
        assert row["trial"] == i and row["text"] == TEXTS[i]
        assert row["codes"] == encoded.codes[0].tolist()
    call(tokenize_command, run, data, tmp_path / "two", "--layers", 2, "--splits", "val")
    two = load_from_disk(str(tmp_path / "two"))["val"][0]["codes"]
    assert two == [frame[:2] for frame in tokens["val"][0]["codes"]]


def test_a_saved_model_on_its_own_needs_only_a_dataset(run, tmp_path):
    best, data = run / "checkpoints" / "best", run.parent / "data"
    with pytest.raises(UserError, match="--data"):
        call(evaluate_command, best)
    assert call(evaluate_command, best, "--data", data, "--out", tmp_path, "--no-noise") == 0


def test_mistakes_are_one_message_each(run, tmp_path):
    data = run.parent / "data"
    with pytest.raises(UserError, match="no such run folder"):
        call(evaluate_command, tmp_path / "nowhere")
    with pytest.raises(UserError, match="not a run folder"):
        call(evaluate_command, tmp_path)
    young = tmp_path / "young"
    young.mkdir()
    (young / "config.yaml").write_text(Config().to_yaml())
    with pytest.raises(UserError, match="no best model yet"):
        call(evaluate_command, young)
    with pytest.raises(UserError, match="no split 'dev'; expected one of train, val, test"):
        call(evaluate_command, run, "--split", "dev")
    with pytest.raises(UserError, match="no such folder"):
        call(evaluate_command, run, "--data", tmp_path / "gone")
    with pytest.raises(UserError, match="exists already"):
        call(tokenize_command, run, data, tmp_path)
    with pytest.raises(UserError, match="3 quantizer layers"):
        call(tokenize_command, run, data, tmp_path / "t", "--layers", 9)
    with pytest.raises(UserError, match="--device"):
        call(decode_command, run, data, "--device", "no-such-device")
    assert not (tmp_path / "t").exists()


def test_another_number_of_channels_is_named(run, tmp_path):
    narrow = trials("val", 2).map(
        lambda row: {"signal": np.asarray(row["signal"])[:, :4]}, features=trial_features(4)
    )
    DatasetDict({"train": narrow, "val": narrow}).save_to_disk(str(tmp_path / "narrow"))
    with pytest.raises(UserError, match="4 channels, the model reads 6"):
        call(evaluate_command, run, "--data", tmp_path / "narrow")
