"""Loading of batches with worker processes."""

import os
import re
import shutil
import signal as signals
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from b2t.data.augment import Augment, AugmentCourse
from b2t.data.batches.batch import Batch, Example, collate
from b2t.data.batches.buffers import Buffers
from b2t.data.batches.order import BatchPlan, evaluation_batches
from b2t.data.batches.rows import TrialRows
from b2t.data.masking import Masking
from b2t.data.trials import signal_lengths
from b2t.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_HEAD_START_S = 0.005

_SHARED_MEMORY = re.compile(
    r"shared memory|Bus error|torch_\w+>: No space|^\[Errno (28|30|38)\]", re.IGNORECASE
)
"""What Python and torch say where a system has too little memory for processes to share."""


def train_batches(
    dataset: Dataset,
    plan: BatchPlan,
    tokenizer: "PreTrainedTokenizerBase | None",
    sessions: Sequence[str],
    augment: Augment | AugmentCourse | None,
    *,
    seed: int,
    phase: int = 0,
    epoch: int = 0,
    position: int = 0,
    consumed: int = 0,
    micro_batch: int,
    accumulation: int = 1,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    max_tokens: int | None = None,
    masking: Masking | None = None,
) -> Iterator[tuple[int, int, list[Batch]]]:
    """Yield (epoch, position, micro-batches of this rank) without end, from (epoch, position) on.

    The same for any number of workers. Close the iterator to stop the workers. ``consumed`` global
    batches of the phase are past: what augmentation ramps with.

    Raises:
        UserError: a trial that cannot be trained on, or a text over ``max_tokens``.
    """
    rows = TrialRows(
        dataset,
        tokenizer,
        sessions,
        augment,
        seed=seed,
        phase=phase,
        max_tokens=max_tokens,
        masking=masking,
    )
    share = partial(
        plan.micro_batches,
        seed,
        phase,
        micro_batch=micro_batch,
        accumulation=accumulation,
        rank=rank,
        world=world,
    )
    share(epoch, position)
    return _steps(rows, plan, share, (epoch, position, consumed), accumulation, workers)


def _steps(
    rows: TrialRows,
    plan: BatchPlan,
    share: Callable[[int, int], list[np.ndarray]],
    start: tuple[int, int, int],
    accumulation: int,
    workers: int,
) -> Iterator[tuple[int, int, list[Batch]]]:
    def keys() -> Iterator[list[tuple[int, int, int]]]:
        epoch, position, step = start
        while True:
            for micro in share(epoch, position):
                yield [(epoch, int(index), step) for index in micro]
            epoch, position = following(epoch, position)
            step += 1

    following = partial(plan.following, rows.seed, rows.phase)
    epoch, position, _ = start
    batches = _load(rows, keys(), workers)
    while True:
        yield epoch, position, [next(batches) for _ in range(accumulation)]
        epoch, position = following(epoch, position)


def eval_batches(
    dataset: Dataset,
    tokenizer: "PreTrainedTokenizerBase | None",
    sessions: Sequence[str],
    *,
    augment: Augment | None = None,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    max_tokens: int | None = None,
    masking: Masking | None = None,
) -> Iterator[Batch]:
    """Yield every row exactly once over all ranks, longest first, without random augmentation.

    Args:
        augment: the training augmentation, whose smoothing also belongs to evaluation.
        batch_size: most rows in a batch.
    """
    rows = TrialRows(dataset, tokenizer, sessions, augment, max_tokens=max_tokens, masking=masking)
    plan = evaluation_batches(signal_lengths(dataset), batch_size, rank, world)
    keys = ([(None, int(index), 0) for index in batch] for batch in plan)
    return _load(rows, keys, workers)


