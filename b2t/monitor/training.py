"""How training goes: shares and trends of the losses, gradient norms, memory, utilization."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from b2t.monitor.context import StepContext
from b2t.monitor.trend import slopes

PEAK_FLOPS = {
    # resources.nvidia.com/en-us-tensor-core: H200 SXM and H100 SXM 1,979 with sparsity, H100 PCIe
    # 1,513.
    r"H200": 989e12,
    r"H100 80GB HBM3": 989e12,
    r"H100 PCIe": 756e12,
    # nvidia-a100-datasheet-us-nvidia-1758950-r4: 312, SXM and PCIe alike.
    r"A100\b.*": 312e12,
    # L40S data sheet: 362.05, 733 with sparsity.
    r"L40S": 362e12,
    # Ada GPU architecture whitepaper, appendix A: 165.2 with float32 accumulation.
    r"RTX 4090": 165.2e12,
    # Ampere GA102 whitepaper, appendix A: 71 with float32 accumulation; appendix C: 154.8.
    r"RTX 3090": 71e12,
    r"RTX A6000": 154.8e12,
    # Data sheets of RTX A5500 and A5000: 272.8 and 222.2 with sparsity.
    r"RTX A5500": 136.4e12,
    r"RTX A5000": 111.1e12,
    # volta-v100-datasheet-update-us-1165301-r5: 125 for SXM2.
    r"V100-SXM2.*": 125e12,
    # t4-tensor-core-datasheet-951643: 65.
    r"T4": 65e12,
}
"""Dense 16-bit tensor-core operations per second, accumulated in float32, by pattern of the whole
name behind NVIDIA, Tesla or GeForce: half of what a data sheet gives with sparsity. Laptop and
other variants have other peaks: a device that is not listed has no MFU."""


class TrainingMonitor:
    """Loss shares, trends, gradient norms, pace and memory over the last ``window`` applied steps.

    Metrics:
        `loss_share/NAME`: weight × loss over the sum of all such products.
        `loss/vq_ratio`: commitment (and codebook) loss over reconstruction loss, unweighted.
        `loss_smooth/NAME`: exponential mean of the loss (decay ``smoothing``, bias corrected).
        `loss_trend/NAME`: least-squares slope over the window per 1,000 steps, over the mean.
        `optim/grad_norm/COMPONENT`: norm before clipping, unscaled, of the last step.
        `throughput/steps_per_s`: applied steps per second.
        `memory/peak_gib`: most memory that torch has held on this rank's GPU, in GiB.
        `throughput/mfu`, `throughput/hfu`: share of the device's peak spent on the model's own
            operations, and on all that were executed, recomputation included. Absent where the
            device or the model's operations are not known.

    Args:
        window: applied steps looked back on.
        smoothing: decay of the exponential mean.
        flops_per_frame: operations of forward and backward per latent frame in 16 bit, one number
            or one for each phase by name; None leaves out MFU.
        recomputed: operations executed beyond those, as a fraction of them, in the same form.
        device: device whose memory and peak count.
        world: number of ranks, all with the same device.
    """

    def __init__(
        self,
        *,
        window: int = 100,
        smoothing: float = 0.98,
        flops_per_frame: float | Mapping[str, float] | None = None,
        recomputed: float | Mapping[str, float] = 0.0,
        device: torch.device | str = "cpu",
        world: int = 1,
    ) -> None:
        self.window = window
        self.smoothing = smoothing
        self.flops_per_frame = flops_per_frame
        self.recomputed = recomputed
        self.device = torch.device(device)
        self.world = world
        self.phase: str | None = None
        self._weights: dict[str, float] = {}
        self._grad_norms: dict[str, Tensor | float] = {}
        self._names: list[str] = []
        self._ring: Tensor | None = None
        self._smooth: Tensor | None = None
        self._seconds: list[float] = []
        self._frames: list[float | Tensor] = []
        self.seen = 0

    def update(self, context: StepContext) -> None:
        """Add one applied step."""
        if context.phase != self.phase:
            self.phase = context.phase
            self._start()
        self._weights = dict(context.weights)
        self._grad_norms = dict(context.grad_norms)
        names = sorted(context.losses)
        if names != self._names or self._ring is None:
            self._start()
            self._names = names
            self._ring = torch.zeros(self.window, len(names), dtype=torch.float64)
            self._smooth = torch.zeros(len(names), dtype=torch.float64)
        assert self._ring is not None and self._smooth is not None
        if names:
            values = torch.stack([context.losses[name].detach().double() for name in names])
            if self._ring.device != values.device:
                self._ring = self._ring.to(values.device)
            self._ring[self.seen % self.window] = values
            weight = torch.full_like(values, self.smoothing)
            self._smooth = torch.lerp(values, self._smooth.to(values.device), weight)
        self.seen += 1
        self._add_pace(context)

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the class docstring; empty before the first step."""
        if not self.seen:
            return {}
        found = self._losses() if self._names else {}
        for name, norm in self._grad_norms.items():
            key = "optim/grad_norm" if name == "global" else f"optim/grad_norm/{name}"
            found[key] = float(norm)
        found.update(self._pace())
        if self.device.type == "cuda":
            found["memory/peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the losses of the window; the pace is measured anew after a resume."""
        return {
            "phase": self.phase,
            "seen": self.seen,
            "names": self._names,
            "weights": self._weights,
            "ring": self._ring,
            "smooth": self._smooth,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a window; one of another length starts anew."""
        ring = state["ring"]
        if ring is None or len(ring) != self.window:
            return
        self._start()
        self.phase, self.seen, self._names = state["phase"], state["seen"], state["names"]
        self._weights, self._ring = state["weights"], ring.clone()
        self._smooth = state["smooth"]

    def _start(self) -> None:
        self.seen = 0
        self._names, self._seconds, self._frames = [], [], []
        self._ring = self._smooth = None

    def _losses(self) -> dict[str, float]:
        assert self._ring is not None and self._smooth is not None
        ring = self._ring.cpu()
        ring = ring[: self.seen] if self.seen < self.window else ring
        ring = ring.roll(-(self.seen % self.window), 0) if self.seen > self.window else ring
        mean = dict(zip(self._names, ring.mean(0).tolist(), strict=True))
        corrected = self._smooth.cpu() / (1 - self.smoothing**self.seen)
        found = {
            f"loss_smooth/{name}": value
            for name, value in zip(self._names, corrected.tolist(), strict=True)
        }
        for name, slope in zip(self._names, slopes(ring).tolist(), strict=True):
            if math.isfinite(slope) and mean[name]:
                found[f"loss_trend/{name}"] = slope / abs(mean[name])
        parts = {n: self._weights.get(n, 1.0) * v for n, v in mean.items() if n != "total"}
        total = sum(parts.values())
        if total:
            found.update({f"loss_share/{n}": part / total for n, part in parts.items()})
        reconstruction = mean.get("reconstruction", 0.0)
        if reconstruction and "commitment" in mean:
            vq = mean["commitment"] + mean.get("codebook", 0.0)
            found["loss/vq_ratio"] = vq / reconstruction
        return found

    def _add_pace(self, context: StepContext) -> None:
        if context.step_time_s is None:
            return
        self._seconds = [*self._seconds[-self.window + 1 :], context.step_time_s]
        if context.frames is not None:
            self._frames = [*self._frames[-self.window + 1 :], context.frames]

    def _pace(self) -> dict[str, float]:
        seconds = sum(self._seconds)
        if not seconds:
            return {}
        found = {"throughput/steps_per_s": len(self._seconds) / seconds}
        peak = peak_flops(self.device)
        per_frame = self._of_phase(self.flops_per_frame)
        if per_frame and self._frames and peak:
            frames = sum(float(frames) for frames in self._frames)
            mfu = per_frame * frames / (seconds * peak * self.world)
            found["throughput/mfu"] = mfu
            found["throughput/hfu"] = mfu * (1 + (self._of_phase(self.recomputed) or 0.0))
        return found

    def _of_phase(self, value: float | Mapping[str, float] | None) -> float | None:
        return value.get(self.phase or "") if isinstance(value, Mapping) else value


def peak_flops(device: torch.device) -> float | None:
    """Peak 16-bit operations per second of a known GPU, else None."""
    if device.type != "cuda":
        return None
    return peak_of(re.sub(r"^((NVIDIA|Tesla|GeForce) )+", "", torch.cuda.get_device_name(device)))


def peak_of(name: str) -> float | None:
    """Peak 16-bit operations per second by the name behind NVIDIA, Tesla or GeForce, else None."""
    return next((peak for part, peak in PEAK_FLOPS.items() if re.fullmatch(part, name)), None)
