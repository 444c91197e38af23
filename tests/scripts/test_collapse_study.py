import json
import sys

import numpy as np
import pytest
import torch

from tests.script_modules import script


@pytest.fixture(scope="module")
def study(repository):
    with script(repository, "collapse_study") as module:
        yield module


@pytest.fixture
def waves(study, monkeypatch):
    """A recording of sines, in place of a real one."""
    time, rng = np.arange(64) / 64, np.random.default_rng(0)
    phase, rate = rng.uniform(0, 6, (60, 1, 4)), rng.integers(1, 5, (60, 1, 4))
    from collapse.recordings import Recording, split, standardize

    segments = np.sin(phase + 6.28 * rate * time[:, None])
    parts = standardize(split(segments, rng.permutation(60)))
    recording = Recording(*parts, patch=4)
    monkeypatch.setitem(study.DATA, "feis", lambda folder: recording)
    return recording


def run(study, out, *more):
    few = ["--sizes", "2x16", "--seeds", "1", "--steps", "12", "--frames", "128"]
    return study.main([*few, "--out", str(out), *more])


def test_a_condition_runs_once_and_is_reported(study, waves, tmp_path):
    out = tmp_path / "runs.jsonl"
    run(study, out, "--conditions", "full", "vqp", "none", "faiss")
    lines = study.load_lines(out)
    assert [line["plan"]["condition"] for line in lines] == ["full", "vqp", "none", "faiss"]
    for line in lines:
        result = line["result"]
        assert np.isfinite(result["snr_pooled_db"])
        if line["plan"]["condition"] != "none":
            held = len(waves.held) * (16 + 15 + 15 + 15)  # four positions of the patch grid
            assert result["usage_frames"] == held
            assert result["dead"] == sum(16 * (1 - u) for u in result["utilization"])
    run(study, out, "--conditions", "full", "vqp", "none", "faiss")
    assert len(study.load_lines(out)) == 4
    sys.path.insert(0, str(study.ROOT / "scripts"))
    from collapse.report import BEGIN, END, write_report

    (tmp_path / "RESULTS.md").write_text(f"kept\n{BEGIN}\nold\n{END}\nalso kept\n")
    write_report(lines, tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    assert text.startswith("kept") and text.endswith("also kept\n") and "\nold\n" not in text
    assert f"| full | 1 | {100 * min(lines[0]['result']['utilization']):.1f} |" in text
    assert (tmp_path / "collapse_study.png").stat().st_size > 0


def test_same_seed_same_result(study, waves, tmp_path):
    results = []
    for name in ("a", "b"):
        run(study, tmp_path / name, "--conditions", "full", "--on", "validation")
        (line,) = study.load_lines(tmp_path / name)
        results.append({k: v for k, v in line["result"].items() if not k.startswith("ms_")})
    assert json.dumps(results[0]) == json.dumps(results[1])


def test_search_never_sees_held_segments(study, waves, tmp_path):
    waves.held = torch.full_like(waves.held, float("nan"))
    run(study, tmp_path / "a", "--conditions", "full", "--on", "validation")
    (line,) = study.load_lines(tmp_path / "a")
    assert np.isfinite(line["result"]["snr_pooled_db"])


def test_parts_share_no_segment(study):
    from collapse.recordings import split

    segments = np.arange(50.0)[:, None, None]
    parts = split(segments, np.random.default_rng(0).permutation(50))
    assert [len(p) for p in parts] == [30, 10, 10]
    assert sorted(np.concatenate(parts).ravel()) == list(range(50))


def test_tally_measures_snr_and_perplexity(study):
    from collapse.run import Tally

    tally = Tally(1, 4)
    signal = torch.full((1, 2, 2), 2.0)
    codes = torch.tensor([[[0], [1]]])
    tally.add(signal, signal - 0.2, torch.randn(1, 2, 3), codes)
    result = tally.result()
    assert result["snr_pooled_db"] == pytest.approx(20.0, abs=1e-4)
    assert result["perplexity_of_k"] == [pytest.approx(0.5)]
    assert result["utilization"] == [0.5] and result["dead"] == 2
