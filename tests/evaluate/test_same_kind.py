"""A model is never applied to signals of another kind than it was trained on in silence."""

import json
import logging

import numpy as np
import pytest
import torch
from datasets import DatasetDict, load_from_disk

from b2t.config import load_config
from b2t.errors import UserError
from b2t.evaluate import decode_command, evaluate_command, tokenize_command
from b2t.model import BrainToText
from b2t.train.build import build
from tests.evaluate.saved_runs import NAMES, call, describe, save_dataset, save_run
from tests.train.small_runs import SMALL

SIGNAL = {"channel_names": NAMES, "unit": "z-score", "rms": 1.0, "smoothing_bins": 1.5}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("kind")
    return save_run(root / "demo", describe(save_dataset(root / "data")), signal=SIGNAL)


@pytest.fixture
def warnings(caplog):
    logging.getLogger("b2t").propagate = True
    with caplog.at_level(logging.WARNING, "b2t"):
        yield caplog


def other_kinds(folder):
    names = [*NAMES[:-1], "Cz"]
    yield "100 Hz", describe(save_dataset(folder / "rate", rate=100.0)), "bins of 10 ms"
    yield "volts", describe(save_dataset(folder / "V", change=lambda x: x * 1e-5)), "mean square"
    yield "unit", describe(save_dataset(folder / "mV"), unit="SI (V, T)"), "normalize block"
    yield "name", describe(save_dataset(folder / "names"), channels=names), r"lacks 1 .*\(C5\)"
    strangers = save_dataset(folder / "new")
    splits = load_from_disk(str(strangers))
    moved = {
        split: rows.remove_columns("session").add_column("session", ["day7"] * len(rows))
        for split, rows in splits.items()
    }
    DatasetDict(moved).save_to_disk(str(folder / "moved"))
    yield "session", describe(folder / "moved"), r"day7.*knows day0, day1"


def test_signals_of_another_kind_are_refused_in_one_message(run, tmp_path, warnings):
    for kind, data, message in other_kinds(tmp_path):
        for arguments in (
            (evaluate_command, run, "--data", data, "--no-noise"),
            (decode_command, run, data),
            (tokenize_command, run, data, tmp_path / f"codes {kind}"),
        ):
            with pytest.raises(UserError, match=message) as error:
                call(*arguments)
            assert "--force" in str(error.value) and str(data) in str(error.value)
            warnings.clear()
        call(decode_command, run, data, "--force")
        call(tokenize_command, run, data, tmp_path / f"codes {kind}", "--force")
        assert len([m for m in warnings.messages if "going on" in m]) == 1, kind


def test_the_same_kind_raises_and_warns_nothing(run, tmp_path, warnings):
    call(evaluate_command, run, "--out", tmp_path, "--no-noise")
    assert warnings.messages == []


def test_channels_in_another_order_are_aligned_by_name(run, tmp_path):
    order = [3, 0, 5, 1, 4, 2]
    wide = [*order, 0]
    for name, places in (("turned", order), ("more", wide)):
        data = save_dataset(tmp_path / name, change=lambda x, places=places: x[:, places])
        labels = [NAMES[place] for place in order] + ["extra"] * (len(places) - 6)
        describe(data, channels=labels)
        call(tokenize_command, run, data, tmp_path / f"codes {name}")
        call(evaluate_command, run, "--data", data, "--out", tmp_path / f"scores {name}")
    call(tokenize_command, run, run.parent / "data", tmp_path / "codes")
    call(evaluate_command, run, "--out", tmp_path / "scores")
    expected = load_from_disk(str(tmp_path / "codes"))["test"]["codes"]
    scores = json.loads((tmp_path / "scores" / "evaluation.json").read_text())
    for name in ("turned", "more"):
        assert load_from_disk(str(tmp_path / f"codes {name}"))["test"]["codes"] == expected
        found = json.loads((tmp_path / f"scores {name}" / "evaluation.json").read_text())
        assert (found["wer"], found["per"]) == (scores["wer"], scores["per"])
        assert found["snr_db"] == pytest.approx(scores["snr_db"])


