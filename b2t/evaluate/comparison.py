"""Two models on the same trials: which is better, and how sure that is."""

from collections.abc import Sequence

from b2t.data.phonemes import to_names
from b2t.errors import UserError
from b2t.evaluate.metrics import EditCounts, count_edits, normalise_text
from b2t.evaluate.results import Evaluation, Prediction
from b2t.evaluate.significance import Comparison, compare_rates
from b2t.evaluate.verdict import KINDS

_SAID = {"wer": "prediction", "wer_lm": "lm_prediction", "wer_joint": "joint_prediction"}


def compare_evaluations(a: Evaluation, b: Evaluation, seed: int = 0) -> dict[str, Comparison]:
    """Compare every error rate that both have, trial by trial.

    Args:
        a: of one model.
        b: of another, on the same rows.
        seed: of bootstrap and test.

    Returns:
        By field of `KINDS`.

    Raises:
        UserError: other rows, other targets, or nothing that both were scored on.
    """
    first, second = ({p.row: p for p in result.predictions} for result in (a, b))
    if {*first} != {*second}:
        row = min({*first} ^ {*second})
        raise UserError(
            f"{row}: only one of the two was evaluated on it: compare models on the same split and "
            "dataset (--data, --split)"
        )
    found = {}
    for field in KINDS:
        rows = [row for row in first if _scored(first[row], field) and _scored(second[row], field)]
        if not rows:
            continue
        one, other = (_edits([side[row] for row in rows], field) for side in (first, second))
        try:
            found[field] = compare_rates(one, other, seed=seed)
        except ValueError as error:
            raise UserError(f"{KINDS[field]} cannot be compared: {error}") from None
    if not found:
        raise UserError("the two models have no score in common (phonemes, words) to compare")
    return found


def told(names: Sequence[str], found: dict[str, Comparison]) -> list[str]:
    """Return a line per error rate."""
    lines = []
    for field, pair in found.items():
        low, high = pair.interval
        lines.append(
            f"{KINDS[field]}: {names[0]} {100 * pair.rate_a:.1f} % → {names[1]} "
            f"{100 * pair.rate_b:.1f} %: {100 * pair.difference:+.1f} points (95 % "
            f"{100 * low:+.1f} to {100 * high:+.1f}), p = {pair.p:.2g}, trials paired"
        )
    return lines


def _scored(prediction: Prediction, field: str) -> bool:
    if field == "per":
        return prediction.phonemes is not None and prediction.target_phonemes is not None
    return prediction.target is not None and getattr(prediction, _SAID[field]) is not None


def _edits(predictions: Sequence[Prediction], field: str) -> EditCounts:
    pairs = [_texts(prediction, field) for prediction in predictions]
    return count_edits([meant for meant, _ in pairs], [said for _, said in pairs], "word")


def _texts(prediction: Prediction, field: str) -> tuple[str, str]:
    """What was meant and what was said, as units between single spaces."""
    if field == "per":
        meant, said = prediction.target_phonemes or [], prediction.phonemes or []
        return " ".join(to_names(meant)), " ".join(to_names(said))
    return normalise_text(prediction.target or ""), normalise_text(
        getattr(prediction, _SAID[field])
    )
