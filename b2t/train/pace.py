"""Which rank the others wait for: one host that is slow, not gone, slows them all."""

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from b2t.log import logger
from b2t.monitor.context import StepContext
from b2t.train.callback import Callback, Run

log = logger(__name__)

WAIT_METRIC, RANK_METRIC = "time/rank_wait_fraction", "time/slowest_rank"

_NOTABLE = 0.2
"""Share of a step's time that is worth a line in the log."""

_ENOUGH = 20
"""Steps that ranks are compared over, at least: single ones differ by chance."""

_REPEAT = 20
"""Comparisons after which a rank that is still slow is named again."""


@dataclass(frozen=True)
class Own:
    """What one rank does alone, without meeting the others, since the last comparison.

    Attributes:
        host: its name.
        encode_s: seconds in the encoder's forward.
        data_s: seconds waiting for its batches.
        bins: padded time bins that it encoded.
    """

    host: str
    encode_s: float
    data_s: float
    bins: int


class EncoderClock:
    """Times the training forwards of a module, in which ranks do not meet.

    On a GPU events are recorded, and read when asked: nothing waits for the device before.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._open: Any = None
        self._spans: list[tuple[Any, Any]] = []
        self._bins = 0
        self._hooks = [
            module.register_forward_pre_hook(self._begin),
            module.register_forward_hook(self._end),
        ]

    def _begin(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if module.training:
            self._open = self._now()

    def _end(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if self._open is None:
            return
        self._spans.append((self._open, self._now()))
        self._open = None
        signal: Tensor = inputs[0]
        self._bins += signal.shape[0] * signal.shape[1]

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> tuple[float, int]:
        """Return seconds and padded bins since the last reading; waits for the device."""
        spans, self._spans = self._spans, []
        bins, self._bins = self._bins, 0
        if not self._on_gpu:
            return sum(end - begin for begin, end in spans), bins
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in spans) / 1e3, bins

    def close(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()


def waits_for(rank: int, own: Sequence[Own], seconds: float) -> tuple[float, float]:
    """Estimate how much the others wait for one rank.

    Waiting for batches is measured. Forward and backward of the whole model, in which ranks meet,
    are taken to be as much slower than elsewhere as the encoder's forward, per bin.

    Args:
        rank: the one.
        own: of all ranks.
        seconds: training time that it was done in, the same for all.

    Returns:
        Share of the time that the others wait for it; its encoder's time per bin over theirs.
    """
    mine, others = own[rank], [each for n, each in enumerate(own) if n != rank]
    theirs = sum(each.encode_s for each in others) / max(1, sum(each.bins for each in others))
    pace = mine.encode_s / max(1, mine.bins) / theirs if theirs > 0 else 1.0
    late = max(0.0, mine.data_s - sum(each.data_s for each in others) / len(others))
    slower = (seconds - mine.data_s) * (1 - 1 / pace) if pace > 1 else 0.0
    return (late + slower) / max(seconds, 1e-9), pace


class Pace(Callback):
    """Says which rank the others wait for, and how long: at the record after each 20 steps.

    Adds `time/slowest_rank`, its number, and `time/rank_wait_fraction`, the share of a step that
    the others wait for it, as `waits_for` estimates it. Under ZeRO stage 3 ranks meet in the
    encoder too, and only the waiting for batches counts.
    """

    collective = True

    def __init__(self) -> None:
        self._clock: EncoderClock | None = None
        self._steps = self._logged = 0
        self._seconds = self._data_s = 0.0
        self._suspect: int | None = None
        self._named: tuple[int, int] | None = None
        self._records = 0

    def on_start(self, trainer: Run) -> None:
        """Begin to listen to the encoder."""
        if trainer.ds_file.zero_stage < 3:
            self._clock = EncoderClock(trainer.model.encoder, trainer.ranks.device)

    def on_step(self, trainer: Run, context: StepContext) -> None:
        """Count the step."""
        self._steps += 1

    def on_log(self, trainer: Run, record: dict[str, float]) -> None:
        """Compare the ranks."""
        lately = record["time/step_s"] * (self._steps - self._logged)
        self._seconds += lately
        self._data_s += record["time/data_wait_fraction"] * lately
        self._logged = self._steps
        if self._steps < _ENOUGH:
            return
        seconds, data_s = self._seconds, self._data_s
        self._steps = self._logged = 0
        self._seconds = self._data_s = 0.0
        encode_s, bins = self._clock.read() if self._clock is not None else (0.0, 1)
        mine = Own(socket.gethostname(), encode_s, data_s, bins)
        everyone: list[Own] = trainer.ranks.gather(mine)
        if len(everyone) == 1:
            return
        waits = [waits_for(rank, everyone, seconds) for rank in range(len(everyone))]
        slowest = max(range(len(waits)), key=lambda rank: waits[rank][0])
        share, pace = waits[slowest]
        record[RANK_METRIC], record[WAIT_METRIC] = float(slowest), share
        self._records += 1
        again, self._suspect = self._suspect == slowest, slowest if share > _NOTABLE else None
        if self._suspect is not None and again:
            self._name(slowest, everyone[slowest], share, pace)

    def _name(self, rank: int, own: Own, share: float, pace: float) -> None:
        """Warn of a rank that was slow in two comparisons in a row."""
        if self._named is not None:
            named, record = self._named
            if named == rank and self._records < record + _REPEAT:
                return
        self._named = rank, self._records
        log.warning(
            "rank %d on %s is slow: the others wait for it about %.0f %% of the time. Its encoder "
            "takes %.1f × as long as theirs, and it waited %.1f s for batches in that "
            "time. Look at what else runs there, its clocks and its disk",
            rank, own.host, 100 * share, pace, own.data_s,
        )  # fmt: skip

    def on_end(self, trainer: Run) -> None:
        """Stop listening."""
        if self._clock is not None:
            self._clock.close()
