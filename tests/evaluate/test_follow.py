"""`b2t decode --follow` against `b2t decode` of the same bins."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from datasets import load_from_disk

from b2t.data.phonemes import to_names
from b2t.data.prepare.blocks import ALL, save_statistics
from b2t.errors import UserError
from b2t.evaluate import decode_command
from b2t.evaluate.bin_source import read_bins, sentences
from b2t.evaluate.decode import collapse_ctc
from b2t.model import BrainToText
from b2t.model.tokenizer import byte_tokenizer
from tests.evaluate.saved_runs import CHANNELS, call, save_dataset
from tests.model.test_brain_to_text import build

GAP = np.full((1, CHANNELS), np.nan, "<f4")


def save_model(folder, **change):
    tokenizer = byte_tokenizer()
    model = build(
        encoder={"kind": "conv", "causal": True}, sessions=["day0", "day1"],
        signal={"smoothing_bins": 1.0}, vocab_size=len(tokenizer), **change,
    )  # fmt: skip
    torch.nn.init.normal_(model.phoneme_head.classify.weight, std=2.0)
    model.tokenizer = tokenizer if model.text_decoder is not None else None
    model.eval().save_pretrained(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A causal model with phonemes and text, a dataset, and its test trials as one recording."""
    folder = tmp_path_factory.mktemp("causal")
    data = save_dataset(folder / "data")
    save_model(folder / "model")
    trials = [np.asarray(s, "<f4") for s in load_from_disk(str(data))["test"]["signal"]]
    recording = np.concatenate([part for trial in trials for part in (trial, GAP)])
    return folder / "model", data, trials, recording


def lines(text, kind):
    found = [line.split("\t") for line in text.splitlines()]
    return [said for _, what, said in found if what == kind]


@pytest.mark.filterwarnings("error:The given NumPy array is not writable")
def test_the_last_texts_are_those_of_whole_trials(saved, tmp_path, capsys):
    folder, data, trials, recording = saved
    (tmp_path / "bins.f32").write_bytes(recording.tobytes())
    assert call(decode_command, folder, data, "--force") == 0
    offline = [line.split("\t")[1] for line in capsys.readouterr().out.splitlines()]
    source = f"--follow={tmp_path / 'bins.f32'}"
    for session in ("day0", "day1"):
        call(decode_command, folder, source, f"--session={session}", "--idle=0.01")
        out, err = capsys.readouterr()
        own = [i for i in range(len(trials)) if f"day{i % 2}" == session]
        assert [lines(out, "final")[i] for i in own] == [offline[i].strip() for i in own]
    assert f"{sum(map(len, trials)):,} × bin of 20 ms" in err and "5 sentences" in err
    assert "waits for the 7 bins (140 ms)" in err


def test_raw_bins_are_read_as_those_of_the_training(saved, tmp_path, capsys):
    folder, _, _, recording = saved
    model = BrainToText.from_pretrained(folder)
    model.config.signal |= {"normalization": "block", "processing": {}}
    model.save_pretrained(tmp_path / "model")
    mean, deviation = np.arange(CHANNELS) + 5.0, np.linspace(20, 40, CHANNELS)
    save_statistics(tmp_path, {ALL: (mean * 0, deviation), "day0": (mean, deviation)})
    raw = (recording * deviation + mean).astype("<f4")
    found = {}
    for name, bins in (("scored", recording), ("raw", raw)):
        (tmp_path / name).write_bytes(bins.tobytes())
        source = [f"--follow={tmp_path / name}", "--session=day0", "--idle=0.01"]
        more = ["--raw", "--forget=86400", f"--start-from={tmp_path}"] if name == "raw" else []
        call(decode_command, tmp_path / "model", *source, *more)
        found[name] = lines(capsys.readouterr().out, "final")
    assert found["raw"] == found["scored"]
    with pytest.raises(UserError, match="does not say what was done"):
        call(decode_command, folder, f"--follow={tmp_path / 'raw'}", "--raw")


