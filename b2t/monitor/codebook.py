"""How the codebooks are used, over a sliding window of optimizer steps."""

from typing import Any

import torch
from torch import Tensor

from b2t.evaluate import usage
from b2t.monitor.context import StepContext
from b2t.monitor.trend import slopes


class CodebookMonitor:
    """Utilization, perplexity and their trends per layer over the last ``window`` updates.

    Metrics (q = layer, from 0):
        `codebook/utilization/q`: used codes / min(K, frames in the window); `codebook/utilization`
            is the mean, `codebook/utilization_worst` the smallest, `codebook/worst_layer` its q.
        `codebook/perplexity/q`: exp of the usage entropy, 1 to K; `codebook/perplexity` the mean,
            `codebook/perplexity_fraction` the mean over K, `codebook/perplexity_worst_fraction`.
        `codebook/entropy_nats/q`: the usage entropy.
        `codebook/dead/q`: share of codes used less than ``dead_threshold`` of uniform use;
            `codebook/dead` the mean. Absent until the window holds K frames.
        `codebook/frames_per_code`: frames in the window / K, by which the others are to be judged.
        `codebook/layer_correlation`: mean absolute Pearson correlation between the usage of
            different layers, index by index: near 0 unless layers copy one another.
        `codebook/utilization_trend`, `codebook/perplexity_trend`: least-squares slope of the mean
            utilization and of the mean perplexity fraction, per 1,000 updates.

    Args:
        window: updates looked back on.
        dead_threshold: fraction of uniform use below which a code counts as dead.
    """

    def __init__(self, window: int = 100, dead_threshold: float = 0.1) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1, found {window}")
        self.window = window
        self.dead_threshold = dead_threshold
        self.seen = 0
        self._counts: Tensor | None = None
        self._total: Tensor | None = None
        self._course: Tensor | None = None

    def update(self, context: StepContext) -> None:
        """Add the counts [Q, K] of one applied step; steps without counts are not updates."""
        if context.counts is None:
            return
        counts = context.counts.detach()
        self._prepare(counts)
        assert self._counts is not None and self._total is not None and self._course is not None
        slot = self.seen % self.window
        self._total += counts.to(self._total.dtype) - self._counts[slot]
        self._counts[slot] = counts
        self._course[slot, 0] = usage.utilization(self._total).mean()
        self._course[slot, 1] = usage.perplexity(self._total).mean() / counts.shape[-1]
        self.seen += 1

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the class docstring; empty before the first update."""
        if self._total is None:
            return {}
        size = self._total.shape[-1]
        rows = {
            "utilization": usage.utilization(self._total),
            "perplexity": usage.perplexity(self._total),
            "entropy_nats": usage.usage_entropy(self._total),
            "dead": self._dead(self._total),
        }
        course = self._chronological(self._course)
        values = torch.cat([*rows.values(), self._total.sum(-1).double()]).cpu()
        values = values.view(len(rows) + 1, -1)
        found: dict[str, float] = {}
        for name, layers in zip(rows, values, strict=False):
            found.update({f"codebook/{name}/{q}": v for q, v in enumerate(layers.tolist())})
        per_layer = dict(zip(rows, values, strict=False))
        worst = int(per_layer["utilization"].argmin())
        found["codebook/utilization"] = float(per_layer["utilization"].mean())
        found["codebook/utilization_worst"] = float(per_layer["utilization"][worst])
        found["codebook/worst_layer"] = float(worst)
        found["codebook/perplexity"] = float(per_layer["perplexity"].mean())
        found["codebook/perplexity_fraction"] = float(per_layer["perplexity"].mean() / size)
        found["codebook/perplexity_worst_fraction"] = float(per_layer["perplexity"].min() / size)
        found["codebook/dead"] = float(per_layer["dead"].mean())
        found["codebook/frames_per_code"] = float(values[-1].min() / size)
        found["codebook/layer_correlation"] = _mean_off_diagonal(self.correlation())
        trends = ("codebook/utilization_trend", "codebook/perplexity_trend")
        found.update(zip(trends, slopes(course).tolist(), strict=True))
        return {name: value for name, value in found.items() if value == value}

    def usage(self) -> Tensor | None:
        """Return the frames per code in the window, [Q, K] int64, None before the first update."""
        return None if self._total is None else self._total.clone()

    def correlation(self) -> Tensor:
        """Return Pearson correlations [Q, Q] between layers' usage, NaN where it is constant."""
        if self._total is None:
            return torch.zeros(0, 0)
        centred = self._total.double() - self._total.double().mean(-1, keepdim=True)
        norm = centred.norm(dim=-1)
        norm = torch.where(norm > 0, norm, torch.nan)
        return ((centred @ centred.T) / (norm[:, None] * norm)).cpu()

    def state_dict(self) -> dict[str, Any]:
        """Return the window in the order of time."""
        if self._counts is None:
            return {"seen": 0, "counts": None, "course": None}
        return {
            "seen": self.seen,
            "counts": self._chronological(self._counts),
            "course": self._chronological(self._course),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a window; of a longer one the most recent updates are kept."""
        self.seen = 0
        self._counts = self._total = self._course = None
        if state["counts"] is None:
            return
        kept = state["counts"][-self.window :]
        self._prepare(kept[0])
        assert self._counts is not None and self._course is not None
        # Slots follow `seen`, so that the next update replaces the oldest.
        first = state["seen"] - len(kept)
        slots = torch.arange(first, state["seen"]) % self.window
        self._counts[slots] = kept
        self._course[slots] = state["course"][-self.window :]
        self._total = self._counts.sum(0, dtype=torch.int64)
        self.seen = state["seen"]

    def _prepare(self, counts: Tensor) -> None:
        """Allocate the window, or move it to where the counts are."""
        if self._counts is None or self._counts.shape[1:] != counts.shape:
            shape, device = (self.window, *counts.shape), counts.device
            self.seen = 0
            self._counts = torch.zeros(shape, dtype=torch.int32, device=device)
            self._total = torch.zeros(counts.shape, dtype=torch.int64, device=device)
            self._course = torch.zeros(self.window, 2, dtype=torch.float64, device=device)
        elif self._counts.device != counts.device:
            assert self._total is not None and self._course is not None
            self._counts = self._counts.to(counts.device)
            self._total = self._total.to(counts.device)
            self._course = self._course.to(counts.device)

    def _dead(self, total: Tensor) -> Tensor:
        frames = total.sum(-1, keepdim=True).double()
        threshold = self.dead_threshold * frames / total.shape[-1]
        share = (total < threshold.clamp(min=1)).double().mean(-1)
        return torch.where(frames.squeeze(-1) >= total.shape[-1], share, torch.nan)

    def _chronological(self, ring: Tensor | None) -> Tensor:
        assert ring is not None
        if self.seen <= self.window:
            return ring[: self.seen]
        return ring.roll(-(self.seen % self.window), dims=0)


def _mean_off_diagonal(matrix: Tensor) -> float:
    layers = len(matrix)
    if layers < 2:
        return float("nan")
    off = matrix[~torch.eye(layers, dtype=torch.bool)]
    return float(off[~off.isnan()].abs().mean())
