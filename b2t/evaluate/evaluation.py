"""One pass over a split: decode, score, count codes, and do the same on noise."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from b2t.data.batches import Batch
from b2t.evaluate import metrics, usage
from b2t.evaluate.controls import noise_batch, shuffled
from b2t.evaluate.decode import collapse_ctc, decode_text, to_model
from b2t.evaluate.results import Evaluation, Prediction
from b2t.evaluate.signal import SignalSums
from b2t.evaluate.soundness import note_soundness
from b2t.evaluate.traces import collect_traces

SHUFFLES = 20


class ReadsWords(Protocol):
    """What reads sentences from phonemes, as `b2t.evaluate.rescoring.WordReader` does."""

    def read(self, output: Any) -> Any:
        """Read B signals of a model's output: `first`, B texts, and `joint`, B texts or None."""


def evaluate_model(
    model: Any,
    batches: Iterable[Batch],
    tokenizer: Any | None = None,
    *,
    split: str = "val",
    simulated: bool = False,
    noise_control: bool = True,
    decode: bool = True,
    seed: int = 0,
    gather: Callable[[Any], list[Any]] | None = None,
    progress: bool = False,
    words: ReadsWords | None = None,
    **generation: Any,
) -> Evaluation:
    """Evaluate a model on batches of a split, decoding freely.

    Where several ranks share the rows, every rank calls this with batches of its own (no row on
    two ranks; a rank may have none) and every rank returns the same results over all rows.

    Args:
        model: a `BrainToText`; left in the mode in which it came.
        batches: unaugmented batches; labels are only used for scoring.
        tokenizer: the model's tokenizer, None for a model without text.
        split: name recorded in the result.
        simulated: recorded in the result and printed with it.
        noise_control: decode noise too, which doubles the time.
        decode: generate text; without it only phonemes, signals and codes are scored.
        seed: seed of the noise, of the shuffles and of the bootstrap.
        gather: returns what every rank gives it, in order, on all ranks; None is a rank alone.
        progress: show a bar, on a terminal.
        words: reads words from the phoneme logits; None leaves `wer_lm` and the like out.
        generation: `num_beams`, `max_new_tokens` and other arguments of transformers' generate.
    """
    share = _Share(codebook_size(model))
    with_text = decode and tokenizer is not None and _part(model, "text_decoder") is not None
    speaker = _Speaker(model, tokenizer if with_text else None, words, generation)
    training = model.training
    hidden = None if progress else True  # None: shown on a terminal only
    model.eval()
    try:
        for batch in tqdm(batches, desc=f"evaluate {split}", disable=hidden, leave=False):
            batch = to_model(batch, model)
            found = _predict(speaker, batch, share)
            if noise_control:
                noise = noise_batch(batch, seed)
                _predict_noise(speaker, noise, found)
            share.predictions += found
    finally:
        model.train(training)
    share = _pool([share] if gather is None else gather(share))
    result = _score(share, split, seed)
    note_soundness(result, model, share.rms)
    result.simulated = simulated
    result.decoding = dict(generation) if with_text else {}
    if not with_text and decode:
        result.notes.append("the model has no text decoder: no text was decoded")
    return result


def codebook_size(model: Any) -> int | None:
    """Codes per layer of the model's quantizer, None where it has none."""
    quantizer = _part(model, "quantizer")
    return int(quantizer.codebook_size) if quantizer is not None else None


@dataclass
class _Share:
    """What one rank found."""

    size: int | None
    predictions: list[Prediction] = field(default_factory=list)
    signal: SignalSums = field(default_factory=SignalSums)
    frames: int = 0
    rms: dict[str, float] = field(default_factory=dict)
    counts: Tensor | None = None
    traces: dict[str, Any] = field(default_factory=dict)

    def count(self, codes: Tensor) -> None:
        assert self.size is not None
        counts = usage.count_codes(codes, self.size).cpu()
        self.counts = counts if self.counts is None else self.counts + counts


def _part(model: Any, name: str) -> Any | None:
    return getattr(model, name, None)


