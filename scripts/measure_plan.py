"""Hold `b2t plan` against what ranks measure: bytes that torch allocates, bytes that they send.

    torchrun --nproc_per_node 2 scripts/measure_plan.py
    python scripts/measure_plan.py demo accumulated      # one rank, where there is no ZeRO
    python scripts/measure_plan.py a5500x2 t15           # one GPU, fp16

Each case is a model, a DeepSpeed file and a size of trials. Ranks take a few steps of it with the
engine, step and codebook update that training uses, on noise. Memory is what torch's profiler
sees its CPU allocator hand out, from before the model is built: every tensor and every workspace
of an operator, but no Python and no library; on a GPU it is the most that torch's allocator there
counts. Traffic is what reaches `torch.distributed`, between two ranks or more. CPU ranks in 16 bit
hold the host's float32 copies of the weights in the same memory, so that the plan adds them.

Without names all cases run that fit the device: those of fp16 on a GPU, the others on CPUs.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from b2t.config import Config, load_config
from b2t.data.batches import Batch
from b2t.log import quiet_libraries
from b2t.model.brain_to_text import BrainToText
from b2t.train.budget import PhaseBudget
from b2t.train.ds_config import DeepSpeedFile, load_ds_config
from b2t.train.main import name_accelerator
from b2t.train.masters import initial_masters, weights_are_masters
from b2t.train.phase import TrainedPhase
from b2t.train.plain import without_needless_zero
from b2t.train.planning.plan import Planner
from b2t.train.planning.traffic import plan_traffic
from b2t.train.planning.workload import Workload, architecture, assumed
from b2t.train.progress import Progress
from b2t.train.ranks import Ranks, join, leave
from b2t.train.step import OptimizerStep
from b2t.train.window import Window

MIB = 2**20
_SKIPPED = 16
"""Steps that fp16 may skip on the way to its loss scale."""
_LETS_GO = 0.005
"""Seconds after which gloo's thread holds no tensor of a collective that is done."""
Traffic = Counter[tuple[str, int]]
_FP16 = {"fp16": {"enabled": True, "initial_scale_power": 8}}
_BUCKETS = {
    "overlap_comm": True, "reduce_scatter": True,
    "reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000,
}  # fmt: skip
_LARGE = {"micro": 8, "seconds": 10.0, "channels": 512, "precision": _FP16, "zero": _BUCKETS}
_WIDE = ["model.encoder.dim=256", "model.signal_decoder.depth=3"]
_CODES = ["model.quantizer.num_quantizers=8", "model.quantizer.codebook_size=1024"]
CASES: dict[str, dict[str, Any]] = {
    # phase, overrides, micro-batch, accumulation, seconds of a trial, zero_optimization
    "demo": {"phase": 2, "micro": 8, "seconds": 6.0},
    "demo, tokenizer": {"phase": 0, "micro": 8, "seconds": 6.0},
    "demo, frozen encoder": {"phase": 1, "micro": 8, "seconds": 6.0},
    "accumulated": {"phase": 2, "micro": 4, "times": 3, "seconds": 6.0},
    "long trials": {"phase": 2, "micro": 4, "seconds": 20.0},
    "checkpointing": {
        "phase": 2, "micro": 4, "seconds": 20.0,
        "overrides": [f"model.activation_checkpointing.{part}=1"
                      for part in ("encoder", "signal_decoder", "text_decoder")],
    },
    "wide": {"phase": 2, "micro": 2, "times": 2, "seconds": 6.0, "overrides": _WIDE},
    "large codebooks": {"phase": 2, "micro": 4, "seconds": 6.0, "overrides": _CODES},
    "large codebooks, half width": {
        "phase": 2, "micro": 4, "seconds": 6.0,
        "overrides": [*_CODES, "model.quantizer.half_width_sums=true"],
    },
    "ZeRO-1": {"phase": 2, "micro": 4, "seconds": 6.0, "zero": {"stage": 1}},
    "reduce_scatter": {"phase": 2, "micro": 4, "seconds": 6.0, "zero": {"reduce_scatter": True}},
    "bf16": {"phase": 2, "micro": 4, "seconds": 6.0, "precision": {"bf16": {"enabled": True}}},
    "a5500x2": {"phase": 2, "config": "a5500x2", **_LARGE},
    "a5500x2, large batch": {"phase": 2, "config": "a5500x2", **_LARGE, "micro": 32},
    "a5500x2, activations kept": {
        "phase": 2, "config": "a5500x2", **_LARGE,
        "overrides": [f"model.activation_checkpointing.{part}=0"
                      for part in ("encoder", "signal_decoder", "text_decoder")],
    },
    "t15": {"phase": 0, "config": "t15", **_LARGE},
}  # fmt: skip


