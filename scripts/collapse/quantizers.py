"""Quantizers of the study behind one interface: ours, the peer's, offline k-means and none."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from b2t.quantize import ResidualVQ
from collapse.autoencoder import LATENT


class NoQuantizer(nn.Module):
    """Latents as they are."""

    pass_through = 0.0
    """Share of the steps that it leaves latents as they are, before `start`."""
    quantizing = True

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None, Tensor | float]:
        """Quantized latents, codes [B, P, Q] or None, weighted auxiliary loss."""
        return z, None, 0.0

    def update(self, progress: float) -> int:
        """After an optimizer step; the number of revived codes."""
        return 0


class Ours(NoQuantizer):
    """`b2t.quantize.ResidualVQ` with the weights of its losses and a start without quantizing."""

    def __init__(self, size: tuple[int, int], options: dict[str, Any], seed: int) -> None:
        super().__init__()
        options = dict(options)
        self.weights = {
            name: options.pop(name) for name in ("commitment", "diversity", "perplexity")
        }
        self.pass_through = options.pop("pass_through")
        self.frames_per_code = options.pop("frames_per_code")
        narrow, normal = (options.pop(f"{name}_start", False) for name in ("narrow", "normal"))
        self.vq = ResidualVQ(LATENT, size[1], size[0], seed=seed, **options)
        books = self.vq.codebooks
        if narrow:
            books.embed.uniform_(-1 / size[1], 1 / size[1])
        if normal:
            books.embed.normal_()
            books.ema_sum.copy_(books.embed)
        books.push()
        self.stats: Any = None
        self.quantizing = self.pass_through == 0 and self.vq.initialized

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None, Tensor | float]:
        """See `NoQuantizer`."""
        if not self.quantizing:
            return z, None, 0.0
        wanted = [name for name, weight in self.weights.items() if weight > 0]
        out = self.vq(z, losses=wanted if self.training else ())
        self.stats = out.stats
        loss = sum(self.weights.get(name, 1.0) * term for name, term in out.losses.items())
        return out.quantized, out.codes, loss

    def update(self, progress: float) -> int:
        """See `NoQuantizer`."""
        self.vq.set_progress(progress)
        return sum(self.vq.update(self.stats).revived) if self.quantizing else 0

    def start(self, latents: Iterator[Tensor]) -> None:
        """Start the codebooks (k-means++ unless switched off) and quantize from here on."""
        if not self.vq.initialized:
            pairs = ((z, None) for z in latents)
            self.vq.initialize(pairs, progress=False, frames_per_code=self.frames_per_code)
        self.quantizing = True


class Peer(NoQuantizer):
    """vector-quantize-pytorch's ResidualVQ, its loss summed over layers as in its examples."""

    def __init__(self, size: tuple[int, int], options: dict[str, Any]) -> None:
        super().__init__()
        from vector_quantize_pytorch import ResidualVQ as PeerVQ

        options = dict(options)
        self.pass_through = options.pop("pass_through", 0.0)
        self.quantizing = self.pass_through == 0
        self.vq = PeerVQ(dim=LATENT, num_quantizers=size[0], codebook_size=size[1], **options)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None, Tensor | float]:
        """See `NoQuantizer`."""
        if not self.quantizing:
            return z, None, 0.0
        quantized, codes, losses = self.vq(z)
        return quantized, codes, losses.sum()

    def start(self, latents: Iterator[Tensor]) -> None:
        """Quantize from here on; its k-means takes the next batch, not ``latents``."""
        self.quantizing = True


class Offline(NoQuantizer):
    """Residual k-means (faiss) fitted once to the latents of a finished autoencoder."""

    def __init__(self, latents: Tensor, size: tuple[int, int], seed: int, beam: int) -> None:
        super().__init__()
        import faiss

        residual, books = latents, []
        for layer in range(size[0]):
            fit = faiss.Kmeans(
                LATENT,
                size[1],
                niter=25,
                seed=seed * 100 + layer + 1,
                max_points_per_centroid=10**6,
            )
            fit.train(residual.numpy())
            books.append(torch.from_numpy(fit.centroids.copy()))
            residual = residual - books[-1][nearest(residual, books[-1])]
        self.vq = ResidualVQ(
            LATENT, size[1], size[0], kmeans_init=False, eval_beam_size=beam, seed=seed
        ).eval()
        self.vq.codebooks.embed.copy_(torch.stack(books))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None, Tensor | float]:
        """See `NoQuantizer`."""
        out = self.vq(z, losses=())
        return out.quantized, out.codes, 0.0


def nearest(x: Tensor, book: Tensor) -> Tensor:
    """Nearest code [N] of x [N, D] in book [K, D]."""
    bias = book.square().sum(1)
    return torch.cat([torch.addmm(bias, r, book.T, alpha=-2).argmin(1) for r in x.split(4096)])
