"""Pre-norm transformer with rotary positions, shared by the encoder and the signal decoder."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from b2t.model.block_calls import call_block
from b2t.model.packing import Packing, can_pack, packed_attention


def rotary_angles(
    length: int, head_dim: int, device: torch.device, first: int = 0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions from `first` on, each [length, head_dim / 2] float32.

    Source: Su et al. 2021, RoFormer, arXiv 2104.09864, base 10,000.
    """
    position = torch.arange(first, first + length, device=device, dtype=torch.float32)
    pair = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    angle = position[:, None] * torch.pow(10_000.0, -pair / head_dim)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn the pairs (i, i + d/2) of x [B, H, P, d] by their position, in float32."""
    left, right = x.float().chunk(2, dim=-1)
    turned = torch.cat((left * cosine - right * sine, right * cosine + left * sine), dim=-1)
    return turned.to(x.dtype)


def attention_mask(mask: Tensor) -> Tensor:
    """Key mask [B, 1, 1, P] for a frame mask [B, P] (True = real).

    A row without any real frame attends to its first, so that its softmax stays finite; the caller
    discards what comes out.
    """
    first = torch.zeros_like(mask)
    first[:, :1] = True
    return (mask | (first & ~mask.any(dim=1, keepdim=True)))[:, None, None, :]


def causal_mask(mask: Tensor, window: int | None) -> Tensor:
    """Attention mask [B, 1, P, P] by which a frame sees itself and those before it.

    Args:
        mask: [B, P] bool, True = real.
        window: frames that one sees, itself included; None: all before it.
    """
    seen = _within(torch.arange(mask.shape[1], device=mask.device), mask.shape[1], window)
    own = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    # A masked frame sees itself, so that its softmax stays finite.
    return ((mask[:, None, :] & seen) | own)[:, None]


def _within(queries: Tensor, keys: int, window: int | None) -> Tensor:
    """Whether places `queries` [n] see places 0 … `keys` − 1: bool [n, keys]."""
    places = torch.arange(keys, device=queries.device)
    seen = places <= queries[:, None]
    return seen if window is None else seen & (places > queries[:, None] - window)


@dataclass
class TransformerState:
    """What a causal transformer keeps of the frames before.

    Attributes:
        position: frames so far.
        caches: of each block the keys and values [B, H, n, d] of the last `window` − 1 frames.
    """

    position: int = 0
    caches: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class Attention(nn.Module):
    """Multi-head self-attention through `scaled_dot_product_attention`."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, keys: Tensor, cosine: Tensor, sine: Tensor, longest: int = 0,
        causal: bool = False,
    ) -> Tensor:  # fmt: skip
        """Attend within each row: x [B, P, D], keys [B, 1, 1 or P, P] bool → [B, P, D].

        Packed frames x [N, D] have starts [B + 1] of the rows for keys, of ``longest`` at most.
        """
        if x.dim() == 2:
            qkv = self.qkv(x).view(x.shape[0], 3, self.heads, -1)
            query, key, value = qkv.unbind(1)
            query, key = rotate(query, cosine, sine), rotate(key, cosine, sine)
            mixed = packed_attention(query, key, value, keys, longest, causal)
            return self.out(mixed.flatten(1))
        query, key, value = self._read(x, cosine, sine)
        return self._mix(query, key, value, keys)

    def advance(
        self,
        x: Tensor,
        cache: tuple[Tensor, Tensor] | None,
        seen: Tensor,
        cosine: Tensor,
        sine: Tensor,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Attend from new frames x [B, n, D] to cached ones and each other, as `seen` [n, m] says.

        Returns:
            [B, n, D], and keys and values of all m frames.
        """
        query, key, value = self._read(x, cosine, sine)
        if cache is not None:
            key, value = torch.cat((cache[0], key), dim=2), torch.cat((cache[1], value), dim=2)
        return self._mix(query, key, value, seen), (key, value)

    def _read(self, x: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, dim = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        return rotate(query, cosine, sine), rotate(key, cosine, sine), value

    def _mix(self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=keys)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and feed-forward, each behind a layer norm, added to the stream."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, *place: Any) -> Tensor:
        """Refine the frames: x [B, P, D] → [B, P, D], or packed [N, D]; see `Attention.forward`."""
        x = x + self.dropout(self.attention(self.attention_norm(x), *place))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))

    def advance(
        self, x: Tensor, cache: tuple[Tensor, Tensor] | None, *place: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Refine new frames x [B, n, D], the ones before in the cache; see `Attention.advance`."""
        mixed, cache = self.attention.advance(self.attention_norm(x), cache, *place)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), cache


