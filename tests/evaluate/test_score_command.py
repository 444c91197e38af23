import json

import pytest

from b2t.errors import UserError
from b2t.evaluate import score_command
from tests.evaluate.saved_runs import call


def test_known_answers_of_published_decoders(real_data, tmp_path, capsys):
    """Published on the texts as they are."""
    folder, out = real_data / "eval_t12", tmp_path / "scores.json"
    call(
        score_command,
        *(folder / "target_test.txt", folder / "model1_test.txt"),
        *("--verbatim", "--out", out),
    )
    printed = capsys.readouterr().out
    assert "WER 11.71 %" in printed and "CER 8.49 %" in printed
    assert "BLEU 80.0 · ROUGE-1 88.0" in printed
    scores = json.loads(out.read_text())["systems"][str(folder / "model1_test.txt")]
    kinds = scores["details"]
    wrong = kinds["substitutions"] + kinds["deletions"] + kinds["insertions"]
    total = kinds["hits"] + kinds["substitutions"] + kinds["deletions"]
    assert wrong / total == pytest.approx(scores["wer"]) and scores["p_permutation"] < 0.001
    phonemes = [folder / f"t12_{kind}_phonemes_gru.json" for kind in ("true", "decoded")]
    call(score_command, *phonemes)
    assert "PER 21.66 %" in capsys.readouterr().out


def write(path, lines):
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_a_file_in_a_new_folder_is_written_and_a_folder_refused(tmp_path):
    targets = write(tmp_path / "t.txt", ["one two", "three"])
    out = tmp_path / "new" / "deep" / "scores.json"
    call(score_command, targets, targets, "--out", out)
    assert json.loads(out.read_text())["systems"]
    with pytest.raises(UserError, match="it is a folder; name a file"):
        call(score_command, targets, targets, "--out", tmp_path)


def test_two_decoders_are_compared_on_the_same_trials(tmp_path, capsys):
    targets = write(tmp_path / "t.txt", ["One two three.", "four five", "six"] * 10)
    rows = [{"row": f"d/{i}", "target": t} for i, t in enumerate(targets.read_text().splitlines())]
    good = [{"row": r["row"], "prediction": r["target"]} for r in reversed(rows)]
    bad = [{"id": r["row"], "text": "one two"} for r in rows]
    reference = write(tmp_path / "ref.jsonl", map(json.dumps, rows))
    a = write(tmp_path / "a.jsonl", map(json.dumps, good))
    b = write(tmp_path / "b.jsonl", map(json.dumps, bad))
    call(score_command, reference, a, b, "--out", tmp_path / "o.json")
    found = json.loads((tmp_path / "o.json").read_text())["comparison"]
    assert found["rate_a"] == 0.0 and found["rate_b"] == found["difference"] == 50 / 60
    assert found["p"] < 0.01 < found["interval"][0]
    assert "+83.33 points" in capsys.readouterr().out
    table = write(tmp_path / "c.csv", ["id,text", *(f"{r['row']},{r['target']}" for r in rows)])
    call(score_command, reference, table)
    assert "WER 0.00 %" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, text, told",
    [
        ("h.txt", "one\n", "1 rows, .* has 2; expected one"),
        ("h.txt", "\n", "1 rows"),
        ("h.txt", "", "holds no sentence"),
        ("h.doc", "one\ntwo\n", "expected .txt"),
        ("h.jsonl", '{"row": "a", "prediction": "x"}\n{"row"\n', "line 2: no JSON"),
        ("h.jsonl", '{"row": "a", "said": "x"}\n', "found row, said; expected prediction"),
        ("h.jsonl", '{"row": "a", "prediction": null}\n', "prediction is null"),
        ("h.json", "[1, 2]", "expected a list of sentences"),
        ("h.json", "[[1, 2], [3]]", "one holds phonemes"),
        ("h.csv", "id,said\n1,x\n", "expected prediction"),
    ],
)
def test_files_that_cannot_be_scored_are_one_message(tmp_path, name, text, told):
    targets = write(tmp_path / "t.txt", ["one", "two"])
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=told):
        call(score_command, targets, tmp_path / name)
    with pytest.raises(UserError, match="no such file"):
        call(score_command, targets, tmp_path / "none.txt")
    with pytest.raises(UserError, match="it is a folder; name a file"):
        call(score_command, targets, tmp_path)


def test_other_trials_are_refused(tmp_path):
    ref = write(tmp_path / "r.jsonl", ['{"row": "a", "text": "x"}', '{"row": "b", "text": "y"}'])
    other = write(tmp_path / "h.jsonl", ['{"row": "a", "text": "x"}', '{"row": "c", "text": "y"}'])
    with pytest.raises(UserError, match=r"b is missing.*same trials"):
        call(score_command, ref, other)
    twice = write(tmp_path / "h.jsonl", ['{"row": "a", "text": "x"}'] * 2)
    with pytest.raises(UserError, match="more than once"):
        call(score_command, ref, twice)
