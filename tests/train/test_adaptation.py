"""A session without labels against the same signals with them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, load_from_disk

from b2t.data.batches import eval_batches
from b2t.data.trials import trial_features
from b2t.errors import UserError
from b2t.evaluate.decode import collapse_ctc
from b2t.evaluate.metrics import phoneme_error_rate
from b2t.model import BrainToText
from b2t.train import adapt_command
from b2t.train.adaptation import PseudoLabel, _confident, add_sessions, hear
from tests.evaluate.saved_runs import call
from tests.model.test_brain_to_text import build

CHANNELS, PHONEMES = 6, 5


def trials(session, count, seed, change=None):
    """Trials in which each of five phonemes lights a channel for a patch, between silent ones."""
    generator = np.random.default_rng(seed)
    rows = []
    for trial in range(count):
        said = generator.integers(1, PHONEMES + 1, 8)
        signal = np.zeros((64, CHANNELS), "float32")
        for place, phoneme in enumerate(said):
            signal[8 * place : 8 * place + 4, phoneme - 1] = 2.0
        signal = signal + 0.3 * generator.standard_normal(signal.shape, dtype="float32")
        signal = signal if change is None else signal @ change
        rows.append(
            {
                "signal": signal.astype("float32"), "text": "so", "phonemes": said.tolist(),
                "session": session, "subject": "s", "block": 0, "trial": trial,
                "sampling_rate": 50.0, "split": "train",
            }
        )  # fmt: skip
    return Dataset.from_list(rows, features=trial_features(CHANNELS))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model that reads sessions a and b, and a dataset of another whose channels are mixed."""
    folder = tmp_path_factory.mktemp("adapt")
    off = {"enabled": False}
    model = build(
        quantizer=off, text_decoder=off, sessions=["a", "b"],
        encoder={"kind": "conv", "kernel_size": 1, "depth": 1, "patch_stride": 4},
    )  # fmt: skip
    torch.nn.init.zeros_(model.adapter.bias)
    parts = [next(eval_batches(trials(s, 24, n), None, ["a", "b"], batch_size=24))
             for n, s in enumerate("ab")]  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(120):
        loss = model(parts[step % 2], weights={"phoneme": 1.0}).loss
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    model.eval().save_pretrained(folder / "model")
    generator = np.random.default_rng(6)
    mixed = np.eye(CHANNELS) * 0.8 + 0.26 * generator.standard_normal((CHANNELS, CHANNELS))
    new = trials("c", 48, 9, mixed.astype("float32"))
    DatasetDict({"train": new, "val": trials("c", 24, 10, mixed.astype("float32"))}).save_to_disk(
        str(folder / "data")
    )
    return folder


def error_rate(model, dataset, session):
    (batch,) = eval_batches(dataset, None, model.config.sessions, batch_size=100)
    batch = replace(batch, session=torch.full_like(batch.session, session))
    output = model.eval()(batch, weights={"phoneme": 1.0})
    heard = collapse_ctc(output.phoneme_logits, output.frame_mask)
    own = dict(zip(batch.rows, heard, strict=True))
    said = [row["phonemes"] for row in dataset]
    return phoneme_error_rate(said, [own[f"{r['session']}/0/{r['trial']}"] for r in dataset])


def test_errors_fall_on_trials_that_it_never_saw(saved, tmp_path, capsys):
    call(
        adapt_command, saved / "model", saved / "data", f"--out={tmp_path / 'new'}", "--lr=0.003",
        "--rounds=4", "--epochs=4", "--batch-size=8", "--keep=0.5",
    )  # fmt: skip
    assert "round 4" in capsys.readouterr().out
    before = BrainToText.from_pretrained(saved / "model")
    after = BrainToText.from_pretrained(tmp_path / "new")
    assert after.config.sessions == ["a", "b", "c"]
    held_out = load_from_disk(str(saved / "data"))["val"]
    first, last = error_rate(before, held_out, -1), error_rate(after, held_out, 2)
    assert first > 0.05 and last < 0.5 * first, (first, last)
    for name, value in before.state_dict().items():
        now = after.state_dict()[name]
        assert torch.equal(now[:2] if name.startswith("adapter.") else now, value), name
    record = json.loads((tmp_path / "new" / "adaptation.json").read_text())
    assert record["sessions"] == ["c"] and len(record["rounds"]) == 5
    assert record["rounds"][-1]["per"] < record["rounds"][0]["per"]


