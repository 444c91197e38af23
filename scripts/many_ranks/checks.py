"""Holds ranks against each other, shards against the checkpoint, and a run against another."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from b2t.run_files import CHECKPOINTS, MOMENTS_FILE, STEP_PREFIX, WEIGHTS_FILE

UNDETERMINED = "k_proj.bias"
"""No loss depends on it: its gradient is rounding, which Adam makes as large as any other."""

Found = Sequence[Mapping[str, Any]]
"""What each rank of a run has observed, in their order."""


def ranks_apart(found: Found) -> list[str]:
    """Say at which steps not all ranks hold the same codebooks, weights and buffers."""
    problems = []
    counts = {len(rank["steps"]) for rank in found}
    if len(counts) != 1:
        return [f"ranks took {sorted(counts)} steps"]
    for steps in zip(*(rank["steps"] for rank in found), strict=True):
        for kind in ("codebooks", "state"):
            others = [n for n, step in enumerate(steps) if step[kind] != steps[0][kind]]
            if others:
                problems.append(
                    f"step {steps[0]['step']}: {kind} of ranks {others} are not those of rank 0"
                )
    return problems


def uncovered(found: Found, phase: str) -> list[str]:
    """Say which trained parameters the ranks' shards do not cover exactly once.

    Also where two shards lie in the same place of a rank's flat tensor, or one beyond its end.
    """
    problems = []
    pieces: dict[str, list[tuple[int, int]]] = {}
    for rank, held in enumerate(each["phases"][phase] for each in found):
        places: dict[int, list[tuple[int, int]]] = {n: [] for n in range(len(held["flats"]))}
        for name, flat, offset, start, count in held["parts"]:
            pieces.setdefault(name, []).append((start, start + count))
            places[flat].append((offset, offset + count))
        for flat, taken in places.items():
            taken.sort()
            ends = [0, *(end for _, end in taken)]
            begins = [*(begin for begin, _ in taken), held["flats"][flat]]
            if any(begin < end for begin, end in zip(begins, ends, strict=True)):
                problems.append(f"{phase}: shards of rank {rank} overlap in its tensor {flat}")
    sizes = found[0]["phases"][phase]["sizes"]
    for name in sorted(sizes.keys() | pieces.keys()):
        place = 0
        for begin, end in sorted(pieces.get(name, [])):
            if begin != place:
                break
            place = end
        held_in_all = sum(end - begin for begin, end in pieces.get(name, []))
        if place != sizes.get(name) or held_in_all != place:
            problems.append(
                f"{phase}: shards of {name} hold {held_in_all} elements, {place} of them in a row, "
                f"of {sizes.get(name)}"
            )
    return problems


def assembled(found: Found, folder: Path, phase: str, kind: str) -> dict[str, np.ndarray]:
    """Put a kind of shards of all ranks together: flat arrays by the parameter's name."""
    sizes = found[0]["phases"][phase]["sizes"]
    whole = {name: np.full(size, np.nan, np.float32) for name, size in sizes.items()}
    for rank, each in enumerate(found):
        with np.load(folder / f"shards-{phase}-{rank}.npz") as shards:
            flats = {int(k.split("/")[1]): v for k, v in shards.items() if k.startswith(f"{kind}/")}
        for name, flat, offset, start, count in each["phases"][phase]["parts"]:
            whole[name][start : start + count] = flats[flat][offset : offset + count]
    return whole


def not_in_checkpoint(found: Found, folder: Path, run: Path, last: str) -> list[str]:
    """Say what of the shards at the end of each phase is not what its checkpoint holds, bitwise.

    Args:
        found: what each rank has observed.
        folder: where the ranks left their shards.
        run: the run folder.
        last: the phase whose checkpoint holds moments as well.
    """
    problems = []
    for phase, held in found[0]["phases"].items():
        saved = checkpoint(run, held["step"])
        kinds = {"master": ""} | (
            {m: f"/{m}" for m in ("exp_avg", "exp_avg_sq")} if phase == last else {}
        )
        for kind, suffix in kinds.items():
            for name, value in assembled(found, folder, phase, kind).items():
                kept = saved.get(f"{name}{suffix}")
                if kept is None or kept.tobytes() != value.tobytes():
                    problems.append(f"{phase}: the checkpoint's {name}{suffix} is not the shards'")
    return problems


def checkpoint(run: Path, step: int) -> dict[str, np.ndarray]:
    """Weights, buffers and moments of a step by name."""
    folder = run / CHECKPOINTS / f"{STEP_PREFIX}{step:08d}"
    return {**load_file(folder / WEIGHTS_FILE), **load_file(folder / MOMENTS_FILE)}


def losses(run: Path) -> dict[int, float]:
    """Total loss by step."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return {r["step"]: r["loss/total"] for r in records if "loss/total" in r}


def revived(run: Path) -> int:
    """Codes that were replaced in a run."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return int(sum(r.get("codebook/revived") or 0 for r in records))


def loss_off(run: Path, other: Path) -> float:
    """Greatest relative difference of the losses of two runs; infinite where steps differ."""
    ours, theirs = losses(run), losses(other)
    if ours.keys() != theirs.keys() or not ours:
        return float("inf")
    return max(abs(ours[step] / theirs[step] - 1) for step in ours)


def state_off(run: Path, other: Path, step: int, only: str = "") -> float:
    """Greatest difference between the weights and buffers of two runs.

    As a share of the largest element of each, or of 1 where that is larger.

    Args:
        run, other: run folders.
        step: whose checkpoints are compared.
        only: beginning of the names that are compared.
    """
    ours, theirs = checkpoint(run, step), checkpoint(other, step)
    names = [n for n in theirs if n.startswith(only) and not n.endswith(UNDETERMINED)]
    names = [n for n in names if "/" not in n]
    if any(name not in ours for name in names) or not names:
        return float("inf")
    off = 0.0
    for name in names:
        left, right = ours[name].astype(np.float64), theirs[name].astype(np.float64)
        off = max(off, float(np.abs(left - right).max() / max(1.0, np.abs(right).max())))
    return off


def not_bitwise(run: Path, other: Path, step: int) -> list[str]:
    """Names of weights, buffers and moments that are not the same in two runs, bit for bit."""
    ours, theirs = checkpoint(run, step), checkpoint(other, step)
    return sorted(
        name
        for name in ours.keys() | theirs.keys()
        if name not in ours or name not in theirs or ours[name].tobytes() != theirs[name].tobytes()
    )
