"""The autoencoder whose latents are quantized."""

from torch import Tensor, nn

LATENT, WIDTH = 64, 128


class Block(nn.Module):
    """Neighbouring frames, then a feed-forward layer, each behind a layer norm: [B, P, D]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.mix = nn.Conv1d(dim, dim, 3, padding=1, groups=dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Refine."""
        x = x + self.mix(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp(self.norms[1](x))


class Autoencoder(nn.Module):
    """Patches to latents [B, P, LATENT] and back."""

    def __init__(self, channels: int, patch: int, depth: int = 1) -> None:
        super().__init__()
        self.patch, width = patch, patch * channels

        def stack() -> list[nn.Module]:
            return [Block(WIDTH) for _ in range(depth)]

        self.encoder = nn.Sequential(
            nn.Linear(width, WIDTH), *stack(), nn.Linear(WIDTH, LATENT), nn.LayerNorm(LATENT)
        )
        self.decoder = nn.Sequential(nn.Linear(LATENT, WIDTH), *stack(), nn.Linear(WIDTH, width))

    def encode(self, signal: Tensor) -> Tensor:
        """Signal [B, T, C] → latents [B, T / patch, LATENT]."""
        return self.encoder(signal.unflatten(1, (-1, self.patch)).flatten(2))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, P, LATENT] → patches [B, P, patch · C]."""
        return self.decoder(latents)
