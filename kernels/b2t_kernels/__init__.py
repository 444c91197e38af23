"""Fused kernels for vector quantization: search, usage, code sums; tensors in, tensors out.

Triton on CUDA, blocked multi-threaded torch elsewhere. ``b2t_kernels.reference`` holds the naive
versions that both are tested against.
"""

from b2t_kernels.ops import code_sums, code_usage, nearest_code, rvq_encode

__all__ = ["code_sums", "code_usage", "nearest_code", "rvq_encode"]
