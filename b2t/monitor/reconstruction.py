"""How well the signal is given back while training."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from b2t.evaluate.signal import decibels
from b2t.evaluate.traces import trial_traces
from b2t.monitor.context import StepContext

_SUMS = ("count", "error", "target", "output", "product", "steps", "step_t", "step_o", "step_p")

_SPECTRAL_TRIALS = 4

BANDS_HZ = ((0.0, 4.0), (4.0, 8.0), (8.0, 13.0), (13.0, 30.0), (30.0, 100.0))
"""Bands of the spectral distance, the classical ones of EEG."""


class ReconstructionMonitor:
    """Error, SNR, cosine, temporal consistency and spectral distance of the reconstruction.

    Only recorded bins count. All but the spectral distance are pooled over the last ``window``
    applied steps, of which every ``every``-th is measured, their last micro-batches and all ranks.

    Metrics:
        `reconstruction/mse`: mean squared error.
        `reconstruction/snr_window_db`: 10·log10(Σ target² / Σ error²).
        `reconstruction/snr_drop_db`: how far that is below its best at a log step of this phase.
        `reconstruction/cosine`: Σ target·output over the product of their norms.
        `reconstruction/temporal_consistency`: the same of the differences between neighbouring
            recorded bins: 1 where every change is given back, 0 for a smooth blur.
        `reconstruction/spectral_distance_db/A-BHz`: |10·log10| of output power over target power
            between A and B Hz, mean over channels, of the first four trials of this rank's last
            measured micro-batch.

    Args:
        sampling_rate: bins per second, in Hz.
        window: applied steps looked back on.
        every: applied steps between measurements.
        bands: (low, high) in Hz; those beyond half the sampling rate are left out.
        group: ranks to pool over.
    """

    def __init__(
        self,
        sampling_rate: float,
        *,
        window: int = 50,
        every: int = 5,
        bands: Sequence[tuple[float, float]] = BANDS_HZ,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.sampling_rate = sampling_rate
        self.every = every
        self.slots = math.ceil(window / every)
        self.bands = [(low, high) for low, high in bands if low < sampling_rate / 2]
        self.group = group
        self.phase: str | None = None
        self.calls = 0
        self.seen = 0
        self.best_db: float | None = None
        self._ring: Tensor | None = None
        self._pending: tuple[Tensor, dist.Work | None] | None = None
        self._last: tuple[Tensor, Tensor, Tensor] | None = None
        self._distances: dict[str, float] = {}

    def update(self, context: StepContext) -> None:
        """Add the last micro-batch of one applied step. Collective: every rank must call."""
        if context.phase != self.phase:
            self._settle()
            self.phase, self.best_db, self._ring, self._last = context.phase, None, None, None
            self.calls = self.seen = 0
            self._distances = {}
        if context.reconstruction is None or context.target is None:
            return
        self.calls += 1
        if (self.calls - 1) % self.every:
            return
        assert context.signal_mask is not None
        output = context.reconstruction.detach()
        self._last = (
            output,
            context.target.detach().to(output.device, non_blocking=True),
            context.signal_mask.to(output.device, non_blocking=True),
        )
        self._settle()
        sums, work = _sums(*self._last), None
        if dist.is_available() and dist.is_initialized():
            # Nobody waits for the other ranks here: the sums are asked for at the next measurement.
            work = dist.all_reduce(sums, group=self.group, async_op=True)
        self._pending = sums, work

    def _settle(self) -> None:
        """Put the sums of the last measured step into the window."""
        if self._pending is None:
            return
        (sums, work), self._pending = self._pending, None
        if work is not None:
            work.wait()
        if self._ring is None:
            self._ring = sums.new_zeros(self.slots, len(_SUMS))
        elif self._ring.device != sums.device:
            self._ring = self._ring.to(sums.device)
        self._ring[self.seen % self.slots] = sums
        self.seen += 1

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the class docstring; empty before the first reconstruction."""
        self._settle()
        if self._ring is None:
            return {}
        total = dict(zip(_SUMS, self._ring.sum(0).tolist(), strict=True))
        found = {}
        if total["count"]:
            found["mse"] = total["error"] / total["count"]
        if total["target"]:
            found["snr_window_db"] = decibels(total["target"], total["error"])
        _add_cosine(found, "cosine", total["product"], total["target"], total["output"])
        _add_cosine(
            found, "temporal_consistency", total["step_p"], total["step_t"], total["step_o"]
        )
        snr = found.get("snr_window_db", math.nan)
        if math.isfinite(snr):
            self.best_db = snr if self.best_db is None else max(self.best_db, snr)
            found["snr_drop_db"] = self.best_db - snr
        found.update(self._last_distances())
        return {f"reconstruction/{name}": value for name, value in found.items()}

    def sample(self) -> dict[str, Any] | None:
        """Return traces of a trial of the last measured micro-batch; None before there is one.

        Reads the device. The format is that of `b2t.evaluate.traces.collect_traces`.
        """
        if self._last is None:
            return None
        output, target, mask = (x[0].detach().cpu() for x in self._last)
        return trial_traces("", output[mask].float().numpy(), target[mask].float().numpy())

    def state_dict(self) -> dict[str, Any]:
        """Return the window, the same on all ranks."""
        self._settle()
        names = ("phase", "calls", "seen", "best_db")
        values = {name: getattr(self, name) for name in names}
        return {**values, "ring": self._ring, "distances": self._last_distances()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a window; one of another length starts anew."""
        ring = state["ring"]
        if ring is not None and len(ring) != self.slots:
            return
        for name in ("phase", "calls", "seen", "best_db"):
            setattr(self, name, state[name])
        self._ring = None if ring is None else ring.clone()
        self._distances = dict(state.get("distances", {}))

    def _last_distances(self) -> dict[str, float]:
        """Spectral distances of the last measured micro-batch, also of one before a resume."""
        if self._last is not None:
            self._distances = self._spectral_distances(*self._last)
        return self._distances

    def _spectral_distances(self, output: Tensor, target: Tensor, mask: Tensor) -> dict[str, float]:
        few = (output[:_SPECTRAL_TRIALS], target[:_SPECTRAL_TRIALS], mask[:_SPECTRAL_TRIALS])
        distances = spectral_distance_db(*few, self.sampling_rate, self.bands)
        pairs = zip(self.bands, distances.tolist(), strict=True)
        return {
            f"spectral_distance_db/{low:g}-{high:g}Hz": value
            for (low, high), value in pairs
            if math.isfinite(value)
        }


def spectral_distance_db(
    output: Tensor,
    target: Tensor,
    mask: Tensor,
    sampling_rate: float,
    bands: Sequence[tuple[float, float]],
) -> Tensor:
    """Distance between the power of two signals by band, mean over channels, in dB.

    Power is the squared magnitude of the Fourier transform of each trial's recorded bins, summed
    over trials, without the constant.

    Args:
        output: [B, T, C].
        target: [B, T, C].
        mask: [B, T] bool, True = real.
        sampling_rate: in Hz.
        bands: (low, high) in Hz, low included, high not.

    Returns:
        [bands] float64; NaN where no trial has a frequency in the band or no channel has power.
    """
    powers = output.new_zeros(2, len(bands), output.shape[-1], dtype=torch.float64)
    edges = torch.tensor(bands, dtype=torch.float64, device=output.device)
    for row in range(len(mask)):
        keep = mask[row]
        both = torch.stack([output[row, keep], target[row, keep]]).float()
        if both.shape[1] < 2:
            continue
        spectrum = torch.view_as_real(torch.fft.rfft(both - both.mean(1, keepdim=True), dim=1))
        power = spectrum.square_().sum(-1)
        frequency = torch.fft.rfftfreq(
            both.shape[1], 1 / sampling_rate, dtype=torch.float64, device=output.device
        )
        inside = (frequency >= edges[:, :1]) & (frequency < edges[:, 1:]) & (frequency > 0)
        powers += inside.to(power) @ power
    distance = 10 * (powers[0] / powers[1]).log10().abs()
    return distance.masked_fill(~distance.isfinite(), torch.nan).nanmean(-1).cpu()


def _sums(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Sums named by ``_SUMS``, [9] float64, without waiting for the device."""
    hidden = ~mask.unsqueeze(-1)
    o = output.float().masked_fill(hidden, 0.0)
    t = target.float().masked_fill(hidden, 0.0)
    apart = ~(mask[:, 1:] & mask[:, :-1])
    step_o = (o[:, 1:] - o[:, :-1]).masked_fill_(apart.unsqueeze(-1), 0.0)
    step_t = (t[:, 1:] - t[:, :-1]).masked_fill_(apart.unsqueeze(-1), 0.0)
    steps = [(step_t, step_t), (step_o, step_o), (step_o, step_t)]
    products = [(t, t), (o, o), (o, t)]
    dots, step_dots = (
        [torch.dot(a.flatten(), b.flatten()).double() for a, b in pairs]
        for pairs in (products, steps)
    )
    error = o.sub_(t).flatten()
    dots = [torch.dot(error, error).double(), *dots]
    count = mask.sum().double() * target.shape[-1]
    moved = (~apart).sum().double() * target.shape[-1]
    return torch.stack([count, *dots, moved, *step_dots])


def _add_cosine(
    found: dict[str, float], name: str, product: float, left: float, right: float
) -> None:
    norm = math.sqrt(left * right) if left > 0 and right > 0 else 0.0
    if norm:
        found[name] = product / norm
