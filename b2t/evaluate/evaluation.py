"""One pass over a split: decode, score, count codes, and do the same on noise."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from b2t.data.batches import Batch
from b2t.evaluate import metrics, usage
from b2t.evaluate.controls import noise_batch, shuffled
from b2t.evaluate.decode import collapse_ctc, decode_text, to_model
from b2t.evaluate.signal import SignalSums
from b2t.evaluate.soundness import note_soundness
from b2t.evaluate.traces import collect_traces
from b2t.records import write_atomically

EVALUATION_FILE = "evaluation.json"
PREDICTIONS_FILE = "predictions.jsonl"
USAGE_FILE = "codebook_usage.json"
TRACES_FILE = "reconstruction.json"
SHUFFLES = 20


@dataclass
class Prediction:
    """What was said and what was meant for one row; None where the row or model lacks it."""

    row: str
    session: str
    target: str | None = None
    prediction: str | None = None
    noise_prediction: str | None = None
    target_phonemes: list[int] | None = None
    phonemes: list[int] | None = None
    noise_phonemes: list[int] | None = None


@dataclass
class Evaluation:
    """Results of one split; fractions are fractions, None where a thing cannot be measured.

    Attributes:
        split: name of the split.
        checkpoint: which model of the run: `best`, `step 200` or a folder.
        role: what the split was to the training, `chose the model` or `trained on`; None where it
            was neither, or where that is not known.
        known_sentences: share of the rows with text whose sentence occurs in training.
        untrained: components of the model that no step has trained; what they say means nothing.
        odd_trials: trials far louder or quieter than the model's training signals.
        simulated: whether the recordings come from `b2t simulate`.
        rows, frames: trials and valid latent frames evaluated.
        per, cer, wer: pooled error rates; `*_interval` are 95 % bootstrap intervals over rows.
        per_noise, cer_noise, wer_noise: the same model fed noise of the same channel statistics.
        wer_shuffled: WER when each trial is decoded from another trial's signal, mean over
            random permutations.
        bleu, rouge1, rouge2, rougeL: overlap in 0–100.
        exact: share of sentences without an error.
        distinct_ratio: distinct predictions over distinct targets (`distinct_ratio_noise` under
            noise).
        utilization, perplexity: per quantizer layer; utilization is over min(codes, frames).
        codebook_size: codes per layer, K.
        snr_db, snr_median_db: signal-to-noise ratio of the reconstruction, pooled over bins and
            median over trials.
        mse, cosine: of the reconstruction, pooled.
        decoding: how text was generated.
        notes: what was not measured, and why.
        predictions: one per row.
        usage: frames per code, [Q][K]; empty without a quantizer.
        traces: some signals beside their reconstruction, see `collect_traces`.
    """

    split: str
    checkpoint: str | None = None
    role: str | None = None
    known_sentences: float | None = None
    untrained: list[str] = field(default_factory=list)
    odd_trials: int = 0
    simulated: bool = False
    rows: int = 0
    frames: int = 0
    per: float | None = None
    cer: float | None = None
    wer: float | None = None
    per_interval: tuple[float, float] | None = None
    cer_interval: tuple[float, float] | None = None
    wer_interval: tuple[float, float] | None = None
    per_noise: float | None = None
    cer_noise: float | None = None
    wer_noise: float | None = None
    wer_shuffled: float | None = None
    bleu: float | None = None
    rouge1: float | None = None
    rouge2: float | None = None
    rougeL: float | None = None  # noqa: N815  # the metric's own name
    exact: float | None = None
    distinct_ratio: float | None = None
    distinct_ratio_noise: float | None = None
    utilization: list[float] = field(default_factory=list)
    perplexity: list[float] = field(default_factory=list)
    codebook_size: int | None = None
    snr_db: float | None = None
    snr_median_db: float | None = None
    mse: float | None = None
    cosine: float | None = None
    decoding: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    predictions: list[Prediction] = field(default_factory=list, repr=False)
    usage: list[list[int]] = field(default_factory=list, repr=False)
    traces: dict[str, Any] = field(default_factory=dict, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the results as JSON values, no NaN and no infinity, without what is per row."""
        apart = ("predictions", "usage", "traces")
        record = {name: value for name, value in vars(self).items() if name not in apart}
        record["normalisation"] = metrics.NORMALISATION
        return _finite(record)

    def scalars(self) -> dict[str, float]:
        """Return the finite numbers under flat names, for a log (`wer`, `utilization/0` …)."""
        flat: dict[str, float] = {}
        for name, value in self.to_dict().items():
            if isinstance(value, bool):
                continue
            if isinstance(value, (int, float)):
                flat[name] = float(value)
            elif name in ("utilization", "perplexity"):
                flat.update({f"{name}/{q}": v for q, v in enumerate(value) if v is not None})
        return flat

    def save(self, folder: Path) -> None:
        """Write `evaluation.json`, `predictions.jsonl`, and the usage and traces of the report.

        Each file is complete or not there at all.
        """
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(asdict(p), ensure_ascii=False) for p in self.predictions]
        write_atomically(folder / PREDICTIONS_FILE, "".join(line + "\n" for line in lines))
        usage_record = {"split": self.split, "counts": self.usage}
        write_atomically(folder / USAGE_FILE, json.dumps(usage_record) + "\n")
        write_atomically(folder / TRACES_FILE, json.dumps(_finite(self.traces)) + "\n")
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        write_atomically(folder / EVALUATION_FILE, text + "\n")


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
    group: dist.ProcessGroup | None = None,
    progress: bool = False,
    **generation: Any,
) -> Evaluation:
    """Evaluate a model on batches of a split, decoding freely.

    Where torch.distributed runs, every rank calls this with batches of its own rows (no row on
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
        group: process group to gather over, None for the default one.
        progress: show a bar, on a terminal.
        generation: `num_beams`, `max_new_tokens` and other arguments of transformers' generate.
    """
    share = _Share(codebook_size(model))
    with_text = decode and tokenizer is not None and _part(model, "text_decoder") is not None
    training = model.training
    hidden = None if progress else True  # None: shown on a terminal only
    model.eval()
    try:
        for batch in tqdm(batches, desc=f"evaluate {split}", disable=hidden, leave=False):
            batch = to_model(batch, model)
            found = _predict(model, batch, tokenizer if with_text else None, share, generation)
            if noise_control:
                noise = noise_batch(batch, seed)
                _predict_noise(model, noise, tokenizer if with_text else None, found, generation)
            share.predictions += found
    finally:
        model.train(training)
    share = _gather(share, group)
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


