"""Beam search over the layers: keep several sums of codes alive, end with the nearest one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from b2t.log import log_once
from b2t.quantize.layers import Layers
from b2t_kernels.blocked import GROUP, CentredCodes, centre_codes

_BLOCK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 25}


class _Book(NamedTuple):
    """Codes [K, D], the same centred, and how many of them may be chosen."""

    codes: Tensor
    centred: CentredCodes
    choices: int


@torch.no_grad()
def beam_search(layers: Layers, latents: Tensor, quantizers: int, width: int) -> Tensor:
    """Codes [N, ``quantizers``] int64 whose sum is the nearest that a beam finds.

    Layer by layer, the ``width`` sums nearest to each frame go on, and the nearest of the last is
    taken. A width of 1 is the nearest code of each layer. Candidates are compared in float64, the
    lower index first among equals, so that a frame's codes do not depend on the frames beside it
    or on an offset. As in additive quantization (Babenko & Lempitsky 2014) and faiss's
    ResidualQuantizer.

    Memory is O(N + K·D), time ``width`` times that of the nearest codes and more.

    Args:
        layers: the codebooks.
        latents: [N, D] finite float32.
        quantizers: layers to walk.
        width: sums kept.
    """
    if latents.is_cuda:
        log_once("beam", "beam search runs in torch; the Triton kernel finds single nearest codes")
    books = [_book(layers.vectors(q)) for q in range(quantizers)]
    K, D = books[0].codes.shape
    # A score for each code, and two candidates in float64 for each sum kept.
    elements = width * max(K, 4 * D)
    rows = max(1, _BLOCK_ELEMENTS.get(latents.device.type, 1 << 21) // elements)
    return torch.cat([_search(block, books, width) for block in latents.split(rows)])


def _book(codes: Tensor) -> _Book:
    """Prepare a codebook; of identical codes only the first may be chosen, NaN never."""
    centred = centre_codes(codes, torch.float32)
    centred.bias.masked_fill_(~centred.allowed(), -torch.inf)
    return _Book(codes, centred, max(1, int((centred.bias > -torch.inf).sum())))


def _search(block: Tensor, books: list[_Book], width: int) -> Tensor:
    """Codes [n, Q] of a block of frames [n, D]."""
    residuals = block[:, None]
    paths = torch.zeros(*residuals.shape[:2], 0, dtype=torch.int64, device=block.device)
    for book in books:
        origin, codes = _nearest_sums(residuals, book, width)
        residuals = _taken(residuals, origin) - book.codes[codes]
        paths = torch.cat([_taken(paths, origin), codes[..., None]], -1)
    return paths[:, 0]


def _nearest_sums(residuals: Tensor, book: _Book, width: int) -> tuple[Tensor, Tensor]:
    """Pick the ``width`` best of all continuations of ``residuals`` [n, b, D] by a code.

    Returns:
        Which residual [n, width] and which code [n, width], the nearest first; fewer where there
        are not so many.
    """
    n, beams, _ = residuals.shape
    moved, padded = book.centred.centre(residuals), book.centred.codes.shape[0]
    scores = torch.addmm(book.centred.bias, moved.flatten(0, 1), book.centred.codes.T)
    scores = scores.view(n, beams, padded) - 0.5 * moved.square().sum(2, keepdim=True)
    # Twice as many as wanted, so that rounding decides only among those that lose anyway.
    near = _greatest(scores.flatten(1), min(2 * width, beams * book.choices))
    near = near.sort(dim=1).values
    origin, codes = near // padded, near % padded
    left = _taken(residuals, origin).double() - book.codes[codes].double()
    order = left.square().sum(2).sort(dim=1, stable=True).indices[:, :width]
    return origin.gather(1, order), codes.gather(1, order)


def _greatest(scores: Tensor, wanted: int) -> Tensor:
    """Places of the ``wanted`` greatest of each row of ``scores`` [n, whole groups], in any order.

    They lie in the groups of the greatest maxima, which are found in one fast pass.
    """
    groups = scores.unflatten(1, (-1, GROUP))
    if groups.shape[1] <= wanted:
        return scores.topk(wanted, sorted=False).indices
    chosen = groups.amax(2).topk(wanted, sorted=False).indices
    places = _taken(groups, chosen).flatten(1).topk(wanted, sorted=False).indices
    return chosen.gather(1, places // GROUP) * GROUP + places % GROUP


def _taken(values: Tensor, index: Tensor) -> Tensor:
    """Select ``index`` [n, k] along the second axis of ``values`` [n, b, …]."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[2]))