class Counted(TorchDispatchMode):
    """Counts the collectives that reach torch.distributed, and their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Traffic = Counter()

    def __torch_dispatch__(  # type: ignore[override]
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Take note of a collective by its tensor: that which it leaves its result in."""
        if func.namespace == "c10d":
            tensors = [t for t in tree_leaves(args[0]) if isinstance(t, torch.Tensor)]
            name = func._schema.name.split("::")[1]
            kind = next(k for k in ("all_gather", "all_to_all", "all_reduce") if _bare(k) in name)
            self.sent[kind, sum(t.numel() * t.element_size() for t in tensors)] += 1
        out = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            # What gloo's thread lets go of last the profiler never sees freed: let it be first.
            dist.Work.unbox(out[-1] if isinstance(out, (tuple, list)) else out).wait()
            time.sleep(_LETS_GO)
        return out


def _bare(kind: str) -> str:
    return kind.replace("_", "")


def read_case(name: str, folder: Path, world: int) -> tuple[Config, DeepSpeedFile, Workload]:
    """Return configuration, DeepSpeed file and trials of a case."""
    case = CASES[name]
    config = load_config(case.get("config", "demo"), case.get("overrides", []))
    zero = {"stage": 2, "overlap_comm": False, "reduce_scatter": False,
            "reduce_bucket_size": 500_000, "allgather_bucket_size": 500_000}  # fmt: skip
    file = folder / "ds.json"
    file.write_text(json.dumps({
        "train_micro_batch_size_per_gpu": case["micro"],
        "gradient_accumulation_steps": case.get("times", 1),
        "gradient_clipping": 1.0,
        **case.get("precision", {}),
        "zero_optimization": {**zero, **case.get("zero", {})},
    }))  # fmt: skip
    seconds = case["seconds"]
    channels = case.get("channels", 64)
    workload = assumed(channels, 50.0, seconds, seconds, 4, config.data.max_text_tokens)
    ds_file = without_needless_zero(load_ds_config(file), config.optim, world)
    return config, ds_file, workload


def measure(
    config: Config, ds_file: DeepSpeedFile, workload: Workload, number: int, ranks: Ranks
) -> tuple[int, Traffic]:
    """Take a few steps of a phase; return the most bytes allocated and the last step's traffic."""
    with most_allocated(ranks.device) as most:
        torch.manual_seed(config.run.seed)
        model = BrainToText(architecture(config, workload)).to(ranks.device)
        knobs = config.model.activation_checkpointing
        model.checkpoint_activations(knobs.encoder, knobs.signal_decoder, knobs.text_decoder)
        assert model.quantizer is not None
        model.quantizer.codebooks.start_random(model.quantizer.num_quantizers, False)
        model.quantizer.revival_enabled = False
        masters = initial_masters(model)
        trained = TrainedPhase(model, config, number, ds_file, masters, {}, None, lambda: 0.0)
        sent = take_steps(model, config, ds_file, workload, number, ranks, trained)
        trained.engine.close()
    return most[0], sent


@contextmanager
def most_allocated(device: torch.device) -> Iterator[list[int]]:
    """Measure the most bytes that are held at once inside; the list has them afterwards."""
    most: list[int] = []
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield most
        most.append(torch.cuda.max_memory_allocated(device) - before)
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield most
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = most_so_far = 0
    for _, change in changes:
        live += change
        most_so_far = max(most_so_far, live)
    most.append(most_so_far)


