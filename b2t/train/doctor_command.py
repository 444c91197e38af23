"""`b2t doctor`: this machine, and what would go wrong when training starts on it."""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from b2t.counted import counted
from b2t.errors import UserError
from b2t.train.interfaces import ENV_FILE, interfaces, write_env

if TYPE_CHECKING:
    from b2t.config import Config

SUMMARY = "check this machine, and optionally a configuration, before training on it"
EPILOG = """\
examples:
  b2t doctor
  b2t doctor --deepspeed_config ds_configs/zero2_fp16.json --config a5500x2 data.path=prepared/t15
  b2t doctor --write-env --hostfile hostfile     # several hosts: for DeepSpeed's launcher

Run it on every host, in the environment that trains. Each line is ok, note, WARN or FAIL, the last
two with what to do. Exit status: 0 nothing would fail, 1 something would."""

Level = Literal["ok", "note", "warn", "fail"]
GIB = 2**30
PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "safetensors", "triton", "faiss-cpu")
_SMALL_DISK, _SMALL_SHM, _DOCKER_SHM = 20 * GIB, GIB, 64 * 2**20
_FEW_FILES, _TOO_FEW_FILES = 4096, 512


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        level: `fail` where training would not start or would break.
        topic: what was looked at.
        text: what was found.
        remedy: what to do about it.
    """

    level: Level
    topic: str
    text: str
    remedy: str = ""

    def line(self) -> str:
        """Return the finding as printed."""
        mark = self.level if self.level in ("ok", "note") else self.level.upper()
        first = f"{mark:<5}{self.topic}: {self.text}"
        return f"{first}\n     → {self.remedy}" if self.remedy else first


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {text}")
    return count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `b2t doctor`."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--deepspeed_config", metavar="NAME|FILE", help="DeepSpeed JSON to check")
    parser.add_argument("--config", metavar="NAME|FILE", help="preset or YAML file to check")
    parser.add_argument(
        "--ranks", type=_count, metavar="N", help="ranks of the run (default: the GPUs, or 1)"
    )
    parser.add_argument(
        "--write-env",
        action="store_true",
        help=f"write into {ENV_FILE} here which network interface leads to the other hosts",
    )
    parser.add_argument(
        "--hostfile",
        type=Path,
        default=Path("hostfile"),
        metavar="FILE",
        help="hosts for --write-env (default: hostfile)",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")


def run(args: argparse.Namespace) -> int:
    """Print all findings; 1 where one of them is a failure."""
    from b2t.train.main import name_accelerator

    if args.write_env:
        name_accelerator()
        print(f"{ENV_FILE}: {', '.join(write_env(args.hostfile))}", flush=True)
    failed = 0
    for finding in examine(args.config, args.overrides, args.deepspeed_config, args.ranks):
        print(finding.line(), flush=True)
        failed += finding.level == "fail"
    print(f"{failed} of the above would stop training" if failed else "nothing would stop training")
    return 1 if failed else 0


def examine(
    source: str | None = None,
    overrides: list[str] | None = None,
    ds_path: str | None = None,
    ranks: int | None = None,
) -> Iterator[Finding]:
    """Yield what is found, from the interpreter up to the configuration."""
    from b2t.config import Config, load_config

    config = Config()
    problem: Finding | None = None
    try:
        config = load_config(source, overrides or [])
    except UserError as error:
        problem = Finding("fail", "configuration", str(error), "correct the key that it names")
    yield from check_packages()
    yield from check_devices()
    yield from check_compiler()
    yield from check_network()
    yield from check_disk(config.run.dir)
    yield from check_shared_memory(config.data.workers)
    yield from check_limits()
    if problem is not None:
        yield problem
    if ds_path is not None:
        yield from check_deepspeed_file(ds_path)
    if problem is None and (source is not None or overrides):
        yield from check_training(config, ds_path, ranks)


def check_packages() -> Iterator[Finding]:
    """Interpreter and the packages that results depend on."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} -")
    yield Finding("ok", "python", f"{sys.version.split()[0]} at {sys.executable}")
    yield Finding("ok", "packages", ", ".join(found))
    for name in ("torch", "deepspeed"):
        if f"{name} -" in found:
            yield Finding("fail", name, "not installed", f"pip install {name}, or `make install`")
    deepspeed = next(item for item in found if item.startswith("deepspeed")).split()[1]
    if deepspeed != "-" and not deepspeed.startswith("0.19."):
        yield Finding(
            "warn",
            "deepspeed",
            f"{deepspeed}, tested with 0.19",
            "pip install 'deepspeed>=0.19.8,<0.20': defaults and internals move between versions",
        )


