"""Scores of what was said: error rates beside those of controls, and which errors they were."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from b2t.data.phonemes import to_names
from b2t.evaluate import metrics
from b2t.evaluate.controls import shuffled
from b2t.evaluate.edits import details
from b2t.evaluate.results import Evaluation, Prediction
from b2t.evaluate.significance import permutation_p_value

SHUFFLES = 20


def score(result: Evaluation, predictions: Sequence[Prediction], seed: int) -> None:
    """Write every score of text and phonemes into a result.

    Args:
        result: of one split.
        predictions: one per row.
        seed: of bootstrap and permutations.
    """
    _score_text(result, predictions, seed)
    for kind in ("lm", "joint"):
        _score_words(result, predictions, kind, seed)
    _score_phonemes(result, predictions, seed)
    timed = [p for p in predictions if p.target is not None and p.seconds]
    if timed:
        words = sum(len(metrics.normalise_text(p.target or "").split()) for p in timed)
        result.words_per_minute = 60 * words / sum(p.seconds or 0.0 for p in timed)


def _score_text(result: Evaluation, predictions: Sequence[Prediction], seed: int) -> None:
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
    _error_rates(result, "", scored, said, noise, seed)
    _score_controls(result, scored, "text", "wer")
    result.bleu = metrics.bleu(targets, said)
    for name, value in metrics.rouge(targets, said).items():
        setattr(result, name, value)
    result.distinct_ratio = metrics.distinct_ratio(targets, said)


def _score_words(
    result: Evaluation, predictions: Sequence[Prediction], kind: str, seed: int
) -> None:
    said = {p.row: getattr(p, f"{kind}_prediction") for p in predictions}
    scored = [p for p in predictions if p.target is not None and said[p.row] is not None]
    if not scored:
        return
    noise = [getattr(p, f"{kind}_noise_prediction") for p in scored]
    known = noise if noise[0] is not None else None
    _error_rates(result, f"_{kind}", scored, [said[p.row] for p in scored], known, seed)
    _score_controls(result, scored, "words" if kind == "lm" else kind, f"wer_{kind}")


def _error_rates(
    result: Evaluation,
    kind: str,
    scored: Sequence[Prediction],
    said: list[str],
    noise: list[str] | None,
    seed: int,
) -> None:
    """Write WER and CER of one decoder beside their controls; ``kind`` ends the fields' names."""
    targets = [p.target or "" for p in scored]
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
    _detail(result, f"wer{kind}", plain_targets, plain_said, scored, seed)


def _score_phonemes(result: Evaluation, predictions: Sequence[Prediction], seed: int) -> None:
    scored = [p for p in predictions if p.target_phonemes is not None and p.phonemes is not None]
    if not scored:
        return
    targets = [p.target_phonemes or [] for p in scored]
    said = [p.phonemes or [] for p in scored]
    edits = metrics.count_phoneme_edits(targets, said)
    result.per, result.per_interval = edits.rate(), edits.interval(seed=seed)
    if scored[0].noise_phonemes is not None:
        noise = [p.noise_phonemes or [] for p in scored]
        result.per_noise = metrics.phoneme_error_rate(targets, noise)
    _detail(result, "per", _named(targets), _named(said), scored, seed)
    for name in sorted({name for p in scored for name in p.controls}):
        heard: list[Any] = [p.controls.get(name, {}).get("phonemes") for p in scored]
        if None not in heard:
            rate = metrics.phoneme_error_rate(targets, heard)
            result.controls.setdefault(name, {})["per"] = rate


def _score_controls(
    result: Evaluation, scored: Sequence[Prediction], part: str, field: str
) -> None:
    """WER of what one decoder, called ``part`` in the predictions, says under each control."""
    targets = [p.target or "" for p in scored]
    for name in sorted({name for p in scored for name in p.controls}):
        said: list[Any] = [p.controls.get(name, {}).get(part) for p in scored]
        if None not in said:
            result.controls.setdefault(name, {})[field] = metrics.word_error_rate(targets, said)


def _detail(
    result: Evaluation,
    field: str,
    targets: list[str],
    said: list[str],
    scored: Sequence[Prediction],
    seed: int,
) -> None:
    result.details[field] = details(targets, said, [p.session for p in scored])
    result.details[field]["p_permutation"] = permutation_p_value(targets, said, seed=seed)


def _named(sequences: Sequence[Sequence[int]]) -> list[str]:
    return [" ".join(to_names(sequence)) for sequence in sequences]
