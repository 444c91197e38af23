"""The autoencoders whose latents are quantized: three small ones that have little in common.

Each maps a signal [B, T, C] to latents [B, T / patch, LATENT] (`encode`) and latents to patches
[B, P, patch · C] (`decode`), by its parts `encoder` and `decoder`.
"""

import math

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
    """Patches, a block with its neighbours, a layer norm over the latents."""

    def __init__(self, channels: int, patch: int, depth: int = 1) -> None:
        super().__init__()
        self.patch, width = patch, patch * channels

        def stack() -> list[nn.Module]:
            return [Block(WIDTH) for _ in range(depth)]

        self.encoder: nn.Module = nn.Sequential(
            nn.Linear(width, WIDTH), *stack(), nn.Linear(WIDTH, LATENT), nn.LayerNorm(LATENT)
        )
        self.decoder: nn.Module = nn.Sequential(
            nn.Linear(LATENT, WIDTH), *stack(), nn.Linear(WIDTH, width)
        )

    def encode(self, signal: Tensor) -> Tensor:
        """Signal [B, T, C] → latents [B, T / patch, LATENT]."""
        return self.encoder(signal.unflatten(1, (-1, self.patch)).flatten(2))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, P, LATENT] → patches [B, P, patch · C]."""
        return self.decoder(latents)


class PatchMLP(Autoencoder):
    """Each patch by itself through one hidden layer; latents of any length, no norm."""

    def __init__(self, channels: int, patch: int) -> None:
        super().__init__(channels, patch, depth=0)
        width = patch * channels
        self.encoder = nn.Sequential(
            nn.Linear(width, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, LATENT)
        )
        self.decoder = nn.Sequential(
            nn.Linear(LATENT, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, width)
        )


class Strided(Autoencoder):
    """Strided convolutions down to a frame for each patch and up again, as codecs of sound."""

    def __init__(self, channels: int, patch: int) -> None:
        super().__init__(channels, patch, depth=0)
        strides, narrow = _strides(patch), WIDTH // 2
        down: list[nn.Module] = [nn.Conv1d(channels, narrow, 3, padding=1)]
        up: list[nn.Module] = [nn.Conv1d(LATENT, narrow, 3, padding=1)]
        for stride in strides:
            down += [nn.GELU(), nn.Conv1d(narrow, narrow, 2 * stride, stride, stride // 2)]
        for stride in reversed(strides):
            up += [nn.GELU(), nn.ConvTranspose1d(narrow, narrow, 2 * stride, stride, stride // 2)]
        self.encoder = nn.Sequential(*down, nn.GELU(), nn.Conv1d(narrow, LATENT, 1))
        self.decoder = nn.Sequential(*up, nn.GELU(), nn.Conv1d(narrow, channels, 3, padding=1))

    def encode(self, signal: Tensor) -> Tensor:
        """See `Autoencoder`."""
        return self.encoder(signal.transpose(1, 2)).transpose(1, 2)

    def decode(self, latents: Tensor) -> Tensor:
        """See `Autoencoder`."""
        signal = self.decoder(latents.transpose(1, 2)).transpose(1, 2)
        return signal.unflatten(1, (-1, self.patch)).flatten(2)


def _strides(patch: int) -> list[int]:
    """Even factors, 2 or 4 each, of a patch that is a power of two from 2 on."""
    twos = int(math.log2(patch))
    if 2**twos != patch or twos < 1:
        raise ValueError(f"patch {patch} is no power of two from 2 on")
    return [2] * (twos % 2) + [4] * (twos // 2)


AUTOENCODERS = {"block": Autoencoder, "mlp": PatchMLP, "strided": Strided}
