"""Real ranks: a small simulated dataset, and training started on it by real launchers."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from tests.distributed.ports import free_port

TIMEOUT_S = 600.0
BIN = Path(sys.executable).parent

TINY: dict[str, Any] = {
    "data": {"max_text_tokens": 64, "workers": 0},
    "model": {
        "adapter": {"dropout": 0.0},
        "encoder": {
            "patch_size": 5,
            "patch_stride": 5,
            "dim": 16,
            "depth": 1,
            "heads": 2,
            "dropout": 0.0,
        },
        # Eager revival, so that twenty steps have some of it.
        "quantizer": {
            "num_quantizers": 2,
            "codebook_size": 16,
            "decay": 0.9,
            "revival_every": 4,
            "revival_threshold": 0.3,
            "rotation_trick": True,
        },
        "signal_decoder": {"depth": 1, "heads": 2},
        "phoneme_head": {"dropout": 0.0},
        "text_decoder": {"dim": 16, "depth": 1, "heads": 2, "ffn_dim": 32, "dropout": 0.0},
        "activation_checkpointing": {"encoder": 0, "signal_decoder": 0, "text_decoder": 0},
    },
    "phases": [{"name": "joint", "steps": 20, "lr": 1e-3, "warmup_steps": 5}],
    "codebook_start": {"after_steps": 0, "frames_per_code": 8},
    "evaluation": {
        "every": 1000,
        "decode_trials": 0,
        "max_trials": 4,
        "batch_size": 2,
        "max_new_tokens": 8,
    },
    "checkpoint": {"every": 1000, "keep": 100},
    "log": {"every": 1, "progress": False, "report": False},
}

DEEPSPEED: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
    "zero_optimization": {
        "stage": 2,
        "overlap_comm": False,
        # DeepSpeed touches whole buckets each step: large ones would take most of the time.
        "reduce_bucket_size": 100_000,
        "allgather_bucket_size": 100_000,
    },
}


@dataclass
class Finished:
    """A run that has ended."""

    status: int
    output: str
    folder: Path

    @property
    def checkpoints(self) -> list[int]:
        return sorted(int(p.name[5:]) for p in (self.folder / "checkpoints").glob("step-*"))

    def weights(self, step: int | None = None) -> dict[str, Any]:
        return load_file(self._checkpoint(step) / "weights.safetensors")

    def moments(self, step: int | None = None) -> dict[str, Any]:
        return load_file(self._checkpoint(step) / "moments.safetensors")

    def state(self, step: int | None = None) -> dict[str, Any]:
        return json.loads((self._checkpoint(step) / "state.json").read_text())

    def metrics(self) -> list[dict[str, Any]]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def _checkpoint(self, step: int | None) -> Path:
        step = self.checkpoints[-1] if step is None else step
        return self.folder / "checkpoints" / f"step-{step:08d}"


@dataclass
class Running:
    """A run in its own session, so that all of it can be killed at once."""

    process: subprocess.Popen
    log: Path
    folder: Path
    deadline: float = field(default_factory=lambda: time.monotonic() + TIMEOUT_S)

    def wait(self) -> Finished:
        try:
            status = self.process.wait(max(1.0, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.kill_all()
            pytest.fail(f"no end after {TIMEOUT_S:.0f} s:\n{self.log.read_text()[-4000:]}")
        finally:
            self.kill_all()
        return Finished(status, self.log.read_text(), self.folder)

    def wait_for_step(self, step: int) -> None:
        while self.last_step() < step:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            if time.monotonic() > self.deadline:
                self.kill_all()
                pytest.fail(f"step {step} was not reached:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.005)

    def last_step(self) -> int:
        file = self.folder / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.is_file() else []
        steps = [json.loads(line)["step"] for line in lines if line.endswith("}")]
        return max(steps, default=0)

    def rank_process(self, rank: int) -> int:
        """The process id of one rank."""
        import psutil

        found = [
            process.pid
            for process in psutil.Process(self.process.pid).children(recursive=True)
            if "train_ds.py" in " ".join(process.cmdline())
            and process.environ().get("RANK") == str(rank)
            and process.parent().environ().get("RANK") != str(rank)
        ]
        assert len(found) == 1, f"rank {rank}: {found}"
        return found[0]

    def kill_all(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.process.wait()


@dataclass
class Training:
    """Starts training runs on the small dataset."""

    repository: Path
    data: Path
    folder: Path

    def start(
        self,
        name: str,
        *overrides: str,
        launcher: str = "deepspeed",
        ranks: int = 2,
        config: dict[str, Any] | None = None,
        deepspeed: dict[str, Any] | Path | None = None,
        script: str = "train_ds.py",
    ) -> Running:
        """Start ``script`` in run folder ``name``."""
        run = self.folder / name
        self.folder.mkdir(exist_ok=True)
        files = []
        for kind, content in (
            ("ds.json", DEEPSPEED if deepspeed is None else deepspeed),
            ("yaml", TINY if config is None else config),
        ):
            if isinstance(content, Path):
                files.append(content)
                continue
            files.append(self.folder / f"{name}.{kind}")
            files[-1].write_text(yaml.safe_dump(content) if kind == "yaml" else json.dumps(content))
        command = [
            *launch(launcher, ranks),
            script,
            f"--deepspeed_config={files[0]}",
            f"--config={files[1]}",
            f"run.dir={run}",
            *([] if any(o.startswith("data.path=") for o in overrides) else [self._path]),
            *overrides,
        ]
        log = self.folder / f"{name}.log"
        with log.open("w") as out:
            process = subprocess.Popen(
                command,
                cwd=self.repository,
                env=environment(),
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Running(process, log, run)

    def run(self, name: str, *overrides: str, **options: Any) -> Finished:
        """Train to the end, which must be a good one."""
        done = self.start(name, *overrides, **options).wait()
        assert done.status == 0, done.output[-4000:]
        return done

    @property
    def _path(self) -> str:
        return f"data.path={self.data}"


def launch(launcher: str, ranks: int) -> list[str]:
    """The launcher's part of the command."""
    port = free_port()
    if launcher == "python":
        assert ranks == 1
        return [sys.executable]
    if launcher == "torchrun":
        return [str(BIN / "torchrun"), f"--nproc_per_node={ranks}", f"--master_port={port}"]
    if launcher == "accelerate":
        # accelerate's --cpu starts one process whatever --num_processes says (it leaves more to
        # MPI); --multi_gpu only means that it starts them as torchrun does, with or without GPUs.
        options = ["--multi_gpu", "--mixed_precision=no", "--dynamo_backend=no", "--num_machines=1"]
        options += [f"--num_processes={ranks}", f"--main_process_port={port}"]
        return [str(BIN / "accelerate"), "launch", *options]
    options = ["--log_level=error", f"--num_accelerators={ranks}", f"--master_port={port}"]
    return [str(BIN / "deepspeed"), *options]


