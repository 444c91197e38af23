"""A look inside: traces of some steps, memory when it runs out, collectives when ranks wait."""

import os
from contextlib import suppress
from pathlib import Path

import torch

from b2t.config import ProfileConfig
from b2t.log import logger
from b2t.monitor.context import StepContext
from b2t.records import write_atomically
from b2t.run_files import PROFILE
from b2t.train.callback import Callback, Run

log = logger(__name__)

_COLLECTIVES = 2000
"""Collectives that each rank remembers."""

_ROWS = 40
"""Operators of the table beside a trace."""


def record_collectives(folder: Path) -> None:
    """Let torch remember the last collectives; call before the process group is made.

    NCCL's watchdog then writes them below ``folder`` when one takes too long. What the environment
    sets already stays.
    """
    with suppress(OSError):  # the checks of the run folder say more
        folder.mkdir(parents=True, exist_ok=True)
    for name, value in {
        "TORCH_FR_BUFFER_SIZE": str(_COLLECTIVES),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": f"{folder}/nccl-rank",
    }.items():
        os.environ.setdefault(name, value)


def write_collectives(folder: Path, rank: int) -> Path | None:
    """Write what this rank did with the others last; None where torch has not remembered any.

    Entries are in order, with operation, shapes, state and the lines that called it: the first that
    two ranks do not share is where they parted.
    """
    from torch._C import _distributed_c10d as c10d

    dump = getattr(c10d, "_dump_fr_trace_json", None)
    if "TORCH_FR_BUFFER_SIZE" not in os.environ or dump is None:
        return None
    path = folder / f"collectives-rank{rank}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, bytes(dump()).decode())
    except (OSError, RuntimeError):  # the rank is leaving, and has said why
        return None
    return path


class Profiler(Callback):
    """Writes a trace of some steps of this rank, and a snapshot of its GPU's memory if it is full.

    Below `profile/` in the run folder: `trace-rank0.json.gz` for Perfetto or chrome://tracing, a
    table of the operators that took longest, and `memory-rank0.pickle` for
    https://pytorch.org/memory_viz.

    Args:
        options: which steps, and whether memory is recorded.
        folder: the run folder.
        rank: of this process.
    """

    def __init__(self, options: ProfileConfig, folder: Path, rank: int) -> None:
        self.options = options
        self.folder = folder / PROFILE
        self.rank = rank
        self._profiler: torch.profiler.profile | None = None

    def on_start(self, trainer: Run) -> None:
        """Begin to count steps."""
        self.folder.mkdir(parents=True, exist_ok=True)
        on_gpu = trainer.ranks.device.type == "cuda"
        if self.options.memory and on_gpu:
            self._watch_memory()
        if not self.options.steps:
            return
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if on_gpu:
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        after = self.options.after
        # The first traced step pays for the start of the tracer: it is left out.
        schedule = torch.profiler.schedule(
            wait=max(0, after - 1), warmup=min(1, after), active=self.options.steps, repeat=1
        )
        self._profiler = torch.profiler.profile(
            activities=kinds, schedule=schedule, record_shapes=True, on_trace_ready=self._write
        )
        self._profiler.start()

    def on_step(self, trainer: Run, context: StepContext) -> None:
        """Go on to the next step."""
        if self._profiler is not None:
            self._profiler.step()

    def on_end(self, trainer: Run) -> None:
        """Stop, should the run end before."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _write(self, profiler: torch.profiler.profile) -> None:
        trace = self.folder / f"trace-rank{self.rank}.json.gz"
        profiler.export_chrome_trace(str(trace))
        order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=_ROWS)
        write_atomically(self.folder / f"operators-rank{self.rank}.txt", f"{table}\n")
        log.info("profile of %d steps: %s", self.options.steps, self.folder)

    def _watch_memory(self) -> None:
        torch.cuda.memory._record_memory_history(max_entries=100_000)
        path = str(self.folder / f"memory-rank{self.rank}.pickle")

        def dump(device: int, allocation: int, total: int, free: int) -> None:
            torch.cuda.memory._dump_snapshot(path)
            log.error("out of GPU memory: what holds it is in %s", path)

        # Of builds for CUDA alone.
        torch._C._cuda_attach_out_of_memory_observer(dump)  # type: ignore[attr-defined]
