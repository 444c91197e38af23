"""Signal to latent frames."""

from torch import Tensor, nn

from b2t.model.patches import patch_mask, to_patches
from b2t.model.transformer import Transformer


class Encoder(nn.Module):
    """Patches of the signal, embedded and refined by a pre-norm transformer.

    Args:
        channels: C.
        patch_size: bins per patch.
        patch_stride: bins from one patch to the next, at most `patch_size`.
        dim: latent width D.
        depth: transformer blocks.
        heads: attention heads; D over heads must be even.
        mlp_ratio: width of the feed-forward layers over D.
        dropout: dropout in attention output and feed-forward layers.
    """

    def __init__(
        self,
        channels: int,
        patch_size: int = 4,
        patch_stride: int = 4,
        dim: int = 512,
        depth: int = 6,
        heads: int = 8,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if not 1 <= patch_stride <= patch_size:
            raise ValueError(f"patch_stride {patch_stride} must lie in 1 … patch_size {patch_size}")
        self.patch_size = patch_size
        self.patch_stride = patch_stride
        self.embed = nn.Linear(patch_size * channels, dim)
        self.dropout = nn.Dropout(dropout)
        self.transformer = Transformer(dim, depth, heads, mlp_ratio, dropout)

    def frame_mask(self, signal_mask: Tensor) -> Tensor:
        """Real latent frames [B, P] bool for real bins [B, T] bool."""
        return patch_mask(signal_mask, self.patch_size, self.patch_stride)

    def forward(self, signal: Tensor, signal_mask: Tensor) -> Tensor:
        """Encode a batch.

        What masked bins hold, and how many follow a trial, changes nothing.

        Args:
            signal: [B, T, C].
            signal_mask: [B, T] bool, True = real.

        Returns:
            Latents [B, P, D], zero under the frame mask.
        """
        signal = signal.masked_fill(~signal_mask[..., None], 0.0)
        patches = to_patches(signal, self.patch_size, self.patch_stride)
        x = self.dropout(self.embed(patches))
        return self.transformer(x, self.frame_mask(signal_mask))
