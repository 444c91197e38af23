"""Quantized latents back to the signal."""

from torch import Tensor, nn

from b2t.model.options import SignalDecoderOptions
from b2t.model.patches import from_patches
from b2t.model.transformer import Transformer


class SignalDecoder(nn.Module):
    """A small transformer over the latent frames and a linear map to their patches.

    Args:
        channels: C.
        latent_dim: D.
        patch_size: bins per patch, as in the encoder.
        patch_stride: bins from one patch to the next, as in the encoder.
        options: sizes and dropout.
    """

    def __init__(
        self,
        channels: int,
        latent_dim: int,
        patch_size: int,
        patch_stride: int,
        options: SignalDecoderOptions,
    ) -> None:
        super().__init__()
        dim = options.dim or latent_dim
        self.patch_size = patch_size
        self.patch_stride = patch_stride
        self.project = nn.Linear(latent_dim, dim)
        self.transformer = Transformer(
            dim, options.depth, options.heads, options.mlp_ratio, options.dropout
        )
        self.to_patch = nn.Linear(dim, patch_size * channels)

    def forward(
        self, latents: Tensor, frame_mask: Tensor, bins: int, count: int | None = None
    ) -> Tensor:
        """Decode latent frames.

        Args:
            latents: [B, P, D], quantized or not.
            frame_mask: [B, P] bool, True = real.
            bins: length T of the signal.
            count: real frames, where that is known.

        Returns:
            Signal [B, T, C] in float32, zero where no real frame lies. Overlapping patches are
            averaged.
        """
        x = self.transformer(self.project(latents), frame_mask, count)
        patches = self.to_patch(x).float()
        return from_patches(patches, frame_mask, bins, self.patch_size, self.patch_stride)
