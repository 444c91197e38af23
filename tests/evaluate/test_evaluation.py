import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from threading import Barrier
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from b2t.data.batches import Batch
from b2t.evaluate.decode import collapse_ctc, decode_batches
from b2t.evaluate.evaluation import evaluate_model


class Reader(nn.Module):
    """Says what channel 0 spells (value = token), phonemes from channel 1, codes from both."""

    def __init__(self, text=True, phonemes=True, quantizer=True):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.text_decoder = nn.Identity() if text else None
        self.quantizer = SimpleNamespace(codebook_size=8) if quantizer else None
        self.phonemes = phonemes
        self.config = SimpleNamespace(sampling_rate=50.0)

    def forward(self, batch, weights):
        assert not self.training and not torch.is_grad_enabled()
        codes = batch.signal.round().long().clamp(0, 7)
        codes = codes.masked_fill(~batch.signal_mask[..., None], -1)
        classes = batch.signal[..., 1].round().long().clamp(0, 40)
        return SimpleNamespace(
            reconstruction=batch.target + 0.1,
            codes=codes if self.quantizer is not None else None,
            frame_mask=batch.signal_mask,
            phoneme_logits=nn.functional.one_hot(classes, 41).float() if self.phonemes else None,
        )

    def generate(self, batch, **kwargs):
        return batch.signal[..., 0].round().long().clamp(0, 7) * batch.signal_mask


class Letters:
    eos_token_id, bos_token_id = 99, 98

    def decode(self, tokens, skip_special_tokens):
        return "".join(" abcdefg"[token] for token in tokens)


def batch_of(texts, phonemes, start=0, bins=6):
    size = len(texts)
    signal = torch.zeros(size, bins, 2)
    mask = torch.zeros(size, bins, dtype=torch.bool)
    labels = torch.zeros(size, bins, dtype=torch.int64)
    for row, (text, sounds) in enumerate(zip(texts, phonemes, strict=True)):
        mask[row, : bins - row] = True
        for i, letter in enumerate(text or ""):
            signal[row, i, 0] = " abcdefg".index(letter)
        signal[row, : len(sounds), 1] = torch.tensor(sounds).float()
        labels[row, : len(sounds)] = torch.tensor(sounds)
    return Batch(
        signal=signal,
        target=signal.clone(),
        signal_mask=mask,
        session=torch.zeros(size, dtype=torch.int64),
        tokens=torch.full((size, 1), -100),
        phonemes=labels,
        phoneme_lengths=torch.tensor([len(s) for s in phonemes]),
        rows=[f"s/0/{start + i}" for i in range(size)],
        texts=list(texts),
    )


def test_a_perfect_reader_scores_zero_and_its_noise_control_does_not():
    texts = ["ab c d e", "da b f a", "f e d g"]
    batches = [
        batch_of(texts[:2], [[1, 2, 5], [3]], bins=9),
        batch_of(texts[2:], [[7, 2]], start=2, bins=9),
    ]
    result = evaluate_model(Reader(), batches, Letters(), split="test", num_beams=1)
    assert result.wer == result.cer == result.per == 0.0
    assert result.exact == 1.0 and result.distinct_ratio == 1.0
    assert result.wer_noise > 0.5 and result.per_noise > 0.5 and result.wer_shuffled > 0.9
    assert result.bleu == pytest.approx(100.0), "four words make the one 4-gram that it needs"
    assert [p.row for p in result.predictions] == ["s/0/0", "s/0/1", "s/0/2"]
    assert [p.prediction for p in result.predictions] == texts
    assert {p.session for p in result.predictions} == {"s"}
    assert result.decoding == {"num_beams": 1}
    assert result.frames == 9 + 8 + 9
    assert len(result.utilization) == len(result.perplexity) == 2


class Hoarse(Reader):
    """Gives trials back with an error of their own, and so that pooling differs from averaging."""

    def forward(self, batch, weights):
        output = super().forward(batch, weights)
        error = torch.tensor([0.1 + int(row.rsplit("/", 1)[1]) for row in batch.rows])
        output.reconstruction = batch.target + error[:, None, None]
        return output


def test_usage_and_snr_are_pooled_over_batches():
    """Of unequal rows, lengths and errors, so that no mean of means comes out the same."""
    batches = [
        batch_of(["ab", "gg a"], [[1, 3], [2]], bins=5),
        batch_of(["ggggggg"], [[2, 2, 2, 6]], start=2, bins=9),
    ]
    result = evaluate_model(Hoarse(), batches, Letters(), noise_control=False)
    power = error = 0.0
    counts, trial_snr = np.zeros((2, 8), int), []
    for batch in batches:
        for row, keep in enumerate(batch.signal_mask.numpy()):
            real = batch.target[row].numpy().astype(float)[keep]
            wrong = 0.1 + int(batch.rows[row].rsplit("/", 1)[1])
            power, error = power + (real**2).sum(), error + wrong**2 * real.size
            trial_snr.append(10 * np.log10((real**2).sum() / (wrong**2 * real.size)))
            for layer in range(2):
                counts[layer] += np.bincount(real[:, layer].round().astype(int), minlength=8)
    frames = counts[0].sum()
    assert result.usage == counts.tolist() and result.frames == frames == 5 + 4 + 9
    used = (counts > 0).sum(1) / 8
    share = counts / frames
    entropy = [-sum(p * math.log(p) for p in layer if p > 0) for layer in share]
    assert result.utilization == pytest.approx(used)
    assert result.perplexity == pytest.approx(np.exp(entropy))
    assert result.snr_db == pytest.approx(10 * math.log10(power / error), abs=1e-5)
    assert result.snr_median_db == pytest.approx(float(np.median(trial_snr)), abs=1e-5)
    assert result.mse == pytest.approx(error / (2 * frames))
    assert abs(result.snr_db - np.mean(trial_snr)) > 1, "pooled is another number than the mean"
    assert result.wer_noise is None


