"""What the trainer hands to the monitors once per applied optimizer step."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from b2t.quantize import UpdateReport


@dataclass
class StepContext:
    """One applied optimizer step, the same on every rank where a field says global.

    Tensors stay on their device: a monitor may keep or add them in `update` and reads numbers
    only in `metrics`, so that nothing waits for the device between log steps.

    Attributes:
        phase: name of the phase.
        losses: global means of this step, 0-d, by name (`total`, `reconstruction` …), unweighted
            except `total`.
        weights: weight of each loss in the total; 1 where none is named, as for the codebook loss.
        counts: [Q, K] frames per code, summed over micro-batches and ranks; None without a
            quantizer or before the codebooks are initialized.
        update_report: what `ResidualVQ.update` returned, None where it was not called.
        grad_norms: norms before clipping, unscaled and global, by component and as `global`.
        step_time_s: wall time since the previous applied step.
        frames: valid latent frames of the global batch.
        reconstruction, target: [B, T, C] of this rank's last micro-batch, detached.
        signal_mask: [B, T] bool of the same.
    """

    phase: str
    losses: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    counts: Tensor | None = None
    update_report: UpdateReport | None = None
    grad_norms: Mapping[str, Tensor | float] = field(default_factory=dict)
    step_time_s: float | None = None
    frames: Tensor | float | None = None
    reconstruction: Tensor | None = None
    target: Tensor | None = None
    signal_mask: Tensor | None = None


class Monitor(Protocol):
    """What every monitor does."""

    def update(self, context: StepContext) -> None:
        """Take in one applied step without waiting for the device."""

    def metrics(self) -> dict[str, float]:
        """Return the current values by metric name; the one place that reads the device."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next value depends on: JSON values, and tensors."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was called."""