def gaussian(signal, bins):
    """Smoothing by its definition, in float64, the ends repeated."""
    reach = int(4 * bins + 0.5)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / bins) ** 2)
    padded = np.pad(signal.astype(float), ((reach, reach), (0, 0)), mode="edge")
    rows = [weights @ padded[t : t + 2 * reach + 1] for t in range(len(signal))]
    return np.array(rows) / weights.sum()


def test_smoothing_is_part_of_the_model(run, tmp_path):
    best, data = run / "checkpoints" / "best", run.parent / "data"
    call(tokenize_command, run, data, tmp_path / "run")
    call(tokenize_command, best, data, tmp_path / "best")
    tokens = load_from_disk(str(tmp_path / "run"))["val"]["codes"]
    assert load_from_disk(str(tmp_path / "best"))["val"]["codes"] == tokens
    model = BrainToText.from_pretrained(best)
    for i, row in enumerate(load_from_disk(str(data))["val"]):
        raw = np.asarray(row["signal"], np.float32)
        smoothed = torch.tensor(gaussian(raw, 1.5), dtype=torch.float32)[None]
        everything = torch.ones(1, len(raw), dtype=torch.bool)
        session = torch.tensor([i % 2])
        expected = model.encode_batch(smoothed, everything, session)
        found = model.encode(torch.tensor(raw)[None], session=session)
        torch.testing.assert_close(found.latents, expected.latents, rtol=1e-4, atol=1e-5)
        assert found.codes[0].tolist() == tokens[i]


def test_an_older_model_is_read_with_one_warning(tmp_path, warnings):
    run = save_run(tmp_path / "run", describe(save_dataset(tmp_path / "data")))
    best = run / "checkpoints" / "best"
    content = json.loads((best / "config.json").read_text())
    del content["signal"]
    (best / "config.json").write_text(json.dumps(content))
    for name in ("manifest.json", "generation_config.json"):
        (best / name).unlink()
    call(evaluate_command, run, "--no-noise")
    call(evaluate_command, run, "--no-noise")
    assert len(warnings.messages) == 1 and "cannot be checked" in warnings.messages[0]


def test_a_changed_or_damaged_model_is_refused(tmp_path):
    run = save_run(tmp_path / "run", save_dataset(tmp_path / "data"), signal=SIGNAL)
    best = run / "checkpoints" / "best"
    whole = {path.name: path.read_bytes() for path in best.iterdir()}
    weights = bytearray(whole["model.safetensors"])
    weights[-5] ^= 1
    config = whole["config.json"].replace(b'"heads": 2', b'"heads": 8')
    assert config != whole["config.json"]
    damages = {
        "model.safetensors": [bytes(weights), whole["model.safetensors"][:-100]],
        "config.json": [config],
    }
    for name, contents in damages.items():
        for content in contents:
            (best / name).write_bytes(content)
            for attempt in (
                lambda: call(evaluate_command, run),
                lambda: BrainToText.from_pretrained(best),
            ):
                with pytest.raises(UserError, match=f"{name} has .* restore it from a copy"):
                    attempt()
        (best / name).write_bytes(whole[name])
    BrainToText.from_pretrained(best)
    BrainToText.from_pretrained(best).save_pretrained(tmp_path / "again")
    BrainToText.from_pretrained(tmp_path / "again")


def test_training_writes_down_its_signals(tiny_trials):
    materials = build(
        load_config(
            "demo",
            [
                *SMALL,
                f"data.path={tiny_trials}",
                "data.augment.smoothing_bins=2",
                "evaluation.num_beams=3",
                "evaluation.max_new_tokens=17",
            ],
        )
    )
    signals = [np.asarray(row["signal"]) for row in materials.train]
    typical = np.median([np.sqrt((signal**2).mean()) for signal in signals])
    signal = materials.model.config.signal
    assert signal["rms"] == pytest.approx(typical, rel=0.02)
    assert signal["smoothing_bins"] == 2 and signal["channel_names"] is None
    decoding = materials.model.generation_config
    assert (decoding.num_beams, decoding.max_new_tokens) == (3, 17)
