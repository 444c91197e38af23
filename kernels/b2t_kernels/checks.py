"""What the public operators refuse."""

from torch import Tensor, dtype
from torch import bool as boolean


def check_rows(name: str, rows: Tensor | None, x: Tensor, wanted: dtype) -> None:
    """Refuse ``rows`` that are not one value of a type for each row of x, beside it."""
    if rows is None:
        return
    if rows.shape != x.shape[:1] or rows.dtype != wanted:
        raise ValueError(
            f"expected {name} [{x.shape[0]}] {wanted}, found {list(rows.shape)} {rows.dtype}"
        )
    check_devices(x, **{name: rows})


def check_devices(x: Tensor, **others: Tensor) -> None:
    """Refuse operands that lie elsewhere than x."""
    for name, other in others.items():
        if other.device != x.device:
            raise ValueError(f"x lies on {x.device} but {name} on {other.device}; move one of them")


def check_search(x: Tensor, codebook: Tensor, mask: Tensor | None) -> None:
    """Refuse rows, codes and a mask that do not fit one another."""
    if x.ndim != 2 or codebook.ndim != 2 or x.shape[1] != codebook.shape[1]:
        raise ValueError(
            f"expected x [N, D] and codebook [K, D], found {list(x.shape)} and "
            f"{list(codebook.shape)}; flatten batch and time first"
        )
    if codebook.shape[0] == 0 or codebook.shape[1] == 0:
        raise ValueError(f"the codebook is empty: {list(codebook.shape)}")
    check_devices(x, codebook=codebook)
    check_rows("mask", mask, x, boolean)


def check_precision(precision: str) -> bool:
    """Whether it is the exact one."""
    if precision not in ("fast", "exact"):
        raise ValueError(f"precision is 'fast' or 'exact', found {precision!r}")
    return precision == "exact"
