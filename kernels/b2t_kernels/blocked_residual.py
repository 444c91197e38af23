"""The residual between two layers, and the sum of the codes chosen, in blocked torch."""

from torch import Tensor

STEP_ROWS = 8192


def _chosen(codebook: Tensor, indices: Tensor, gain: Tensor | None) -> Tensor:
    vectors = codebook[indices.clamp(min=0)]
    if gain is not None:
        vectors *= gain
    return vectors.masked_fill_((indices < 0)[:, None], 0.0)


def leave(
    residual: Tensor, codebook: Tensor, indices: Tensor, gain: Tensor | None, errors: Tensor | None
) -> Tensor:
    """See :func:`b2t_kernels.leave`."""
    for start in range(0, residual.shape[0], STEP_ROWS):
        rows = slice(start, start + STEP_ROWS)
        residual[rows].sub_(_chosen(codebook, indices[rows], gain))
    if errors is not None:
        errors += residual
    return residual.norm().square()


def sum_codes(codebooks: Tensor, codes: Tensor, gain: Tensor | None) -> Tensor:
    """See :func:`b2t_kernels.sum_codes`."""
    total = codebooks.new_zeros(codes.shape[0], codebooks.shape[2])
    for layer, indices in enumerate(codes.unbind(1)):
        book = layer if codebooks.shape[0] > 1 else 0
        for start in range(0, codes.shape[0], STEP_ROWS):
            rows = slice(start, start + STEP_ROWS)
            factor = None if gain is None else gain[book]
            total[rows].add_(_chosen(codebooks[book], indices[rows], factor))
    return total
