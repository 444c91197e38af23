"""Residual vector quantization: each layer quantizes what the layers before it left over."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from b2t.quantize.beam import beam_search
from b2t.quantize.files import read_quantizer, write_quantizer
from b2t.quantize.frames import ValidFrames, frame_numbers, require_codes
from b2t.quantize.gradients import pass_gradient
from b2t.quantize.layers import Layers, Walk
from b2t.quantize.norms import StepNorms
from b2t.quantize.objectives import (
    LOSSES,
    codebook_loss,
    commitment_loss,
    needs_usage,
    require_known,
    usage_losses,
)  # fmt: skip
from b2t.quantize.pending import Begun, PendingStats
from b2t.quantize.quantizer_state import QuantizerState
from b2t.quantize.start import Frames, gather_frames, start_codebooks, valid_frames
from b2t.quantize.statistics import InitReport, QuantizerStats, SoftUsage, UpdateReport
from b2t.quantize.update import pool_size, update_codebooks


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


class ResidualVQ(QuantizerState):
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
        backend: ``kernels``, or ``reference`` for the naive versions of the same (small data only).
        seed: of everything random here.
        options: the other fields of `b2t.quantize.options.ResidualVQOptions`, which says what they
            mean and what they are by default.

    Attributes:
        options: `ResidualVQOptions`.
        revival_enabled: switch for phases that must not revive.
        reminders: say once where a training loop forgets `initialize` or `update`.

    Raises:
        UserError: an option out of its range.
    """

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        norms: StepNorms | None = None,
        losses: Collection[str] = LOSSES,
        group: ProcessGroup | None = None,
        ids: Tensor | None = None,
        across_ranks: bool | None = None,
        count: int | None = None,
        finite: bool = False,
    ) -> RVQOutput:
        """Quantize latents.

        ``across_ranks`` with ``diversity`` or ``perplexity`` and without ``norms.usage``, one
        all-reduce runs over ``group``; every rank must call, also with no valid frame.

        Args:
            x: [B, P, dim] (any leading axes).
            mask: [B, P] bool, True = real.
            norms: of the step, for losses that are exactly those of the global batch. Its count
                ``frames`` divides commitment and codebook loss, instead of this batch's own number
                of valid frames; its ``usage`` is what the two regularisers depend on.
            losses: names wanted, of ``commitment``, ``diversity``, ``perplexity``.
            group: ranks of the global batch.
            ids: [B, P] int64, what each frame is (`b2t.quantize.frame_hash.frame_ids`): what is
                drawn at random then depends on no rounding. None draws by the frames' values.
            across_ranks: whether the two regularisers are those of all ranks' frames, as what
                trains the latents needs, also where the quantizer itself is frozen. None means in
                training mode.
            count: frames that ``mask`` calls real; knowing it spares a wait for the device.
            finite: all of them are known to be finite (else losses are NaN): nothing is read, and
                with an `update` that revives nothing a CUDA graph holds the step.
        """
        require_known(losses)
        frames_of, latents, nonfinite = self.valid_latents(x, mask, count, finite)
        if not self.initialized:
            self.reminders.passed_through(self.training)
            return self._pass_through(x, frames_of, latents, nonfinite, losses)
        self.reminders.quantized(self.training)
        training, norms = self.training, norms or StepNorms()
        layers = self._layers(self.codebooks.value(self.options.codebook_gradient_scale))
        hashes, keep = self._draw(latents, frames_of, ids)
        walk = self._walk(layers, latents.detach(), hashes, training, keep, needs_usage(losses))
        stats = QuantizerStats.of(walk, nonfinite, hashes, keep, pool_size(self.options))
        # Backward goes the other way round: commitment frees its errors before usage takes memory.
        usage_terms = usage_losses(
            latents, layers, walk, losses, norms,
            group=group, reduce=training if across_ranks is None else across_ranks,
        )  # fmt: skip
        z, frames = layers.sum_codes(walk.codes), norms.count("frames", latents.shape[0])
        terms: dict[str, Tensor] = {}
        if "commitment" in losses:
            terms["commitment"] = commitment_loss(latents, z, walk, frames)
        if self.options.update_rule == "gradient":
            terms["codebook"] = codebook_loss(layers.books, latents, walk, stats, frames)
        z = pass_gradient(latents, z, self.options.rotation_trick)
        quantized = self.laid_out(z, frames_of, x.dtype)
        return RVQOutput(quantized, frames_of.scattered(walk.codes, -1), terms | usage_terms, stats)

    def _walk(
        self,
        layers: Layers,
        latents: Tensor,
        hashes: Tensor | None = None,
        sums: bool = False,
        keep: Tensor | None = None,
        soft: bool = False,
        *,
        evaluates: bool = False,
    ) -> Walk:
        """Walk the layers of this step, by beam, nearest code or draw."""
        training = self.training and not evaluates
        active = self._active_layers() if training else self.num_quantizers
        width = (not training and self.options.eval_beam_size) or self.options.beam_size
        codes = beam_search(layers, latents, active, width) if width > 1 else None
        draws = training and self.options.stochastic_sample_codes
        return layers.walk(latents, active, hashes if draws else None, sums, keep, codes, soft)

    def _pass_through(
        self,
        x: Tensor,
        frames: ValidFrames,
        latents: Tensor,
        nonfinite: Tensor,
        losses: Collection[str],
    ) -> RVQOutput:
        zero, Q = latents.new_zeros(()), self.num_quantizers
        stats = QuantizerStats.none(self.codebooks.embed, Q, nonfinite, sums=self.training)
        codes = torch.full((*x.shape[:-1], Q), -1, device=x.device)
        terms = {name: zero.clone() for name in LOSSES if name in losses}
        if self.options.update_rule == "gradient":
            terms["codebook"] = zero.clone()
        return RVQOutput(self.laid_out(latents, frames, x.dtype), codes, terms, stats)

    def _draw(
        self, latents: Tensor, frames: ValidFrames, ids: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Random numbers [N] of the frames and the rows of the revival pool, where needed."""
        revives = self.training and self._revives_next()
        if not (revives or (self.training and self.options.stochastic_sample_codes)):
            return None, None
        books = self.codebooks
        hashes = frame_numbers(latents, frames, ids, int(books.seed), int(books.updates))
        size = pool_size(self.options)
        keep = torch.argsort(hashes, stable=True)[:size] if revives else None
        return hashes, keep

    @torch.no_grad()
    def soft_usage(
        self, x: Tensor, mask: Tensor | None = None, ids: Tensor | None = None,
        count: int | None = None,
    ) -> SoftUsage:  # fmt: skip
        """Soft assignments of one micro-batch, for regularisers exact over accumulation.

        Before the first backward of a step, sum this over the step's micro-batches, ``all_reduce``
        the sum, and hand it to each forward in `StepNorms`. The latents must be those of the
        forward: replay the encoder's dropout from the same random state. Before the codebooks have
        started it is all zeros, and forward makes no use of it.
        """
        frames, latents, _ = self.valid_latents(x, mask, count)
        entered = torch.zeros(self.num_quantizers, dtype=torch.int64, device=latents.device)
        if not self.initialized:
            return SoftUsage(latents.new_zeros(self.num_quantizers, self.codebook_size), entered)
        layers = self._layers(self.codebooks.value())
        draws = self.options.stochastic_sample_codes
        hashes = self._draw(latents, frames, ids)[0] if draws else None
        walk = self._walk(layers, latents, hashes, soft=True)
        entered[: walk.layers] = latents.shape[0]
        return SoftUsage(layers.soft_sums(latents, walk), entered)

    @torch.no_grad()
    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Codes [B, P, Q] int64 of latents ``x`` [B, P, dim], as in evaluation, all layers."""
        self._require_start("encode")
        frames, latents, _ = self.valid_latents(x, mask)
        walk = self._walk(self._layers(self.codebooks.value()), latents, evaluates=True)
        return frames.scattered(walk.codes, -1)

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
        require_codes(codes, self.num_quantizers, self.codebook_size)
        flat = codes.reshape(-1, codes.shape[-1])
        z = self._layers(self.codebooks.value()).sum_codes(flat)
        frames = ValidFrames((flat[:, 0] >= 0).nonzero()[:, 0], tuple(codes.shape[:-1]))
        z = z.view(*codes.shape[:-1], self.codebook_dim)
        return self.project_back(z, frames, dtype)

    @torch.no_grad()
    def begin_update(self, stats: QuantizerStats, group: ProcessGroup | None = None) -> Begun:
        """Start to sum ``stats`` over ranks beside what follows; give the result to `update`."""
        if stats.empty or not self.initialized:
            return stats
        if stats.sums is None:
            raise ValueError("update needs statistics of a forward in training mode")
        return PendingStats(stats, self.options, group)

    @torch.no_grad()
    def update(self, stats: Begun, group: ProcessGroup | None = None) -> UpdateReport:
        """Move the codebooks; call once for each applied optimizer step, on every rank.

        Moves averages and codes, then revives, to the same state on all ranks. Statistics from
        before the start change nothing.

        Args:
            stats: those of this rank's micro-batches, added, or what `begin_update` made of them.
            group: ranks of the global batch.
        """
        self.reminders.updated()
        stats = self.begin_update(stats, group) if isinstance(stats, QuantizerStats) else stats
        if isinstance(stats, QuantizerStats):
            none = [0] * self.num_quantizers
            return UpdateReport(False, stats.frames, none, stats.nonfinite)
        revive = self._revives_next()
        return update_codebooks(self.codebooks, self.options, stats, revive=revive, group=group)

    @torch.no_grad()
    def initialize(
        self,
        frames: Tensor | Iterable[Frames],
        group: ProcessGroup | None = None,
        progress: bool = True,
        frames_per_code: float = 16.0,
        between: Callable[[], None] | None = None,
    ) -> InitReport:
        """Start the codebooks from latents: k-means++ layer by layer.

        Each rank brings its own latents, over as many batches as it takes; layer q is fitted to
        what the finished layers before it leave of *all* frames gathered. The result is the same on
        every rank, and depends on the set of frames only, not on how ranks share them. A run that
        stopped in between goes on with the next layer.

        Args:
            frames: latents x [B, P, dim], or (x, mask [B, P] or None), drawn until enough; a third
                element, ids [B, P], does what it does in `forward`. One tensor is all there is.
            group: ranks that start together.
            progress: show a progress bar on the first rank.
            frames_per_code: frames to gather over all ranks, per code.
            between: called on all ranks before each layer; may raise, on all of them alike.

        Raises:
            UserError: no valid frame on any rank.
        """
        if self.initialized:
            raise RuntimeError("the codebooks have already started")
        wanted = max(1, int(frames_per_code * self.codebook_size))
        latents = valid_frames(self, frames, self.codebooks)
        x, nonfinite = gather_frames(latents, wanted, self.codebooks, group, progress)
        layers = self._layers(self.codebooks.embed)
        report = start_codebooks(
            self.codebooks, layers, x, self.options.kmeans_iters, group, progress, between
        )
        report.nonfinite = nonfinite
        return report

    def save_pretrained(self, folder: str | Path) -> None:
        """Write this tokenizer alone: options as JSON, everything else as safetensors."""
        write_quantizer(folder, self.config, self.state_dict())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ResidualVQ:
        """Load what `save_pretrained` wrote, in evaluation mode.

        Raises:
            UserError: a file is missing or does not fit.
        """
        arguments, state = read_quantizer(folder)
        quantizer = cls(**arguments)
        quantizer.load_state_dict(state)
        return quantizer.eval()
