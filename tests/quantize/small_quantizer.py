"""A small quantizer that has started, and its codes by brute force."""

import torch

from b2t.quantize import ResidualVQ


def latents(B=4, P=25, D=8, seed=0, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, P, D, generator=generator) + offset


def started(x=None, **options):
    x = latents(16) if x is None else x
    options = {"dim": x.shape[-1], "codebook_size": 16, "num_quantizers": 4, **options}
    quantizer = ResidualVQ(**options)
    if not quantizer.initialized:
        quantizer.initialize([(x, None)], progress=False)
    return quantizer


def state_of(quantizer):
    return {name: value.clone() for name, value in quantizer.state_dict().items()}


def same_state(a, b):
    return all(torch.equal(a[name], b[name]) for name in a) and a.keys() == b.keys()


def brute_force(quantizer, frames):
    """Codes [N, Q] and sums of codes [N, D], one distance at a time, in float64."""
    residual, chosen = frames.double(), []
    for book in quantizer.codebooks.embed.double():
        distance = (residual[:, None] - book[None]).square().sum(-1)
        chosen.append(distance.argmin(1))
        residual = residual - book[chosen[-1]]
    return torch.stack(chosen, 1), frames.double() - residual
