"""What the time of a step goes into, part by part, in the trainer and in the loop beside it."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import deepspeed.runtime.zero.stage_1_and_2 as zero
import numpy as np
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch.nn.parallel import DistributedDataParallel

from b2t.data.batches import Batch
from b2t.quantize import ResidualVQ
from b2t.train.step import OptimizerStep
from b2t.train.window import Window

_ZERO = zero.DeepSpeedZeroOptimizer
_INTO, _OUT = "gradients into buckets", "gradients out of buckets"
_SUM, _STEP = "sum of gradients over ranks", "norm, clipping, copies of shares"
_PARTS: tuple[tuple[Any, str, str], ...] = (
    (Batch, "to", "augmentation"),
    (DeepSpeedEngine, "forward", "forward"),
    (DistributedDataParallel, "forward", "forward"),
    (torch.Tensor, "backward", "backward"),
    (zero, "count_used_parameters_in_backward", _INTO),
    (_ZERO, "process_gradients", _INTO),
    (_ZERO, "reduce_ipg_grads", _OUT),
    (_ZERO, "independent_gradient_partition_epilogue", _OUT),
    (_ZERO, "gradient_reduction_w_predivide", _SUM),
    (_ZERO, "allreduce_bucket", _SUM),
    (_ZERO, "step", _STEP),
    (torch.nn.utils, "clip_grad_norm_", _STEP),
    (torch.optim.AdamW, "step", "optimizer"),
    (zero, "all_gather_dp_groups", "all-gather of weights"),
    (ResidualVQ, "begin_update", "codebooks"),
    (ResidualVQ, "update", "codebooks"),
    (OptimizerStep, "totals", "totals and losses over ranks"),
    (Window, "close_step", "totals and losses over ranks"),
)
_REST = "rest, and other threads"


class Shares:
    """Times parts of the steps of ZeRO-1 and 2, of the trainer and of DistributedDataParallel.

    Each part without those inside of it; by clock, and in processor time of the main thread. What
    gloo's and the loader's threads work is in the rest. Used as a context.

    Attributes:
        on: whether time is taken.
    """

    def __init__(self) -> None:
        self.on = False
        self._loop = "ours"
        self._inside: list[np.ndarray] = []
        self._taken: dict[str, dict[str, np.ndarray]] = {"ours": {}, "theirs": {}}
        for loop in self._taken:
            self._taken[loop] = defaultdict(lambda: np.zeros(2))

    def __enter__(self) -> "Shares":
        self._before = [getattr(owner, name) for owner, name, _ in _PARTS]
        for (owner, name, part), function in zip(_PARTS, self._before, strict=True):
            setattr(owner, name, self._timed(function, part))
        return self

    def __exit__(self, *_: Any) -> None:
        for (owner, name, _part), function in zip(_PARTS, self._before, strict=True):
            setattr(owner, name, function)

    @contextmanager
    def of_the_other(self) -> Iterator[None]:
        """What is done inside is the other loop's."""
        self._loop = "theirs"
        try:
            yield
        finally:
            self._loop = "ours"

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self.on or threading.current_thread() is not threading.main_thread():
                return function(*args, **kwargs)
            began = _now()
            self._inside.append(np.zeros(2))
            try:
                return function(*args, **kwargs)
            finally:
                spent = _now() - began
                self._taken[self._loop][part] += spent - self._inside.pop()
                if self._inside:
                    self._inside[-1] += spent

        return timed

    def table(self, ours: np.ndarray, theirs: np.ndarray, steps: int) -> str:
        """Put the parts in columns, milliseconds per step.

        Args:
            ours: (clock, processor) seconds of all segments of the trainer that were timed.
            theirs: of the other loop.
            steps: that either took in them.
        """
        parts = list(dict.fromkeys(part for _, _, part in _PARTS))
        loops = [self._taken["ours"], self._taken["theirs"]]
        rows = [(part, *(1e3 * loop[part] / steps for loop in loops)) for part in parts]
        whole = [1e3 * ours / steps, 1e3 * theirs / steps]
        known = [sum((row[side] for row in rows), np.zeros(2)) for side in (1, 2)]
        rows.append((_REST, whole[0] - known[0], whole[1] - known[1]))
        rows.append(("a step", whole[0], whole[1]))
        head = f"{'ms per step':34}{'clock':>9}{'theirs':>9}{'processor':>12}{'theirs':>9}"
        lines = [
            f"{part:34}{a[0]:9.1f}{b[0]:9.1f}{a[1]:12.1f}{b[1]:9.1f}"
            f"{100 * (a[1] - b[1]) / whole[1][1]:+9.1f} %"
            for part, a, b in rows
        ]
        return "\n".join([f"{head}  more, of their step", *lines])


def _now() -> np.ndarray:
    return np.array([time.perf_counter(), time.thread_time()])
