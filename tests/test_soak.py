"""The comparison at the end of `make soak` sees every kind of difference."""

import importlib
import json
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file


@pytest.fixture(autouse=True)
def scripts(repository, monkeypatch):
    monkeypatch.syspath_prepend(repository / "scripts")


@pytest.fixture
def comparison(monkeypatch):
    module = importlib.import_module("soaking.comparison")
    monkeypatch.setattr(module, "transcripts", lambda folder: (folder / "said").read_text())
    return module


@pytest.fixture
def places():
    return importlib.import_module("soaking.runs")


@pytest.fixture
def runs(tmp_path):
    for name in ("alone", "killed"):
        step = tmp_path / name / "checkpoints" / "step-00000009"
        best = tmp_path / name / "checkpoints" / "best"
        step.mkdir(parents=True)
        best.mkdir()
        for file in (step / "weights", step / "moments", best / "model"):
            save_file({"a": np.array([0.0, 1.0])}, file.with_suffix(".safetensors"))
        record = {"step": 1, "loss/total": 2.0, "time/step_s": 1.0 if name == "alone" else 2.0}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        (tmp_path / name / "said").write_text("hello")
    return tmp_path / "alone", tmp_path / "killed"


def test_equal_runs_may_differ_in_time(comparison, runs):
    assert comparison.compare(*runs) == []


@pytest.mark.parametrize("name", ["step-00000009/weights", "step-00000009/moments", "best/model"])
def test_one_bit(comparison, runs, name):
    save_file({"a": np.array([-0.0, 1.0])}, runs[1] / "checkpoints" / f"{name}.safetensors")
    assert comparison.compare(*runs) == [f"checkpoints/{name}.safetensors differs"]


def test_a_loss_a_word_and_a_lost_checkpoint(comparison, runs):
    (runs[1] / "metrics.jsonl").write_text('{"step": 1, "loss/total": 2.0000000000000004}\n')
    (runs[1] / "said").write_text("hallo")
    shutil.rmtree(runs[1] / "checkpoints" / "best")
    assert comparison.compare(*runs) == [
        "checkpoints/best/model.safetensors differs",
        "metrics.jsonl differs",
        "decoded text differs",
    ]


@pytest.mark.parametrize(
    ("visited", "place"),
    [
        ([], "start"),
        (["starting", "reading the checkpoint"], "start"),
        (["trying the longest trials", "building the engine of phase joint"], "start"),
        (["starting the codebooks"], "k-means"),
        (["opening step 3 of phase joint", "in step 3 of phase joint"], "step of phase joint"),
        (["opening step 3 of phase codebook"], "step of phase codebook"),
        (["saving after step 4"], "save"),
        (["validating after step 9"], "validation"),
        (["decoding after phase tokenizer"], "decoding"),
        (["ending phase tokenizer"], "phase change"),
        (["ending phase tokenizer", "saving before phase codebook"], "phase change"),
        (
            ["ending phase tokenizer", "saving before phase x", "building the engine of phase x"],
            "phase change",
        ),
        (["saving after step 60", "finishing"], "save"),
    ],
)
def test_places_are_told_apart(places, visited, place):
    assert places.place_of(visited) == place
    assert place in places.PLACES


def test_every_place_that_the_trainer_names_is_known(places, repository):
    """A new place in the code must not count as the start."""
    sources = "".join(p.read_text() for p in (repository / "b2t" / "train").glob("*.py"))
    named = re.findall(r'place = f?"([a-z ]+)', sources)
    named = ["opening step" if place in ("opening ", "in ") else place for place in named]
    assert len(named) >= 10
    known = ("starting", "reading the checkpoint", "trying the longest trials", "looking for what")
    known += ("comparing checksums of the data", "looking for the run folder")
    for place in named:
        found = places.place_of([place.strip()])
        assert found != "start" or place.startswith((*known, "building the engine")), place
