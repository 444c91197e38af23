"""Signals in another unit than they say, or than their neighbours."""

from typing import Any

import numpy as np

from b2t.evaluate.audit.findings import NOTE, WARNING, Finding
from b2t.signal_spec import Z_SCORE

UNITS = "units"
_Z_RANGE = (0.2, 5.0)
_TRAINABLE = (0.05, 20.0)
_PLAUSIBLE = {
    "SI (V, T)": (1e-16, 5e-3),
    "V": (1e-8, 5e-3),
    "T": (1e-16, 1e-9),
    "uV": (1e-2, 5e3),
    "µV": (1e-2, 5e3),
}
"""Standard deviations that recordings of a brain have, by unit."""
_SESSION, _CHANNEL = 100.0, 1000.0


def check_units(
    deviations: dict[str, np.ndarray], channels: list[str], unit: str | None
) -> Finding:
    """Compare how far signals move with their unit and with one another.

    Args:
        deviations: typical standard deviation of each channel by session, [C].
        channels: C names.
        unit: `z-score`, a unit of the recording, or None.
    """
    levels = {
        name: float(np.median(moving))
        for name, each in deviations.items()
        if len(moving := each[each > 0])
    }
    if not levels:
        return Finding(UNITS, NOTE, "no channel moves: nothing to compare")
    places = _of_sessions(levels, unit)
    wrong = {place["session"] for place in places}
    for session, level in levels.items():
        if session in wrong:
            continue
        ratios = deviations[session] / level
        strange = np.flatnonzero((ratios > _CHANNEL) | ((ratios > 0) & (ratios < 1 / _CHANNEL)))
        places += [
            _place(
                session,
                channels[channel],
                f"moves {_times(float(ratios[channel]))} as far as the session's other channels",
            )
            for channel in strange
        ]
    if not places:
        typical = float(np.median(list(levels.values())))
        text = f"deviations are around {typical:.3g} ({unit or 'unit unknown'})"
        return Finding(UNITS, NOTE, text, {"places": []})
    return Finding(
        UNITS,
        WARNING,
        f"{len(places)} sessions or channels move as no signal in {unit or 'their unit'} does",
        {"places": places},
        [f"{place['session']}, {place['channel']}: {place['said']}" for place in places[:8]],
        "correct the unit where the file was written, or z-score with `b2t prepare --normalize "
        "block`, which makes units equal",
    )


def _of_sessions(levels: dict[str, float], unit: str | None) -> list[dict[str, Any]]:
    usual = float(np.exp(np.median(np.log(list(levels.values())))))
    places = []
    for session, level in levels.items():
        if unit == Z_SCORE:
            if not _Z_RANGE[0] <= level <= _Z_RANGE[1]:
                said = f"deviates by {level:.3g}, where z-scores deviate by about 1"
                places.append(_place(session, "all", said))
        elif len(levels) > 1 and not 1 / _SESSION <= level / usual <= _SESSION:
            said = f"moves {_times(level / usual)} as far as the other sessions"
            places.append(_place(session, "all", f"{said}: V, mV or µV mixed?"))
        elif unit in _PLAUSIBLE and not _PLAUSIBLE[unit][0] <= level <= _PLAUSIBLE[unit][1]:
            said = f"deviates by {level:.3g} {unit}, as no brain signal does: µV written as V?"
            places.append(_place(session, "all", said))
        elif not _TRAINABLE[0] <= level <= _TRAINABLE[1]:
            said = f"deviates by {level:.3g} {unit or ''}".rstrip()
            places.append(_place(session, "all", f"{said}; the presets are made for z-scores"))
    return places


def _place(session: str, channel: str, said: str) -> dict[str, Any]:
    return {"session": session, "channel": channel, "said": said}


def _times(ratio: float) -> str:
    return f"{ratio:,.0f} times" if ratio >= 1 else f"1/{1 / ratio:,.0f}"
