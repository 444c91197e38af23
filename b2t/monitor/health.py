"""The monitoring table: which values are healthy, concerning or critical."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

GRADES = ("healthy", "concerning", "critical")


@dataclass(frozen=True)
class HealthRow:
    """One row of the table.

    Attributes:
        metric: name as in metrics.jsonl.
        label: for people.
        unit: `%` shows a fraction as per cent.
        healthy: (low, high), ends included.
        concerning: (low, high); what lies outside is critical.
        remedy: what to try where it is not healthy; names configuration keys, `phases.*` for the
            phase at hand.
        note: what to know before judging.
        decides: whether the row enters the verdict; not where a good value depends on the
            recordings.
    """

    metric: str
    label: str
    unit: str
    healthy: tuple[float, float]
    concerning: tuple[float, float]
    remedy: str
    note: str = ""
    decides: bool = True

    def grade(self, value: float | None) -> str | None:
        """Return one of ``GRADES``; None without a value, critical where it is not finite."""
        if value is None:
            return None
        if not math.isfinite(value):
            return "critical"
        for grade, (low, high) in zip(GRADES, (self.healthy, self.concerning), strict=False):
            if low <= value <= high:
                return grade
        return "critical"

    def show(self, value: float | None) -> str:
        """Return the value with its unit."""
        if value is None:
            return "–"
        if self.unit == "%":
            return f"{100 * value:.1f} %"
        shown = f"{value:.2f} dB" if self.unit == "dB" else f"{value:.3g} {self.unit}".strip()
        return shown.replace("-", "−") if value < 0 else shown

    def span(self, grade: str = "healthy") -> str:
        """Return the range of a grade with its unit; critical is what lies beyond concerning."""
        low, high = self.healthy if grade == "healthy" else self.concerning
        if math.isinf(high):
            return f"≥ {self._bound(low)}"
        if low == 0:
            return f"≤ {self._bound(high)}"
        return f"{low:g} – {self._bound(high)}".replace("e-0", "e-")

    def _bound(self, value: float) -> str:
        return f"{100 * value:.0f} %" if self.unit == "%" else f"{value:g} {self.unit}".strip()


INFINITY = math.inf

PERPLEXITY = HealthRow(
    "codebook/perplexity_worst_fraction",
    "perplexity over codes, worst layer",
    "%",
    (100 / 256, INFINITY),
    (50 / 256, INFINITY),
    "mode collapse: phases.*.revival, a higher model.quantizer.revival_threshold, fewer "
    "codes; a lower model.quantizer.decay or larger model.quantizer.eps where codes cannot follow",
)

TABLE: tuple[HealthRow, ...] = (
    HealthRow(
        "codebook/utilization_worst",
        "codes in use, worst layer",
        "%",
        (0.60, INFINITY),
        (0.40, INFINITY),
        "phases.*.revival, a higher model.quantizer.revival_threshold, a larger batch, "
        "fewer codes if the data are few; model.quantizer.decay down to 0.9 where codes lag",
    ),
    PERPLEXITY,
    HealthRow(
        "codebook/dead",
        "dead codes",
        "%",
        (0.0, 0.20),
        (0.0, 0.40),
        "phases.*.revival, a higher model.quantizer.revival_threshold, a larger batch, "
        "or fewer codes",
    ),
    HealthRow(
        "reconstruction/snr_db",
        "reconstruction SNR",
        "dB",
        (15.0, INFINITY),
        (10.0, INFINITY),
        "a larger model.signal_decoder.depth or model.encoder.dim, smaller "
        "model.encoder.patch_size, more model.quantizer.num_quantizers",
        "the recordings' noise bounds it, so it does not enter the verdict: compare with the same "
        "model trained with model.quantizer.enabled=false",
        decides=False,
    ),
    HealthRow(
        "loss/vq_ratio",
        "VQ loss over reconstruction loss",
        "",
        (0.0, 2.0),
        (0.0, 10.0),
        "phases.*.losses.commitment towards 0.1, or a lower model.quantizer.decay",
    ),
    HealthRow(
        "optim/grad_norm",
        "gradient norm before clipping",
        "",
        (1e-6, 5.0),
        (1e-6, 10.0),
        "lower phases.*.lr, lengthen phases.*.warmup_steps, or accumulate; check gradient_clipping "
        "in the DeepSpeed file",
    ),
)


def verdict(metrics: Mapping[str, float], table: tuple[HealthRow, ...] = TABLE) -> str | None:
    """Return the worst grade among the rows whose metric is there; None where none is."""
    rows = [row for row in table if row.decides]
    found = [grade for row in rows if (grade := row.grade(metrics.get(row.metric)))]
    return max(found, key=GRADES.index) if found else None
