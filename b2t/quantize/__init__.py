"""Residual vector quantization.

`ResidualVQ` is the whole interface; the other modules are its parts.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from b2t.quantize.norms import StepNorms
    from b2t.quantize.residual_vq import ResidualVQ, RVQOutput
    from b2t.quantize.statistics import InitReport, QuantizerStats, SoftUsage, UpdateReport

__all__ = [
    "ResidualVQ", "RVQOutput", "StepNorms", "QuantizerStats", "SoftUsage", "UpdateReport",
    "InitReport",
]  # fmt: skip

_PLACES = {"ResidualVQ": "residual_vq", "RVQOutput": "residual_vq", "StepNorms": "norms"}
"""Modules of what is not in `statistics`."""


def __getattr__(name: str) -> Any:
    # The configuration imports the options alone, without torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    place = _PLACES.get(name, "statistics")
    return getattr(importlib.import_module(f"{__name__}.{place}"), name)
