"""Encoder body of depthwise convolutions: what small recordings are read best by."""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from b2t.model.block_calls import call_block


class ConvolutionBlock(nn.Module):
    """A gated depthwise convolution and a feed-forward layer, each added to the stream.

    Source: the convolution module of Gulati et al. 2020, Conformer, arXiv 2005.08100, with layer
    norm in place of batch norm, so that neither batch nor rank enters.
    """

    def __init__(
        self, dim: int, kernel_size: int, mlp_ratio: float, dropout: float, causal: bool
    ) -> None:
        super().__init__()
        self.before = kernel_size - 1 if causal else kernel_size // 2
        self.after = kernel_size - 1 - self.before
        hidden = int(dim * mlp_ratio)
        self.gate_norm = nn.LayerNorm(dim)
        self.gate = nn.Linear(dim, 2 * dim)
        self.depthwise = nn.Conv1d(dim, dim, kernel_size, groups=dim)
        self.mix_norm = nn.LayerNorm(dim)
        self.mix = nn.Linear(dim, dim)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.SiLU(), nn.Dropout(dropout), nn.Linear(hidden, dim)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Refine the frames: x [B, P, D], mask [B, P, 1] bool → [B, P, D]."""
        gated = F.glu(self.gate(self.gate_norm(x)), dim=-1).masked_fill(~mask, 0.0)
        return self._mix(x, F.pad(gated, (0, 0, self.before, self.after)))

    def advance(self, x: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        """Refine new frames x [B, n, D]; `tail` [B, kernel − 1, D] are the gated ones before."""
        gated = torch.cat((tail, F.glu(self.gate(self.gate_norm(x)), dim=-1)), dim=1)
        return self._mix(x, gated), gated[:, gated.shape[1] - self.before :]

    def _mix(self, x: Tensor, gated: Tensor) -> Tensor:
        """Add to x [B, P, D] what the kernel makes of gated frames [B, P + kernel − 1, D]."""
        mixed = self.depthwise(gated.transpose(1, 2)).transpose(1, 2)
        x = x + self.dropout(self.mix(F.silu(self.mix_norm(mixed))))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Convolution(nn.Module):
    """A stack of convolution blocks and a final layer norm.

    Args:
        dim: latent width D.
        depth: blocks.
        kernel_size: frames that a block looks at, an odd number.
        mlp_ratio: width of the feed-forward layers over D.
        dropout: in convolution output and feed-forward layers.
        causal: a frame sees none that follow.

    Attributes:
        checkpoint_every: recompute the activations of every n-th block in backward; 0 keeps all.
        compiled: run blocks through `torch.compile` in training.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        kernel_size: int,
        mlp_ratio: float,
        dropout: float,
        causal: bool = False,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {kernel_size} must be odd, to look both ways alike")
        self.checkpoint_every = 0
        self.compiled = False
        self.blocks = nn.ModuleList(
            ConvolutionBlock(dim, kernel_size, mlp_ratio, dropout, causal) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Refine real frames and zero the others.

        Args:
            x: frames [B, P, D].
            mask: [B, P] bool, True = real. What stands under False changes nothing else.

        Returns:
            [B, P, D], zero under the mask.
        """
        real = mask[..., None]
        for index, block in enumerate(self.blocks):
            every = self.checkpoint_every if self.training else 0
            x = call_block(
                block, x, real, compiled=self.compiled and self.training,
                recompute=every > 0 and index % every == 0,
            )  # fmt: skip
        return self.norm(x).masked_fill(~real, 0.0)

    def start(self) -> list[Tensor]:
        """Return the state before the first frame of a causal stack: silence in each block."""
        weight = self.norm.weight
        blocks = cast(Iterable[ConvolutionBlock], self.blocks)
        return [weight.new_zeros(1, block.before, len(weight)) for block in blocks]

    def advance(self, x: Tensor, state: list[Tensor]) -> Tensor:
        """Refine frames x [1, n, D] that follow those in `state`, which takes them in."""
        for index, block in enumerate(cast(Iterable[ConvolutionBlock], self.blocks)):
            x, state[index] = block.advance(x, state[index])
        return self.norm(x)
