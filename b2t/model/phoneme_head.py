"""Phoneme posteriors for connectionist temporal classification."""

from torch import Tensor, nn

NUM_CLASSES = 41
"""0 is the blank, 1–40 the classes of `b2t.data.phonemes.PHONEMES`."""


class PhonemeHead(nn.Module):
    """Layer norm, dropout and a linear map from latents to 41 classes.

    Args:
        dim: latent width D.
        dropout: probability of zeroing a feature in training.
    """

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(dim, NUM_CLASSES)

    def forward(self, latents: Tensor) -> Tensor:
        """Score the classes of every frame: latents [B, P, D] → logits [B, P, 41] float32."""
        return self.classify(self.dropout(self.norm(latents))).float()
