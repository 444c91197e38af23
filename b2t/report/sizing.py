"""How many codes the data bear: a curve of perplexity against codebook size."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from b2t.monitor.health import PERPLEXITY
from b2t.monitor.rules import COLLAPSED
from b2t.report.run_data import RunData

EFFICIENCY = 0.8
"""Perplexity over codes of the least used layer where nothing limits it: 0.74 to 0.83 at 256, 1,024
and 8,192 codes in the collapse study (docs/RESULTS.md)."""

FRAMES_PER_CODE = 20
"""Frames per code below which the count itself, and not the quantizer, lowers the perplexity."""

_BEND = 0.8
"""Share of its straight line below which the curve counts as bent."""


@dataclass(frozen=True)
class Sizing:
    """A curve of perplexity against codebook size.

    perplexity(K) = a·K·S / (a·K + S): a·K while K is far below S, and never more than S.

    Attributes:
        points: (K, perplexity of the least used layer) that it was fitted to.
        efficiency: a, fitted to two or more sizes; of one size ``EFFICIENCY``, or what was measured
            if that is more.
        saturation: S, in codes; None where the points do not bend, so that nothing bounds S.
        suggestion: codes to try. The largest power of two that the curve calls healthy; where it
            does not bend, twice the largest codebook measured.
    """

    points: tuple[tuple[int, float], ...]
    efficiency: float
    saturation: float | None
    suggestion: int

    def perplexity(self, codes: float) -> float:
        """Return the curve's perplexity with ``codes`` codes."""
        line = self.efficiency * codes
        return line if self.saturation is None else line / (1 + line / self.saturation)

    @property
    def sizes(self) -> list[int]:
        """The sizes measured, ascending."""
        return sorted({size for size, _ in self.points})


def fit_sizing(points: Sequence[tuple[int, float]]) -> Sizing | None:
    """Fit the curve to (K, perplexity) by least squares in the logarithm; None without a point."""
    usable = tuple(sorted((k, p) for k, p in points if k > 1 and 0 < p <= k))
    if not usable:
        return None
    sizes = np.array([k for k, _ in usable], dtype=float)
    logs = np.log([p for _, p in usable])
    efficiency, saturation = _fit(sizes, logs)
    largest = float(sizes.max())
    if 1 / (1 + efficiency * largest / saturation) > _BEND:
        return Sizing(usable, efficiency, None, 2 * int(largest))
    healthy = max(2.0, saturation * (1 / PERPLEXITY.healthy[0] - 1 / efficiency))
    return Sizing(usable, efficiency, saturation, 2 ** math.floor(math.log2(healthy)))


def _fit(sizes: np.ndarray, logs: np.ndarray) -> tuple[float, float]:
    """Return (a, S); with a single size a is given, for one point cannot tell the two apart."""
    from scipy.optimize import minimize, minimize_scalar

    def misfit(log_a: float, log_s: float) -> float:
        line = log_a + np.log(sizes)
        return float(np.square(line - np.logaddexp(0.0, line - log_s) - logs).sum())

    most = math.log(1e9)
    given = math.log(EFFICIENCY)
    if len(set(sizes)) == 1:
        given = max(given, float(logs.mean()) - math.log(sizes[0]))
    alone = minimize_scalar(lambda s: misfit(given, s), bounds=(0.0, most), method="bounded")
    if len(set(sizes)) == 1:
        return math.exp(given), math.exp(alone.x)
    both = minimize(
        lambda x: misfit(*x),
        (given, alone.x),
        bounds=((math.log(0.2), 0.0), (0.0, most)),
        method="L-BFGS-B",
        options={"ftol": 1e-14, "gtol": 1e-10},
    )
    return math.exp(both.x[0]), math.exp(both.x[1])


@dataclass(frozen=True)
class SizingPoints:
    """What runs say about the size of codebooks.

    Attributes:
        points: (K, perplexity of the least used layer) by run.
        left_out: runs that say nothing, each with the reason.
    """

    points: tuple[tuple[int, float], ...]
    left_out: tuple[str, ...]


def sizing_points(runs: Sequence[RunData]) -> SizingPoints:
    """Collect (K, perplexity) from whichever count of each run holds more frames."""
    points, left_out = [], []
    for run in runs:
        counts = [count for count in (_evaluated(run), _trained(run)) if count is not None]
        if not counts:
            continue
        frames, size, perplexity = max(counts)
        if _collapsed(run):
            left_out.append(
                f"{run.name}, whose codebook collapsed: that says nothing about the data"
            )
        elif frames < FRAMES_PER_CODE * size:
            left_out.append(
                f"{run.name}, with {frames / size:.1f} frames per code counted, fewer than "
                f"{FRAMES_PER_CODE}: a wider monitor.window counts more"
            )
        else:
            points.append((size, perplexity))
    return SizingPoints(tuple(points), tuple(left_out))


def _evaluated(run: RunData) -> tuple[float, int, float] | None:
    """Frames, codes, and perplexity of the least used layer on the evaluated split."""
    perplexity = [p for p in run.evaluation.get("perplexity") or [] if p is not None]
    size = run.evaluation.get("codebook_size")
    if not (perplexity and size and run.usage):
        return None
    return float(min(map(sum, run.usage))), int(size), float(min(perplexity))


def _trained(run: RunData) -> tuple[float, int, float] | None:
    """The same over the last window of training."""
    latest = run.latest()
    perplexity = [v for n, v in latest.items() if n.startswith("codebook/perplexity/")]
    size = run.setting("model.quantizer.codebook_size")
    if not (perplexity and isinstance(size, int)):
        return None
    return latest.get("codebook/frames_per_code", 0.0) * size, size, float(min(perplexity))


def _collapsed(run: RunData) -> bool:
    use = run.latest().get(COLLAPSED.metric)
    return any(alert.get("rule") == COLLAPSED.name for alert in run.alerts) or (
        use is not None and COLLAPSED.violated(use)
    )