@torch.no_grad()
def _predict(
    model: Any, batch: Batch, tokenizer: Any | None, share: _Share, generation: dict[str, Any]
) -> list[Prediction]:
    output = model(batch, weights={"reconstruction": 1.0, "phoneme": 1.0})
    if output.reconstruction is not None:
        share.signal.add(output.reconstruction, batch.target, batch.signal_mask)
        if not share.traces:
            signals = (output.reconstruction, batch.target, batch.signal_mask)
            share.traces = collect_traces(batch.rows, *signals, model.config.sampling_rate)
    if output.codes is not None and share.size is not None:
        share.count(output.codes)
    share.frames += int(output.frame_mask.sum())
    share.rms |= dict(zip(batch.rows, _rms(batch), strict=True))
    found = [
        Prediction(row=row, session=row.rsplit("/", 2)[0], target=text)
        for row, text in zip(batch.rows, batch.texts, strict=True)
    ]
    if output.phoneme_logits is not None:
        decoded = collapse_ctc(output.phoneme_logits, output.frame_mask)
        lengths = batch.phoneme_lengths.tolist()
        for row, (prediction, phonemes) in enumerate(zip(found, decoded, strict=True)):
            prediction.phonemes = phonemes
            if lengths[row]:
                prediction.target_phonemes = batch.phonemes[row, : lengths[row]].tolist()
    if tokenizer is not None:
        texts = decode_text(model, batch, tokenizer, **generation)
        for prediction, text in zip(found, texts, strict=True):
            prediction.prediction = text
    return found


@torch.no_grad()
def _predict_noise(
    model: Any,
    noise: Batch,
    tokenizer: Any | None,
    found: list[Prediction],
    generation: dict[str, Any],
) -> None:
    if any(prediction.phonemes is not None for prediction in found):
        output = model(noise, weights={"phoneme": 1.0})
        decoded = collapse_ctc(output.phoneme_logits, output.frame_mask)
        for prediction, phonemes in zip(found, decoded, strict=True):
            prediction.noise_phonemes = phonemes
    if tokenizer is not None:
        texts = decode_text(model, noise, tokenizer, **generation)
        for prediction, text in zip(found, texts, strict=True):
            prediction.noise_prediction = text


def _gather(share: _Share, group: dist.ProcessGroup | None) -> _Share:
    """Pool the shares of all ranks, rows in the order of their ids."""
    shares: list[Any] = [share]
    if dist.is_available() and dist.is_initialized():
        shares = [None] * dist.get_world_size(group)
        dist.all_gather_object(shares, share, group=group)
    total = _Share(share.size, traces=shares[0].traces)
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
    plain_targets = [metrics.normalise_text(text) for text in targets]
    plain_said = [metrics.normalise_text(text) for text in said]
    words = metrics.count_edits(plain_targets, plain_said, "word")
    characters = metrics.count_edits(plain_targets, plain_said, "character")
    result.wer, result.wer_interval = words.rate(), words.interval(seed=seed)
    result.cer, result.cer_interval = characters.rate(), characters.interval(seed=seed)
    result.bleu = metrics.bleu(targets, said)
    for name, value in metrics.rouge(targets, said).items():
        setattr(result, name, value)
    result.exact = metrics.exact_match(targets, said)
    result.distinct_ratio = metrics.distinct_ratio(targets, said)
    rates = [metrics.word_error_rate(targets, shuffled(said, seed + i)) for i in range(SHUFFLES)]
    if len(said) > 1:
        result.wer_shuffled = float(np.mean([rate for rate in rates if rate is not None]))
    if scored[0].noise_prediction is not None:
        noise = [p.noise_prediction or "" for p in scored]
        result.wer_noise = metrics.word_error_rate(targets, noise)
        result.cer_noise = metrics.character_error_rate(targets, noise)
        result.distinct_ratio_noise = metrics.distinct_ratio(targets, noise)


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


def _finite(value: Any) -> Any:
    """Replace what JSON cannot hold by None, at any depth."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
