"""Pre-norm transformer with rotary positions, shared by the encoder and the signal decoder."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def rotary_angles(length: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions, each [length, head_dim / 2] float32.

    Source: Su et al. 2021, RoFormer, arXiv 2104.09864, base 10,000.
    """
    position = torch.arange(length, device=device, dtype=torch.float32)
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


class Attention(nn.Module):
    """Multi-head self-attention through `scaled_dot_product_attention`."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, keys: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Attend within each row: x [B, P, D], keys [B, 1, 1, P] bool → [B, P, D]."""
        batch, length, dim = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        query, key = rotate(query, cosine, sine), rotate(key, cosine, sine)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=keys)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, dim))


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

    def forward(self, x: Tensor, keys: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Refine the frames: x [B, P, D] → [B, P, D]."""
        x = x + self.dropout(self.attention(self.attention_norm(x), keys, cosine, sine))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Transformer(nn.Module):
    """A stack of blocks and a final layer norm.

    Attributes:
        checkpoint_every: recompute the activations of every n-th block in backward; 0 keeps all.
    """

    def __init__(self, dim: int, depth: int, heads: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        if dim % heads or (dim // heads) % 2:
            raise ValueError(f"dim {dim} over heads {heads} must be an even whole number")
        self.head_dim = dim // heads
        self.checkpoint_every = 0
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Refine real frames and zero the others.

        Args:
            x: frames [B, P, D].
            mask: [B, P] bool, True = real. What stands under False changes nothing else.

        Returns:
            [B, P, D], zero under the mask.
        """
        keys = attention_mask(mask)
        cosine, sine = rotary_angles(x.shape[1], self.head_dim, x.device)
        for index, block in enumerate(self.blocks):
            if self.training and self.checkpoint_every and index % self.checkpoint_every == 0:
                x = checkpoint(block, x, keys, cosine, sine, use_reentrant=False)
            else:
                x = block(x, keys, cosine, sine)
        return self.norm(x).masked_fill(~mask[..., None], 0.0)
