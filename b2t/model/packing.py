"""Real frames of a padded batch one after the other, and attention within each row of them.

Attention with a mask of padding cannot be torch's flash attention; that of rows of several lengths
(`torch.nn.attention.varlen`, torch 2.10 and later) is, and computes nothing for padding.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from b2t.log import log_once

try:
    from torch.nn.attention.varlen import varlen_attn as _VARLEN
except ImportError:
    _VARLEN: Any = None  # type: ignore[no-redef]


def causal_options(attention: Callable[..., Any]) -> dict[str, Any]:
    """Arguments by which attention of packed rows is causal, in this release of torch."""
    names = inspect.signature(attention).parameters
    return {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}


_CAUSAL = {} if _VARLEN is None else causal_options(_VARLEN)
"""Found once: a compiled block cannot look for it."""


class Packing(NamedTuple):
    """Where the N real frames of a batch [B, P] stand.

    Args:
        rows: [N] int64, their places in the flattened batch.
        starts: [B + 1] int32, where in the N frames each row of the batch begins, and N.
        shape: (B, P); no row has more than P.
    """

    rows: Tensor
    starts: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, mask: Tensor, count: int) -> "Packing":
        """Pack the ``count`` real frames of a mask [B, P] bool; nothing is read from the device."""
        rows = torch.nonzero_static(mask.reshape(-1), size=count)[:, 0]
        starts = F.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        return cls(rows, starts, (mask.shape[0], mask.shape[1]))

    def packed(self, x: Tensor) -> Tensor:
        """Frames [N, D] of x [B, P, D]."""
        return x.flatten(0, 1)[self.rows]

    def laid_out(self, x: Tensor) -> Tensor:
        """Frames x [N, D] as [B, P, D], zero where none is real."""
        B, P = self.shape
        flat = x.new_zeros(B * P, x.shape[1])
        return flat.index_copy(0, self.rows, x).view(B, P, x.shape[1])

    def angles(self, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary angles [N, 1, d / 2] of the frames, from those of all places [P, d / 2]."""
        place = self.rows % self.shape[1]
        return cosine[place][:, None], sine[place][:, None]


def can_pack(x: Tensor, window: int | None) -> bool:
    """Whether frames x can be packed for attention; says once why they are not."""
    why = ""
    if _VARLEN is None:
        why = "this torch has no attention of packed rows (2.10 and later have)"
    elif not x.is_cuda or x.dtype not in (torch.float16, torch.bfloat16):
        why = f"that takes a GPU and 16 bit, and these are {x.dtype} on {x.device.type}"
    elif window is not None:
        why = "they see a window of others"
    if why:
        log_once("packed-frames", f"model.pack_frames: frames are padded, {why}")
    return not why


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, causal: bool
) -> Tensor:
    """Attention within each row of packed frames.

    Args:
        query, key, value: [N, H, d].
        starts: [B + 1] int32.
        longest: frames of no row are more.
        causal: a frame sees none that follow.

    Returns:
        [N, H, d].
    """
    options = _CAUSAL if causal else {}
    mixed = _VARLEN(query, key, value, starts, starts, longest, longest, **options)
    return cast(Tensor, mixed)
