"""Residual vector quantization: each layer quantizes what the layers before it left over."""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from b2t.errors import UserError
from b2t.quantize.beam import beam_search
from b2t.quantize.codebook import Codebooks, Read, Write, default_decay
from b2t.quantize.frame_hash import frame_hash, identity_hash, signed64
from b2t.quantize.gradients import pass_gradient, squared_codebook, squared_commitment
from b2t.quantize.layers import Layers, Walk
from b2t.quantize.regularizers import diversity_loss, global_usage, perplexity_loss
from b2t.quantize.revival import REVIVALS, revive_layer
from b2t.quantize.schedules import SCHEDULES, anneal
from b2t.quantize.search import BACKENDS
from b2t.quantize.start import gather_frames, start_codebooks
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
        decay: of the running averages, per update; by default 0.95 below 256 codes, else
            0.98.
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
        beam_size: sums of codes kept from layer to layer; 1 takes the nearest code of each layer,
            more come nearer with all layers and less near with the first few alone.
        eval_beam_size: the same in evaluation; None means ``beam_size``.
        backend: ``kernels``, or ``reference`` for the naive versions of the same (small data only).
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
        revival_threshold: float = 0.3,
        revival_every: int = 5,
        revival_max_share: float = 0.1,
        revival_until: float = 0.9,
        temperature: float = 2.0,
        temperature_end: float = 0.5,
        temperature_schedule: str = "cosine",
        stochastic_sample_codes: bool = False,
        beam_size: int = 1,
        eval_beam_size: int | None = None,
        backend: str = "kernels",
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
        self.stochastic_sample_codes, self.backend = stochastic_sample_codes, backend
        self.beam_size = beam_size
        self.eval_beam_size = beam_size if eval_beam_size is None else eval_beam_size
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
        books = self.codebooks
        total = torch.zeros((), dtype=torch.int64, device=books.embed.device)
        for state in (books.embed.flatten(0, 1), books.ema_sum.flatten(0, 1), books.ema_count):
            place = torch.arange(1, 2 * state.shape[0], 2, device=state.device)
            total = 31 * total + (frame_hash(state, 0, 0) * place).sum()
        return total

    def _revives_next(self) -> bool:
        return (
            self.revival is not None
            and self.revival_enabled
            and float(self.codebooks.progress) + 1e-6 < self.revival_until
            and (int(self.codebooks.updates) + 1) % self.revival_every == 0
        )

    def _active_layers(self) -> int:
        """Layers of this step: all of them, or a number drawn from (seed, update)."""
        if not self.quantize_dropout:
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
        ids: Tensor | None = None,
        across_ranks: bool | None = None,
    ) -> RVQOutput:
        """Quantize latents.

        ``across_ranks`` with ``diversity`` or ``perplexity`` and without ``usage``, one all-reduce
        runs over ``group``; every rank must call, also with no valid frame.

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
            ids: [B, P] int64, what each frame is (`b2t.quantize.frame_hash.frame_ids`): what is
                drawn at random then depends on no rounding. None draws by the frames' values.
            across_ranks: whether the two regularisers are those of all ranks' frames, as what
                trains the latents needs, also where the quantizer itself is frozen. None means in
                training mode.
        """
        rows, latents, nonfinite = self._valid_latents(x, mask)
        if not self.initialized:
            return self._pass_through(x, rows, latents, nonfinite, losses)
        layers = self._layers(self.codebooks.value(self.codebook_gradient_scale))
        hashes, keep = self._draw(latents, rows, ids)
        walk = self._walk(
            layers, latents.detach(), hashes, self.training, keep, training=self.training
        )
        stats = self._statistics(walk, nonfinite, hashes, keep)
        # Backward goes the other way round: commitment frees its errors before usage takes memory.
        reduce = self.training if across_ranks is None else across_ranks
        regularizers = self._regularizers(
            latents, layers, walk, losses, group, usage, micro_batches, reduce
        )
        z = layers.sum_codes(walk.codes)
        terms = self._losses(latents, z, layers, walk, stats, losses, frames) | regularizers
        z = pass_gradient(latents, z, self.rotation_trick)
        return RVQOutput(
            self._output(z, rows, x), self._scatter(walk.codes, rows, x, -1), terms, stats
        )

    def _layers(self, books: Tensor) -> Layers:
        return Layers(
            books,
            gain=self.codebooks.gain,
            distance=self.codebooks.distance_scale,
            quantizers=self.num_quantizers,
            temperature=self.temperature,
            cosine=self.use_cosine_sim,
            backend=self.backend,
        )

    def _walk(
        self,
        layers: Layers,
        latents: Tensor,
        hashes: Tensor | None = None,
        sums: bool = False,
        keep: Tensor | None = None,
        *,
        training: bool,
    ) -> Walk:
        """Walk the layers of this step, by beam, nearest code or draw."""
        active = self._active_layers() if training else self.num_quantizers
        width = self.beam_size if training else self.eval_beam_size
        codes = beam_search(layers, latents, active, width) if width > 1 else None
        draws = training and self.stochastic_sample_codes
        return layers.walk(latents, active, hashes if draws else None, sums, keep, codes)

    def _valid_latents(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the flattened ``x`` that count, their latents [N, D], how many held NaN."""
        if x.shape[-1] != self.dim:
            raise ValueError(f"latents have width {x.shape[-1]}, the quantizer expects {self.dim}")
        flat = x.reshape(-1, self.dim)
        keep = _finite_rows(flat)
        if mask is not None:
            if mask.shape != x.shape[:-1]:
                raise ValueError(f"mask {tuple(mask.shape)} does not fit x {tuple(x.shape)}")
            real = mask.reshape(-1).bool()
        else:
            real = torch.ones_like(keep)
        rows = (keep & real).nonzero()[:, 0]
        whole = rows.shape[0] == flat.shape[0]
        latents = self._project(flat if whole else flat.index_select(0, rows))
        finite = _finite_rows(latents)
        if isinstance(self.project_in, nn.Linear) and not bool(finite.all()):
            rows, latents = rows[finite], latents[finite]
        return rows, latents, real.sum() - rows.shape[0]

    def _project(self, flat: Tensor) -> Tensor:
        if isinstance(self.project_in, nn.Linear):
            flat = self.project_in(flat.to(self.project_in.weight.dtype))
        latents = flat.float()
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

    def _draw(
        self, latents: Tensor, rows: Tensor, ids: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Random numbers [N] of the frames and the rows of the revival pool, where needed."""
        revives = self.training and self._revives_next()
        if not (revives or (self.training and self.stochastic_sample_codes)):
            return None, None
        hashes = self._hashes(latents, rows, ids, int(self.codebooks.updates))
        keep = torch.argsort(hashes, stable=True)[: self._pool_size] if revives else None
        return hashes, keep

    def _hashes(self, latents: Tensor, rows: Tensor, ids: Tensor | None, step: int) -> Tensor:
        seed = int(self.codebooks.seed)
        if ids is None:
            return frame_hash(latents.detach(), seed, step)
        return identity_hash(ids.reshape(-1)[rows], seed, step)

    @property
    def _pool_size(self) -> int:
        return max(256, int(self.revival_max_share * self.codebook_size))

    def _statistics(
        self, walk: Walk, nonfinite: Tensor, hashes: Tensor | None, keep: Tensor | None
    ) -> QuantizerStats:
        frames = torch.zeros_like(walk.counts[:, 0])
        frames[: walk.layers] = walk.codes.shape[0]
        pool = None
        if hashes is not None and keep is not None and walk.residuals is not None:
            pool = FramePool(hashes[keep], walk.residuals, walk.codes[keep].T, self._pool_size)
        return QuantizerStats(
            walk.counts, walk.sums, walk.squared_error, walk.projection, frames, nonfinite, pool
        )

    # ---- losses

    def _losses(
        self,
        latents: Tensor,
        quantized: Tensor,
        layers: Layers,
        walk: Walk,
        stats: QuantizerStats,
        names: Collection[str],
        frames: Tensor | float | None,
    ) -> dict[str, Tensor]:
        """Commitment and codebook loss: mean over frames, layers and D."""
        unknown = set(names) - set(LOSSES)
        if unknown:
            raise ValueError(f"unknown losses {sorted(unknown)}; choose of {LOSSES}")
        divisor = torch.as_tensor(
            latents.shape[0] if frames is None else frames,
            dtype=torch.float32,
            device=latents.device,
        )
        elements = divisor.clamp(min=1e-6) * (walk.layers * self.codebook_dim)
        terms: dict[str, Tensor] = {}
        if "commitment" in names:
            errors = walk.errors if walk.layers > 1 else None
            total = squared_commitment(latents, walk.squared_error.sum(), errors, quantized)
            terms["commitment"] = total / elements
        if self.update_rule == "gradient":
            terms["codebook"] = self._code_error(layers.books, walk, stats) / elements
        return terms

    def _code_error(self, books: Tensor, walk: Walk, stats: QuantizerStats) -> Tensor:
        total = walk.code_error.sum()
        if stats.sums is None:
            return total
        counts = stats.counts.sum(0, keepdim=True) if self.shared_codebook else stats.counts
        return squared_codebook(books, counts.float(), stats.sums, total)

    def _regularizers(
        self,
        latents: Tensor,
        layers: Layers,
        walk: Walk,
        names: Collection[str],
        group: ProcessGroup | None,
        usage: SoftUsage | None,
        micro_batches: int,
        reduce: bool,
    ) -> dict[str, Tensor]:
        wanted = [name for name in ("diversity", "perplexity") if name in names]
        if not wanted:
            return {}
        local = layers.soft_sums(latents, walk)
        frames = torch.zeros_like(walk.counts[:, 0])
        frames[: walk.layers] = latents.shape[0]
        mean = global_usage(local, frames, group, usage, micro_batches, reduce)
        of = {"diversity": diversity_loss, "perplexity": perplexity_loss}
        return {name: of[name](mean[: walk.layers]) for name in wanted}

    @torch.no_grad()
    def soft_usage(
        self, x: Tensor, mask: Tensor | None = None, ids: Tensor | None = None
    ) -> SoftUsage:
        """Soft assignments of one micro-batch, for regularisers exact over accumulation.

        Before the first backward of a step, sum this over the step's micro-batches, ``all_reduce``
        the sum, and hand it to each forward as ``usage`` with ``micro_batches``. The latents must
        be those of the forward: replay the encoder's dropout from the same random state. Before the
        codebooks have started it is all zeros, and forward makes no use of it.
        """
        rows, latents, _ = self._valid_latents(x, mask)
        frames = torch.zeros(self.num_quantizers, dtype=torch.int64, device=latents.device)
        if not self.initialized:
            return SoftUsage(latents.new_zeros(self.num_quantizers, self.codebook_size), frames)
        layers = self._layers(self.codebooks.value())
        hashes = self._draw(latents, rows, ids)[0] if self.stochastic_sample_codes else None
        walk = self._walk(layers, latents, hashes, training=self.training)
        frames[: walk.layers] = latents.shape[0]
        return SoftUsage(layers.soft_sums(latents, walk), frames)

    # ---- codes in and out

    def _scatter(self, values: Tensor, rows: Tensor, like: Tensor, fill: float) -> Tensor:
        shape = (*like.shape[:-1], values.shape[1])
        if rows.shape[0] == like.shape[:-1].numel():
            return values.view(shape)
        flat = values.new_full((like.shape[:-1].numel(), values.shape[1]), fill)
        return flat.index_copy(0, rows, values).view(shape)

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
        """Codes [B, P, Q] int64 of latents ``x`` [B, P, dim], as in evaluation, all layers."""
        self._require_start("encode")
        rows, latents, _ = self._valid_latents(x, mask)
        walk = self._walk(self._layers(self.codebooks.value()), latents, training=False)
        return self._scatter(walk.codes, rows, x, -1)

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
        z = self._layers(self.codebooks.value()).sum_codes(flat)
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
        frames: Iterable[tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]],
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
            frames: (x [B, P, dim], mask [B, P] or None), drawn until enough; a third element,
                ids [B, P], does what it does in `forward`.
            group: ranks that start together.
            progress: show a progress bar on the first rank.
            frames_per_code: frames to gather over all ranks, per code.

        Raises:
            UserError: no valid frame on any rank.
        """
        if self.initialized:
            raise RuntimeError("the codebooks have already started")
        wanted = max(1, int(frames_per_code * self.codebook_size))
        latents = self._latents_of(frames)
        x, nonfinite = gather_frames(latents, wanted, self.codebooks, group, progress)
        layers = self._layers(self.codebooks.embed)
        report = start_codebooks(self.codebooks, layers, x, self.kmeans_iters, group, progress)
        report.nonfinite = nonfinite
        return report

    def _latents_of(
        self,
        frames: Iterable[tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]],
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        device = self.codebooks.embed.device
        for x, mask, *given in frames:
            rows, latents, bad = self._valid_latents(
                x.to(device), None if mask is None else mask.to(device)
            )
            ids = given[0].to(device) if given else None
            yield latents, self._hashes(latents, rows, ids, 0), bad

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


def _finite_rows(x: Tensor) -> Tensor:
    """Rows of ``x`` [N, D] without NaN or infinity, [N] bool, without a temporary of its size."""
    x = x.detach()
    return x.amax(1).isfinite() & x.amin(1).isfinite()


def _check_options(options: dict[str, Any], revival: str | None) -> None:
    choices = {
        "update_rule": ("ema", "gradient"),
        "temperature_schedule": SCHEDULES,
        "backend": BACKENDS,
    }
    for name, allowed in choices.items():
        if options[name] not in allowed:
            raise UserError(f"quantizer: {name} is {options[name]!r}, expected one of {allowed}")
    if revival is not None and revival not in REVIVALS:
        raise UserError(f"quantizer: revival is {revival!r}, expected one of {REVIVALS} or none")
    for name in ("dim", "codebook_size", "num_quantizers", "revival_every", "beam_size"):
        if not (isinstance(options[name], int) and options[name] >= 1):
            raise UserError(f"quantizer: {name} is {options[name]!r}, expected a positive integer")
    if options["eval_beam_size"] is not None and not options["eval_beam_size"] >= 1:
        raise UserError(
            f"quantizer: eval_beam_size is {options['eval_beam_size']}, expected a positive "
            "integer or none"
        )
    if options["beam_size"] > 1 and options["stochastic_sample_codes"]:
        raise UserError(
            f"quantizer: beam_size is {options['beam_size']} and stochastic_sample_codes is on; a "
            "beam draws nothing: switch one of them off (eval_beam_size may stay)"
        )
    if options["decay"] is not None and not 0 <= options["decay"] < 1:
        raise UserError(f"quantizer: decay is {options['decay']}, expected 0 ≤ decay < 1")
    if not 0 <= options["quantize_dropout_cutoff_index"] < options["num_quantizers"]:
        raise UserError("quantizer: quantize_dropout_cutoff_index must name one of the layers")
    for name in ("temperature", "temperature_end"):
        if not options[name] > 0:
            raise UserError(f"quantizer: {name} is {options[name]}, expected more than 0")
