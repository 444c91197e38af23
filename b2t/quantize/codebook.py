"""Codebooks and everything that must survive a checkpoint, in float32 whatever the engine does."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from b2t.quantize.frame_hash import frame_hash
from b2t.quantize.gradients import master_value
from b2t.quantize.statistics import QuantizerStats

Read = Callable[[nn.Parameter], "Tensor | None"]
Write = Callable[[nn.Parameter, Tensor], None]

_CLOCKS = ("seed", "updates", "initialized", "temperature", "progress")


class Codebooks(nn.Module):
    """L codebooks of K codes of width D (L = 1 where the layers share one).

    ``.half()``, ``.bfloat16()`` and ``.to(dtype)`` move these tensors and never cast them. The
    clocks stay on the CPU, so that reading them costs no synchronization with a device.

    Buffers:
        embed: [L, K, D] the codes; under the gradient rule the float32 value of ``weight``.
        ema_count: [L, K] running average of the frames of each code per update.
        ema_sum: [L, K, D] running average of the sum of its frames.
        unscaled: [L] bool, averages still hold the start's number of frames; the first update
            rescales them to its own.
        distance_scale: [L] running mean squared distance of a frame to its code.
        gain: [L] length of the codes under cosine similarity.
        seed, updates, initialized, temperature, progress: [] clocks.

    Parameters
    ----------
        weight: [L, K, D] under the gradient rule only.
    """

    embed: Tensor
    ema_count: Tensor
    ema_sum: Tensor
    unscaled: Tensor
    distance_scale: Tensor
    gain: Tensor
    seed: Tensor
    updates: Tensor
    initialized: Tensor
    temperature: Tensor
    progress: Tensor
    weight: nn.Parameter | None

    def __init__(self, layers: int, size: int, dim: int, *, learnable: bool, seed: int) -> None:
        super().__init__()
        self.learnable = learnable
        self._read: Read | None = None
        self._write: Write | None = None
        f32 = torch.float32
        self.register_buffer("embed", torch.zeros(layers, size, dim, dtype=f32))
        self.register_buffer("ema_count", torch.zeros(layers, size, dtype=f32))
        self.register_buffer("ema_sum", torch.zeros(layers, size, dim, dtype=f32))
        self.register_buffer("unscaled", torch.ones(layers, dtype=torch.bool))
        self.register_buffer("distance_scale", torch.zeros(layers, dtype=f32))
        self.register_buffer("gain", torch.ones(layers, dtype=f32))
        self.register_buffer("seed", torch.tensor(seed, dtype=torch.int64))
        self.register_buffer("updates", torch.tensor(0, dtype=torch.int64))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.int64))
        self.register_buffer("temperature", torch.tensor(1.0, dtype=f32))
        self.register_buffer("progress", torch.tensor(0.0, dtype=f32))
        self.weight = nn.Parameter(torch.zeros(layers, size, dim, dtype=f32)) if learnable else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Codebooks:
        clocks = {id(self._buffers[name]) for name in _CLOCKS}

        def move(tensor: Tensor) -> Tensor:
            if id(tensor) in clocks and not tensor.is_meta:
                return tensor
            moved = fn(tensor)
            if id(tensor) in clocks:
                return torch.empty_like(tensor, device="cpu" if not moved.is_meta else "meta")
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def attach_master(self, read: Read, write: Write) -> None:
        """Name who owns the float32 master of ``weight`` (gradient rule).

        An engine rounds parameters to half precision and keeps a float32 master of its own, which
        overwrites them at each step. From here on the codes are ``embed``: ``weight`` only carries
        gradients to the optimizer, and after each step ``embed`` is read back from the master. A
        new engine makes its master from the rounded weight: this writes the true codes into it.

        Under DeepSpeed, in any precision: ``attach_master(safe_get_full_fp32_param,
        safe_set_full_fp32_param)`` of `deepspeed.utils`, after each ``deepspeed.initialize`` and
        before a checkpoint is loaded.
        """
        self._read, self._write = read, write
        self.push()

    def pull(self) -> None:
        """Bring ``embed`` up to date with the optimizer's result (gradient rule)."""
        if self.weight is None or not self.weight.requires_grad:
            return
        if self._read is not None:
            value = self._read(self.weight)
            if value is None:
                raise RuntimeError("the engine gave no float32 master for the codebooks' weight")
            self.embed.copy_(value.view_as(self.embed))
        elif self.weight.dtype == torch.float32:
            self.embed.copy_(self.weight.detach())
        else:
            raise RuntimeError(
                f"the codebooks' weight is {self.weight.dtype} and nobody named its float32 "
                "master: call attach_master after the engine is built"
            )

    @torch.no_grad()
    def push(self) -> None:
        """Write ``embed`` into ``weight`` and its master (gradient rule)."""
        if self.weight is None:
            return
        if self.weight.shape == self.embed.shape:  # not so while ZeRO-3 holds it in parts
            self.weight.copy_(self.embed)
        if self._write is not None:
            self._write(self.weight, self.embed.clone())

    def value(self, gradient_scale: float = 1.0) -> Tensor:
        """The codes [L, K, D] float32, with a gradient to ``weight`` under the gradient rule."""
        if self.embed.dtype != torch.float32:
            raise RuntimeError(
                f"codebooks must stay float32 but are {self.embed.dtype}: list the quantizer in "
                "the model's _keep_in_fp32_modules_strict and leave data_types.buffer_dtype unset"
            )
        if self.weight is None:
            return self.embed
        owned = self._read is not None or self.weight.dtype != torch.float32
        current = self.embed if owned else self.weight.detach()
        if self.weight.requires_grad and torch.is_grad_enabled():
            return master_value(self.weight, current, gradient_scale)
        return current

    @torch.no_grad()
    def checksum(self) -> Tensor:
        """A number [] int64 that is equal on two ranks whose codebooks are bitwise equal."""
        total = torch.zeros((), dtype=torch.int64, device=self.embed.device)
        for state in (self.embed.flatten(0, 1), self.ema_sum.flatten(0, 1), self.ema_count):
            place = torch.arange(1, 2 * state.shape[0], 2, device=state.device)
            total = 31 * total + (frame_hash(state, 0, 0) * place).sum()
        return total

    @torch.no_grad()
    def start_random(self, quantizers: int, cosine: bool) -> None:
        """Uniform codes (Kaiming's bound, as vector-quantize-pytorch without k-means).

        Args:
            quantizers: layers that are started by it.
            cosine: normalize codes to unit length.
        """
        generator = torch.Generator().manual_seed(int(self.seed))
        bound = math.sqrt(6.0 / self.embed.shape[-1])
        values = torch.rand(self.embed.shape, generator=generator, device="cpu")
        self.embed.copy_((2.0 * values - 1.0) * bound)
        self.ema_count.fill_(1.0)
        self.ema_sum.copy_(self.embed)
        if cosine:
            self.embed.copy_(F.normalize(self.embed, dim=-1))
        self.push()
        self.initialized.fill_(quantizers)

    @torch.no_grad()
    def start_layer(
        self, layer: int, codes: Tensor, counts: Tensor, gain: Tensor, error: Tensor
    ) -> None:
        """Set one codebook from k-means: sums are code × count, so the averages agree with it.

        Args:
            layer: which one.
            codes: [K, D].
            counts: [K] frames of each.
            gain: [] length of the codes.
            error: [] mean squared distance of a frame to its code.
        """
        self.embed[layer] = codes
        self.ema_count[layer] = counts
        self.ema_sum[layer] = codes * counts[:, None]
        self.unscaled[layer] = True
        self.gain[layer] = gain
        self.distance_scale[layer] = error

    @torch.no_grad()
    def move_averages(
        self, counts: Tensor, sums: Tensor | None, decay: float, eps: float, cosine: bool
    ) -> None:
        """Exponential moving averages of counts and sums, and the codes that follow from them.

        n ← γ·n + (1−γ)·counts, m ← γ·m + (1−γ)·sums, code = (m + ε·code)/(n + ε): Laplace
        smoothing whose pseudo-frames sit at the code itself instead of the origin, so that a code
        without frames stays where it is whatever the data's offset. A codebook that got no frame
        at all (all masked, or its layer dropped) is left untouched.

        Args:
            counts: [L, K].
            sums: [L, K, D]; None follows the counts only (gradient rule).
            decay: γ.
            eps: ε, in frames.
            cosine: normalize codes to unit length.
        """
        counts = counts.to(torch.float32)
        total = counts.sum(1)
        alive = total > 0
        rescale = torch.where(
            self.unscaled & alive, total / self.ema_count.sum(1).clamp(min=1e-12), 1.0
        )
        self.unscaled &= ~alive
        gamma = torch.where(alive, decay, 1.0)[:, None]
        self.ema_count.mul_(rescale[:, None] * gamma).add_((1.0 - gamma) * counts)
        if sums is None:
            return
        gamma = gamma[..., None]
        self.ema_sum.mul_(rescale[:, None, None] * gamma).add_((1.0 - gamma) * sums)
        codes = (self.ema_sum + eps * self.embed) / (self.ema_count + eps)[..., None]
        if cosine:
            codes = F.normalize(codes, dim=-1)
        self.embed.copy_(torch.where(alive[:, None, None], codes, self.embed))

    @torch.no_grad()
    def move_scales(self, stats: QuantizerStats, decay: float, cosine: bool) -> None:
        """Running means of the distance to the nearest code and of the gain."""
        frames = stats.frames.to(torch.float32)
        error, projection = stats.squared_error, stats.projection
        if self.distance_scale.shape[0] == 1:
            frames, error, projection = frames.sum(0, True), error.sum(0, True), projection.sum(0)
            projection = projection[None]
        alive = frames > 0
        mean = error / frames.clamp(min=1)
        first = alive & (self.distance_scale <= 0)
        moved = torch.where(first, mean, self.distance_scale.lerp(mean, 1.0 - decay))
        self.distance_scale.copy_(torch.where(alive, moved, self.distance_scale))
        if cosine:
            gain = self.gain.lerp(projection / frames.clamp(min=1), 1.0 - decay)
            self.gain.copy_(torch.where(alive, gain, self.gain))
