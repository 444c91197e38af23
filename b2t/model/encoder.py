"""Signal to latent frames."""

from torch import Tensor, nn

from b2t.model.convolution import Convolution
from b2t.model.options import EncoderOptions
from b2t.model.patches import patch_mask, to_patches
from b2t.model.recurrence import Recurrence
from b2t.model.transformer import Transformer


class Encoder(nn.Module):
    """Patches of the signal, embedded and refined by a transformer, convolutions or a GRU.

    Args:
        channels: C.
        options: kind, sizes and dropout.
    """

    def __init__(self, channels: int, options: EncoderOptions) -> None:
        super().__init__()
        self.patch_size = options.patch_size
        self.patch_stride = options.patch_stride
        dim, depth, dropout = options.dim, options.depth, options.dropout
        self.embed = nn.Linear(self.patch_size * channels, dim)
        self.dropout = nn.Dropout(dropout)
        self.kind = options.kind
        self.causal = options.causal or (self.kind == "gru" and not options.bidirectional)
        # Named by kind: checkpoints of the first encoders hold `transformer`.
        if self.kind == "transformer":
            self.transformer = Transformer(
                dim, depth, options.heads, options.mlp_ratio, dropout, options.causal,
                options.window,
            )  # fmt: skip
        elif self.kind == "conv":
            self.conv = Convolution(
                dim, depth, options.kernel_size, options.mlp_ratio, dropout, options.causal
            )
        else:
            self.gru = Recurrence(dim, depth, options.bidirectional, dropout)

    @property
    def body(self) -> Transformer | Convolution | Recurrence:
        """What refines the embedded patches."""
        found = getattr(self, self.kind)
        assert isinstance(found, (Transformer, Convolution, Recurrence))
        return found

    def frame_mask(self, signal_mask: Tensor) -> Tensor:
        """Real latent frames [B, P] bool for real bins [B, T] bool."""
        return patch_mask(signal_mask, self.patch_size, self.patch_stride)

    def forward(
        self, signal: Tensor, signal_mask: Tensor, count: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode a batch.

        What masked bins hold, and how many follow a trial, changes nothing.

        Args:
            signal: [B, T, C].
            signal_mask: [B, T] bool, True = real.
            count: real latent frames, where that is known.

        Returns:
            Latents [B, P, D], zero under the mask of real frames, and this mask [B, P] bool.
        """
        frames = self.frame_mask(signal_mask)
        signal = signal.masked_fill(~signal_mask[..., None], 0.0)
        patches = to_patches(signal, self.patch_size, self.patch_stride)
        x = self.dropout(self.embed(patches))
        body = self.body
        refined = body(x, frames, count) if isinstance(body, Transformer) else body(x, frames)
        return refined, frames