@dataclass(frozen=True)
class _Speaker:
    """A model and what turns its outputs into text."""

    model: Any
    tokenizer: Any | None
    words: ReadsWords | None
    generation: dict[str, Any]

    def texts(self, batch: Batch) -> list[str | None]:
        """Texts of the model's own decoder."""
        if self.tokenizer is None:
            return [None] * len(batch.rows)
        return list(decode_text(self.model, batch, self.tokenizer, **self.generation))

    def phonemes(self, output: Any) -> list["_Heard"]:
        """Phonemes of each row, and words that are read from them."""
        rows = len(output.frame_mask)
        if output.phoneme_logits is None:
            return [_Heard()] * rows
        first = joint = [None] * rows
        if self.words is not None:
            found = self.words.read(output)
            first, joint = found.first, joint if found.joint is None else found.joint
        phonemes = collapse_ctc(output.phoneme_logits, output.frame_mask)
        return [_Heard(*row) for row in zip(phonemes, first, joint, strict=True)]


class _Heard(NamedTuple):
    """Phonemes of one row, and words by language model and by joint scores."""

    phonemes: list[int] | None = None
    words: str | None = None
    joint: str | None = None


@torch.no_grad()
def _predict(speaker: _Speaker, batch: Batch, share: _Share) -> list[Prediction]:
    output = speaker.model(batch, weights={"reconstruction": 1.0, "phoneme": 1.0})
    if output.reconstruction is not None:
        share.signal.add(output.reconstruction, batch.target, batch.signal_mask)
        if not share.traces:
            signals = (output.reconstruction, batch.target, batch.signal_mask)
            share.traces = collect_traces(batch.rows, *signals, speaker.model.config.sampling_rate)
    if output.codes is not None and share.size is not None:
        share.count(output.codes)
    share.frames += int(output.frame_mask.sum())
    share.rms |= dict(zip(batch.rows, _rms(batch), strict=True))
    heard = speaker.phonemes(output)
    texts, lengths = speaker.texts(batch), batch.phoneme_lengths.tolist()
    return [
        Prediction(
            row=name,
            session=name.rsplit("/", 2)[0],
            target=target,
            prediction=texts[row],
            lm_prediction=heard[row].words,
            joint_prediction=heard[row].joint,
            phonemes=heard[row].phonemes,
            target_phonemes=batch.phonemes[row, : lengths[row]].tolist()
            if lengths[row] and heard[row].phonemes is not None
            else None,
        )
        for row, (name, target) in enumerate(zip(batch.rows, batch.texts, strict=True))
    ]


@torch.no_grad()
def _predict_noise(speaker: _Speaker, noise: Batch, found: list[Prediction]) -> None:
    if any(prediction.phonemes is not None for prediction in found):
        heard = speaker.phonemes(speaker.model(noise, weights={"phoneme": 1.0}))
        for row, prediction in enumerate(found):
            prediction.noise_phonemes = heard[row].phonemes
            prediction.lm_noise_prediction = heard[row].words
            prediction.joint_noise_prediction = heard[row].joint
    for prediction, text in zip(found, speaker.texts(noise), strict=True):
        prediction.noise_prediction = text


def _pool(shares: list[_Share]) -> _Share:
    """Pool the shares of all ranks, rows in the order of their ids."""
    total = _Share(shares[0].size, traces=shares[0].traces)
    for part in shares:
        total.predictions += part.predictions
        total.signal = total.signal + part.signal
        total.frames += part.frames
        total.rms |= part.rms
        if part.counts is not None:
            total.counts = part.counts if total.counts is None else total.counts + part.counts
    total.predictions.sort(key=lambda prediction: _order(prediction.row))
    return total


def _order(row: str) -> list[tuple[bool, int, str]]:
    """Sort key of a row id that puts trial 2 before trial 14."""
    return [(not p.isdigit(), int(p) if p.isdigit() else 0, p) for p in row.split("/")]


def _score(share: _Share, split: str, seed: int) -> Evaluation:
    result = Evaluation(split=split, rows=len(share.predictions), predictions=share.predictions)
    result.traces = share.traces
    _score_text(result, share.predictions, seed)
    _score_words(result, share.predictions, seed)
    _score_phonemes(result, share.predictions, seed)
    signal = share.signal
    result.snr_db, result.snr_median_db = signal.snr_db, signal.median_snr_db
    result.mse, result.cosine = signal.mse, signal.cosine
    if share.size is not None:
        result.codebook_size = share.size
    result.frames = share.frames
    if share.counts is not None and bool(share.counts.any()):
        result.utilization = usage.utilization(share.counts).tolist()
        result.perplexity = usage.perplexity(share.counts).tolist()
        result.usage = share.counts.tolist()
    elif share.size is None:
        result.notes.append("the model has no quantizer: no codebook use")
    elif share.frames:
        result.notes.append(
            "no frame has a code: the codebooks had not started (codebook_start.after_steps), so "
            "that the latents went through as they are"
        )
    return result


