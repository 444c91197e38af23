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
    parts = standardize(split(list(segments[:, None]), rng.permutation(60)))
    recording = Recording(*parts, patch=4)
    monkeypatch.setattr(study, "load", lambda name, folder, hold_subjects: recording)
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
        if line["plan"]["condition"] == "none":
            assert result["snr_latents_db"] == result["snr_pooled_db"]
        else:
            assert result["snr_latents_db"] > result["snr_pooled_db"]
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


def test_quantizers_of_a_seed_train_on_the_same_batches(study, waves, tmp_path, monkeypatch):
    """Whatever their start draws: another order of batches moves the autoencoder itself by more."""
    batches = []
    step = study.Run._step

    def seen(self, *arguments):
        crops = self.crops
        self.crops = lambda *a: batches[-1].append(crops(*a)) or batches[-1][-1]
        step(self, *arguments)
        self.crops = crops

    monkeypatch.setattr(study.Run, "_step", seen)
    conditions = ("none", "full", "vqp-best", "default", "vqp-late")
    for condition in conditions:
        batches.append([])
        run(study, tmp_path / "runs.jsonl", "--conditions", condition)
    first, *others = map(torch.cat, batches)
    assert len(others) == 4
    for other in others:
        assert torch.equal(first, other)


@pytest.mark.parametrize("condition", ["default", "vqp-late"])
def test_codes_start_after_their_share_of_the_steps(study, waves, tmp_path, monkeypatch, condition):
    quantized, step = [], study.Run._step

    def seen(self, *arguments):
        self.quantizer.register_forward_hook(lambda *a: quantized.append(a[2][1] is not None))
        step(self, *arguments)
        self.quantizer._forward_hooks.clear()

    monkeypatch.setattr(study.Run, "_step", seen)
    run(study, tmp_path / "runs.jsonl", "--conditions", condition)
    assert quantized == [False] * 6 + [True] * 6


def test_search_never_sees_held_segments(study, waves, tmp_path):
    waves.held = torch.full_like(waves.held, float("nan"))
    run(study, tmp_path / "a", "--conditions", "full", "--on", "validation")
    (line,) = study.load_lines(tmp_path / "a")
    assert np.isfinite(line["result"]["snr_pooled_db"])


def test_parts_share_no_segment(study):
    from collapse.recordings import split

    units = list(np.arange(50.0)[:, None, None, None])
    parts = split(units, np.random.default_rng(0).permutation(50))
    assert [len(p) for p in parts] == [30, 10, 10]
    assert sorted(np.concatenate(parts).ravel()) == list(range(50))


def subject(number, units=10):
    """Units of three segments whose scale tells the subject, and whose order tells the unit."""
    rng = np.random.default_rng(number)
    return [10.0**number * rng.standard_normal((3, 8, 2)) for _ in range(units)]


def test_whole_subjects_are_held_out(study):
    from collapse.recordings import by_subjects

    four = by_subjects([subject(n) for n in range(4)], patch=4)
    assert [len(p) for p in (four.fit, four.validation, four.held)] == [60, 30, 30]
    own = np.concatenate(subject(3))
    own = own - own.mean(1, keepdims=True)
    np.testing.assert_allclose(four.held, own / own.std((0, 1)), rtol=1e-5, atol=1e-6)
    two = by_subjects([subject(n) for n in range(2)], patch=4)
    assert [len(p) for p in (two.fit, two.validation, two.held)] == [18, 6, 30]
    one = by_subjects([subject(0)], patch=4)
    assert [len(p) for p in (one.fit, one.validation, one.held)] == [18, 6, 6]


@pytest.mark.parametrize("patch", [2, 4, 8, 16])
@pytest.mark.parametrize("name", ["block", "mlp", "strided"])
def test_autoencoders_keep_frames_and_patches(study, name, patch):
    """A frame for each patch, and patches laid out as the signal's own."""
    from collapse.autoencoder import AUTOENCODERS, LATENT

    torch.manual_seed(0)
    model = AUTOENCODERS[name](3, patch)
    signal = torch.randn(2, 6 * patch, 3)
    latents = model.encode(signal)
    assert latents.shape == (2, 6, LATENT) and model.decode(latents).shape == (2, 6, 3 * patch)
    later = model.encode(torch.roll(signal, patch, 1))  # one patch later, one frame later
    torch.testing.assert_close(later[:, 2:5], latents[:, 1:4], atol=1e-4, rtol=1e-4)


def test_a_patch_that_strides_cannot_make_is_refused(study):
    from collapse.autoencoder import Strided

    with pytest.raises(ValueError, match="patch 6"):
        Strided(3, 6)


def line(condition, seed, snr, on="held", model="mlp"):
    plan = {"data": "feis", "autoencoder": model, "condition": condition, "seed": seed, "on": on}
    names = ("snr_pooled_db", "snr_median_db", "snr_train_db", "cosine", "effective_rank")
    result = dict.fromkeys((*names, "ms_step", "ms_quantizer", "revived_per_step"), snr)
    return {"plan": plan, "result": result}


def test_leads_are_those_of_the_same_seed(study):
    """A lead that every seed has is ahead of any spread that the seeds share."""
    from collapse.everywhere import places_of, table, tried, verdicts

    lines = [line("vqp-best", s, 10.0 * s) for s in range(3)]
    lines += [line("default", s, 10.0 * s + 0.5 + 0.01 * s) for s in range(3)]
    lines += [line("other", s, 10.0 * s + (-1) ** s) for s in range(3)]
    places = places_of(lines, "held")
    assert "+0.51 ± 0.01 ahead |" in verdicts(places, "default")
    assert "ahead, within the spread" in verdicts(places, "other")
    assert places_of(lines, "validation") == {}
    rows = tried(places).splitlines()
    assert rows[2].startswith("| default | 1 |") and rows[2].endswith("| +0.510 |")
    # Nothing is in use where nothing is quantized.
    assert "| +0.51 ± 0.01 | – | – | 11 | 11 |" in table(places)


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
