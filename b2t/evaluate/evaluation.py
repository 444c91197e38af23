"""One pass over a split: decode, score, count codes, and do the same without a brain."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from b2t.data.batches import Batch
from b2t.evaluate import usage
from b2t.evaluate.controls import noise_batch, shuffled_codes, spectrum_batch
from b2t.evaluate.decode import collapse_ctc, decode_encoded, decode_text, to_model
from b2t.evaluate.results import Evaluation, Prediction
from b2t.evaluate.scoring import score
from b2t.evaluate.signal import SignalSums
from b2t.evaluate.soundness import note_soundness
from b2t.evaluate.traces import collect_traces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from b2t.model.brain_to_text import BrainToText

CONTROLS = ("spectrum", "codes", "lm_alone")
"""Controls besides white noise: noise of equal spectrum, codes in another order, and the language
model without phonemes."""


class ReadsPhonemes(Protocol):
    """What reads phonemes from their logits, as `b2t.evaluate.words.PhonemeBeam` does."""

    def decode(self, logits: Tensor, mask: Tensor) -> list[list[int]]:
        """Read logits [B, P, K] under a mask [B, P] → B lists of class ids."""


class ReadsWords(Protocol):
    """What reads sentences from phonemes, as `b2t.evaluate.rescoring.WordReader` does."""

    def read(self, output: Any) -> Any:
        """Read B signals of a model's output: `first`, B texts, and `joint`, B texts or None."""


