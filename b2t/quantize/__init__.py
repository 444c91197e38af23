"""Residual vector quantization.

`ResidualVQ` is the whole interface; the other modules are its parts.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from b2t.quantize.residual_vq import ResidualVQ, RVQOutput
    from b2t.quantize.statistics import InitReport, QuantizerStats, SoftUsage, UpdateReport

__all__ = ["ResidualVQ", "RVQOutput", "QuantizerStats", "SoftUsage", "UpdateReport", "InitReport"]


def __getattr__(name: str) -> Any:
    # The configuration imports the options alone, without torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    place = "residual_vq" if name in ("ResidualVQ", "RVQOutput") else "statistics"
    return getattr(importlib.import_module(f"{__name__}.{place}"), name)
