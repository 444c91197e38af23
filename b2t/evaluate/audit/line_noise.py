"""Mains hum: peaks at 50 or 60 Hz and their harmonics."""

from collections import defaultdict

import numpy as np
from scipy.signal import welch

from b2t.evaluate.audit.findings import NOTE, WARNING, Finding, listed
from b2t.evaluate.audit.reading import Trial

LINE_NOISE = "line noise"
MAINS = (50.0, 60.0)
_TRIALS = 32
_FEWEST = 8
"""Spectra of a second to average, without which chance makes peaks."""
_PEAK, _NEAR, _BESIDE = 1.0, 2.0, 6.0
"""A peak lies within so many Hz; what it stands out from lies between the other two, in Hz."""
_DECIBELS = 10.0


class LineNoiseCheck:
    """Averages power spectra by session, at a resolution of 1 Hz.

    Args:
        channels: C names.
        sampling_rate: in Hz.
    """

    def __init__(self, channels: list[str], sampling_rate: float) -> None:
        self._channels = channels
        self._rate = sampling_rate
        self.frequencies = np.fft.rfftfreq(max(2, round(sampling_rate)), 1 / sampling_rate)
        self._sums: dict[str, np.ndarray] = {}
        self._segments: dict[str, int] = defaultdict(int)
        self._trials: dict[str, int] = defaultdict(int)

    def lines(self) -> list[float]:
        """Return the frequencies that can be looked at, in Hz: those well below Nyquist."""
        highest = self._rate / 2 - _NEAR
        return sorted({k * f for f in MAINS for k in range(1, int(highest // f) + 1)})

    def add(self, trial: Trial) -> None:
        """Add one finite trial; one shorter than a second tells nothing."""
        length = round(self._rate)
        if not self.lines() or len(trial.signal) < length or self._trials[trial.session] == _TRIALS:
            return
        _, power = welch(trial.signal, self._rate, nperseg=length, axis=0)
        segments = 2 * (len(trial.signal) // length) - 1
        self._sums[trial.session] = self._sums.get(trial.session, 0.0) + segments * power
        self._segments[trial.session] += segments
        self._trials[trial.session] += 1

    def spectra(self) -> dict[str, np.ndarray]:
        """Return power by session, [F, C]."""
        return {name: self._sums[name] / self._segments[name] for name in sorted(self._sums)}

    def finding(self) -> Finding:
        """Judge what was added."""
        if not self.lines():
            text = f"nothing at {MAINS[0]:g} Hz can be seen at a rate of {self._rate:g} Hz"
            return Finding(LINE_NOISE, NOTE, text)
        places = []
        spectra = {n: p for n, p in self.spectra().items() if self._segments[n] >= _FEWEST}
        for session, power in spectra.items():
            for line in self.lines():
                decibels = peak(self.frequencies, power, line)
                loud = np.flatnonzero(decibels > _DECIBELS)
                places += [
                    {
                        "session": session,
                        "channel": self._channels[channel],
                        "hz": line,
                        "decibels": round(float(decibels[channel]), 1),
                    }
                    for channel in loud
                ]
        return _judged(places, len(spectra), self.lines())


def peak(frequencies: np.ndarray, power: np.ndarray, line: float) -> np.ndarray:
    """Return how far a line stands out of its neighbourhood in dB, [C].

    Args:
        frequencies: in Hz, [F].
        power: [F, C].
        line: in Hz.
    """
    away = np.abs(frequencies - line)
    top = power[away <= _PEAK].max(0)
    beside = np.median(power[(away >= _NEAR) & (away <= _BESIDE)], axis=0)
    ratio = np.divide(top, beside, out=np.ones_like(top), where=(beside > 0) & (top > 0))
    return np.asarray(10 * np.log10(ratio))


def _judged(places: list[dict[str, object]], sessions: int, lines: list[float]) -> Finding:
    if not sessions:
        text = f"needs {_FEWEST} seconds of a session in trials of a second: not looked at"
        return Finding(LINE_NOISE, NOTE, text)
    if not places:
        shown = listed([f"{line:g}" for line in lines])
        text = f"no peak at {shown} Hz in {sessions} sessions"
        return Finding(LINE_NOISE, NOTE, text, {"places": []})
    found = sorted({float(str(place["hz"])) for place in places})
    groups: dict[tuple[str, str], list[dict[str, object]]] = defaultdict(list)
    for place in places:
        groups[str(place["session"]), f"{place['hz']:g}"].append(place)
    examples = [
        f"{session}, {hz} Hz: {listed([str(p['channel']) for p in some])}, up to "
        f"{max(float(str(p['decibels'])) for p in some):.0f} dB"
        for (session, hz), some in groups.items()
    ]
    first = f"{found[0]:g}"
    return Finding(
        LINE_NOISE,
        WARNING,
        f"mains hum at {listed([f'{hz:g}' for hz in found])} Hz, {_DECIBELS:g} dB and more above "
        f"what lies beside it, in {len({place['session'] for place in places})} of {sessions} "
        "sessions",
        {"places": places},
        examples[:8],
        f"filter it out ({first} Hz notch, and its harmonics) before training; a codebook would "
        "spend its codes on it",
    )