def _score_text(result: Evaluation, predictions: list[Prediction], seed: int) -> None:
    scored = [p for p in predictions if p.target is not None and p.prediction is not None]
    if not scored:
        if any(p.prediction is not None for p in predictions):
            result.notes.append("the split has no text: WER, CER, BLEU and ROUGE are null")
        return
    targets = [p.target or "" for p in scored]
    said = [p.prediction or "" for p in scored]
    noise = None
    if scored[0].noise_prediction is not None:
        noise = [p.noise_prediction or "" for p in scored]
        result.distinct_ratio_noise = metrics.distinct_ratio(targets, noise)
    _error_rates(result, "", targets, said, noise, seed)
    result.bleu = metrics.bleu(targets, said)
    for name, value in metrics.rouge(targets, said).items():
        setattr(result, name, value)
    result.distinct_ratio = metrics.distinct_ratio(targets, said)


def _score_words(result: Evaluation, predictions: list[Prediction], seed: int) -> None:
    for kind in ("lm", "joint"):
        said = {p.row: getattr(p, f"{kind}_prediction") for p in predictions}
        scored = [p for p in predictions if p.target is not None and said[p.row] is not None]
        if not scored:
            continue
        noise = [getattr(p, f"{kind}_noise_prediction") for p in scored]
        _error_rates(
            result,
            f"_{kind}",
            [p.target or "" for p in scored],
            [said[p.row] for p in scored],
            noise if noise[0] is not None else None,
            seed,
        )


def _error_rates(
    result: Evaluation,
    kind: str,
    targets: list[str],
    said: list[str],
    noise: list[str] | None,
    seed: int,
) -> None:
    """Write WER and CER of one decoder beside their controls; ``kind`` ends the fields' names."""
    plain_targets = [metrics.normalise_text(text) for text in targets]
    plain_said = [metrics.normalise_text(text) for text in said]
    words = metrics.count_edits(plain_targets, plain_said, "word")
    characters = metrics.count_edits(plain_targets, plain_said, "character")
    found: dict[str, Any] = {
        f"wer{kind}": words.rate(),
        f"wer{kind}_interval": words.interval(seed=seed),
        f"cer{kind}": characters.rate(),
        f"cer{kind}_interval": characters.interval(seed=seed),
        f"exact{kind}": metrics.exact_match(targets, said),
    }
    if len(said) > 1:
        mixed = (shuffled(said, seed + i) for i in range(SHUFFLES))
        rates = [metrics.word_error_rate(targets, texts) for texts in mixed]
        found[f"wer{kind}_shuffled"] = float(np.mean([r for r in rates if r is not None]))
    if noise is not None:
        found[f"wer{kind}_noise"] = metrics.word_error_rate(targets, noise)
        found[f"cer{kind}_noise"] = metrics.character_error_rate(targets, noise)
    for name, value in found.items():
        setattr(result, name, value)


def _score_phonemes(result: Evaluation, predictions: list[Prediction], seed: int) -> None:
    scored = [p for p in predictions if p.target_phonemes is not None and p.phonemes is not None]
    if not scored:
        return
    targets = [p.target_phonemes or [] for p in scored]
    edits = metrics.count_phoneme_edits(targets, [p.phonemes or [] for p in scored])
    result.per, result.per_interval = edits.rate(), edits.interval(seed=seed)
    if scored[0].noise_phonemes is not None:
        noise = [p.noise_phonemes or [] for p in scored]
        result.per_noise = metrics.phoneme_error_rate(targets, noise)


def _rms(batch: Batch) -> list[float]:
    """Root mean square of each trial's real bins."""
    real = batch.signal_mask
    power = batch.target.double().square().mean(-1).masked_fill(~real, 0.0).sum(1)
    return (power / real.sum(1).clamp(min=1)).sqrt().tolist()
