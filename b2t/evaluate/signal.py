"""How well a signal was given back, pooled over valid bins."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class SignalSums:
    """Sums over valid bins and channels from which the pooled measures follow.

    Sums are float64 and add across batches and ranks, so that a pooled value does not depend
    on how the bins were split. The median is over trials.
    """

    count: float = 0.0
    error: float = 0.0
    target_power: float = 0.0
    output_power: float = 0.0
    product: float = 0.0
    trial_snr_db: list[float] = field(default_factory=list)

    def add(self, reconstruction: Tensor, target: Tensor, mask: Tensor) -> None:
        """Add one batch: reconstruction and target [B, T, C], mask [B, T] bool, True = real."""
        keep = mask.unsqueeze(-1)
        output = reconstruction.double().masked_fill(~keep, 0.0)
        truth = target.double().masked_fill(~keep, 0.0)
        error = (output - truth).square().sum(dim=(1, 2))
        power = truth.square().sum(dim=(1, 2))
        self.count += float(mask.sum()) * target.shape[-1]
        self.error += float(error.sum())
        self.target_power += float(power.sum())
        self.output_power += float(output.square().sum())
        self.product += float((output * truth).sum())
        pairs = zip(power.tolist(), error.tolist(), strict=True)
        self.trial_snr_db += [decibels(p, e) for p, e in pairs if p > 0 and e > 0]

    def __add__(self, other: "SignalSums") -> "SignalSums":
        """Pool two sums."""
        return SignalSums(
            self.count + other.count,
            self.error + other.error,
            self.target_power + other.target_power,
            self.output_power + other.output_power,
            self.product + other.product,
            self.trial_snr_db + other.trial_snr_db,
        )

    @property
    def snr_db(self) -> float | None:
        """Pooled 10·log10(Σ target² / Σ (reconstruction − target)²); None without a target."""
        if self.count == 0 or self.target_power == 0:
            return None
        return decibels(self.target_power, self.error)

    @property
    def median_snr_db(self) -> float | None:
        """Median over trials of the trial's own SNR in dB."""
        if not self.trial_snr_db:
            return None
        return float(torch.tensor(self.trial_snr_db, dtype=torch.float64).quantile(0.5))

    @property
    def mse(self) -> float | None:
        """Mean squared error per bin and channel."""
        return self.error / self.count if self.count else None

    @property
    def cosine(self) -> float | None:
        """Cosine of the angle between the pooled reconstruction and target."""
        norm = math.sqrt(self.target_power * self.output_power)
        return self.product / norm if norm else None


def decibels(power: float, error: float) -> float:
    """10·log10(power / error); infinite where the error is 0, NaN where either is not finite."""
    if not (math.isfinite(power) and math.isfinite(error)):
        return math.nan
    if error == 0:
        return math.inf
    return 10 * math.log10(power / error) if power > 0 else -math.inf