def check_devices() -> Iterator[Finding]:
    """GPUs that torch sees, and those that only the driver sees."""
    import torch

    driver = Path("/proc/driver/nvidia/version").exists()
    if not torch.cuda.is_available():
        if driver:
            built = torch.version.cuda or "CPU only"
            yield Finding(
                "fail",
                "GPU",
                f"the driver is loaded and torch {torch.__version__} (CUDA: {built}) sees no GPU",
                "install a CUDA build of torch that the driver supports (see nvidia-smi), and "
                "look at CUDA_VISIBLE_DEVICES",
            )
        else:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else "?"
            yield Finding(
                "note",
                "GPU",
                f"none: training runs on {cores} CPU cores, in float32",
                "use ds_configs/zero2_cpu.json; --config demo is made for it",
            )
        return
    for number in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(number)
        free, total = torch.cuda.mem_get_info(number)
        text = f"{number}: {name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        if free < 0.9 * total:
            remedy = "another process holds memory (nvidia-smi names it); end it or expect less"
            yield Finding("warn", "GPU", text, remedy)
        else:
            yield Finding("ok", "GPU", text)


def check_compiler(gpus: bool | None = None) -> Iterator[Finding]:
    """What DeepSpeed, Triton and torch's compiler build where they are used first."""
    import torch

    gpus = torch.cuda.is_available() if gpus is None else gpus
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    ninja = shutil.which("ninja")
    beside = Path(sys.executable).parent / "ninja"
    needs = "Triton's launchers and CPU offload" if gpus else "compiled blocks and CPU offload"
    if compiler is None:
        yield Finding(
            "warn" if gpus else "note",
            "compiler",
            f"no C++ compiler on PATH; {needs} need one, nothing else does",
            "install one (Debian: apt install g++), or name it in CXX",
        )
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        yield Finding(
            "fail" if gpus else "note",
            "Python headers",
            f"no Python.h in {sysconfig.get_path('include')}; {needs} need it",
            "install them (Debian: apt install python3-dev), or a Python that brings them",
        )
    if ninja is None:
        here = f"it is at {beside}: " if beside.exists() else ""
        yield Finding(
            "warn" if gpus else "note",
            "ninja",
            "not on PATH; CPU offload needs it",
            f"{here}export PATH={beside.parent}:$PATH"
            if beside.exists()
            else "pip install ninja, and put its folder on PATH",
        )
    if compiler and ninja:
        names = ", ".join(name for name, fits in deepspeed_ops().items() if fits)
        yield Finding("ok", "DeepSpeed ops", f"{compiler}, {ninja}; can be built: {names}")


