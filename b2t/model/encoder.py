"""Signal to latent frames."""

from torch import Tensor, nn

from b2t.model.convolution import Convolution
from b2t.model.patches import patch_mask, to_patches
from b2t.model.recurrence import Recurrence
from b2t.model.transformer import Transformer


class Encoder(nn.Module):
    """Patches of the signal, embedded and refined by a transformer, convolutions or a GRU.

    Args:
        channels: C.
        kind: `transformer` (pre-norm, rotary positions), `conv` (gated depthwise convolutions) or
            `gru`.
        patch_size: bins per patch.
        patch_stride: bins from one patch to the next, at most `patch_size`.
        dim: latent width D.
        depth: blocks, or recurrent layers.
        heads: attention heads of a transformer; D over heads must be even.
        mlp_ratio: width of the feed-forward layers over D; a GRU has none.
        dropout: dropout in attention or convolution output and feed-forward layers; between the
            layers of a GRU.
        kernel_size: frames that a convolution looks at, an odd number.
        bidirectional: whether a GRU reads both ways.
        causal: no frame depends on bins behind its patch, so that bins can be read as they come; a
            GRU that reads forward never does.
        window: frames that one attends to in a causal transformer, itself included; None: all.
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
        kind: str = "transformer",
        kernel_size: int = 15,
        bidirectional: bool = False,
        causal: bool = False,
        window: int | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= patch_stride <= patch_size:
            raise ValueError(f"patch_stride {patch_stride} must lie in 1 … patch_size {patch_size}")
        self.patch_size = patch_size
        self.patch_stride = patch_stride
        self.embed = nn.Linear(patch_size * channels, dim)
        self.dropout = nn.Dropout(dropout)
        self.kind = kind
        self.causal = causal or (kind == "gru" and not bidirectional)
        # Named by kind: checkpoints of the first encoders hold `transformer`.
        if kind == "transformer":
            self.transformer = Transformer(dim, depth, heads, mlp_ratio, dropout, causal, window)
        elif kind == "conv":
            self.conv = Convolution(dim, depth, kernel_size, mlp_ratio, dropout, causal)
        elif kind == "gru":
            self.gru = Recurrence(dim, depth, bidirectional, dropout)
        else:
            raise ValueError(f"encoder kind {kind!r}: expected transformer, conv or gru")

    @property
    def body(self) -> Transformer | Convolution | Recurrence:
        """What refines the embedded patches."""
        found = getattr(self, self.kind)
        assert isinstance(found, (Transformer, Convolution, Recurrence))
        return found

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
        return self.body(x, self.frame_mask(signal_mask))