def test_labels_are_never_looked_at(saved, tmp_path):
    wrong = load_from_disk(str(saved / "data"))
    wrong["train"] = wrong["train"].map(lambda row: {"phonemes": [7] * 3})
    wrong.save_to_disk(str(tmp_path / "wrong-data"))
    found = []
    for name, data in (("right", saved / "data"), ("wrong", tmp_path / "wrong-data")):
        out = f"--out={tmp_path / name}"
        call(adapt_command, saved / "model", data, out, "--rounds=1", "--epochs=1")
        found.append(BrainToText.from_pretrained(tmp_path / name).adapter.weight)
    assert torch.equal(*found)
    known = BrainToText.from_pretrained(saved / "model").adapter.weight
    assert not torch.equal(found[0][2], known.mean(0))


def test_a_new_map_is_the_mean_of_the_others(saved):
    model = BrainToText.from_pretrained(saved / "model")
    grown = add_sessions(model, ["c", "d"])
    dataset = load_from_disk(str(saved / "data"))["val"]
    (batch,) = eval_batches(dataset, None, ["c"], batch_size=100)
    unseen = model.encode(batch.signal, batch.signal_mask, -1).latents
    for session in ("c", "d"):
        found = grown.encode(batch.signal, batch.signal_mask, session).latents
        torch.testing.assert_close(found, unseen)
    assert model.config.sessions == ["a", "b"] and len(model.adapter.weight) == 2


def test_words_correct_what_is_heard(saved):
    """A decoder that always says "so": its phonemes are the labels, and agreement is counted."""
    model = add_sessions(BrainToText.from_pretrained(saved / "model"), ["c"])
    dataset = load_from_disk(str(saved / "data"))["val"]
    batches = list(eval_batches(dataset, None, ["c"], batch_size=8))

    class Words:
        def decode(self, logits, mask):
            return ["so"] * len(logits)

    alone, corrected = hear(model, batches), hear(model, batches, Words())
    for row, label in corrected.items():
        assert label.phonemes == [29, 25, 40]
        agreement = max(1 - phoneme_error_rate([label.phonemes], [alone[row].phonemes]), 0)
        assert label.confidence == pytest.approx(alone[row].confidence * agreement)


def test_the_surest_trials_are_learnt_from():
    labels = {f"r{i}": PseudoLabel([1] if i else [], i / 10) for i in range(9)}
    assert _confident(labels, 0.5) == {"r5", "r6", "r7", "r8"}
    with pytest.raises(UserError, match="no phoneme"):
        _confident({"r0": PseudoLabel([], 0.0)}, 0.5)


def test_what_cannot_be_adapted(saved, tmp_path):
    out = f"--out={tmp_path / 'new'}"
    DatasetDict({"train": trials("a", 3, 0)}).save_to_disk(str(tmp_path / "known"))
    with pytest.raises(UserError, match="trained on all of its sessions"):
        call(adapt_command, saved / "model", tmp_path / "known", out)
    with pytest.raises(UserError, match="keep"):
        call(adapt_command, saved / "model", saved / "data", out, "--keep=0")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file").touch()
    with pytest.raises(UserError, match="there already"):
        call(adapt_command, saved / "model", saved / "data", out)
    with pytest.raises(UserError, match="no maps of sessions"):
        add_sessions(build(adapter={"enabled": False}), ["c"])
