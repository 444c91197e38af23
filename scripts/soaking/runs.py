"""A small run on all ranks that can be killed, and where in it a rank is."""

import argparse
import os
import socket
import subprocess
import sys
import time
from multiprocessing.context import BaseContext
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
EXIT_OK = 0

DS_CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "zero_optimization": {
        "stage": 2,
        "overlap_comm": False,
        "reduce_bucket_size": 20000,
        "allgather_bucket_size": 20000,
    },
}

FP16 = {
    "enabled": True,
    "loss_scale": 0,
    "initial_scale_power": 20,
    "loss_scale_window": 4,
    "hysteresis": 1,
    "min_loss_scale": 1,
}
"""A scale that starts far too high and grows often, so that steps are skipped all along."""

OVERRIDES = """
    model.encoder.dim=32 model.encoder.depth=1 model.encoder.heads=2 model.signal_decoder.depth=1
    model.signal_decoder.heads=2 model.text_decoder.dim=32 model.text_decoder.depth=1
    model.text_decoder.heads=2 model.text_decoder.ffn_dim=64 model.text_decoder.tokenizer=byte
    model.quantizer.codebook_size=32 model.quantizer.num_quantizers=2 data.max_text_tokens=128
    data.workers=1 optim.weight_ema=0.9
    codebook_start.after_steps=6 codebook_start.frames_per_code=4 evaluation.every=9
    evaluation.decode_trials=4 evaluation.max_trials=8 evaluation.max_new_tokens=8
    checkpoint.every=4 log.every=3 log.report=false log.progress=false run.seed=5
""".split()  # noqa: SIM905

PHASES = ("tokenizer", "codebook", "joint")
PLACES = (
    "start",
    "k-means",
    *(f"step of phase {phase}" for phase in PHASES),
    "save",
    "half-written checkpoint",
    "validation",
    "decoding",
    "phase change",
)
"""Where a kill may land; all of them must be hit."""


def steps_of_phases(steps: int) -> list[int]:
    """Steps of the three phases, a half, a quarter and the rest of all."""
    return [steps // 2, steps // 4, steps - steps // 2 - steps // 4]


def training_arguments(options: argparse.Namespace, data: Path, name: str) -> list[str]:
    """Arguments of `train_ds.py` for the run of this name."""
    return [
        *("--config", "demo", "--deepspeed_config", str(options.out / "ds.json")),
        *(f"run.dir={options.out / name}", f"data.path={data}", *OVERRIDES),
        *(f"phases.{n}.steps={count}" for n, count in enumerate(steps_of_phases(options.steps))),
    ]


def environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What a launcher would tell a rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "B2T_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }


def leave_alone(options: argparse.Namespace, data: Path) -> None:
    """Train without interruption, by the command that users type."""
    command = [sys.executable, "train_ds.py", *training_arguments(options, data, "alone")]
    port = free_port()
    with (options.out / "alone.log").open("w") as log:
        ranks = [
            subprocess.Popen(
                command,
                env={**os.environ, **environment(rank, options.ranks, port)},
                cwd=REPOSITORY,
                stdout=log,
                stderr=log,
            )
            for rank in range(options.ranks)
        ]
        statuses = [rank.wait(600) for rank in ranks]
    if any(statuses):
        raise SystemExit(f"the run that is left alone failed: {statuses}, see {log.name}")


def killable_rank(
    argv: list[str], variables: dict[str, str], log: Path, trace: Path, fp16: bool
) -> None:
    """Train as one rank, in a process of its own that notes where it is, for whoever kills it."""
    os.environ.update(variables)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    from b2t.train.main import main
    from b2t.train.ranks import Ranks

    if fp16:
        from deepspeed.accelerator import get_accelerator

        get_accelerator().is_fp16_supported = lambda: True
    notes = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def move(self: Ranks, place: str) -> None:
        self.__dict__["place"] = place
        os.write(notes, f"{time.monotonic():.4f} {place}\n".encode())

    Ranks.place = property(lambda self: self.__dict__["place"], move)  # type: ignore
    os.chdir(REPOSITORY)
    sys.exit(main(argv))


class KillableRun:
    """All ranks of the run, without a launcher, so that nothing restarts them or cleans up."""

    def __init__(
        self, options: argparse.Namespace, data: Path, context: BaseContext, name: str = "killed"
    ) -> None:
        self.folder = options.out / name
        self.started = time.time()
        self.began = time.monotonic()
        self._traces = [options.out / f"{name}-rank{rank}.places" for rank in range(options.ranks)]
        port = free_port()
        argv = training_arguments(options, data, name)
        self.processes = []
        for rank, trace in enumerate(self._traces):
            trace.unlink(missing_ok=True)
            variables = environment(rank, options.ranks, port)
            log = options.out / f"{name}-rank{rank}.log"
            process = context.Process(  # type: ignore[attr-defined]
                target=killable_rank, args=(argv, variables, log, trace, options.fp16)
            )
            process.start()
            self.processes.append(process)

    def trace(self, rank: int = 0) -> list[tuple[float, str]]:
        """Where a rank has been: seconds since the start of the run, and the place."""
        try:
            lines = self._traces[rank].read_text("utf-8").splitlines()
        except FileNotFoundError:
            return []
        return [
            (float(when) - self.began, place) for when, place in (x.split(" ", 1) for x in lines)
        ]

    def where(self, rank: int = 0) -> str:
        """Which of the places a rank is in."""
        return place_of([place for _, place in self.trace(rank)])

    @property
    def running(self) -> bool:
        """Whether any rank still runs."""
        return any(process.exitcode is None for process in self.processes)

    @property
    def half_written(self) -> bool:
        """Whether a checkpoint or an export of this start is half written."""
        for path in (self.folder / "checkpoints").glob(".writing-*"):
            try:
                if path.stat().st_mtime >= self.started:
                    return True
            except FileNotFoundError:
                continue
        return False

    def kill(self) -> None:
        """SIGKILL to all, and wait until they are gone."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def wait(self) -> None:
        """Wait for the end, which must be a good one."""
        for process in self.processes:
            process.join(600)
        self.require_good_end()

    def require_good_end(self) -> None:
        """Give up where a rank has failed, or hangs."""
        statuses = [process.exitcode for process in self.processes]
        if any(status != EXIT_OK for status in statuses):
            raise SystemExit(f"a resumed run was lost: statuses {statuses}, see {self.folder}*.log")


def place_of(visited: list[str]) -> str:
    """Name the last of the places that a rank has visited, one of `PLACES`."""
    if not visited:
        return "start"
    place = visited[-1]
    for words, name in (
        ("opening step", "step of phase"),
        ("in step", "step of phase"),
        ("starting the codebooks", "k-means"),
        ("saving after", "save"),
        ("validating", "validation"),
        ("decoding", "decoding"),
        ("ending phase", "phase change"),
        ("saving before phase", "phase change"),
        ("going back to the weights", "phase change"),
        ("finishing", "save"),
    ):
        if place.startswith(words):
            return f"{name} {place.split()[-1]}" if name == "step of phase" else name
    changing = any(earlier.startswith("ending phase") for earlier in visited[-3:])
    return "phase change" if changing else "start"


def newest_step(folder: Path) -> int:
    """Step of the newest checkpoint, 0 without one."""
    names = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    return int(names[-1].removeprefix("step-")) if names else 0


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
