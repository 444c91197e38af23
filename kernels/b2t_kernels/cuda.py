"""What a CUDA tensor runs: the Triton kernels, or blocked torch where they cannot be used."""

from b2t_kernels.blocked import code_sums as _blocked_code_sums
from b2t_kernels.blocked import (
    nearest_code,
    rvq_encode,
    usage_backward,
    usage_forward,
)

__all__ = ["code_sums", "nearest_code", "rvq_encode", "usage_backward", "usage_forward"]


def code_sums(x, indices, K, mask, atomic):
    """Sorted sums."""
    return _blocked_code_sums(x, indices, K, mask)