def test_phonemes_come_while_they_are_said(saved, tmp_path, capsys):
    _, _, trials, recording = saved
    save_model(tmp_path / "heard", text_decoder={"enabled": False})
    model = BrainToText.from_pretrained(tmp_path / "heard").eval()
    expected = []
    for trial in trials:
        quantized = model.encode(trial, session="day0").quantized
        logits = model.phoneme_head(quantized[None])
        (classes,) = collapse_ctc(logits, torch.ones(logits.shape[:2], dtype=torch.bool))
        expected.append(" ".join(to_names(classes)))
    np.save(tmp_path / "bins.npy", recording)
    source = [f"--follow={tmp_path / 'bins.npy'}", "--session=day0", "--idle=0.01"]
    for at_once in (1, 4):
        call(decode_command, tmp_path / "heard", *source, f"--at-once={at_once}")
        out = capsys.readouterr().out
        assert lines(out, "final") == expected
        said = []
        for _, kind, text in (line.split("\t") for line in out.splitlines()):
            if kind == "final":
                assert said or len(text) < 10
                assert all(text.startswith(each) for each in said), "what was said stays said"
                said = []
            else:
                assert not said or len(text) > len(said[-1])
                said.append(text)


@pytest.mark.distributed
def test_a_pipe_and_a_growing_file(saved, tmp_path, repository):
    """A real process prints a sentence before the next one is written."""
    folder, _, trials, _ = saved
    command = [sys.executable, "-m", "b2t.cli", "decode", str(folder), "--session=day0", "--follow"]
    pipe = {"stdout": subprocess.PIPE, "cwd": repository, "text": True}
    with subprocess.Popen([*command, "-"], stdin=subprocess.PIPE, **pipe) as process:
        said = []
        for trial in trials[:2]:
            process.stdin.buffer.write(np.concatenate((trial, GAP)).tobytes())
            process.stdin.flush()
            said.append(next(line for line in process.stdout if "final" in line))
        process.stdin.close()
        assert process.stdout.read() == "" and process.wait() == 0

    file = tmp_path / "growing.f32"
    file.write_bytes(trials[0][:5].tobytes())

    def write():
        with file.open("ab") as out:
            for block in (trials[0][5:].tobytes()[:30], trials[0][5:].tobytes()[30:]):
                time.sleep(0.3)
                out.write(block)
                out.flush()

    writer = threading.Thread(target=write)
    writer.start()
    found = np.concatenate(list(read_bins(str(file), CHANNELS, idle_s=1.5)))
    writer.join()
    assert np.array_equal(found, trials[0])


def test_sentences_end_at_bins_of_nan():
    a, b = np.zeros((3, 2), "<f4"), np.ones((2, 2), "<f4")
    gap = np.full((1, 2), np.nan, "<f4")
    blocks = [np.concatenate((gap, a, gap, gap, b[:1])), b[1:]]
    found = [None if x is None else x[:, 0].tolist() for x in sentences(iter(blocks), 2)]
    assert found == [[0, 0], [0], None, [1], [1], None]


def test_what_cannot_be_followed(saved, tmp_path):
    folder, data, _, recording = saved
    file = tmp_path / "bins.f32"
    file.write_bytes(recording.tobytes()[:-4])
    follow = f"--follow={file}"
    with pytest.raises(UserError, match=r"ends within a bin, 20 bytes"):
        call(decode_command, folder, follow, "--idle=0.01")
    with pytest.raises(UserError, match="no such file"):
        call(decode_command, folder, "--follow=nowhere")
    with pytest.raises(UserError, match="dataset to decode, or --follow"):
        call(decode_command, folder)
    with pytest.raises(UserError, match="dataset to decode, or --follow"):
        call(decode_command, folder, data, follow)
    with pytest.raises(UserError, match="day9 was not trained on"):
        call(decode_command, folder, follow, "--session=day9")
    for array, name in ((recording.astype("f8"), "float64"), (recording[:, :5], "×5")):
        np.save(tmp_path / "wrong.npy", array)
        with pytest.raises(UserError, match=name):
            call(decode_command, folder, f"--follow={tmp_path / 'wrong.npy'}", "--idle=0.01")
