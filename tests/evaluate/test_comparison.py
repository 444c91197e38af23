import csv
import json

import pytest
import torch

from b2t.data.dataset import load_trials
from b2t.data.trials import row_ids
from b2t.errors import UserError
from b2t.evaluate import decode_command, evaluate_command, lm_command, run_folder
from b2t.evaluate.comparison import compare_evaluations
from b2t.evaluate.metrics import normalise_text
from b2t.evaluate.results import Evaluation, Prediction
from b2t.evaluate.words import PhonemeBeam
from tests.evaluate.saved_runs import call, save_dataset, save_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    return save_run(root / "demo", save_dataset(root / "data"))


def rows(said, start=0):
    return [
        Prediction(f"s/0/{start + i}", "s/0", target="a b", prediction=text)
        for i, text in enumerate(said)
    ]


def test_rows_are_matched_by_name():
    a = Evaluation("test", predictions=rows(["a b", "a c", "c c"]))
    b = Evaluation("test", predictions=rows(["a b", "a b", "a b"])[::-1])
    found = compare_evaluations(a, b)
    assert list(found) == ["wer"] and found["wer"].difference == -0.5
    with pytest.raises(UserError, match="only one of the two"):
        compare_evaluations(a, Evaluation("test", predictions=rows(["a b"] * 3, start=1)))
    with pytest.raises(UserError, match="no score in common"):
        compare_evaluations(a, Evaluation("test", predictions=rows([None] * 3)))


def test_two_runs_are_evaluated_and_compared(run, tmp_path, capsys):
    call(evaluate_command, run, run, "--out", tmp_path, "--no-noise")
    printed = " ".join(capsys.readouterr().out.split())
    assert "words:" in printed and "+0.0 points" in printed and "p = 1" in printed
    record = json.loads((tmp_path / "comparison.json").read_text())
    assert record["wer"]["difference"] == record["per"]["difference"] == 0.0
    assert (tmp_path / "a" / "evaluation.json").is_file()
    with pytest.raises(UserError, match="3 runs: expected one, or two"):
        call(evaluate_command, run, run, run)


def test_controls_stand_beside_the_scores_and_the_first_line_judges(run, tmp_path, capsys):
    """Nothing was trained here: nothing may seem decoded."""
    call(evaluate_command, run, "--out", tmp_path)
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].startswith("NOT DECODING: phonemes no better than")
    assert "most frequent sentence" in printed and "words per minute" in printed
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert record["verdict"] == " ".join(printed.partition("SIMULATED")[0].split())
    assert set(record["controls"]) == {"spectrum", "codes"}
    assert set(record["controls"]["codes"]) == {"per", "wer"}
    assert set(record["details"]) == {"per", "wer"}
    assert set(record["details"]["wer"]["by_session"]) == {"day0", "day1"}
    assert record["prior"]["most_frequent"] == "no ok"
    bins = [12 + 5 * i for i in range(5)]
    assert record["words_per_minute"] == pytest.approx(60 * 50 * 9 / sum(bins))
    predictions = [json.loads(line) for line in (tmp_path / "predictions.jsonl").open()]
    assert sorted(p["seconds"] for p in predictions) == [n / 50 for n in bins]
    assert all(p["controls"]["spectrum"]["text"] is not None for p in predictions)
    call(evaluate_command, run, "--out", tmp_path, "--controls", "codes", "--no-noise")
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert set(record["controls"]) == {"codes"} and record["wer_noise"] is None


def test_phonemes_by_a_beam_of_prefixes(run, tmp_path):
    """Those of the beam itself on the model's own logits."""
    pytest.importorskip("flashlight.lib.text.decoder", reason="flashlight-text has no wheel here")
    call(evaluate_command, run, "--phoneme-beam", 5, "--no-noise", "--out", tmp_path)
    said = [json.loads(line)["phonemes"] for line in (tmp_path / "predictions.jsonl").open()]
    opened = run_folder.open_run(run)
    model, tokenizer = run_folder.load_model(opened, "cpu")
    data = str(run.parent / "data")
    found = {}
    for batch in run_folder.load_batches(opened, model, data, "test", tokenizer, 2):
        with torch.no_grad():
            output = model(batch, weights={"phoneme": 1.0})
        phonemes = PhonemeBeam(5).decode(output.phoneme_logits, output.frame_mask)
        found |= dict(zip(batch.rows, phonemes, strict=True))
    rows = [json.loads(line)["row"] for line in (tmp_path / "predictions.jsonl").open()]
    assert said == [found[row] for row in rows]


def test_outputs_as_the_competition_and_with_their_hypotheses(run, tmp_path, capsys):
    pytest.importorskip("flashlight.lib.text.decoder", reason="flashlight-text has no wheel here")
    data, lm = run.parent / "data", tmp_path / "lm"
    call(lm_command, data, "--out", lm)
    call(decode_command, run, data, "--out", tmp_path / "o.csv")
    call(decode_command, run, data, "--out", tmp_path / "o.jsonl")
    table = list(csv.DictReader((tmp_path / "o.csv").open()))
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").open()]
    assert [row["id"] for row in table] == [str(i) for i in range(5)]
    assert [row["text"] for row in table] == [normalise_text(line["prediction"]) for line in lines]
    assert [line["row"] for line in lines] == row_ids(load_trials(str(data), "test"))
    call(decode_command, run, data, "--lm", lm, "--n-best", 3, "--out", tmp_path / "n.jsonl")
    for line in map(json.loads, (tmp_path / "n.jsonl").open()):
        scores = [hypothesis["score"] for hypothesis in line["n_best"]]
        assert scores == sorted(scores, reverse=True) and len(scores) <= 3
        assert line["n_best"][0]["text"] == line["prediction"]
    call(evaluate_command, run, "--lm", lm, "--out", tmp_path, "--controls", "lm_alone")
    alone = json.loads((tmp_path / "evaluation.json").read_text())["controls"]["lm_alone"]
    assert set(alone) == {"wer_lm"}
    capsys.readouterr()
    for wrong in (["--n-best", 3], ["--n-best", 3, "--lm", lm, "--out", tmp_path / "n.csv"]):
        with pytest.raises(UserError, match="--n-best"):
            call(decode_command, run, data, *wrong)
