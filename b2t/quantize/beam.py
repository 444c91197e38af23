"""Beam search over the layers: keep several sums of codes alive, end with the nearest one."""

from __future__ import annotations

import torch
from torch import Tensor

import b2t_kernels
from b2t.quantize.layers import Layers


@torch.no_grad()
def beam_search(layers: Layers, latents: Tensor, quantizers: int, width: int) -> Tensor:
    """Codes [N, ``quantizers``] int64 whose sum is the nearest that a beam finds.

    See `b2t_kernels.beam_codes`. A width of 1 is the nearest code of each layer.

    Args:
        layers: the codebooks.
        latents: [N, D] finite float32.
        quantizers: layers to walk.
        width: sums kept.
    """
    books = [layers.vectors(q) for q in range(quantizers)]
    # Codes that are scaled by a gain are not those that were prepared.
    known = not layers.cosine and layers.backend == "kernels"
    prepared = [layers.prepared[layers.index(q)] for q in range(quantizers)] if known else ()
    return b2t_kernels.beam_codes(latents, books, width, prepared)
