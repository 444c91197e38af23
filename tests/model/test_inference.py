"""The model on a user's own arrays."""

import json
import logging

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from b2t.errors import UserError
from b2t.model import BrainToText, decode_texts
from b2t.model.tokenizer import byte_tokenizer
from tests.model.small_model import CHANNELS, SESSIONS, batch_of, build, part

NAMES = [f"C{i}" for i in range(CHANNELS)]
SIGNAL = {"channel_names": NAMES, "unit": "z-score", "rms": 1.0}


@pytest.fixture(scope="module")
def model():
    model = build(signal=SIGNAL, vocab_size=259, encoder={"dropout": 0.3})
    model.tokenizer = byte_tokenizer()
    return model


@pytest.fixture(scope="module")
def batch():
    return batch_of([40, 23, 40])


def test_one_trial_as_numpy_is_that_row_of_the_batch(model, batch):
    sessions = [None if index < 0 else SESSIONS[index] for index in batch.session.tolist()]
    expected = model.eval().encode_batch(batch.signal, batch.signal_mask, batch.session)
    tokens = model.generate(batch, max_new_tokens=6)
    texts = [text.strip() for text in decode_texts(model.tokenizer, tokens)]
    model.train()
    for row, bins in enumerate([40, 23, 40]):
        trial = batch.signal[row, :bins].numpy().astype(np.float64)
        found = model.encode(trial, session=sessions[row])
        frames = found.codes.shape[0]
        assert found.codes.shape == (frames, 3) and found.frame_mask.all()
        assert torch.equal(found.codes, expected.codes[row, :frames])
        torch.testing.assert_close(
            found.quantized, expected.quantized[row, :frames], atol=2e-5, rtol=1e-4
        )
        assert not found.latents.requires_grad
        assert model.transcribe(trial, session=sessions[row], max_new_tokens=6) == texts[row]
        listed = trial.tolist()
        assert model.transcribe(listed, session=sessions[row], max_new_tokens=6) == texts[row]
    assert model.training, "the mode it came in"


def test_trials_together_take_names_or_indices_of_sessions(model, batch):
    signal, mask = batch.signal.numpy(), batch.signal_mask.numpy()
    named = model.encode(signal, mask, ["c", "a", "b"]).latents
    for same in (torch.tensor([2, 0, 1]), np.array([2, 0, 1]), [2, 0, 1]):
        assert torch.equal(model.encode(signal, mask, same).latents, named)
    assert not torch.equal(model.encode(signal, mask, "a").latents, named)
    texts = model.transcribe(signal, ["c", "a", "b"], signal_mask=mask, max_new_tokens=4)
    assert isinstance(texts, list) and len(texts) == 3
    unseen = model.encode(signal, mask, -1).latents
    assert torch.equal(model.encode(signal, mask).latents, unseen)


def test_channels_are_aligned_by_name(model, batch):
    trial = batch.signal[0].numpy()
    order = [4, 2, 0, 5, 1, 3]
    turned = model.encode(trial[:, order], session="a", channels=[NAMES[i] for i in order])
    assert torch.equal(turned.latents, model.encode(trial, session="a", channels=NAMES).latents)
    more = np.concatenate([np.full((40, 1), 9.0), trial], 1)
    wide = model.encode(more, session="a", channels=["EOG", *NAMES])
    assert torch.equal(wide.latents, turned.latents)


