"""What to try next: the debugging guide applied to a run, and how many codes the data bear."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from b2t.monitor.health import TABLE
from b2t.monitor.run_data import RunData

FRAMES_PER_CODE = 20
"""Training frames per code to aim for: what the collapse study gives its largest codebooks."""


@dataclass(frozen=True)
class Advice:
    """One thing to try.

    Attributes:
        symptom: what was seen.
        cause: what it probably means.
        remedy: what to do.
    """

    symptom: str
    cause: str
    remedy: str


@dataclass(frozen=True)
class Sizing:
    """A curve of perplexity against codebook size.

    perplexity(K) = K·S/(K + S): every code is used while K is far below S, and beyond S more codes
    add little. The one parameter S is fitted by least squares in the logarithm.

    Attributes:
        saturation: S, in codes.
        points: (K, perplexity) that it was fitted to.
        suggestion: the largest power of two at which the curve still gives half of K.
    """

    saturation: float
    points: tuple[tuple[int, float], ...]
    suggestion: int

    def perplexity(self, codes: float) -> float:
        """Return the curve's perplexity with ``codes`` codes."""
        return codes * self.saturation / (codes + self.saturation)


def fit_sizing(points: Sequence[tuple[int, float]]) -> Sizing | None:
    """Fit the curve to (K, perplexity); None without a usable point."""
    usable = [(k, p) for k, p in points if k > 1 and math.isfinite(p) and 0 < p < k]
    if not usable:
        return None
    from scipy.optimize import minimize_scalar

    sizes = np.array([k for k, _ in usable], dtype=float)
    logs = np.log([p for _, p in usable])

    def misfit(log_s: float) -> float:
        s = math.exp(log_s)
        return float(np.square(np.log(sizes * s / (sizes + s)) - logs).sum())

    found = minimize_scalar(misfit, bounds=(0.0, math.log(1e9)), method="bounded")
    saturation = math.exp(float(found.x))
    suggestion = 2 ** max(1, math.floor(math.log2(max(2.0, saturation))))
    return Sizing(saturation, tuple(usable), suggestion)


def sizing_points(runs: Sequence[RunData]) -> list[tuple[int, float]]:
    """(K, perplexity of the least used layer) of each run, evaluated or while training."""
    points = []
    for run in runs:
        perplexity = [p for p in run.evaluation.get("perplexity") or [] if p is not None]
        size = run.evaluation.get("codebook_size")
        if not (perplexity and size):
            latest = run.latest()
            perplexity = [v for n, v in latest.items() if n.startswith("codebook/perplexity/")]
            size = run.config.get("model", {}).get("quantizer", {}).get("codebook_size")
        if perplexity and size:
            points.append((int(size), float(min(perplexity))))
    return points


def advise(run: RunData) -> list[Advice]:
    """Apply the debugging guide to the most recent values; the most urgent first."""
    latest = run.latest()
    found = [
        Advice(
            f"{row.label}: {row.show(latest[row.metric])} (healthy {row.span()})",
            row.note,
            row.remedy,
        )
        for row in sorted(TABLE, key=lambda row: not row.decides)
        if row.grade(latest.get(row.metric)) in ("concerning", "critical")
    ]
    return found + _guide(run, latest)


def _guide(run: RunData, latest: dict[str, float]) -> list[Advice]:
    found = []
    ratio = latest.get("loss/vq_ratio", 0.0)
    if ratio > 2 and latest.get("loss/reconstruction", math.inf) < 0.3:
        found.append(
            Advice(
                "high VQ loss, low reconstruction loss", "commitment too strong", "commitment 0.1"
            )
        )
    if _stuck(run):
        found.append(
            Advice(
                "the reconstruction loss has hardly moved since its first quarter",
                "decoder too small, or signals that are mostly noise",
                "more decoder layers or a wider latent; compare with model.quantizer.enabled=false",
            )
        )
    wer, noise = run.evaluation.get("wer"), run.evaluation.get("wer_noise")
    if wer is not None and noise is not None and wer > 0.9 * noise:
        found.append(
            Advice(
                f"WER {100 * wer:.0f} % is hardly better than {100 * noise:.0f} % on noise",
                "the text decoder has learnt the language and not the brain",
                "train longer in the last phase; check that phonemes are learnt first (PER)",
            )
        )
    distinct = run.evaluation.get("distinct_ratio")
    if distinct is not None and distinct < 0.5:
        found.append(
            Advice(
                f"distinct outputs are {distinct:.2f} of the distinct targets",
                "the decoder falls back on a few sentences",
                "less dropout in the encoder, more steps, or a smaller text decoder",
            )
        )
    skipped = latest.get("optim/skipped_steps", 0.0)
    last = run.steps[-1]["step"] if run.steps else 0
    if last and skipped > 0.05 * last:
        found.append(
            Advice(
                f"{skipped:.0f} optimizer steps were skipped",
                "gradients overflow in half precision",
                "bf16 where the GPU has it, or a lower learning rate",
            )
        )
    return found


def _stuck(run: RunData) -> bool:
    _, values = run.series("loss/reconstruction")
    if len(values) < 12:
        return False
    quarter = len(values) // 4
    early, late = np.mean(values[quarter : 2 * quarter]), np.mean(values[-quarter:])
    return bool(late > 0.5 and late > 0.98 * early)
