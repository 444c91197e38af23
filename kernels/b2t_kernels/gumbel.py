"""Gumbel noise that is a function of two keys, one of the row and one of the code.

The noise of a pair depends on nothing else: not on the rows beside it, on the device, or on how the
work is cut up. Letters: N rows, K codes.
"""

import torch
from torch import Tensor

UNIFORM_BITS = 23
BLOCK_ELEMENTS = 1 << 15
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9 as a signed 64-bit number
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own repeats the sign."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """Finalizer of SplitMix64 (Steele, Lea and Flood 2014), elementwise on int64."""
    x = (x ^ shift_right(x, 30)).mul_(_MIX_1)
    x.bitwise_xor_(shift_right(x, 27)).mul_(_MIX_2)
    return x.bitwise_xor_(shift_right(x, 31))


def noise(row_keys: Tensor, code_keys: Tensor) -> Tensor:
    """Standard Gumbel noise [N, K] float32 of keys [N] and [K] int64."""
    made = row_keys.new_empty(row_keys.shape[0], code_keys.shape[0], dtype=torch.float32)
    # Blocks that stay in the cache; a GPU takes larger ones.
    size = BLOCK_ELEMENTS if row_keys.device.type == "cpu" else 1 << 24
    step = max(1, size // max(1, code_keys.shape[0]))
    for start in range(0, row_keys.shape[0], step):
        keys = row_keys[start : start + step, None] ^ code_keys
        bits = shift_right(mix(keys), 64 - UNIFORM_BITS)
        made[start : start + step] = from_bits(bits)
    return made


def from_bits(bits: Tensor) -> Tensor:
    """Standard Gumbel noise from equally likely integers below 2 ** UNIFORM_BITS."""
    # One bit more and the largest uniform number would round to 1, whose noise is infinite.
    uniform = bits.to(torch.float32).add_(0.5).mul_(2.0**-UNIFORM_BITS)
    return uniform.log_().neg_().log_().neg_()
