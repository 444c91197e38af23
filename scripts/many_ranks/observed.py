"""What one rank of a training run sees of itself: time, memory, checksums, its shards of ZeRO."""

import hashlib
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from b2t.monitor.context import StepContext
from b2t.train.callback import Callback, Run
from b2t.train.launch import Launch

MOMENTS = ("exp_avg", "exp_avg_sq")


def private_bytes() -> int:
    """Memory that this process shares with no other, bytes."""
    lines = Path("/proc/self/smaps_rollup").read_text("ascii").splitlines()
    kept = [line for line in lines if line.startswith(("Private_Clean:", "Private_Dirty:"))]
    return 1024 * sum(int(line.split()[1]) for line in kept)


def processor_seconds() -> float:
    """Processor time of this process, its threads, and what it has started and waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


class Observer(Callback):
    """Writes `rank-N.json`, and `shards-PHASE-N.npz` at the end of each phase.

    Args:
        folder: where to.
        rank: number of this process.
        begun: `time.monotonic()` when this process was forked.
    """

    def __init__(self, folder: Path, rank: int, begun: float) -> None:
        self._folder, self._rank, self._begun = folder, rank, begun
        self._seen = 0.0
        self.found: dict[str, Any] = {"rank": rank, "steps": [], "phases": {}}

    def on_start(self, trainer: Run) -> None:
        """Note what it took until the first step."""
        self.found["start"] = {
            "wall": time.monotonic() - self._begun, "cpu": processor_seconds(),
            "private": private_bytes(),
        }  # fmt: skip
        self._seen = processor_seconds()

    def on_step(self, trainer: Run, context: StepContext) -> None:
        """Note what the step took, and what this rank holds after it."""
        cpu = processor_seconds() - self._seen
        quantizer, digest = trainer.model.quantizer, hashlib.sha256()
        assert quantizer is not None
        for tensor in trainer.model.state_dict().values():
            digest.update(tensor.numpy().tobytes())
        self.found["steps"].append({
            "step": trainer.progress.step, "phase": context.phase, "wall": context.step_time_s,
            "cpu": cpu, "codebooks": int(quantizer.checksum()), "state": digest.hexdigest(),
            "private": private_bytes(),
        })  # fmt: skip
        self._seen = processor_seconds()

    def before_phase_end(self, trainer: Run) -> None:
        """Keep this rank's shards of masters and moments, and where they belong."""
        engine, name = trainer.engine, trainer.phase.name
        kinds = {"master": engine.flat_masters()}
        for moment in MOMENTS:
            kinds[moment] = [engine._adam.state[each][moment] for each in engine._stepped()]
        arrays = {
            f"{kind}/{number}": flat.detach().view(-1).numpy()
            for kind, flats in kinds.items()
            for number, flat in enumerate(flats)
        }
        np.savez(self._folder / f"shards-{name}-{self._rank}.npz", **arrays)  # type: ignore[arg-type]
        shapes = {n: p.numel() for n, p in trainer.model.named_parameters() if p.requires_grad}
        self.found["phases"][name] = {
            "step": trainer.progress.step, "sizes": shapes,
            "parts": [list(part) for part in engine._parts()],
            "flats": [flat.numel() for flat in kinds["master"]],
        }  # fmt: skip

    def on_end(self, trainer: Run) -> None:
        """Write all of it, and the modules that the run has imported."""
        self.found["private"] = private_bytes()
        self.found["modules"] = sorted(sys.modules)
        text = json.dumps(self.found)
        (self._folder / f"rank-{self._rank}.json").write_text(text, "utf-8")


def observe(folder: Path, begun: float) -> None:
    """Let the run that this process is about to start be observed."""
    from b2t.train import launch

    class Observed(Launch):
        def _callbacks(self, *arguments: Any) -> list[Callback]:
            observer = Observer(folder, self.ranks.rank, begun)
            return [*super()._callbacks(*arguments), observer]

    launch.Launch = Observed  # type: ignore[misc]


def become(rank: int, world: int, port: int) -> None:
    """Tell this process its place, as a launcher does."""
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), B2T_THREADS="1",
    )  # fmt: skip