class Transformer(nn.Module):
    """A stack of blocks and a final layer norm.

    Args:
        dim: width D.
        depth: blocks.
        heads: attention heads; D over heads must be even.
        mlp_ratio: width of the feed-forward layers over D.
        dropout: dropout in attention output and feed-forward layers.
        causal: a frame sees none that follow.
        window: frames that one sees of a causal stack, itself included; None: all before it.

    Attributes:
        checkpoint_every: recompute the activations of every n-th block in backward; 0 keeps all.
        compiled: run blocks through `torch.compile` in training.
        packs: leave padding out where the number of real frames is known, on a GPU.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        dropout: float,
        causal: bool = False,
        window: int | None = None,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.window = window
        if dim % heads or (dim // heads) % 2:
            raise ValueError(f"dim {dim} over heads {heads} must be an even whole number")
        self.head_dim = dim // heads
        self.checkpoint_every = 0
        self.compiled = self.packs = False
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, mask: Tensor, count: int | None = None) -> Tensor:
        """Refine real frames and zero the others.

        Args:
            x: frames [B, P, D].
            mask: [B, P] bool, True = real. What stands under False changes nothing else.
            count: how many are real, where that is known.

        Returns:
            [B, P, D], zero under the mask.
        """
        angles = rotary_angles(x.shape[1], self.head_dim, x.device)
        if self.packs and count and can_pack(x, self.window):
            packing = Packing.of(mask, count)
            place = (packing.starts, *packing.angles(*angles), x.shape[1], self.causal)
            return packing.laid_out(self.norm(self._refined(packing.packed(x), *place)))
        keys = causal_mask(mask, self.window) if self.causal else attention_mask(mask)
        return self.norm(self._refined(x, keys, *angles)).masked_fill(~mask[..., None], 0.0)

    def _refined(self, x: Tensor, *place: Any) -> Tensor:
        """Run the blocks."""
        for index, block in enumerate(self.blocks):
            every = self.checkpoint_every if self.training else 0
            x = call_block(
                block, x, *place, compiled=self.compiled and self.training,
                recompute=every > 0 and index % every == 0,
            )  # fmt: skip
        return x

    def start(self) -> TransformerState:
        """Return the state before the first frame of a causal stack."""
        return TransformerState()

    def advance(self, x: Tensor, state: TransformerState) -> Tensor:
        """Refine frames x [B, n, D] that follow those in `state`, which takes them in."""
        kept = state.caches[0][0].shape[2] if state.caches else 0
        new = torch.arange(kept, kept + x.shape[1], device=x.device)
        seen = _within(new, kept + x.shape[1], self.window)
        angles = rotary_angles(x.shape[1], self.head_dim, x.device, state.position)
        caches = []
        for index, block in enumerate(cast(Iterable[Block], self.blocks)):
            cache = state.caches[index] if state.caches else None
            x, (keys, values) = block.advance(x, cache, seen, *angles)
            forget = 0 if self.window is None else max(keys.shape[2] - self.window + 1, 0)
            caches.append((keys[:, :, forget:], values[:, :, forget:]))
        state.position += x.shape[1]
        state.caches = caches
        return self.norm(x)
