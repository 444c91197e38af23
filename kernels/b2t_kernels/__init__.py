"""Fused kernels for vector quantization: search, beams, draws, usage, code sums of tensors.

Triton on CUDA, blocked multi-threaded torch elsewhere. ``b2t_kernels.reference`` holds the naive
versions that both are tested against.
"""

from b2t_kernels.ops import (
    beam_codes,
    code_sums,
    leave,
    nearest_code,
    prepare_codes,
    sample_code,
    sum_codes,
)
from b2t_kernels.usage_ops import SearchedUsage, code_usage, known_usage, search_usage

__all__ = [
    "SearchedUsage",
    "beam_codes",
    "code_sums",
    "code_usage",
    "known_usage",
    "leave",
    "nearest_code",
    "prepare_codes",
    "sample_code",
    "search_usage",
    "sum_codes",
]
