"""Metrics between two log steps, summed on the device and read once."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from b2t.evaluate.signal import decibels
from b2t.model.outputs import BrainToTextOutput
from b2t.quantize import UpdateReport
from b2t.train.ranks import Ranks

_COUNTERS = ("steps", "frames", "bins", "padded", "seconds", "data_s", "revived", "nonfinite")
_CTC_ROWS = {
    "phoneme": ("phoneme_rows", "phoneme_rows_too_short"),
    "text": ("text_rows", "text_rows_too_short"),
}
LEFT_OUT = tuple(name for pair in _CTC_ROWS.values() for name in pair)
"""Sums of rows that CTC learns from, and of those with too few frames, by what is read."""
_POOLED = ("squared_error", "signal_power", "bins", "tokens", "tokens_correct", *LEFT_OUT)


class Window:
    """Sums over the applied steps since the last log step; a skipped step leaves no trace.

    Args:
        ranks: whose sums are added when the window is read.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.last_losses: dict[str, Tensor] = {}
        self._step: dict[str, Tensor] = {}
        self._start()

    def _start(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._frames = self._bins = self._padded = self._seconds = self._data_s = 0.0
        self._revived = 0.0
        self._nonfinite: Tensor | float = 0.0

    @torch.no_grad()
    def add(self, output: BrainToTextOutput, accumulation: int) -> None:
        """Take in one micro-batch of the current step."""
        assert output.losses is not None and output.loss is not None
        values = {f"loss/{name}": loss.detach().float() for name, loss in output.losses.items()}
        values["loss/total"] = output.loss.detach().float()
        values = {name: value / accumulation for name, value in values.items()}
        metrics = output.metrics or {}
        for name in _POOLED:
            if name in metrics:
                values[name] = metrics[name].detach().double()
        for name, value in values.items():
            self._step[name] = self._step[name] + value if name in self._step else value

    def not_finite(self) -> list[str]:
        """Names of this rank's losses of the current step that are NaN or infinite."""
        names = [name for name in self._step if name.startswith("loss/")]
        return [name for name in names if not math.isfinite(float(self._step[name]))]

    @property
    def steps(self) -> int:
        """Applied steps since the last record."""
        return int(self._steps)

    def drop_step(self) -> None:
        """Forget the current step: it was skipped."""
        self._step = {}

    def close_step(
        self, totals: dict[str, float], step_s: float, data_s: float, report: UpdateReport | None
    ) -> None:
        """Add the current step, which was applied, to the window."""
        self._share_losses()
        for name, value in self._step.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._step = {}
        self._steps += 1
        self._frames += totals["frames"]
        self._bins += totals["bins"]
        self._padded += totals["padded"]
        self._seconds += step_s
        self._data_s += data_s
        if report is not None:
            self._revived += sum(report.revived)
            self._nonfinite = self._nonfinite + report.nonfinite

    def _share_losses(self) -> None:
        """Make the step's losses global means, in one reduction that nothing waits for."""
        names = [name for name in self._step if name.startswith("loss/")]
        losses = torch.stack([self._step[name] for name in names])
        if self.ranks.world > 1:
            dist.all_reduce(losses)
            losses /= self.ranks.world
        self._step.update(dict(zip(names, losses, strict=True)))
        self.last_losses = {name.removeprefix("loss/"): self._step[name] for name in names}

    def state(self) -> dict[str, Any]:
        """Return the window as JSON values, for a run that stops between two records. Collective.

        Sums are those of each rank, so that a resume adds them up in the same order.
        """
        names = sorted(self._sums)
        local = [float(self._sums[name]) for name in names]
        return {
            "names": names,
            "sums": self.ranks.gather(local),
            **{name: float(getattr(self, f"_{name}")) for name in _COUNTERS},
        }

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Continue from what `state` returned, on any number of ranks; None starts afresh."""
        if state is None:
            return
        for name in _COUNTERS:
            setattr(self, f"_{name}", state[name])
        shares = state["sums"]
        if len(shares) == self.ranks.world:
            mine = shares[self.ranks.rank]
        else:
            columns = zip(*shares, strict=True)
            pairs = zip(state["names"], columns, strict=True)
            mine = [self._taken_over(name, values) for name, values in pairs]
        for name, value in zip(state["names"], mine, strict=True):
            dtype = torch.float32 if name.startswith("loss/") else torch.float64
            self._sums[name] = torch.tensor(value, dtype=dtype, device=self.ranks.device)

    def _taken_over(self, name: str, values: Sequence[float]) -> float:
        """One rank's sum in place of those of another number of ranks; all have the same losses."""
        if name.startswith("loss/"):
            return values[0]
        return math.fsum(values) if self.ranks.is_main else 0.0

    def metrics(self) -> dict[str, float]:
        """Return means over steps and ranks, and start a new window. Collective."""
        names = sorted(self._sums)
        local = torch.stack([self._sums[name].double() for name in names]).cpu().tolist()
        total = dict(zip(names, self.ranks.sum(local), strict=True))
        world, steps = self.ranks.world, max(1, self._steps)
        record = {name: total[name] / world / steps for name in names if name.startswith("loss/")}
        if total.get("squared_error", 0) > 0 and total["signal_power"] > 0:
            record["reconstruction/snr_db"] = decibels(
                total["signal_power"], total["squared_error"]
            )
        if total.get("tokens", 0) > 0:
            record["text/token_accuracy"] = total["tokens_correct"] / total["tokens"]
        record |= left_out(total)
        seconds = max(self._seconds, 1e-9)
        record["time/step_s"] = seconds / steps
        record["time/data_wait_fraction"] = self._data_s / seconds
        record["throughput/frames_per_s"] = self._frames / seconds
        record["throughput/padding_fraction"] = 1 - self._bins / max(self._padded, 1.0)
        record["codebook/revived"] = float(self._revived)
        record["codebook/nonfinite_frames"] = float(self._nonfinite)
        self._start()
        return record


def left_out(total: Mapping[str, float]) -> dict[str, float]:
    """Shares of the rows with labels that have too few frames for CTC; none without such rows."""
    found = {}
    for name, (rows, too_short) in _CTC_ROWS.items():
        used, short = total.get(rows, 0.0), total.get(too_short, 0.0)
        if used + short:
            found[f"{name}/left_out_fraction"] = short / (used + short)
    return found