def deepspeed_ops() -> dict[str, bool]:
    """Operators of DeepSpeed by name, and whether they can be built here."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    wanted = ("cpu_adam", "fused_adam")
    return {name: ALL_OPS[name].is_compatible() for name in wanted if name in ALL_OPS}


def check_network() -> Iterator[Finding]:
    """Interfaces, those that gloo and NCCL are told to use, and the address of this host."""
    known = interfaces()
    shown = [
        f"{name} {'/'.join(addresses) or '-'}{'' if up else ' (down)'}"
        for name, (up, addresses) in known.items()
    ]
    yield Finding("ok", "network", ", ".join(shown) or "no interface")
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = os.environ.get(variable)
        if value:
            yield from _check_named_interfaces(variable, value, known)
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError:
        yield Finding(
            "warn",
            "host name",
            f"{host} has no address",
            f"add a line '<address> {host}' to /etc/hosts, or export GLOO_SOCKET_IFNAME",
        )
        return
    if address.startswith("127.") and "GLOO_SOCKET_IFNAME" not in os.environ:
        yield Finding(
            "note",
            "host name",
            f"{host} is {address}, which other hosts cannot reach: fine for one host",
            "for several hosts list them in a hostfile and run b2t doctor --write-env, which finds "
            "the interface to them",
        )


def _check_named_interfaces(
    variable: str, value: str, known: dict[str, tuple[bool, list[str]]]
) -> Iterator[Finding]:
    """NCCL takes prefixes, `=` for exact names and `^` for what to leave out; gloo exact names."""
    exclude = value.startswith("^") and variable.startswith("NCCL")
    exact = variable.startswith("GLOO") or value.startswith("=")
    for wanted in value.lstrip("^=").split(","):
        fits = [n for n in known if n == wanted or (not exact and n.startswith(wanted))]
        if exclude:
            continue
        if not fits:
            yield Finding(
                "fail",
                variable,
                f"{wanted!r} is no interface of this host",
                f"choose one of {', '.join(known)}, or unset {variable}",
            )
        elif not any(known[name][0] for name in fits):
            yield Finding(
                "fail", variable, f"{wanted!r} is down", f"bring it up, or unset {variable}"
            )
        else:
            yield Finding("ok", variable, value)


def existing_parent(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    folder = folder.expanduser().absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def check_disk(run_dir: Path) -> Iterator[Finding]:
    """Free space and permission where checkpoints go."""
    place = existing_parent(run_dir)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        yield Finding(
            "fail", "run.dir", f"{place} cannot be written", "choose another run.dir=FOLDER"
        )
        return
    free = shutil.disk_usage(place).free
    text = f"{free / GIB:.1f} GiB free at {place}"
    if free < _SMALL_DISK:
        yield Finding(
            "warn",
            "disk",
            text,
            "checkpoints of the a5500x2 preset take about 1 GiB each; training checks again "
            "against the real size when it starts",
        )
    else:
        yield Finding("ok", "disk", text)


def check_shared_memory(workers: int) -> Iterator[Finding]:
    """/dev/shm, through which loader processes and ranks of a host hand over tensors."""
    place = Path("/dev/shm")
    if not place.is_dir():
        yield Finding("note", "shared memory", "no /dev/shm on this system")
        return
    total = shutil.disk_usage(place).total
    text = f"{total / GIB:.2f} GiB at {place}"
    if total > _SMALL_SHM:
        yield Finding("ok", "shared memory", text)
        return
    yield Finding(
        "fail" if workers and total <= _DOCKER_SHM else "warn",
        "shared memory",
        f"{text}, little for {workers} loader processes per rank",
        "docker run --shm-size=8g (or --ipc=host); or data.workers=0",
    )


def check_limits() -> Iterator[Finding]:
    """Limits on open files and on locked memory."""
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _FEW_FILES:
        yield Finding(
            "fail" if soft < _TOO_FEW_FILES else "warn",
            "open files",
            f"at most {soft}; Arrow files, loader processes and sockets each take some",
            f"ulimit -n {_FEW_FILES if hard == -1 or hard >= _FEW_FILES else hard}",
        )
    else:
        yield Finding("ok", "open files", "no limit" if soft == -1 else f"at most {soft}")
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    text = "no limit" if locked == -1 else f"at most {locked / 2**20:.0f} MiB"
    yield Finding("note" if locked != -1 else "ok", "locked memory", text)


def check_deepspeed_file(path: str) -> Iterator[Finding]:
    """The DeepSpeed file, key by key, and whether this machine has its precision."""
    from b2t.config import Config
    from b2t.train.ds_config import load_ds_config
    from b2t.train.launch import check_precision, require_compiler
    from b2t.train.main import name_accelerator

    name_accelerator()
    try:
        ds_file = load_ds_config(path)
        check_precision(ds_file)
        require_compiler(Config(), ds_file)
    except UserError as error:
        yield Finding("fail", "DeepSpeed file", str(error), "correct what it names")
        return
    yield Finding(
        "ok",
        "DeepSpeed file",
        f"{path}: {ds_file.precision}, ZeRO-{ds_file.zero_stage}, micro-batch "
        f"{ds_file.micro_batch} × {ds_file.accumulation} accumulated",
    )
    import torch

    if (
        ds_file.precision == "bf16"
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability()[0] < 8
    ):
        yield Finding(
            "warn", "bf16", "emulated on this GPU, slowly", "use ds_configs/zero2_fp16.json"
        )


def check_training(config: Config, ds_path: str | None, ranks: int | None) -> Iterator[Finding]:
    """Data, batch and memory of the run that the configuration describes."""
    import torch

    from b2t.train.build import build
    from b2t.train.ds_config import load_ds_config
    from b2t.train.main import default_ds_config
    from b2t.train.memory import describe_memory
    from b2t.train.startup import checkpoint_bytes, require_disk

    world = max(1, torch.cuda.device_count()) if ranks is None else ranks
    try:
        ds_file = load_ds_config(ds_path or default_ds_config())
        materials = build(config)
        require_rows(len(materials.train), ds_file.global_batch(world), world)
        size = checkpoint_bytes(materials.model, config.optim.weight_ema is not None)
        require_disk(existing_parent(config.run.dir), size, 0)
    except UserError as error:
        yield Finding("fail", "training", str(error), "correct what it names")
        return
    info = materials.info
    yield Finding(
        "ok",
        "data",
        f"{config.data.path}: {counted(len(materials.train), 'training trial')}, "
        f"{counted(info.channels, 'channel')}, "
        f"{'text' if info.has_text else 'no text'}; global batch {ds_file.global_batch(world)} "
        f"on {counted(world, 'rank')}",
    )
    yield Finding("ok", "memory", describe_memory(materials.model, config.phases, ds_file, world))


def require_rows(rows: int, global_batch: int, world: int) -> None:
    """Refuse a global batch that the training split cannot fill.

    Raises:
        UserError: with both numbers.
    """
    if rows < global_batch:
        raise UserError(
            f"{rows} training trials do not fill one global batch of {global_batch} on {world} "
            "ranks: lower train_micro_batch_size_per_gpu or gradient_accumulation_steps"
        )
