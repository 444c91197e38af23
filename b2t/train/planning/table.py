"""A plan on a terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

GIB = 2**30
_PARTS = {
    "weights": "weights",
    "optimizer": "optimizer's share",
    "codebooks": "codebooks",
    "batches": "batches of a step",
    "gradients": "gradients' share",
    "training": "activations, buckets, gradients on their way",
    "stepping": "or the optimizer step",
    "updating": "or the codebook update",
    "peak": "most at any time",
    "host": "host memory",
}


def print_plan(plan: dict[str, Any], console: Console | None = None) -> None:
    """Print a plan of `Planner.plan`."""
    console = console or Console()
    console.print(f"{plan['parameters'] / 1e6:.1f} M parameters · {plan['gpus']} GPUs · batch "
                  f"{plan['global_batch']} · {plan['workload']}", markup=False)  # fmt: skip
    console.print(_memory(plan))
    console.print(_verdict(plan), markup=False)
    console.print(_work(plan))
    if plan["gpus"] > 1:
        console.print(_messages(plan))
    if "pace" not in plan:
        console.print("no time is predicted: peaks are known in 16 bit only (fp16 or bf16)")
        return
    console.print(_pace(plan))
    cost = "" if plan["cost"] is None else f", {plan['cost']:,.0f} at {plan['price']:g} an hour"
    console.print(
        f"whole run: {plan['hours']:.1f} h, {plan['gpu_hours']:.1f} GPU hours{cost}", markup=False
    )
    console.print(_scaling(plan))
    assumed = plan["assumed"]
    console.print(
        f"assumed, not measured: matrix products at {assumed['efficiency']:.0%} of the peak, "
        f"memory and links at {assumed['memory_efficiency']:.0%} of theirs, "
        f"{assumed['launch_s'] * 1e6:g} µs for each operator, {assumed['reserve'] / GIB:g} GiB for "
        "CUDA, NCCL and gaps; data loading, validation and checkpoints left out",
        markup=False,
    )


def _memory(plan: dict[str, Any]) -> Table:
    table = Table(title="Memory of one GPU, GiB", title_justify="left")
    table.add_column("")
    for phase in plan["phases"]:
        table.add_column(phase["name"], justify="right", overflow="fold")
    for key, name in _PARTS.items():
        sizes = [f"{phase['memory_bytes'][key] / GIB:.2f}" for phase in plan["phases"]]
        table.add_row(name, *sizes, style="bold" if key == "peak" else None)
    return table


def _verdict(plan: dict[str, Any]) -> str:
    room, phase = plan["room_bytes"] / GIB, plan["needs_most"]
    whole = plan["peak_without_checkpointing_bytes"] / GIB
    fits = "fits" if plan["fits"] else "DOES NOT FIT"
    return (
        f"{fits} in {room:.2f} GiB · largest micro-batch of the longest trials "
        f"{plan['largest_micro_batch']} (phase {phase}) · without activation checkpointing "
        f"{whole:.2f} GiB"
    )


def _work(plan: dict[str, Any]) -> Table:
    table = Table(title="Work and traffic of one GPU in a step", title_justify="left")
    for name in ("phase", "TFLOP", "collectives", "sent, MB"):
        table.add_column(name, justify="left" if name == "phase" else "right", overflow="fold")
    for phase in plan["phases"]:
        times = sum(message["times"] for message in phase["messages"])
        sent = phase["sent_bytes"] / 1e6
        work = phase["flops_per_gpu_and_step"] / 1e12
        table.add_row(phase["name"], f"{work:.3f}", str(times), f"{sent:.2f}")
    return table


def _messages(plan: dict[str, Any]) -> Table:
    phase = max(plan["phases"], key=lambda phase: phase["sent_bytes"])
    table = Table(title=f"Collectives of a step of phase {phase['name']}", title_justify="left")
    for name in ("what", "by", "times", "MB", "sent, MB"):
        table.add_column(
            name, justify="left" if name in ("what", "by") else "right", overflow="fold"
        )
    for message in phase["messages"]:
        sizes = (f"{message[key] / 1e6:.3f}" for key in ("bytes", "wire_bytes"))
        table.add_row(message["purpose"], message["kind"], str(message["times"]), *sizes)
    return table


def _pace(plan: dict[str, Any]) -> Table:
    title = f"Predicted seconds of a step: {plan['gpu']}, {plan['link']}, {plan['network']}"
    parts = ("arithmetic", "memory", "launches", "communication", "seconds")
    table = Table(title=title, title_justify="left")
    for name in ("phase", "math", "memory", "launch", "comm.", "all", "steps/s", "most", "hours"):
        table.add_column(
            name, justify="left" if name in ("phase", "most") else "right", overflow="fold"
        )
    for found in plan["pace"]:
        table.add_row(
            found["name"], *(f"{found[part]:.3f}" for part in parts),
            f"{found['steps_per_s']:.2f}", found["bottleneck"], f"{found['hours']:.2f}",
        )  # fmt: skip
    return table


def _scaling(plan: dict[str, Any]) -> Table:
    title = f"Scaling of phase {plan['scaling_of']}, {plan['gpus_per_host']} GPUs a host"
    table = Table(title=title, title_justify="left")
    for name in ("", "GPUs", "batch", "micro × acc.", "steps/s", "trials/s", "efficiency",
                 "most"):  # fmt: skip
        table.add_column(name, justify="left" if name in ("", "most") else "right", overflow="fold")
    for found in plan["scaling"]:
        if "impossible" in found:
            table.add_row(found["kind"], str(found["gpus"]), "–", "–", "–", "–", "–",
                          found["impossible"])  # fmt: skip
            continue
        table.add_row(
            found["kind"], str(found["gpus"]), str(found["global_batch"]),
            f"{found['micro_batch']} × {found['accumulation']}", f"{found['steps_per_s']:.2f}",
            f"{found['trials_per_s']:.0f}", f"{found['efficiency']:.0%}", found["bottleneck"],
        )  # fmt: skip
    return table