def evaluate_model(
    model: "BrainToText",
    batches: Iterable[Batch],
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    *,
    split: str = "val",
    simulated: bool = False,
    noise_control: bool = True,
    decode: bool = True,
    seed: int = 0,
    gather: Callable[[Any], list[Any]] | None = None,
    words: ReadsWords | None = None,
    controls: Sequence[str] = (),
    phonemes: ReadsPhonemes | None = None,
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
        words: reads words from the phoneme logits; None leaves `wer_lm` and the like out.
        controls: names of `CONTROLS`; each takes about as long as decoding does.
        phonemes: reads phonemes from their logits; None takes the best class of each frame.
        generation: `num_beams`, `max_new_tokens` and other arguments of transformers' generate.
    """
    share = _Share(codebook_size(model))
    with_text = decode and tokenizer is not None and _part(model, "text_decoder") is not None
    speaker = _Speaker(model, tokenizer if with_text else None, words, generation, phonemes)
    training = model.training
    model.eval()
    try:
        for batch in batches:
            batch = to_model(batch, model)
            found, output = _predict(speaker, batch, share)
            _control(speaker, batch, output, found, seed, noise_control, controls)
            share.predictions += found
    finally:
        model.train(training)
    share = _pool([share] if gather is None else gather(share))
    result = _result(share, split, seed)
    note_soundness(result, model, share.rms)
    result.simulated = simulated
    result.decoding = dict(generation) if with_text else {}
    if not with_text and decode:
        result.notes.append("the model has no text decoder: no text was decoded")
    return result


def codebook_size(model: "BrainToText") -> int | None:
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


def _part(model: "BrainToText", name: str) -> Any | None:
    return getattr(model, name, None)


@dataclass(frozen=True)
class _Speaker:
    """A model and what turns its outputs into text."""

    model: "BrainToText"
    tokenizer: "PreTrainedTokenizerBase | None"
    words: ReadsWords | None
    generation: dict[str, Any]
    reads: ReadsPhonemes | None = None

    def hear(self, output: Any, batch: Batch | None = None) -> list["_Heard"]:
        """Read everything that can be read.

        Args:
            output: of the model.
            batch: whose output it is; None where no signals have it, for its latents were changed.
        """
        rows = len(output.frame_mask)
        phonemes: list[Any] = [None] * rows
        first = joint = texts = phonemes
        if output.phoneme_logits is not None:
            read = collapse_ctc if self.reads is None else self.reads.decode
            phonemes = read(output.phoneme_logits, output.frame_mask)
            if self.words is not None:
                found = self.words.read(output)
                first, joint = found.first, joint if found.joint is None else found.joint
        if self.tokenizer is not None:
            said: Any = (decode_encoded, output) if batch is None else (decode_text, batch)
            texts = said[0](self.model, said[1], self.tokenizer, **self.generation)
        return [_Heard(*row) for row in zip(phonemes, first, joint, texts, strict=True)]


class _Heard(NamedTuple):
    """Phonemes of one row, words by language model and by joint scores, the text decoder's text."""

    phonemes: list[int] | None = None
    words: str | None = None
    joint: str | None = None
    text: str | None = None


@torch.no_grad()
def _predict(speaker: _Speaker, batch: Batch, share: _Share) -> tuple[list[Prediction], Any]:
    """Return what was said of each row, and the model's output."""
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
    heard, lengths = speaker.hear(output, batch), batch.phoneme_lengths.tolist()
    bins, rate = batch.signal_mask.sum(1).tolist(), speaker.model.config.sampling_rate
    return [
        Prediction(
            row=name,
            session=name.rsplit("/", 2)[0],
            seconds=bins[row] / rate if rate else None,
            target=target,
            prediction=heard[row].text,
            lm_prediction=heard[row].words,
            joint_prediction=heard[row].joint,
            phonemes=heard[row].phonemes,
            target_phonemes=batch.phonemes[row, : lengths[row]].tolist()
            if lengths[row] and heard[row].phonemes is not None
            else None,
        )
        for row, (name, target) in enumerate(zip(batch.rows, batch.texts, strict=True))
    ], output


def _control(
    speaker: _Speaker,
    batch: Batch,
    output: Any,
    found: list[Prediction],
    seed: int,
    noise_control: bool,
    controls: Sequence[str],
) -> None:
    """Add what is said without a brain to what was said of a batch, where anything was."""
    if not any(p.phonemes is not None or p.prediction is not None for p in found):
        return
    if noise_control:
        _predict_noise(speaker, noise_batch(batch, seed), found)
    for name in controls:
        _predict_control(speaker, name, batch, output, found, seed)


@torch.no_grad()
def _predict_noise(speaker: _Speaker, noise: Batch, found: list[Prediction]) -> None:
    heard = speaker.hear(speaker.model(noise, weights={"phoneme": 1.0}), noise)
    for row, prediction in enumerate(found):
        prediction.noise_phonemes = heard[row].phonemes
        prediction.lm_noise_prediction = heard[row].words
        prediction.joint_noise_prediction = heard[row].joint
        prediction.noise_prediction = heard[row].text


@torch.no_grad()
def _predict_control(
    speaker: _Speaker, name: str, batch: Batch, output: Any, found: list[Prediction], seed: int
) -> None:
    """Write what is said without a brain into the predictions' `controls`."""
    if name == "spectrum":
        noise = spectrum_batch(batch, seed)
        heard = speaker.hear(speaker.model(noise, weights={"phoneme": 1.0}), noise)
    elif name == "codes" and output.codes is not None:
        heard = speaker.hear(shuffled_codes(speaker.model, output, batch.rows, seed))
    elif name == "lm_alone" and speaker.words is not None and output.phoneme_logits is not None:
        nothing = dataclasses.replace(
            output, phoneme_logits=torch.zeros_like(output.phoneme_logits)
        )
        heard = [_Heard(words=text) for text in speaker.words.read(nothing).first]
    else:
        return
    for prediction, row in zip(found, heard, strict=True):
        prediction.controls[name] = {k: v for k, v in row._asdict().items() if v is not None}


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


def _result(share: _Share, split: str, seed: int) -> Evaluation:
    result = Evaluation(split=split, rows=len(share.predictions), predictions=share.predictions)
    result.traces = share.traces
    score(result, share.predictions, seed)
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


def _rms(batch: Batch) -> list[float]:
    """Root mean square of each trial's real bins."""
    real = batch.signal_mask
    power = batch.target.double().square().mean(-1).masked_fill(~real, 0.0).sum(1)
    return (power / real.sum(1).clamp(min=1)).sqrt().tolist()
