"""Residual vector quantization.

`ResidualVQ` is the whole interface; the other modules are its parts.
"""

from b2t.quantize.residual_vq import ResidualVQ, RVQOutput
from b2t.quantize.statistics import InitReport, QuantizerStats, SoftUsage, UpdateReport

__all__ = ["ResidualVQ", "RVQOutput", "QuantizerStats", "SoftUsage", "UpdateReport", "InitReport"]
