import json
import sys

import numpy as np
import pytest
import torch
from datasets import DatasetDict, load_from_disk

from b2t.config import Config
from b2t.data.trials import trial_features
from b2t.errors import UserError
from b2t.evaluate import decode_command, evaluate_command, lm_command, tokenize_command
from b2t.evaluate.run_folder import choose_split
from b2t.model import BrainToText
from b2t.train.checkpoint import Checkpoint, CheckpointStore
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
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert record["split"] == "val" and record["role"] is None, "another dataset than the run's"
    assert any("val split was scored instead" in note for note in record["notes"])


@pytest.mark.parametrize(("given", "chosen"), [((1, 1), "test"), ((0, 1), "val"), ((0, 0), "test")])
def test_recordings_without_a_text_are_scored_on_test(tmp_path, given, chosen):
    """Not on the split that chose the model; given: whether test has text, and whether val has."""
    data = save_dataset(tmp_path / "data", test_text=bool(given[0]), text=bool(given[1]))
    assert choose_split(str(data), None) == chosen
    assert choose_split(str(data), "val") == "val"


def test_a_split_that_chose_the_model_is_named_everywhere(run, tmp_path, capsys):
    for split, role, told in (
        ("val", "chose the model", "split chose this model"),
        ("train", "trained on", "trained on the train split"),
        ("test", None, None),
    ):
        call(evaluate_command, run, "--split", split, "--out", tmp_path, "--no-noise")
        record = json.loads((tmp_path / "evaluation.json").read_text())
        printed = " ".join(capsys.readouterr().out.split())
        assert record["role"] == role
        assert (f"· {split} ({role})" in printed) == (role is not None)
        assert any(told in note for note in record["notes"]) if told else True
        assert told is None or told in printed
    best = run / "checkpoints" / "best"
    call(evaluate_command, best, "--data", run.parent / "data", "--split", "val", "--out", tmp_path)
    assert json.loads((tmp_path / "evaluation.json").read_text())["role"] is None


def test_sentences_known_from_training_are_counted(run, tmp_path, capsys):
    """Training holds yes, no, water; test holds these, "i am cold", and yes again."""
    call(evaluate_command, run, "--out", tmp_path, "--no-noise")
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert record["known_sentences"] == 4 / 5
    assert "occur in training 80.0 %" in capsys.readouterr().out
    assert any("80.0 % of the target sentences" in note for note in record["notes"])


def test_a_limit_takes_trials_of_all_sessions(run, tmp_path):
    data = tmp_path / "data"
    splits = {split: trials(split, 8).sort("session") for split in ("train", "val", "test")}
    DatasetDict(splits).save_to_disk(str(data))
    call(evaluate_command, run, "--data", data, "--limit", 4, "--no-noise", "--out", tmp_path)
    rows = [json.loads(line)["session"] for line in (tmp_path / "predictions.jsonl").open()]
    assert sorted(rows) == ["day0", "day0", "day1", "day1"]


def test_a_dataset_is_left_as_it_was(run, tmp_path):
    data = save_dataset(tmp_path / "data")
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    for keep in ((), ("--keep-signal",)):
        call(tokenize_command, run, data, tmp_path / f"codes{len(keep)}", *keep)
    mute = save_run(tmp_path / "mute", data, text=False)
    for model in (run, mute):  # 4 of 5 trials are no run of neighbours: datasets keeps indices
        call(evaluate_command, model, "--data", data, "--out", tmp_path, "--limit", 4, "--no-noise")
    call(decode_command, run, data)
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before