def environment() -> dict[str, str]:
    """A clean environment: CPU ranks with one thread each, whatever the machine has."""
    dropped = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    kept = {k: v for k, v in os.environ.items() if k not in dropped}
    # Launchers start `python` by name: the one that runs the tests must come first.
    path = f"{BIN}{os.pathsep}{kept.get('PATH', '')}"
    return {
        **kept,
        "PATH": path,
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "B2T_THREADS": "1",
    }


def changed(tree: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """A copy of a configuration with keys of sections replaced."""
    copied = copy.deepcopy(tree)
    for name, values in sections.items():
        if isinstance(values, dict) and isinstance(copied.get(name), dict):
            copied[name].update(values)
        else:
            copied[name] = values
    return copied


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """60 simulated trials of 16 electrodes, through the real commands."""
    folder = tmp_path_factory.mktemp("dataset")
    simulated, prepared = folder / "simulated", folder / "prepared"
    sizes = ["--sessions=2", "--electrodes=16", "--select-from=32", "--trials", "48", "8", "4"]
    for arguments in (
        ["simulate", str(simulated), *sizes, "--speaking-rate=120", "--jobs=1"],
        ["prepare", str(simulated), str(prepared)],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "b2t.cli", *arguments],
            cwd=repository,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 0, done.stderr
    return prepared


@pytest.fixture(scope="session")
def training(
    tmp_path_factory: pytest.TempPathFactory, repository: Path, dataset: Path
) -> Iterator[Training]:
    yield Training(repository, dataset, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def tiny() -> Callable[..., dict[str, Any]]:
    """Makes small configurations: sections by name, keys replaced."""
    return lambda **sections: changed(TINY, **sections)


@pytest.fixture(scope="session")
def ds_file() -> Callable[..., dict[str, Any]]:
    """Makes DeepSpeed files for small models."""
    return lambda **sections: changed(DEEPSPEED, **sections)
