"""Which component first went non-finite, and in which rows: why optimizer steps are skipped."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from b2t.config import COMPONENTS
from b2t.data.batches import Batch
from b2t.monitor.alerts import Alert
from b2t.train.progress import Progress
from b2t.train.ranks import Ranks

_SHOWN = 8


@dataclass(frozen=True)
class Finding:
    """What of one step is not finite, seen by all ranks.

    Attributes:
        what: in words; empty where a second look finds everything finite.
        component: where it began, None where losses or nothing can be named.
        rows: trials that it began in; all of the step where that cannot be told.
    """

    what: str
    component: str | None
    rows: tuple[str, ...]

    @property
    def trials(self) -> str:
        """The rows in words, the first few of them."""
        more = f" … ({len(self.rows)} in all)" if len(self.rows) > _SHOWN else ""
        return ", ".join(self.rows[:_SHOWN]) + more


def diagnose(
    model: nn.Module,
    batches: Sequence[Batch],
    forward: Callable[[int, Batch], object],
    losses: Iterable[str],
    gradients: Iterable[str],
    ranks: Ranks,
) -> Finding:
    """Look again at a skipped step, in the order of computation. Collective.

    Weights first, then what each component gives back, then losses, then gradients, which flow
    the other way: the component nearest to the losses is where they began.

    Args:
        model: with components as attributes; its weights are those that the step started from.
        batches: micro-batches of the step on this rank.
        forward: runs one of them, by number, as the step did.
        losses: names of this rank's losses that were not finite.
        gradients: components of whose gradients this rank's share was not finite.
        ranks: who else looks.
    """
    present = [name for name in COMPONENTS if getattr(model, name, None) is not None]
    seen: dict[str, Any] = {
        "weights": [name for name in present if not _finite(getattr(model, name).parameters())],
        "outputs": _first_output(model, present, batches, forward),
        "losses": sorted(losses),
        "gradients": sorted(gradients),
        "rows": [row for batch in batches for row in batch.rows],
    }
    return _combine(ranks.gather(seen), present)


def skipped_alert(
    finding: Finding, progress: Progress, in_losses: bool, loss_scale: float | None
) -> Alert:
    """Return the alert that ends a run whose steps are all skipped.

    Args:
        finding: of the last of them.
        progress: where the run is.
        in_losses: whether a loss was not finite, on any rank.
        loss_scale: of fp16, None in other precisions.
    """
    scale = "" if loss_scale is None else f" at loss scale {loss_scale:g}"
    return _alert(
        "loss-not-finite" if in_losses else "gradients-not-finite",
        f"{progress.consecutive_skips} optimizer steps in a row were skipped{scale}: "
        f"{finding.what or 'gradients not finite'}; trials: {finding.trials}",
        "a learning rate too high, overflow in half precision, or broken trials",
        progress,
    )


def not_started_alert(finding: Finding, progress: Progress, problem: str) -> Alert:
    """Return the alert that ends a run whose codebooks no latent frame can start."""
    return _alert(
        "codebook-start",
        f"{problem} ({finding.what or 'none in a second look'}); trials: {finding.trials}",
        "a learning rate too high before the codebooks' start, overflow in half precision, or "
        "broken trials",
        progress,
    )


def _alert(rule: str, message: str, cause: str, progress: Progress) -> Alert:
    return Alert(
        severity="critical",
        rule=rule,
        message=message,
        cause=cause,
        remedy=f"look at these trials (b2t inspect), lower phases.{progress.phase}.lr, or train in "
        "bf16",
        step=progress.step,
    )


def _combine(shares: Sequence[dict[str, Any]], present: Sequence[str]) -> Finding:
    rows = tuple(row for share in shares for row in share["rows"])
    broken = {name for share in shares for name in share["weights"]}
    if broken:
        first = min(broken, key=present.index)
        return Finding(f"the weights of {first} are not finite", first, rows)
    outputs = [share["outputs"] for share in shares if share["outputs"] is not None]
    if outputs:
        first = min((name for name, _ in outputs), key=present.index)
        where = tuple(row for name, bad in outputs if name == first for row in bad)
        return Finding(f"what {first} gives back is not finite", first, where or rows)
    losses = sorted({name for share in shares for name in share["losses"]})
    if losses:
        return Finding(f"{', '.join(losses)} not finite", None, rows)
    gradients = {name for share in shares for name in share["gradients"]}
    if gradients:
        first = max(gradients, key=present.index)
        return Finding(f"gradients not finite, first those of {first}", first, rows)
    return Finding("", None, rows)


def _finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


@torch.no_grad()
def _first_output(
    model: nn.Module,
    present: Sequence[str],
    batches: Sequence[Batch],
    forward: Callable[[int, Batch], object],
) -> tuple[str, list[str]] | None:
    """Component whose output is the first with NaN or infinity on this rank, and its rows."""
    found: dict[str, list[str]] = {}
    for number, batch in enumerate(batches):
        with _watching(model, present, batch, found):
            forward(number, batch)
    if not found:
        return None
    first = min(found, key=present.index)
    return first, found[first]


@contextmanager
def _watching(
    model: nn.Module, present: Sequence[str], batch: Batch, found: dict[str, list[str]]
) -> Iterator[None]:
    """Note in ``found`` the rows of ``batch`` for which a component's output is not finite."""

    def note(name: str, output: object) -> None:
        for tensor in _floats(output):
            if tensor.ndim and tensor.shape[0] == len(batch):
                bad = ~torch.isfinite(tensor).flatten(1).all(1)
                rows = [row for row, is_bad in zip(batch.rows, bad.tolist(), strict=True) if is_bad]
            else:
                rows = [] if _finite([tensor]) else list(batch.rows)
            if rows:
                found.setdefault(name, []).extend(r for r in rows if r not in found[name])

    hooks = [
        getattr(model, name).register_forward_hook(
            lambda module, args, output, name=name: note(name, output)
        )
        for name in present
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _floats(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _floats(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _floats(value)