def take_steps(
    model: BrainToText, config: Config, ds_file: DeepSpeedFile, workload: Workload,
    number: int, ranks: Ranks, trained: TrainedPhase,
) -> Traffic:  # fmt: skip
    """Take steps on noise until three were applied; return what the last of them sent."""
    progress, window = Progress(phase=number), Window(ranks)
    stepping = OptimizerStep(
        model, trained.engine, config, progress, ds_file, ranks, window,
        PhaseBudget(config.phases[number], progress),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(ranks.rank)
    batches = []
    for _ in range(ds_file.accumulation):
        batch = workload.batch(ds_file.micro_batch, torch.float32)
        batch.signal.normal_(generator=generator)
        batch.target.copy_(batch.signal)
        batches.append(batch.to("cpu", trained.engine.dtype))
    sent: Traffic = Counter()
    stepping.phase = config.phases[number].model_copy(update={"revival": False})
    applied = 0
    for _ in range(3 + _SKIPPED):
        counting = Counted() if ranks.world > 1 else nullcontext()
        with counting as counted:
            applied += take_step(model, stepping, batches)
        sent = Counter() if counted is None else counted.sent
        if applied == 3:
            return sent
    raise SystemExit(f"{applied} of {3 + _SKIPPED} steps were applied: the loss scale is too high")


def take_step(model: BrainToText, stepping: OptimizerStep, batches: list[Batch]) -> bool:
    """Take one step; as in the trainer nothing of it is held when it is over."""
    totals = stepping.totals(batches, None, False)
    result = stepping.take(batches, totals)
    report = None
    if not result.applied:
        stepping.window.drop_step()
        return False
    if "quantizer" in stepping.phase.trainable:
        report = model.quantizer.update(result.stats)
    stepping.window.close_step(totals, 1.0, 0.0, report)
    return True


def planned(
    config: Config, ds_file: DeepSpeedFile, workload: Workload, number: int, ranks: Ranks
) -> tuple[int, Traffic]:
    """Return what the plan says of the same."""
    world = ranks.world
    planner, phase = Planner(config, ds_file, world, workload), config.phases[number]
    memory = planner.memory(phase)
    step = planner.step(phase, ds_file.micro_batch, workload.bins)
    sent: Traffic = Counter()
    for message in plan_traffic(planner.model, phase, config.optim, ds_file, world, step):
        sent[message.kind, message.size] += message.times
    on_host = ranks.device.type == "cpu" and not weights_are_masters(ds_file, ranks.device)
    return memory.peak + (memory.host if on_host else 0), sent


def main(argv: list[str] | None = None) -> int:
    """Measure the cases and print them; 1 where one is off."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    options = parser.parse_args(argv)
    quiet_libraries()
    name_accelerator()
    ranks = join()
    found: list[dict[str, Any]] = []
    for name in options.cases or fitting(ranks.device):
        with tempfile.TemporaryDirectory() as folder:
            case = read_case(name, Path(folder), ranks.world)
        number = CASES[name]["phase"]
        most, sent = measure(*case, number, ranks)
        expected, messages = planned(*case, number, ranks)
        most = max(ranks.gather(most))
        found.append({
            "case": name, "measured": most, "planned": expected,
            "messages": sum(sent.values()), "exact": sent == messages,
            "sent": sum(size * times for (_, size), times in sent.items()),
        })  # fmt: skip
    leave()
    if ranks.is_main:
        show(found)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    good = [one["exact"] and abs(one["planned"] / one["measured"] - 1) < 0.1 for one in found]
    return 0 if all(good) else 1


def fitting(device: torch.device) -> list[str]:
    """Names of the cases that this kind of device can train and hold."""
    on_gpu = device.type == "cuda"
    return [name for name, case in CASES.items() if (case.get("precision") is _FP16) == on_gpu]


def show(found: list[dict[str, Any]]) -> None:
    """Print the cases."""
    table = Table()
    for name in ("case", "planned, MiB", "measured, MiB", "off", "collectives", "KB", "traffic"):
        table.add_column(name, justify="left" if name in ("case", "traffic") else "right")
    for one in found:
        table.add_row(
            one["case"], f"{one['planned'] / MIB:.1f}", f"{one['measured'] / MIB:.1f}",
            f"{one['planned'] / one['measured'] - 1:+.1%}", str(one["messages"]),
            f"{one['sent'] / 1e3:.1f}", "exact" if one["exact"] else "DIFFERS",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
