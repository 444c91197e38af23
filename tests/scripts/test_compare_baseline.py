import json
from types import SimpleNamespace

import numpy as np
import pytest

from b2t.config import load_config
from b2t.evaluate.metrics import EditCounts
from tests.script_modules import script


@pytest.fixture(scope="module")
def compare(repository):
    with script(repository, "compare_baseline") as module:
        yield module


def counts(edits):
    return EditCounts(np.array(edits), np.full(len(edits), 10))


def test_the_paired_interval_sees_what_trials_share(compare):
    """Half the edits on every trial is half on every draw; unpaired, trials would spread it."""
    generator = np.random.default_rng(1)
    one = generator.integers(1, 9, 60) * 2
    assert compare.paired(counts(one), counts(one // 2)) == pytest.approx((0.5, 0.5, 0.5))
    ratio, low, high = compare.paired(counts(one), counts(generator.permutation(one) // 2))
    assert ratio == 0.5 and low < 0.45 and high > 0.55


def test_edits_are_those_of_phonemes_and_of_words_read_from_them(compare, tmp_path):
    rows = [
        {
            "target": "Hello, you.",
            "lm_prediction": "hello too",
            "target_phonemes": [1, 40, 2],
            "phonemes": [1, 2, 3],
        },
        {"target": "no", "lm_prediction": "", "target_phonemes": [5], "phonemes": [5]},
    ]
    lexicon = [{"lm_prediction": "hello you"}, {"lm_prediction": "nor"}]
    for name, content in (("by_lm", rows), ("by_lexicon", lexicon)):
        (tmp_path / name).mkdir()
        lines = "".join(json.dumps(r) + "\n" for r in content)
        (tmp_path / name / "predictions.jsonl").write_text(lines)
    found = compare.edits(compare.predictions(tmp_path))
    assert found["wer_lm"].edits.tolist() == [1, 1] and found["wer_lm"].lengths.tolist() == [2, 1]
    assert found["per"].edits.tolist() == [2, 0] and found["per"].lengths.tolist() == [3, 1]
    assert found["wer_lexicon"].edits.tolist() == [0, 1]
    assert "wer" not in found, "no text decoder wrote"
    mixed = compare.edits(compare.predictions(tmp_path), mixed=True)
    # Each trial against what was said of the other.
    assert mixed["per"].edits.tolist() == [3, 3] and mixed["wer_lm"].edits.tolist() == [2, 2]


def test_a_text_decoder_can_be_scored_alone(compare, tmp_path):
    (tmp_path / "by_lm").mkdir()
    row = {"target": "Hello, you.", "prediction": "hello", "target_phonemes": [1], "phonemes": [1]}
    (tmp_path / "by_lm" / "predictions.jsonl").write_text(json.dumps(row) + "\n")
    found = compare.edits(compare.predictions(tmp_path))
    assert found["wer"].edits.tolist() == [1] and found.keys() == {"per", "wer"}


def test_phases_share_the_minutes_of_a_setting(compare, tmp_path):
    parser_like = SimpleNamespace(dataset="d", seed=3, minutes=12.0, every=50, batch=16)
    plain = compare.training(parser_like, "phonemes", tmp_path)
    config = load_config("phonemes", plain[2:])
    assert config.phases[0].minutes == 12 and config.phases[0].minutes_of == "processor"
    assert config.checkpoint.best_metric == "val/per" and config.run.seed == 3
    own = compare.training(parser_like, "words minutes=23 batch=64 model.init_from=r", tmp_path)
    config = load_config("words", own[2:])
    assert [phase.minutes for phase in config.phases] == [8, 12, 3]
    assert config.model.init_from == "r" and config.checkpoint.best_metric == "val/wer"


def test_the_curve_has_one_point_for_each_validation(compare, tmp_path):
    rows = [
        {"step": 2, "loss/total": 1.0},
        {"step": 2, "val/loss": 0.5},
        {"step": 2, "val/per": 0.25, "val/snr_db": 1.0},
        {"step": 3, "loss/total": 1.0},
        {"step": 4, "val/loss": 0.4},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert compare.validation_curve(tmp_path) == [
        {"step": 2, "val/loss": 0.5, "val/per": 0.25},
        {"step": 4, "val/loss": 0.4},
    ]
    assert compare.last_step(tmp_path) == 4


def test_tables_of_several_folders_pool_their_trials(compare, tmp_path, capsys):
    """Half the errors of the first setting in every folder is a ratio of a half."""
    folders, results = [], []
    for name, missed in (("a", 2), ("b", 4)):
        found = []
        for number, wrong in enumerate((missed, missed // 2)):
            place = tmp_path / name / str(number)
            said = [1] * wrong + [2] * (10 - wrong)
            row = {"target_phonemes": [2] * 10, "phonemes": said}
            for by in ("by_lm", "by_lexicon"):
                (place / by).mkdir(parents=True)
                (place / by / "predictions.jsonl").write_text((json.dumps(row) + "\n") * 3)
            found.append({"setting": f"s{number}", "minutes": 1.0, "steps": 5, "per_noise": 0.9})
            found[-1]["validation"] = [{"step": 5, "val/per": wrong / 10}]
        folders.append(tmp_path / name)
        results.append(found)
    compare.print_tables(results, folders)
    printed = capsys.readouterr().out
    assert "| a | s0 | 1 | 5 | per | 20.0 % | 20.0–20.0 | 90.0 % | 20.0 % |" in printed
    assert "| s0 | per | 30.0 % | 30.0 % (" in printed and "| 1.00 (1.00–1.00) |" in printed
    assert "| s1 | per | 15.0 % | 15.0 % (" in printed and "| 0.50 (0.50–0.50) |" in printed
    compare.draw_curves(results, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