@pytest.mark.parametrize(
    ("change", "arguments", "told"),
    [
        (lambda x: x.T, {}, "6×40.* has 40 channels, the model reads 6; it looks transposed"),
        (lambda x: x[:, :4], {}, "40×4, so it has 4 channels, the model reads 6$"),
        (lambda x: x[0], {}, r"shape is 6, expected \[T, C\]"),
        (lambda x: x[None, None], {}, r"expected \[T, C\] for one trial or \[B, T, C\]"),
        (lambda x: x[:0], {}, "0×6: it holds no values"),
        (lambda x: np.where(np.arange(40)[:, None] == 7, np.nan, x), {}, "nan in trial 0, bin 7"),
        (lambda x: x.astype("U5"), {}, "of type <U5, expected real numbers"),
        (lambda x: x + 1j, {}, "complex"),
        (lambda x: x * 1e-5, {}, "root mean square is .*e-0[56].*force=True"),
        (lambda x: None, {}, "of type object, expected real numbers"),
        (lambda x: [[1.0, 2.0], [3.0]], {}, "signal: no array of numbers"),
        (lambda x: x, {"sampling_rate": float("nan")}, "sampling_rate: found nan, expected"),
        (lambda x: x, {"session": 1.5}, "session: 1.5 is no index"),
        (lambda x: x, {"session": [None]}, "session: None is no index"),
        (lambda x: x, {"sampling_rate": 256.0}, "256 Hz .* the model at 50 Hz"),
        (lambda x: x, {"session": "d"}, r"session: d was not trained on, .* 3 \(a, b, c\)"),
        (lambda x: x, {"session": 3}, "3 is no index of the 3 sessions"),
        (lambda x: x, {"session": ["a", "b"]}, "2 given for 1 trials"),
        (lambda x: x, {"channels": NAMES[:5]}, "6 channels, but channels names 5"),
        (lambda x: x, {"channels": [*NAMES[:5], "Cz"]}, r"lacks 1 of the channels \(C5\)"),
        (lambda x: x, {"signal_mask": np.ones(39, bool)}, "signal_mask: bool of shape 1×39"),
        (lambda x: x, {"signal_mask": np.ones(40)}, "signal_mask: float64"),
    ],
)  # fmt: skip
def test_what_the_model_cannot_read_is_one_message(model, batch, change, arguments, told):
    trial = change(batch.signal[0].numpy())
    for method in (model.encode, model.transcribe):
        with pytest.raises(UserError, match=told):
            method(trial, **arguments)


def test_insisting_warns_and_goes_on(model, batch, caplog):
    with caplog.at_level(logging.WARNING, "b2t"):
        found = model.encode(batch.signal[0].numpy() * 1e3, session="a", force=True)
    assert torch.isfinite(found.latents).all()
    assert sum("going on" in message for message in caplog.messages) == 1


def test_masked_bins_may_hold_anything(model, batch):
    signal, mask = batch.signal[1:2].clone(), batch.signal_mask[1:2]
    expected = model.encode(part(batch, 1, 2, 23).signal, session="a")
    signal[~mask] = float("nan")
    found = model.encode(signal, mask, "a")
    assert torch.equal(found.codes[:, : expected.codes.shape[1]], expected.codes)


def test_a_saved_model_brings_its_tokenizer_and_its_way_of_decoding(model, batch, tmp_path):
    model.generation_config.num_beams, model.generation_config.max_new_tokens = 2, 5
    model.save_pretrained(tmp_path / "one")
    loaded = BrainToText.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    again = BrainToText.from_pretrained(tmp_path / "two")
    trial = batch.signal[0]
    expected = model.transcribe(trial, "a", num_beams=2, max_new_tokens=5)
    assert again.transcribe(trial, "a") == expected
    assert model.generate(trial, session="a").shape[1] <= 6
    assert GenerationConfig.from_pretrained(tmp_path / "two").num_beams == 2
    assert len(AutoTokenizer.from_pretrained(tmp_path / "two")) == 259
    manifest = json.loads((tmp_path / "two" / "manifest.json").read_text())
    assert {"config.json", "generation_config.json", "tokenizer_config.json"} <= set(manifest)
    model.generation_config.num_beams, model.generation_config.max_new_tokens = 1, 12


def test_a_model_without_its_tokenizer_says_so(tmp_path, batch):
    build().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no tokenizer"):
        BrainToText.from_pretrained(tmp_path).transcribe(batch.signal[0], "a")
    with pytest.raises(UserError, match="no text decoder"):
        build(text_decoder={"enabled": False}).transcribe(batch.signal[0], "a")
