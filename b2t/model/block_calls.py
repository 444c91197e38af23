"""How a stack calls its blocks: as they are or compiled, with activations kept or recomputed."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

BACKEND = "inductor"
"""What `torch.compile` hands graphs to."""


def call_block(
    block: nn.Module, *inputs: Any, compiled: bool = False, recompute: bool = False
) -> Tensor:
    """Return ``block(*inputs)``.

    The block stays the module it is, whatever is chosen: names of weights, hooks of the stack and
    saved models do not change. One compiled function serves all blocks of the same shapes.

    Args:
        block: one of a stack.
        inputs: of its forward.
        compiled: run it through `torch.compile`, of any number of trials and frames.
        recompute: keep no activations and recompute them in backward.
    """
    call = _compiled(BACKEND) if compiled else _call
    if recompute:
        return checkpoint(call, block, *inputs, use_reentrant=False)
    return call(block, *inputs)


def _call(block: nn.Module, *inputs: Any) -> Tensor:
    return block(*inputs)


@functools.cache
def _compiled(backend: str) -> Callable[..., Tensor]:
    # Dropout draws what the uncompiled block draws, also in passes that are compiled apart. Past
    # torch's limit of variants a block runs uncompiled; a demand for whole graphs would raise.
    options: dict[str, Any] | None = {"fallback_random": True} if backend == "inductor" else None
    return torch.compile(_call, dynamic=True, backend=backend, options=options)
