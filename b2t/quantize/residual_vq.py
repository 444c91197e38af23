"""Residual vector quantization: each layer quantizes what the layers before it left over."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F
from tqdm import tqdm

from b2t.errors import UserError
from b2t.log import logger
from b2t.quantize import search
from b2t.quantize.codebook import Codebooks, Read, Write, default_decay
from b2t.quantize.distributed import all_gather_rows, all_reduce_sum, broadcast_from_first, rank
from b2t.quantize.distributed import world_size as ranks_of
from b2t.quantize.frame_hash import frame_hash, signed64
from b2t.quantize.gradients import pass_gradient, squared_codebook, squared_commitment
from b2t.quantize.kmeans import FrameReservoir, canonical, collect, kmeans
from b2t.quantize.regularizers import diversity_loss, global_usage, perplexity_loss
from b2t.quantize.revival import REVIVALS, revive_layer
from b2t.quantize.schedules import SCHEDULES, anneal
from b2t.quantize.statistics import (
    FramePool,
    InitReport,
    QuantizerStats,
    SoftUsage,
    UpdateReport,
)

LOSSES = ("commitment", "diversity", "perplexity")
_CONFIG, _WEIGHTS = "quantizer.json", "quantizer.safetensors"


class RVQOutput(NamedTuple):
    """What `ResidualVQ.forward` returns.

    Args:
        quantized: [B, P, dim] in the dtype of the input; zero where nothing was quantized.
        codes: [B, P, Q] int64; −1 under the mask, at frames that are not finite, in dropped layers
            and before the codebooks have started.
        losses: 0-d float32 tensors by name: those asked for of ``commitment``, ``diversity`` and
            ``perplexity``, and ``codebook`` under the gradient rule (add it with weight 1).
        stats: what `ResidualVQ.update` needs.
    """

    quantized: Tensor
    codes: Tensor
    losses: dict[str, Tensor]
    stats: QuantizerStats


class _Pass(NamedTuple):
    """One pass over the layers, on the N frames that count."""

    codes: Tensor  # [N, Q]
    quantized: Tensor  # [N, D]
    errors: Tensor  # [N, D], sum over layers of the residual that each leaves
    counts: Tensor  # [Q, K]
    squared_error: Tensor  # [Q]
    projection: Tensor  # [Q]
    layers: int
    sums: Tensor | None = None  # [L, K, D]
    pool: FramePool | None = None

    @classmethod
    def zeros(cls, latents: Tensor, Q: int, K: int, layers: int) -> _Pass:
        return cls(
            codes=torch.full((latents.shape[0], Q), -1, device=latents.device),
            quantized=torch.zeros_like(latents),
            errors=torch.zeros_like(latents),
            counts=torch.zeros(Q, K, dtype=torch.int64, device=latents.device),
            squared_error=latents.new_zeros(Q),
            projection=latents.new_zeros(Q),
            layers=layers,
        )


class ResidualVQ(nn.Module):
    """Residual vector quantizer whose forward is pure and whose codes stay alive.

    Forward assigns, computes losses and statistics, and changes nothing. `update` moves the
    codebooks, once for each applied optimizer step, from the statistics of all micro-batches and
    ranks. Before `initialize` (k-means++ from latents) the quantizer passes its input through.

    Codebooks, averages and distances are float32 in any engine. Frames under the mask and frames
    with NaN or infinity never touch a loss, a statistic or a seed; their output is zero with codes
    −1 and no gradient, and the latter are counted in ``stats.nonfinite``.

    Argument names are those of vector-quantize-pytorch where the meaning is the same.

    Args:
        dim: width of the latents.
        codebook_size: codes K of each layer.
        num_quantizers: layers Q.
        codebook_dim: width D of a code; other than ``dim`` adds a projection on either side.
        shared_codebook: one codebook for all layers.
        update_rule: ``ema``, codes are running averages of their frames; ``gradient``, codes are a
            parameter moved by the optimizer on the loss ``codebook``.
        decay: of the running averages, per update; by default 0.95 up to 512 codes, 0.97 up to
            2048, 0.98 above.
        eps: pseudo-frames of the Laplace smoothing.
        codebook_gradient_scale: factor on every gradient into the codebooks (gradient rule).
        use_cosine_sim: latents are normalized, codes are unit vectors found by angle; each layer
            has a gain, the running mean of its residuals along their codes.
        rotation_trick: gradient to the latents by rotation of the whole sum; else straight through.
        quantize_dropout: train with a random number of the first layers, drawn from (seed, update),
            so that it is one number for all ranks and micro-batches of a step.
        quantize_dropout_cutoff_index: index of the last layer that is never dropped.
        kmeans_init: start by `initialize`; False starts from uniform random codes at once.
        kmeans_iters: Lloyd steps of the start.
        revival: ``split``, ``frames`` (see `b2t.quantize.revival.revive_layer`) or None; True and
            False stand for ``split`` and None.
        revival_threshold: a code is dead below this fraction of uniform use.
        revival_every: updates between revivals.
        revival_max_share: greatest part of a codebook revived in one update.
        revival_until: progress of training (see `set_progress`) after which nothing is revived.
        temperature: τ at the start of training, in units of the mean squared distance of a frame
            to its code. Soft assignments are softmax(−‖r−c‖²/(τ·mean)).
        temperature_end: τ at the end.
        temperature_schedule: ``cosine``, ``linear`` or ``exponential``.
        stochastic_sample_codes: in training, draw codes from the soft assignment (Gumbel-max);
            the noise is a function of the frame and the update.
        seed: of everything random here.

    Attributes:
        revival_enabled: switch for phases that must not revive.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        num_quantizers: int,
        codebook_dim: int | None = None,
        *,
        shared_codebook: bool = False,
        update_rule: str = "ema",
        decay: float | None = None,
        eps: float = 1e-5,
        codebook_gradient_scale: float = 10.0,
        use_cosine_sim: bool = False,
        rotation_trick: bool = True,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        kmeans_init: bool = True,
        kmeans_iters: int = 10,
        revival: str | bool | None = "split",
        revival_threshold: float = 0.1,
        revival_every: int = 5,
        revival_max_share: float = 0.1,
        revival_until: float = 0.9,
        temperature: float = 2.0,
        temperature_end: float = 0.5,
        temperature_schedule: str = "cosine",
        stochastic_sample_codes: bool = False,
        seed: int = 0,
    ) -> None:
        given = dict(locals())
        super().__init__()
        self.config = {k: given[k] for k in inspect.signature(ResidualVQ).parameters}
        if isinstance(revival, bool):
            revival = "split" if revival else None
        _check_options(self.config, revival)
        self.dim, self.codebook_size, self.num_quantizers = dim, codebook_size, num_quantizers
        self.codebook_dim = codebook_dim or dim
        self.shared_codebook, self.update_rule = shared_codebook, update_rule
        self.decay = default_decay(codebook_size) if decay is None else decay
        self.eps, self.codebook_gradient_scale = eps, codebook_gradient_scale
        self.use_cosine_sim, self.rotation_trick = use_cosine_sim, rotation_trick
        self.quantize_dropout = quantize_dropout and num_quantizers > 1
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.kmeans_iters = kmeans_iters
        self.revival, self.revival_threshold = revival, revival_threshold
        self.revival_every, self.revival_max_share = revival_every, revival_max_share
        self.revival_until, self.revival_enabled = revival_until, True
        self.temperature_start, self.temperature_end = temperature, temperature_end
        self.temperature_schedule = temperature_schedule
        self.stochastic_sample_codes = stochastic_sample_codes
        projects = self.codebook_dim != dim
        self.project_in = nn.Linear(dim, self.codebook_dim) if projects else nn.Identity()
        self.project_out = nn.Linear(self.codebook_dim, dim) if projects else nn.Identity()
        self.codebooks = Codebooks(
            1 if shared_codebook else num_quantizers,
            codebook_size,
            self.codebook_dim,
            learnable=update_rule == "gradient",
            seed=seed,
        )
        if not self.codebooks.embed.is_meta:
            self._start_clocks(kmeans_init)

    def _start_clocks(self, kmeans_init: bool) -> None:
        self.codebooks.temperature.fill_(self.temperature_start)
        if not kmeans_init:
            self.codebooks.start_random()
            if self.use_cosine_sim:
                self.codebooks.embed.copy_(F.normalize(self.codebooks.embed, dim=-1))
                self.codebooks.push()
            self.codebooks.initialized.fill_(self.num_quantizers)

    # ---- clocks and switches

    @property
    def initialized(self) -> bool:
        """Whether the codebooks have started; until then the input passes through."""
        return int(self.codebooks.initialized) == self.num_quantizers

    @property
    def temperature(self) -> float:
        """τ, dimensionless."""
        return float(self.codebooks.temperature)

    def set_temperature(self, value: float) -> None:
        """Set τ > 0."""
        if not value > 0:
            raise ValueError(f"temperature must be positive, got {value}")
        self.codebooks.temperature.fill_(value)

    def set_progress(self, progress: float) -> None:
        """Tell how much of training is done, in [0, 1]: sets τ and ends revival in time."""
        self.codebooks.progress.fill_(progress)
        self.set_temperature(
            anneal(
                self.temperature_start, self.temperature_end, progress, self.temperature_schedule
            )
        )

    def attach_master(self, read: Read, write: Write) -> None:
        """See `Codebooks.attach_master`; needed for the gradient rule in half precision."""
        self.codebooks.attach_master(read, write)

    @torch.no_grad()
    def checksum(self) -> Tensor:
        """A number [] int64 that is equal on two ranks whose codebooks are bitwise equal."""
        total = torch.zeros((), dtype=torch.int64, device=self.codebooks.embed.device)
        for tensor in (self.codebooks.embed, self.codebooks.ema_count, self.codebooks.ema_sum):
            bits = tensor.view(torch.int32).reshape(-1).to(torch.int64)
            total = total * 31 + (bits * torch.arange(1, 2 * bits.numel(), 2).to(bits)).sum()
        return total

    def _book(self, layer: int) -> int:
        return 0 if self.shared_codebook else layer

    def _revives_next(self) -> bool:
        return (
            self.revival is not None
            and self.revival_enabled
            and float(self.codebooks.progress) < self.revival_until
            and (int(self.codebooks.updates) + 1) % self.revival_every == 0
        )

    def _active_layers(self) -> int:
        """Layers of this step: all of them, or a number drawn from (seed, update)."""
        if not (self.training and self.quantize_dropout):
            return self.num_quantizers
        seed = signed64(int(self.codebooks.seed) * 7_919 + int(self.codebooks.updates))
        low = self.quantize_dropout_cutoff_index + 1
        generator = torch.Generator().manual_seed(seed)
        return int(torch.randint(low, self.num_quantizers + 1, (1,), generator=generator))

    # ---- forward

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        frames: Tensor | float | None = None,
        losses: Collection[str] = LOSSES,
        group: ProcessGroup | None = None,
        usage: SoftUsage | None = None,
        micro_batches: int = 1,
    ) -> RVQOutput:
        """Quantize latents.

        In training with ``diversity`` or ``perplexity`` and without ``usage``, one all-reduce runs
        over ``group``; every rank must call, also with no valid frame.

        Args:
            x: [B, P, dim] (any leading axes).
            mask: [B, P] bool, True = real.
            frames: divisor of commitment and codebook loss instead of this batch's own number of
                valid frames: their mean per micro-batch and rank, for an exact global mean.
            losses: names wanted, of ``commitment``, ``diversity``, ``perplexity``.
            group: ranks of the global batch.
            usage: soft usage of the whole step (see `soft_usage`); the two regularisers are then
                exact over micro-batches too.
            micro_batches: forwards of this step on each rank; needed with ``usage``.
        """
        rows, latents, nonfinite = self._valid_latents(x, mask)
        if not self.initialized:
            return self._pass_through(x, rows, latents, nonfinite, losses)
        active = self._active_layers()
        books = self.codebooks.value(self.codebook_gradient_scale)
        hashes = self._hashes(latents)
        pool_rows = self._pool_rows(hashes)
        with torch.no_grad():
            done = self._search(latents.detach(), books.detach(), active, hashes, pool_rows)
            stats = self._statistics(done, nonfinite)
        terms = self._losses(
            latents, books, done, stats, frames, losses, group, usage, micro_batches
        )
        z = pass_gradient(latents, done.quantized, self.rotation_trick)
        return RVQOutput(
            self._output(z, rows, x), self._scatter(done.codes, rows, x, -1), terms, stats
        )

    def _valid_latents(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the flattened ``x`` that count, their latents [N, D], how many held NaN."""
        if x.shape[-1] != self.dim:
            raise ValueError(f"latents have width {x.shape[-1]}, the quantizer expects {self.dim}")
        flat = x.reshape(-1, self.dim)
        keep = torch.isfinite(flat.detach()).all(1)
        if mask is not None:
            if mask.shape != x.shape[:-1]:
                raise ValueError(f"mask {tuple(mask.shape)} does not fit x {tuple(x.shape)}")
            real = mask.reshape(-1).bool()
        else:
            real = torch.ones_like(keep)
        rows = (keep & real).nonzero()[:, 0]
        latents = self._project(flat[rows])
        finite = torch.isfinite(latents.detach()).all(1)
        if isinstance(self.project_in, nn.Linear) and not bool(finite.all()):
            rows, latents = rows[finite], latents[finite]
        return rows, latents, real.sum() - rows.shape[0]

    def _project(self, flat: Tensor) -> Tensor:
        latents = self.project_in(flat).float()
        return F.normalize(latents, dim=-1) if self.use_cosine_sim else latents

    def _pass_through(
        self, x: Tensor, rows: Tensor, latents: Tensor, nonfinite: Tensor, losses: Collection[str]
    ) -> RVQOutput:
        Q, K, D = self.num_quantizers, self.codebook_size, self.codebook_dim
        zero = latents.new_zeros(())
        stats = QuantizerStats(
            counts=torch.zeros(Q, K, dtype=torch.int64, device=x.device),
            sums=latents.new_zeros(self.codebooks.embed.shape[0], 0, D) if self.training else None,
            squared_error=latents.new_zeros(Q),
            projection=latents.new_zeros(Q),
            frames=torch.zeros(Q, dtype=torch.int64, device=x.device),
            nonfinite=nonfinite,
            empty=True,
        )
        codes = torch.full((*x.shape[:-1], Q), -1, device=x.device)
        terms = {name: zero.clone() for name in LOSSES if name in losses}
        if self.update_rule == "gradient":
            terms["codebook"] = zero.clone()
        return RVQOutput(self._output(latents, rows, x), codes, terms, stats)

    def _hashes(self, latents: Tensor) -> Tensor | None:
        if not self.training or not (self.stochastic_sample_codes or self._revives_next()):
            return None
        seed, step = int(self.codebooks.seed), int(self.codebooks.updates)
        return frame_hash(latents.detach(), seed, step)

    def _pool_rows(self, hashes: Tensor | None) -> Tensor | None:
        if hashes is None or not self._revives_next():
            return None
        return torch.argsort(hashes, stable=True)[: self._pool_size]

    @property
    def _pool_size(self) -> int:
        return max(256, int(self.revival_max_share * self.codebook_size))

    def _search(
        self,
        latents: Tensor,
        books: Tensor,
        layers: int,
        hashes: Tensor | None = None,
        pool_rows: Tensor | None = None,
        collect: bool = True,
    ) -> _Pass:
        """Walk the first ``layers`` layers over ``latents`` [N, D]."""
        Q, K = self.num_quantizers, self.codebook_size
        done = _Pass.zeros(latents, Q, K, layers)
        sums = torch.zeros_like(self.codebooks.embed) if self.training and collect else None
        residual, seen = latents.clone(), []
        for q in range(layers):
            layer = self._book(q)
            if pool_rows is not None:
                seen.append(residual[pool_rows])
            codes = self._assign(residual, books, q, hashes)
            done.codes[:, q] = codes
            if sums is not None:
                summed, done.counts[q] = search.code_sums(self._seen(residual), codes, K)
                sums[layer] += summed
            elif collect:
                done.counts[q] = torch.bincount(codes, minlength=K)
            chosen = self._chosen(codes, books, q)
            if self.use_cosine_sim:
                done.projection[q] = (residual * books[layer][codes]).sum()
            residual -= chosen
            done.quantized.add_(chosen)
            done.errors.add_(residual)
            done.squared_error[q] = residual.square().sum()
        pool = None
        if hashes is not None and pool_rows is not None:
            seen += [torch.zeros_like(latents[pool_rows])] * (Q - layers)
            pool = FramePool(
                hashes[pool_rows], torch.stack(seen), done.codes[pool_rows].T, self._pool_size
            )
        return done._replace(sums=sums, pool=pool)

    def _seen(self, residual: Tensor) -> Tensor:
        """A residual as the search sees it."""
        return F.normalize(residual, dim=-1) if self.use_cosine_sim else residual

    def _chosen(self, codes: Tensor, books: Tensor, q: int) -> Tensor:
        """What layer q adds for ``codes`` [N] ≥ 0; [N, D], without gradient."""
        layer = self._book(q)
        chosen = books[layer].detach()[codes]
        return chosen * self.codebooks.gain[layer] if self.use_cosine_sim else chosen

    def _assign(
        self, residual: Tensor, books: Tensor, q: int, hashes: Tensor | None = None
    ) -> Tensor:
        book = books[self._book(q)]
        residual = self._seen(residual)
        if self.training and self.stochastic_sample_codes and hashes is not None:
            return search.sample(residual, book, self._inverse_scale(q, books), hashes, q)
        return search.nearest(residual, book)

    def _inverse_scale(self, q: int, books: Tensor) -> Tensor:
        """1/(τ·mean squared distance): [] tensor, so that no device waits for the host."""
        layer = self._book(q)
        mean = self.codebooks.distance_scale[layer]
        if self.use_cosine_sim:
            # Soft assignments compare directions: ‖û−ĉ‖² between unit vectors.
            mean = 2.0 - 2.0 * self.codebooks.gain[layer].clamp(max=1.0 - 1e-3)
        book = books[layer].detach()
        # A codebook that never saw a frame has its own spread for a scale; one that fits its
        # frames perfectly has a distance of zero, and keeps a finite temperature.
        spread = 2.0 * (book - book.mean(0)).square().sum(1).mean()
        floor = torch.where(mean > 0, 1e-6 * spread, spread).clamp(min=1e-20)
        return 1.0 / (torch.maximum(mean, floor) * self.temperature)

    def _sum_codes(self, codes: Tensor, books: Tensor) -> Tensor:
        """Sum of the chosen codes [N, D] in the order of the layers; −1 adds nothing."""
        total = books.new_zeros(codes.shape[0], self.codebook_dim)
        for q in range(codes.shape[1]):
            chosen = self._chosen(codes[:, q].clamp(min=0), books, q)
            total += torch.where(codes[:, q, None] >= 0, chosen, 0.0)
        return total

    def _statistics(self, done: _Pass, nonfinite: Tensor) -> QuantizerStats:
        frames = torch.zeros_like(done.counts[:, 0])
        frames[: done.layers] = done.codes.shape[0]
        return QuantizerStats(
            done.counts,
            done.sums,
            done.squared_error,
            done.projection,
            frames,
            nonfinite,
            done.pool,
        )

    # ---- losses

    def _losses(
        self,
        latents: Tensor,
        books: Tensor,
        done: _Pass,
        stats: QuantizerStats,
        frames: Tensor | float | None,
        names: Collection[str],
        group: ProcessGroup | None,
        usage: SoftUsage | None,
        micro_batches: int,
    ) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        unknown = set(names) - set(LOSSES)
        if unknown:
            raise ValueError(f"unknown losses {sorted(unknown)}; choose of {LOSSES}")
        divisor = max(1, latents.shape[0]) if frames is None else frames
        if isinstance(divisor, Tensor):
            divisor = divisor.to(latents.device, torch.float32)
        elements = divisor * (done.layers * self.codebook_dim)
        total = done.squared_error.sum()
        if "commitment" in names:
            terms["commitment"] = squared_commitment(latents, total, done.errors) / elements
        if self.update_rule == "gradient":
            terms["codebook"] = self._codebook_loss(books, stats, total) / elements
        if "diversity" in names or "perplexity" in names:
            local = self._soft_sums(latents, books, done)
            mean = global_usage(
                local, stats.frames, group, usage, micro_batches, reduce=self.training
            )[: done.layers]
            if "diversity" in names:
                terms["diversity"] = diversity_loss(mean)
            if "perplexity" in names:
                terms["perplexity"] = perplexity_loss(mean)
        return terms

    def _codebook_loss(self, books: Tensor, stats: QuantizerStats, total: Tensor) -> Tensor:
        if stats.sums is None:
            return total.clone()
        counts = stats.counts.sum(0, keepdim=True) if self.shared_codebook else stats.counts
        return squared_codebook(books, counts.float(), stats.sums, total)

    def _soft_sums(self, latents: Tensor, books: Tensor, done: _Pass) -> Tensor:
        """Soft assignments of each layer summed over this batch's frames, [Q, K]."""
        sums = []
        offset = torch.zeros_like(latents, requires_grad=False)
        for q in range(done.layers):
            residual = self._seen(latents - offset)
            book = books[self._book(q)]
            sums.append(search.soft_usage(residual, book, self._inverse_scale(q, books)))
            offset = offset + self._chosen(done.codes[:, q], books, q)
        sums += [torch.zeros_like(sums[0])] * (self.num_quantizers - done.layers)
        return torch.stack(sums)

    @torch.no_grad()
    def soft_usage(self, x: Tensor, mask: Tensor | None = None) -> SoftUsage:
        """Soft assignments of one micro-batch, for regularisers exact over accumulation.

        Before the first backward of a step, sum this over the step's micro-batches, ``all_reduce``
        the sum, and hand it to each forward as ``usage`` with ``micro_batches``. The latents must
        be those of the forward: replay the encoder's dropout from the same random state.
        """
        _, latents, _ = self._valid_latents(x, mask)
        books = self.codebooks.value()
        hashes = self._hashes(latents)
        done = self._search(latents, books, self._active_layers(), hashes, collect=False)
        frames = torch.zeros(self.num_quantizers, dtype=torch.int64, device=latents.device)
        frames[: done.layers] = latents.shape[0]
        return SoftUsage(self._soft_sums(latents, books, done), frames)

    # ---- codes in and out

    def _scatter(self, values: Tensor, rows: Tensor, like: Tensor, fill: float) -> Tensor:
        flat = values.new_full((like.shape[:-1].numel(), values.shape[1]), fill)
        return flat.index_copy(0, rows, values).view(*like.shape[:-1], values.shape[1])

    def _output(self, z: Tensor, rows: Tensor, like: Tensor) -> Tensor:
        """Project [N, D] back and lay it out as ``like`` [B, P, dim], zero elsewhere."""
        return self._project_back(self._scatter(z, rows, like, 0.0), rows, like.dtype)

    def _project_back(self, z: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
        if not isinstance(self.project_out, nn.Linear):
            return z.to(dtype)
        out = self.project_out(z.to(self.project_out.weight.dtype)).to(dtype)
        real = torch.zeros(z.shape[:-1].numel(), dtype=torch.bool, device=z.device)
        real[rows] = True
        return torch.where(real.view(*z.shape[:-1], 1), out, 0.0)

    @torch.no_grad()
    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Codes [B, P, Q] int64 of latents ``x`` [B, P, dim], nearest, all layers."""
        self._require_start("encode")
        rows, latents, _ = self._valid_latents(x, mask)
        books = self.codebooks.value()
        was_training, self.training = self.training, False
        try:
            done = self._search(latents, books, self.num_quantizers, collect=False)
        finally:
            self.training = was_training
        return self._scatter(done.codes, rows, x, -1)

    @torch.no_grad()
    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Quantized latents [B, P, dim] of ``codes`` [B, P, Q]: exactly those of forward.

        Codes of −1 add nothing, and a frame whose first code is −1 is zero.

        Args:
            codes: [B, P, q] int64 with q ≤ Q layers.
            dtype: of the result, and the input dtype of the forward to agree with.

        Raises:
            ValueError: codes outside [−1, K) or more layers than there are.
        """
        self._require_start("decode")
        if codes.shape[-1] > self.num_quantizers:
            raise ValueError(f"{codes.shape[-1]} layers of codes, at most {self.num_quantizers}")
        if codes.numel() and not (int(codes.min()) >= -1 and int(codes.max()) < self.codebook_size):
            raise ValueError(
                f"codes span {int(codes.min())} to {int(codes.max())}, "
                f"expected −1 to {self.codebook_size - 1}"
            )
        flat = codes.reshape(-1, codes.shape[-1])
        z = self._sum_codes(flat, self.codebooks.value())
        rows = (flat[:, 0] >= 0).nonzero()[:, 0]
        z = z.view(*codes.shape[:-1], self.codebook_dim)
        return self._project_back(z, rows, dtype)

    def decode_prefix(
        self, codes: Tensor, layers: int, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Quantized latents of the first ``layers`` layers of ``codes``."""
        if not 1 <= layers <= codes.shape[-1]:
            raise ValueError(f"prefix of {layers} layers, expected 1 to {codes.shape[-1]}")
        return self.decode(codes[..., :layers], dtype)

    def _require_start(self, action: str) -> None:
        if not self.initialized:
            raise RuntimeError(f"cannot {action}: the codebooks have not started (initialize)")

    # ---- update

    @torch.no_grad()
    def update(self, stats: QuantizerStats, group: ProcessGroup | None = None) -> UpdateReport:
        """Move the codebooks; call once for each applied optimizer step, on every rank.

        Sums ``stats`` over ranks, moves the averages and the codes, then revives. The state is the
        same on all ranks afterwards. Statistics from before the start change nothing.

        Args:
            stats: those of this rank's micro-batches, added.
            group: ranks of the global batch.
        """
        if stats.empty or not self.initialized:
            none = [0] * self.num_quantizers
            return UpdateReport(False, stats.frames, none, stats.nonfinite)
        if stats.sums is None:
            raise ValueError("update needs statistics of a forward in training mode")
        pool, stats = stats.pool, stats.all_reduce(group)
        assert stats.sums is not None
        books = self.codebooks
        books.pull()
        counts = stats.counts.sum(0, keepdim=True) if self.shared_codebook else stats.counts
        sums = stats.sums if self.update_rule == "ema" else None
        books.move_averages(counts, sums, self.decay, self.eps, self.use_cosine_sim)
        books.move_scales(stats, self.decay, self.use_cosine_sim)
        if sums is None and self.use_cosine_sim:
            books.embed.copy_(F.normalize(books.embed, dim=-1))
            books.push()
        revived = self._revive(pool, group)
        books.updates += 1
        return UpdateReport(True, stats.frames, revived, stats.nonfinite, stats.counts)

    def _revive(self, pool: FramePool | None, group: ProcessGroup | None) -> list[int]:
        revived = [0] * self.num_quantizers
        if not self._revives_next():
            return revived
        books, mode = self.codebooks, self.revival
        floor = self.revival_threshold * books.ema_count.mean(1, keepdim=True)
        # The averages are equal on all ranks, so all of them take the same way here.
        if mode is None or not bool((books.ema_count < floor).any()):
            return revived
        pool = (pool or self._no_pool()).gathered(group)
        for layer in range(books.embed.shape[0]):
            revived[layer] = revive_layer(
                books,
                layer,
                pool,
                pool_layers=list(range(self.num_quantizers)) if self.shared_codebook else [layer],
                mode=mode,
                threshold=self.revival_threshold,
                max_share=self.revival_max_share,
                cosine=self.use_cosine_sim,
            )
        if any(revived):
            books.push()
        return revived

    def _no_pool(self) -> FramePool:
        embed, Q = self.codebooks.embed, self.num_quantizers
        return FramePool(
            torch.zeros(0, dtype=torch.int64, device=embed.device),
            embed.new_zeros(Q, 0, self.codebook_dim),
            torch.zeros(Q, 0, dtype=torch.int64, device=embed.device),
            self._pool_size,
        )

    # ---- start

    @torch.no_grad()
    def initialize(
        self,
        frames: Iterable[tuple[Tensor, Tensor | None]],
        group: ProcessGroup | None = None,
        progress: bool = True,
        frames_per_code: float = 16.0,
    ) -> InitReport:
        """Start the codebooks from latents: k-means++ layer by layer.

        Each rank brings its own latents, over as many batches as it takes; layer q is fitted to
        what the finished layers before it leave of *all* frames gathered. The result is the same on
        every rank, and depends on the set of frames only, not on how ranks share them. A run that
        stopped in between goes on with the next layer.

        Args:
            frames: (x [B, P, dim], mask [B, P] or None) pairs, drawn until enough.
            group: ranks that start together.
            progress: show a progress bar on the first rank.
            frames_per_code: frames to gather over all ranks, per code.

        Raises:
            UserError: no valid frame on any rank.
        """
        if self.initialized:
            raise RuntimeError("the codebooks have already started")
        began = time.monotonic()
        x, nonfinite = self._gather_frames(frames, group, progress, frames_per_code)
        report = InitReport(frames=x.shape[0], nonfinite=nonfinite)
        if x.shape[0] < 2 * self.codebook_size and rank(group) == 0:
            logger(__name__).warning(
                "k-means start: %d frames for %d codes; %d clusters are fitted and the rest of the "
                "codes are copies until revival. Gather more frames or use fewer codes.",
                x.shape[0],
                self.codebook_size,
                max(1, x.shape[0] // 2),
            )
        books = self.codebooks.embed.shape[0]
        work = books * (1 + self.kmeans_iters) * self.codebook_size * (2 - (books > 1))
        with _bar(work, "k-means++", progress and rank(group) == 0) as bar:
            if self.shared_codebook:
                self._start_shared(x, bar, report, group)
            else:
                self._start_layers(x, bar, report, group)
        self.codebooks.push()
        report.seconds = time.monotonic() - began
        return report

    def _gather_frames(
        self,
        frames: Iterable[tuple[Tensor, Tensor | None]],
        group: ProcessGroup | None,
        progress: bool,
        frames_per_code: float,
    ) -> tuple[Tensor, int]:
        wanted = max(1, int(frames_per_code * self.codebook_size))
        target = -(-wanted // ranks_of(group))
        seed = int(self.codebooks.seed)
        reservoir = FrameReservoir(target, seed)
        device = self.codebooks.embed.device
        reservoir.add(torch.zeros(0, self.codebook_dim, device=device))
        nonfinite = torch.zeros((), dtype=torch.int64, device=device)

        def latents() -> Iterator[Tensor]:
            for x, mask in frames:
                _, found, bad = self._valid_latents(
                    x.to(device), None if mask is None else mask.to(device)
                )
                nonfinite.add_(bad)
                yield found

        with _bar(target, "frames for k-means++", progress and rank(group) == 0) as bar:
            collect(latents(), reservoir, target, bar.update)
        gathered = all_gather_rows(reservoir.kept(), group)
        (bad,) = all_reduce_sum([nonfinite], group)
        if gathered.shape[0] == 0:
            raise UserError(
                "codebook start: no rank brought a valid latent frame (every frame was masked or "
                f"held NaN; {int(bad)} held NaN). Check the data and the learning rate."
            )
        return canonical(gathered, wanted, seed), int(bad)

    def _start_layers(
        self, x: Tensor, bar: tqdm, report: InitReport, group: ProcessGroup | None
    ) -> None:
        residual = x.clone()
        for q in range(self.num_quantizers):
            if q >= int(self.codebooks.initialized):
                seeded = self._fit(q, residual, bar, group)
                self.codebooks.initialized.fill_(q + 1)
                report.seeded.append(seeded)
            codes = self._assign(residual, self.codebooks.embed, q)
            residual -= self._chosen(codes, self.codebooks.embed, q)
            report.squared_error.append(float(residual.square().sum(1).mean()))

    def _start_shared(
        self, x: Tensor, bar: tqdm, report: InitReport, group: ProcessGroup | None
    ) -> None:
        """Fit the frames, then the frames together with the residuals which that fit leaves."""
        self._fit(0, x, bar, group)
        residual, parts = x.clone(), [x]
        for q in range(self.num_quantizers - 1):
            codes = self._assign(residual, self.codebooks.embed, q)
            residual = residual - self._chosen(codes, self.codebooks.embed, q)
            parts.append(residual)
        seeded = self._fit(0, torch.cat(parts), bar, group)
        self.codebooks.initialized.fill_(self.num_quantizers)
        residual = x.clone()
        for q in range(self.num_quantizers):
            codes = self._assign(residual, self.codebooks.embed, q)
            residual -= self._chosen(codes, self.codebooks.embed, q)
            report.seeded.append(seeded)
            report.squared_error.append(float(residual.square().sum(1).mean()))

    def _fit(self, layer: int, residual: Tensor, bar: tqdm, group: ProcessGroup | None) -> int:
        residual = self._seen(residual)
        seed = signed64(int(self.codebooks.seed) * 104_729 + layer)
        generator = torch.Generator().manual_seed(seed)
        found = kmeans(residual, self.codebook_size, self.kmeans_iters, generator, bar.update)
        codes, counts = found.codes, found.counts
        if self.use_cosine_sim:
            codes = F.normalize(codes, dim=-1)
        broadcast_from_first([codes, counts], group)
        assigned = codes[search.nearest(residual, codes)]
        error = (residual - assigned).square().sum(1).mean()
        broadcast_from_first([error], group)
        self.codebooks.start_layer(layer, codes, counts, error)
        return found.seeded

    # ---- on disk

    def save_pretrained(self, folder: str | Path) -> None:
        """Write this tokenizer alone: options as JSON, everything else as safetensors."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        save_file(state, folder / _WEIGHTS)
        (folder / _CONFIG).write_text(json.dumps(self.config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ResidualVQ:
        """Load what `save_pretrained` wrote, in evaluation mode.

        Raises:
            UserError: a file is missing or does not fit.
        """
        from safetensors.torch import load_file

        folder = Path(folder)
        for name in (_CONFIG, _WEIGHTS):
            if not (folder / name).is_file():
                raise UserError(
                    f"{folder}: no {name} in this folder; expected one written by save_pretrained"
                )
        config: dict[str, Any] = json.loads((folder / _CONFIG).read_text())
        quantizer = cls(**config)
        quantizer.load_state_dict(load_file(folder / _WEIGHTS))
        return quantizer.eval()


def _bar(total: int, title: str, show: bool) -> tqdm:
    return tqdm(
        total=total, desc=title, unit=" codes", unit_scale=True, disable=not show, leave=False
    )


def _check_options(options: dict[str, Any], revival: str | None) -> None:
    choices = {
        "update_rule": ("ema", "gradient"),
        "temperature_schedule": SCHEDULES,
    }
    for name, allowed in choices.items():
        if options[name] not in allowed:
            raise UserError(f"quantizer: {name} is {options[name]!r}, expected one of {allowed}")
    if revival is not None and revival not in REVIVALS:
        raise UserError(f"quantizer: revival is {revival!r}, expected one of {REVIVALS} or none")
    for name in ("dim", "codebook_size", "num_quantizers", "revival_every"):
        if not (isinstance(options[name], int) and options[name] >= 1):
            raise UserError(f"quantizer: {name} is {options[name]!r}, expected a positive integer")
    if options["decay"] is not None and not 0 <= options["decay"] < 1:
        raise UserError(f"quantizer: decay is {options['decay']}, expected 0 ≤ decay < 1")
    if not 0 <= options["quantize_dropout_cutoff_index"] < options["num_quantizers"]:
        raise UserError("quantizer: quantize_dropout_cutoff_index must name one of the layers")
    for name in ("temperature", "temperature_end"):
        if not options[name] > 0:
            raise UserError(f"quantizer: {name} is {options[name]}, expected more than 0")
