"""The codebooks themselves: how far codes move, how their clusters are filled, what they span."""

from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from b2t.monitor.context import StepContext
from b2t.quantize import ResidualVQ


class EMAMonitor:
    """Movement, cluster sizes, variance, effective rank, revivals, and equality between ranks.

    Metrics (q = codebook, from 0; one codebook where the layers share it):
        `ema/movement/q`: root mean square move of a code in one update over the root mean square
            norm of the codes, at the last update whose number divides by ``every``;
            `ema/movement` the mean.
        `ema/cluster_size_min/q`, `ema/cluster_size_std/q`: EMA counts over their mean, so that 1 is
            uniform use; `ema/cluster_size_mean/q`: the mean itself, in frames per update.
        `ema/tiny_clusters/q`: share of codes whose EMA count is below ``tiny`` of the mean.
        `ema/code_variance/q`: variance over codes, averaged over dimensions;
            `ema/code_variance_min` the smallest: below 1e-6 the codes are all alike.
        `ema/effective_rank/q`: exp of the entropy of the normalised singular values of the centred
            codebook (Roy and Vetterli 2007); at most min(K, D). It changes slowly and costs more
            than all else: after the first reading each looks at the next codebook only, so that a
            value is at most as many readings old as there are codebooks.
        `ema/revived_per_step`: codes revived per update, all layers, over the last ``window``
            updates; `ema/revived_fraction` over all codes; `ema/revived/q` by layer.
        `ema/warm`: 1 once the start weighs less than 5 % in the averages.
        `ema/ranks_differ`: 1 where the codebooks of two ranks are not bitwise equal, else 0.

    `metrics` looks at the codebooks, and compares ranks, so that every rank must call it.

    Args:
        quantizer: the `ResidualVQ` to watch.
        every: updates between measurements of movement, which costs a copy of the codebooks.
        window: updates over which revivals are averaged.
        tiny: fraction of the mean EMA count.
        group: ranks to compare.
    """

    def __init__(
        self,
        quantizer: ResidualVQ,
        *,
        every: int = 10,
        window: int = 20,
        tiny: float = 0.1,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.quantizer = quantizer
        self.every = every
        self.tiny = tiny
        self.group = group
        self.updates = 0
        self._revived: deque[list[int]] = deque(maxlen=window)
        self._before: Tensor | None = None
        self._movement: Tensor | None = None
        self._ranks: Tensor | None = None
        self._next = 0
        self._ranked_at = 0

    def update(self, context: StepContext) -> None:
        """Take in one applied step; only steps that moved the codebooks count."""
        report = context.update_report
        if report is None or not report.applied:
            return
        self.updates += 1
        self._revived.append([int(count) for count in report.revived])
        if self.updates % self.every == 0 and self._before is not None:
            self._movement = _movement(self._before, self._codes)
            self._before = None
        if self.updates % self.every == self.every - 1 or self.every == 1:
            self._before = self._codes.clone()

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the class docstring; empty before the first update. Collective."""
        if not self.updates:
            return {}
        per_layer = {
            **_cluster_sizes(self.quantizer.codebooks.ema_count, self.tiny),
            "code_variance": self._codes.var(dim=1, correction=0).mean(-1),
            "effective_rank": self._effective_ranks(),
        }
        if self._movement is not None:
            per_layer["movement"] = self._movement
        values = torch.stack([v.double().to(self._codes.device) for v in per_layer.values()])
        table = dict(zip(per_layer, values.cpu(), strict=True))
        found = {f"ema/{n}/{q}": v for n, row in table.items() for q, v in enumerate(row.tolist())}
        found["ema/code_variance_min"] = float(table["code_variance"].min())
        if "movement" in table:
            found["ema/movement"] = float(table["movement"].mean())
        found.update(self._revivals())
        found["ema/warm"] = float(self.quantizer.decay**self.updates < 0.05)
        found["ema/ranks_differ"] = float(self._ranks_differ())
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return what the codebooks themselves do not hold."""
        return {
            "updates": self.updates,
            "revived": list(self._revived),
            "movement": self._movement,
            "ranks": self._ranks,
            "next": self._next,
            "ranked_at": self._ranked_at,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on; call after the codebooks were restored, which the next movement starts from."""
        self.updates = state["updates"]
        self._revived.clear()
        self._revived.extend(state["revived"])
        self._movement, self._ranks = state["movement"], state.get("ranks")
        self._next, self._ranked_at = state.get("next", 0), state.get("ranked_at", 0)
        due = self.updates % self.every == self.every - 1 or self.every == 1
        self._before = self._codes.clone() if due and self.updates else None

    @property
    def _codes(self) -> Tensor:
        return self.quantizer.codebooks.embed.detach()

    def _effective_ranks(self) -> Tensor:
        """Effective rank of each codebook, one of them measured anew since the last update."""
        codes = self._codes
        if self._ranks is None or len(self._ranks) != len(codes):
            self._ranks, self._next = effective_rank(codes), 0
        elif self._ranked_at != self.updates:
            ranks = self._ranks.to(codes.device, copy=True)
            ranks[self._next] = effective_rank(codes[self._next : self._next + 1])[0]
            self._ranks, self._next = ranks, (self._next + 1) % len(codes)
        self._ranked_at = self.updates
        return self._ranks

    def _revivals(self) -> dict[str, float]:
        means = [sum(layer) / len(self._revived) for layer in zip(*self._revived, strict=True)]
        codes = self._codes.shape[0] * self._codes.shape[1]
        found = {f"ema/revived/{q}": mean for q, mean in enumerate(means)}
        found["ema/revived_per_step"] = sum(means)
        found["ema/revived_fraction"] = sum(means) / codes
        return found

    def _ranks_differ(self) -> bool:
        if not (dist.is_available() and dist.is_initialized()):
            return False
        mine = self.quantizer.checksum().reshape(1)
        sums = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(sums, mine, group=self.group)
        return len(set(torch.cat(sums).tolist())) > 1


def effective_rank(codes: Tensor) -> Tensor:
    """Effective rank of each centred codebook: codes [L, K, D] → [L] float64, 0 without variance.

    Singular values come from the smaller Gram matrix, in float64.
    """
    found = []
    for book in codes.double():
        centred = book - book.mean(0)
        gram = centred.T @ centred if book.shape[1] <= book.shape[0] else centred @ centred.T
        singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
        # Rounding leaves eigenvalues of about 1e-16 of the largest where there should be none.
        singular = torch.where(singular > 1e-7 * singular.max(), singular, 0)
        share = singular / singular.sum().clamp(min=torch.finfo(torch.float64).tiny)
        rank = torch.exp(-torch.special.xlogy(share, share).sum())
        found.append(torch.where(singular.sum() > 0, rank, torch.zeros_like(rank)))
    return torch.stack(found)


def _movement(before: Tensor, after: Tensor) -> Tensor:
    moved = (after - before).double().square().sum(-1).mean(-1)
    norm = before.double().square().sum(-1).mean(-1)
    return (moved / norm.clamp(min=1e-30)).sqrt()


def _cluster_sizes(counts: Tensor, tiny: float) -> dict[str, Tensor]:
    counts = counts.double()
    mean = counts.mean(-1)
    relative = counts / mean.clamp(min=1e-30)[:, None]
    return {
        "cluster_size_mean": mean,
        "cluster_size_min": relative.amin(-1),
        "cluster_size_std": relative.std(-1, correction=0),
        "tiny_clusters": (relative < tiny).double().mean(-1),
    }
