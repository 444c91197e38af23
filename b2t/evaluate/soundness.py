"""Reasons why a score may mean nothing: untrained components, trials out of range."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from b2t.evaluate.results import Evaluation
    from b2t.model.brain_to_text import BrainToText

_FACTOR = 100.0
"""A trial this much louder or quieter than a typical one of the training is out of range."""

_SAYS = {
    "text_decoder": "WER, CER, BLEU and ROUGE mean",
    "phoneme_head": "PER means",
    "signal_decoder": "the reconstruction means",
    "encoder": "every score means",
}


def note_soundness(result: "Evaluation", model: "BrainToText", rms: dict[str, float]) -> None:
    """Write into a result what was never trained, and which trials are out of range.

    Args:
        result: gets `untrained`, `odd_trials` and notes.
        model: a `BrainToText`; its config tells what was trained and how loud its signals were.
        rms: root mean square of each trial, by row.
    """
    trained = getattr(model.config, "trained", None)
    if trained is not None:
        result.untrained = [
            name for name in _SAYS if getattr(model, name, None) is not None and name not in trained
        ]
    for name in result.untrained:
        result.notes.append(
            f"{name} was never trained before this model was saved: {_SAYS[name]} nothing"
        )
    typical = (getattr(model.config, "signal", None) or {}).get("rms")
    typical = typical or float(np.median(list(rms.values()) or [0.0]))
    odd = [row for row, value in rms.items() if not _in_range(value, typical)]
    result.odd_trials = len(odd)
    if odd:
        result.notes.append(
            f"{len(odd)} of {len(rms)} trials are over {_FACTOR:.0f} times louder or quieter than "
            f"those of the training (the first, {odd[0]}: root mean square {rms[odd[0]]:.3g}, "
            f"typical {typical:.3g}): broken, or in another unit"
        )


def _in_range(value: float, typical: float) -> bool:
    """Whether a trial's root mean square is near the typical one; NaN is not."""
    return typical == 0 or typical / _FACTOR <= value <= typical * _FACTOR