def _load(rows: TrialRows, keys: Iterator[list[Any]], workers: int) -> Iterator[Batch]:
    collated = partial(_collate_or_error, buffers=Buffers())
    if workers:
        batches = _from_workers(rows, keys, workers, collated)
    else:
        batches = _one_ahead(_from_here(rows, keys, collated))
    for batch in batches:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def _from_workers(
    rows: TrialRows, keys: Iterator[list[Any]], workers: int, collated: Callable[..., Any]
) -> Iterator[Batch | UserError]:
    try:
        with warnings.catch_warnings():
            # Python 3.12 warns of every fork beside threads; workers use numpy and Arrow alone.
            warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
            # Of more workers than cores too, on each rank and in each phase: the start says it.
            warnings.filterwarnings("ignore", message=".*worker processes in total.*")
            loader = DataLoader(
                rows,
                batch_sampler=_Keys(keys),
                collate_fn=partial(_shared, collated=collated),
                num_workers=workers,
                # Its own generator: a new loader must not advance the model's random state.
                generator=torch.Generator(),
                prefetch_factor=2,
                pin_memory=torch.cuda.is_available(),
                worker_init_fn=_calm_worker,
                multiprocessing_context="fork",
            )
            batches = iter(loader)
        yield from batches
    except (OSError, RuntimeError) as error:
        if not _SHARED_MEMORY.search(str(error)):
            raise
        raise UserError(
            f"data.workers={workers}: worker processes hand batches over in {_shared_memory()}, "
            "and that was not enough: docker run --shm-size=8g (or --ipc=host), a larger /dev/shm, "
            "or data.workers=0, which reads in a thread"
        ) from error


def _shared(
    examples: Sequence[Example | UserError], collated: Callable[..., Batch | UserError]
) -> Batch | UserError:
    """Collate in a worker, into memory that is shared.

    torch would move it there on its way out, where an error is printed and the batch is lost: who
    asked for it would wait without end.
    """
    batch = collated(examples)
    return batch.share_memory() if isinstance(batch, Batch) else batch


def _shared_memory() -> str:
    try:
        return f"/dev/shm ({shutil.disk_usage('/dev/shm').total / 2**20:,.0f} MiB)"
    except OSError:
        return "/dev/shm, which this system does not have"


def _from_here(
    rows: TrialRows, keys: Iterator[list[Any]], collated: Callable[..., Any]
) -> Iterator[Batch | UserError]:
    pinned = torch.cuda.is_available()
    for chosen in keys:
        batch = collated([rows[key] for key in chosen])
        yield batch.pin_memory() if pinned and isinstance(batch, Batch) else batch


def _one_ahead(batches: Iterator[Any]) -> Iterator[Any]:
    """Read the next batch in a thread while this one is worked on.

    It begins a moment later, or when it is asked for: both need Python's lock, which whoever has
    just got a batch would otherwise lose to the reading before any of its work is under way.
    """
    asked = threading.Event()

    def read() -> Any:
        asked.wait(_HEAD_START_S)
        return next(batches, None)

    with ThreadPoolExecutor(1, "batches") as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            asked.clear()
            coming = thread.submit(read)
            yield batch
            asked.set()


class _Keys:
    """Batches of keys as `DataLoader` wants them: an iterable read once."""

    def __init__(self, keys: Iterator[list[Any]]) -> None:
        self.keys = keys

    def __iter__(self) -> Iterator[list[Any]]:
        return self.keys


def _collate_or_error(
    examples: Sequence[Example | UserError], buffers: Buffers
) -> Batch | UserError:
    errors = [example for example in examples if isinstance(example, UserError)]
    try:
        return errors[0] if errors else collate(examples, buffers)  # type: ignore[arg-type]
    except UserError as error:
        return error


def _calm_worker(worker: int) -> None:
    """Leave signals to the trainer, whose handlers a forked worker inherits.

    Launchers send SIGTERM to ranks and all their children. A worker that died of it would end the
    run before it has saved, so it heeds its parent alone.
    """
    for number in (signals.SIGINT, signals.SIGUSR1):
        signals.signal(number, signals.SIG_IGN)
    signals.signal(signals.SIGTERM, signals.SIG_DFL)
    if hasattr(signals, "sigwaitinfo"):
        signals.pthread_sigmask(signals.SIG_BLOCK, {signals.SIGTERM})
        threading.Thread(target=_end_when_parent_says, daemon=True).start()


def _end_when_parent_says() -> None:
    parent = os.getppid()
    while signals.sigwaitinfo({signals.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