@pytest.fixture(scope="module")
def steps(run):
    """Checkpoints of the run at two steps, with other weights than the best."""
    store = CheckpointStore(run / "checkpoints", keep=5)
    texts = {}
    for step in (7, 12):
        torch.manual_seed(step)
        model = BrainToText.from_pretrained(run / "checkpoints" / "best")
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        # What a validation would use: averages where there are any.
        moments = {f"weight_ema:{n}": p.detach() for n, p in model.named_parameters() if step == 7}
        weights = {n: p * (0 if step == 7 else 1) for n, p in model.named_parameters()}
        state = dict(model.named_buffers())
        store.save(step, Checkpoint({**weights, **state}, moments, {"progress": {"step": step}}))
        model.save_pretrained(run.parent / f"step{step}")
        texts[step] = model
    return texts


def test_other_checkpoints_than_the_best_can_be_evaluated(run, steps, tmp_path, capsys):
    data = run.parent / "data"

    def decoded(*arguments):
        call(decode_command, *arguments, "--beams", 1, "--max-new-tokens", 12)
        return capsys.readouterr().out

    expected = {step: decoded(run.parent / f"step{step}", data) for step in (7, 12)}
    best = decoded(run, data)
    assert len({best, *expected.values()}) == 3
    for which, step in (("7", 7), ("step-7", 7), ("step 12", 12), ("last", 12)):
        assert decoded(run, data, "--checkpoint", which) == expected[step], which
    assert decoded(run, data, "--checkpoint", run / "checkpoints" / "step-00000007") == expected[7]
    assert decoded(run, data, "--checkpoint", run.parent / "step12") == expected[12]
    assert decoded(run, data, "--checkpoint", "best") == best
    call(tokenize_command, run, data, tmp_path / "codes", "--checkpoint", "last")
    call(tokenize_command, run.parent / "step12", data, tmp_path / "same")
    codes = [load_from_disk(str(tmp_path / name))["val"]["codes"] for name in ("codes", "same")]
    assert codes[0] == codes[1]
    call(evaluate_command, run, "--checkpoint", "7", "--out", tmp_path, "--split", "val")
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert record["checkpoint"] == "step 7" and record["role"] is None
    assert "step 7 · val" in capsys.readouterr().out


def test_checkpoints_that_are_not_there_or_damaged_are_named(run, steps, tmp_path):
    data = run.parent / "data"
    foreign = run / "checkpoints" / "step-notes"
    foreign.mkdir()
    for which, told in (
        ("8", r"none of that step; found 7, 12$"),
        ("newest", r"expected best, best-PHASE, last, the number of a step \(7, 12\) or a folder"),
        (str(tmp_path), "neither a checkpoint"),
    ):
        with pytest.raises(UserError, match=told):
            call(decode_command, run, data, "--checkpoint", which)
    foreign.rmdir()
    with pytest.raises(UserError, match="no dataset is known, as it has no run; give one"):
        call(evaluate_command, run.parent / "step7")
    with pytest.raises(UserError, match="name its run"):
        call(decode_command, run.parent / "step7", data, "--checkpoint", "last")
    weights = run / "checkpoints" / "step-00000012" / "weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(UserError, match=r"step-00000012: damaged: weights.safetensors has"):
        call(decode_command, run, data, "--checkpoint", "last")
    weights.write_bytes(whole)


def test_a_best_model_without_its_config_is_damaged_and_not_awaited(tmp_path):
    run = save_run(tmp_path / "run", save_dataset(tmp_path / "data"))
    (run / "checkpoints" / "best" / "config.json").unlink()
    with pytest.raises(UserError, match=r"config.json is missing.*damaged"):
        call(evaluate_command, run)


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


def test_without_the_search_a_language_model_is_made_and_its_use_told(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flashlight.lib.text", None)
    data, lm = run.parent / "data", tmp_path / "lm"
    assert call(lm_command, data, "--out", lm) == 0
    told = r"needs flashlight-text, .* pip install 'b2t\[lm\]'"
    for command, *arguments in (
        (evaluate_command, run, "--lm", lm),
        (evaluate_command, run, "--phoneme-beam", 4),
        (decode_command, run, data, "--lm", lm),
        (lm_command, "--out", lm, "--tune", run),
    ):
        with pytest.raises(UserError, match=told):
            call(command, *arguments)