def test_a_tokenizer_only_model_has_no_text_scores_and_says_so():
    result = evaluate_model(Reader(text=False, phonemes=False), [batch_of([None], [[]])], None)
    assert result.wer is None and result.per is None and result.wer_noise is None
    assert any("no text decoder" in note for note in result.notes)
    assert result.mse == pytest.approx(0.01) and result.utilization


def test_rows_without_text_are_decoded_but_not_scored():
    result = evaluate_model(Reader(), [batch_of(["ab", None], [[1], []])], Letters())
    assert result.wer == 0.0
    assert result.predictions[1].prediction == "" and result.predictions[1].target is None
    only = evaluate_model(Reader(), [batch_of([None], [[]])], Letters())
    assert only.wer is None and any("no text" in note for note in only.notes)


def test_without_a_quantizer_usage_is_empty():
    result = evaluate_model(Reader(quantizer=False), [batch_of(["ab"], [[1]])], Letters())
    assert result.utilization == [] and result.codebook_size is None
    assert any("no quantizer" in note for note in result.notes)


def test_an_empty_split_gives_nulls_not_errors():
    result = evaluate_model(Reader(), [], Letters())
    assert result.rows == 0 and result.wer is None and result.snr_db is None
    json.dumps(result.to_dict(), allow_nan=False)


def test_the_models_mode_is_restored():
    model = Reader()
    evaluate_model(model.train(), [batch_of(["ab"], [[1]])], Letters())
    assert model.training
    evaluate_model(model.eval(), [batch_of(["ab"], [[1]])], Letters())
    assert not model.training


def test_files_hold_the_stable_names_and_strict_json(tmp_path):
    result = evaluate_model(Reader(), [batch_of(["ab", "dab"], [[1], [2]])], Letters())
    result.snr_median_db = math.inf
    result.save(tmp_path / "run")
    record = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    names = {"per", "cer", "wer", "wer_noise", "distinct_ratio", "utilization", "perplexity"}
    assert names | {"snr_db"} <= record.keys()
    assert record["snr_median_db"] is None and len(record["utilization"]) == 2
    lines = (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["target"] for line in lines] == ["ab", "dab"]
    usage = json.loads((tmp_path / "run" / "codebook_usage.json").read_text())["counts"]
    assert [sum(layer) for layer in usage] == [result.frames] * 2 and len(usage[0]) == 8
    traces = json.loads((tmp_path / "run" / "reconstruction.json").read_text())
    assert [t["row"] for t in traces["trials"]] == ["s/0/0", "s/0/1"]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "codebook_usage.json",
        "evaluation.json",
        "predictions.jsonl",
        "reconstruction.json",
    ]


def test_scalars_are_flat_and_finite():
    result = evaluate_model(Reader(), [batch_of(["ab"], [[1]])], Letters())
    result.snr_db = math.nan
    flat = result.scalars()
    assert flat["utilization/1"] == result.utilization[1] and "snr_db" not in flat
    assert all(math.isfinite(v) for v in flat.values())


def test_ctc_collapse_merges_repeats_unless_a_blank_parts_them():
    path = torch.tensor([[0, 5, 5, 0, 5, 7, 7, 0], [3, 3, 0, 0, 9, 9, 9, 9]])
    mask = torch.tensor([[1] * 8, [1] * 4 + [0] * 4]).bool()
    assert collapse_ctc(nn.functional.one_hot(path, 41), mask) == [[5, 5, 7], [3]]
    assert collapse_ctc(nn.functional.one_hot(path, 41), torch.zeros_like(mask)) == [[], []]


def test_decode_batches_pairs_rows_with_texts():
    batches = [batch_of(["ab", "dab"], [[1], [2]])]
    assert list(decode_batches(Reader(), batches, Letters())) == [("s/0/0", "ab"), ("s/0/1", "dab")]


def test_rows_come_in_the_order_of_their_numbers():
    batches = [batch_of(["ab"], [[1]], start=start) for start in (10, 2, 1)]
    result = evaluate_model(Reader(), batches, Letters(), noise_control=False)
    assert [p.row for p in result.predictions] == ["s/0/1", "s/0/2", "s/0/10"]


def test_ranks_that_share_the_rows_find_what_one_finds():
    """Three threads as ranks, of which one has no rows."""
    batches = [
        batch_of(["ab", "dab"], [[1, 5], [2]]),
        batch_of(["bad"], [[3, 4]], start=2),
        batch_of([None, "a"], [[7], [1, 2]], start=3),
    ]
    shares, met, given = [batches[::2], batches[1:2], []], Barrier(3), {}

    def found_by(rank):
        def gather(value):
            given[rank] = value
            met.wait()
            return [given[other] for other in range(3)]

        return evaluate_model(Reader(), shares[rank], Letters(), gather=gather, num_beams=2)

    alone = evaluate_model(Reader(), batches, Letters(), num_beams=2)
    with ThreadPoolExecutor(3) as threads:
        everyone = list(threads.map(found_by, range(3)))
    assert alone.wer == 0.0 and len(alone.predictions) == 5
    assert json.dumps(asdict(alone), default=str) == json.dumps(asdict(everyone[0]), default=str)
    assert everyone[0] == everyone[1] == everyone[2]
