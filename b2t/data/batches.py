"""Trials to batches: collation, length-grouped order, loading with worker processes.

The order is our own and not transformers' ``DistributedLengthGroupedSampler``: that one repeats
rows until the split divides by the world size, and deals rows to ranks in an order that changes
with it, so that neither a resume at a position nor "one rank sees what two ranks see" can hold.
"""

import hashlib
import os
import signal as signals
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from b2t.data.augment import Augment, row_generator
from b2t.data.trials import read_signal, require_finite, row_id, signal_lengths
from b2t.errors import UserError
from b2t.log import logger

IGNORED = -100
UNSEEN_SESSION = -1


@dataclass
class Batch:
    """Trials padded to a common length.

    Attributes:
        signal: [B, T, C] float32, augmented; zero under the mask.
        target: [B, T, C] float32, what the signal decoder must give back.
        signal_mask: [B, T] bool, True = recorded. A shifted trial may also start with masked bins.
        session: [B] int64, index into the model's sessions; -1 = unseen.
        tokens: [B, L] int64 labels ending in eos, padded with -100; a row without text is all -100.
        phonemes: [B, S] int64 class ids 1..40, padded with 0.
        phoneme_lengths: [B] int64, 0 = no phonemes.
        rows: ids ``session/block/trial``.
        texts: the sentences, None where a row has none.
        row_ids: [B] int64, hashes of ``rows``: what the rows are, where a device needs to know.
    """

    signal: torch.Tensor
    target: torch.Tensor
    signal_mask: torch.Tensor
    session: torch.Tensor
    tokens: torch.Tensor
    phonemes: torch.Tensor
    phoneme_lengths: torch.Tensor
    rows: list[str]
    texts: list[str | None]
    row_ids: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    _counts: dict[str, float] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if len(self.row_ids) != len(self.rows):
            digests = [hashlib.blake2b(row.encode(), digest_size=8).digest() for row in self.rows]
            self.row_ids = torch.from_numpy(np.frombuffer(b"".join(digests), "<i8").copy())

    def __len__(self) -> int:
        return len(self.rows)

    def counts(self) -> dict[str, float]:
        """Count the elements that losses are averaged over.

        Returns ``bins`` (recorded bins times channels), ``tokens``, ``phonemes`` and ``rows``.
        Counted once, on the CPU when the batch was loaded, so that asking costs no device wait.
        """
        if self._counts is None:
            self._counts = {
                "bins": float(self.signal_mask.sum() * self.signal.shape[-1]),
                "tokens": float((self.tokens != IGNORED).sum()),
                "phonemes": float(self.phoneme_lengths.sum()),
                "rows": float(len(self)),
            }
        return dict(self._counts)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Batch":
        """Move to ``device``; ``dtype`` casts signal and target only."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            cast = dtype if tensor.is_floating_point() else None
            return tensor.to(device=device, dtype=cast, non_blocking=True)

        return self._map(move)

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory (called by ``DataLoader``)."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        tensors: dict[str, Any] = {
            name: function(value)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, **tensors)


class Example(NamedTuple):
    """One row, augmented: signal and target [T, C], mask [T], labels [L], phonemes [S]."""

    signal: np.ndarray
    target: np.ndarray
    mask: np.ndarray
    session: int
    labels: np.ndarray
    phonemes: np.ndarray
    row: str
    text: str | None


def collate(examples: Sequence[Example]) -> Batch:
    """Pad ``examples`` into one batch."""

    def padded(name: str, value: float) -> torch.Tensor:
        rows = [torch.from_numpy(getattr(example, name)) for example in examples]
        return pad_sequence(rows, batch_first=True, padding_value=value)

    def padded_ids(name: str, value: int) -> torch.Tensor:
        ids = padded(name, value)
        return ids if ids.shape[1] else ids.new_full((len(examples), 1), value)

    batch = Batch(
        signal=padded("signal", 0.0),
        target=padded("target", 0.0),
        signal_mask=padded("mask", False),
        session=torch.tensor([example.session for example in examples], dtype=torch.int64),
        tokens=padded_ids("labels", IGNORED),
        phonemes=padded_ids("phonemes", 0),
        phoneme_lengths=torch.tensor([len(example.phonemes) for example in examples]),
        rows=[example.row for example in examples],
        texts=[example.text for example in examples],
    )
    batch.counts()
    return batch


class BatchPlan:
    """The order of training rows: global batches of rows of similar length.

    A global batch is a function of (seed, phase, epoch, position) and of the rows' lengths; ranks
    and micro-batches only share it out. Each epoch shuffles the rows, leaves out the few that do
    not fill a batch, sorts groups of ``group`` batches by length, and shuffles the batches.

    Args:
        lengths: time bins of each row, [rows].
        batch_size: rows of a global batch: micro-batch times accumulation times world size.
        group: batches whose rows are sorted together: more means less padding and less chance.
        split: name used in errors.

    Raises:
        UserError: the split has fewer rows than one global batch.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        batch_size: int,
        *,
        group: int = 20,
        split: str = "train",
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.batch_size = batch_size
        self.group = group
        self._order: dict[tuple[int, int, int], np.ndarray] = {}
        if len(self.lengths) < batch_size:
            raise UserError(
                f"the {split} split has {len(self.lengths)} rows, fewer than one global batch of "
                f"{batch_size} (micro-batch × accumulation × ranks): lower "
                "train_micro_batch_size_per_gpu or gradient_accumulation_steps in the DeepSpeed "
                "file, use fewer ranks, or prepare more data"
            )

    def __len__(self) -> int:
        """Return the number of global batches in an epoch."""
        return len(self.lengths) // self.batch_size

    def rows(self, seed: int, phase: int, epoch: int, position: int) -> np.ndarray:
        """Return the row indices [batch_size] of one global batch."""
        return self._epoch(seed, phase, epoch)[position]

    def micro_batches(
        self,
        rows: np.ndarray,
        *,
        micro_batch: int,
        accumulation: int,
        rank: int = 0,
        world: int = 1,
    ) -> list[np.ndarray]:
        """Cut a global batch into this rank's ``accumulation`` micro-batches.

        Ranks take every ``world``-th row of a stretch, so that all pad to about the same length.
        """
        if micro_batch * accumulation * world != self.batch_size:
            raise ValueError(
                f"{micro_batch} rows × {accumulation} micro-batches × {world} ranks is not the "
                f"global batch of {self.batch_size}"
            )
        stretches = rows.reshape(accumulation, micro_batch * world)
        return [stretch[rank::world] for stretch in stretches]

    def following(self, epoch: int, position: int) -> tuple[int, int]:
        """Return the (epoch, position) after this one: where a resumed run begins."""
        return (epoch, position + 1) if position + 1 < len(self) else (epoch + 1, 0)

    def _epoch(self, seed: int, phase: int, epoch: int) -> np.ndarray:
        key = (seed, phase, epoch)
        if key not in self._order:
            self._order = {key: self._shuffled(np.random.default_rng([*key, 0x0B2]))}
        return self._order[key]

    def _shuffled(self, generator: np.random.Generator) -> np.ndarray:
        kept = generator.permutation(len(self.lengths))[: len(self) * self.batch_size]
        groups = np.split(kept, np.arange(0, len(kept), self.group * self.batch_size)[1:])
        ordered = [group[np.argsort(self.lengths[group], kind="stable")] for group in groups]
        batches = np.concatenate(ordered).reshape(len(self), self.batch_size)
        return generator.permutation(batches, axis=0)


def evaluation_batches(
    lengths: np.ndarray, batch_size: int, rank: int = 0, world: int = 1
) -> list[np.ndarray]:
    """Share out every row exactly once over ranks, longest first.

    Ranks hold equally many rows, give or take one, in batches of at most ``batch_size``; a rank
    may therefore have one batch less than another: reduce sums after the loop, not in it.
    """
    rows = np.argsort(-np.asarray(lengths), kind="stable")[rank::world]
    batches = -(-len(rows) // batch_size)
    return np.array_split(rows, batches) if batches else []


class TrialRows(TorchDataset):
    """Rows of a trial dataset as `Example`, ready to collate.

    Texts are tokenized here, in the process that builds the object: workers only read and augment.

    Args:
        dataset: trials, as `b2t.data.dataset.load_trials` returns them.
        tokenizer: any transformers tokenizer with an eos token; None for data without text.
        sessions: the model's sessions in order.
        augment: None leaves signals as recorded.
        max_tokens: longest label sequence, eos included.

    Raises:
        UserError: a text is longer than ``max_tokens``.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: Any,
        sessions: Sequence[str],
        augment: Augment | None = None,
        *,
        seed: int = 0,
        phase: int = 0,
        max_tokens: int | None = None,
    ) -> None:
        self.dataset = dataset.with_format("arrow")
        self.labels = encode_texts(_texts(dataset), tokenizer)
        self.sessions = {name: index for index, name in enumerate(sessions)}
        self.augment = augment
        self.seed = seed
        self.phase = phase
        self._require_short(max_tokens)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int | None, int]) -> Example | UserError:
        """Read the row ``key`` = (epoch, index); an epoch of None reads without augmentation.

        A user's error is returned, not raised: `DataLoader` would wrap it in a worker's traceback.
        """
        epoch, index = key
        try:
            return self.example(epoch, int(index))
        except UserError as error:
            return error

    def example(self, epoch: int | None, index: int) -> Example:
        """Read and augment one row."""
        table = self.dataset[index]
        row = {name: table[name][0].as_py() for name in table.column_names if name != "signal"}
        name = row_id(row)
        signal, target, mask = self._augmented(
            checked_signal(table, name), row["sampling_rate"], name, epoch
        )
        return Example(
            signal=signal,
            target=target,
            mask=mask,
            session=self.sessions.get(row["session"], UNSEEN_SESSION),
            labels=self.labels[index],
            phonemes=np.asarray(row["phonemes"] or [], dtype=np.int64),
            row=name,
            text=row["text"],
        )

    def _augmented(
        self, signal: np.ndarray, sampling_rate: float, name: str, epoch: int | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        augment = self.augment or Augment(enabled=False)
        if epoch is None:
            return augment.evaluation(signal)
        return augment(signal, sampling_rate, row_generator(self.seed, self.phase, epoch, name))

    def _require_short(self, max_tokens: int | None) -> None:
        if max_tokens is None:
            return
        too_long = [index for index, ids in enumerate(self.labels) if len(ids) > max_tokens]
        if too_long:
            raise _too_long(self.dataset, self.labels, too_long, max_tokens)


def encode_texts(texts: Sequence[str | None], tokenizer: Any) -> list[np.ndarray]:
    """Tokenize to label ids [L] as the tokenizer frames a target text, ending in eos.

    A row without text gets an empty array, and so does every row without a tokenizer.
    """
    present = [text for text in texts if text is not None]
    if not present or tokenizer is None:
        return [np.zeros(0, np.int64) for _ in texts]
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the data has text, but the text decoder's tokenizer has no eos token: choose a "
            "tokenizer with one (tokenizer.eos_token)"
        )
    eos = tokenizer.eos_token_id
    encoded = iter(tokenizer(text_target=present)["input_ids"])
    labels = []
    for text in texts:
        ids = [] if text is None else list(next(encoded))
        if text is not None and ids[-1:] != [eos]:
            ids.append(eos)
        labels.append(np.asarray(ids, dtype=np.int64))
    return labels


def _texts(dataset: Dataset) -> list[str | None]:
    return dataset.with_format("arrow").select_columns(["text"])[:]["text"].to_pylist()


def drop_long_texts(dataset: Dataset, tokenizer: Any, max_tokens: int) -> Dataset:
    """Return ``dataset`` without rows of more than ``max_tokens`` labels, logging how many."""
    labels = encode_texts(_texts(dataset), tokenizer)
    kept = [index for index, ids in enumerate(labels) if len(ids) <= max_tokens]
    dropped = len(labels) - len(kept)
    if not dropped:
        return dataset
    logger(__name__).warning(
        "dropped %d of %d rows whose text is longer than %d tokens",
        dropped,
        len(labels),
        max_tokens,
    )
    return dataset.select(kept)


def checked_signal(table: Any, name: str) -> np.ndarray:
    """Return the signal [T, C] of a one-row table, refusing what would poison training.

    Raises:
        UserError: the trial is empty, ragged, or holds NaN or infinity; the message names the row.
    """
    try:
        signal = read_signal(table)
    except ValueError as error:
        raise UserError(f"trial {name}: {error}: every bin needs the same channels") from None
    require_finite(signal, name)
    return signal


def train_batches(
    dataset: Dataset,
    plan: BatchPlan,
    tokenizer: Any,
    sessions: Sequence[str],
    augment: Augment | None,
    *,
    seed: int,
    phase: int = 0,
    epoch: int = 0,
    position: int = 0,
    micro_batch: int,
    accumulation: int = 1,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    max_tokens: int | None = None,
) -> Iterator[tuple[int, int, list[Batch]]]:
    """Yield (epoch, position, micro-batches of this rank) without end, from (epoch, position) on.

    The same for any number of workers. Close the iterator to stop the workers.

    Raises:
        UserError: a trial that cannot be trained on, or a text over ``max_tokens``.
    """
    rows = TrialRows(
        dataset, tokenizer, sessions, augment, seed=seed, phase=phase, max_tokens=max_tokens
    )
    share = partial(
        plan.micro_batches,
        micro_batch=micro_batch,
        accumulation=accumulation,
        rank=rank,
        world=world,
    )
    share(plan.rows(seed, phase, epoch, position))
    return _steps(rows, plan, share, (epoch, position), accumulation, workers)


def _steps(
    rows: TrialRows,
    plan: BatchPlan,
    share: Callable[[np.ndarray], list[np.ndarray]],
    start: tuple[int, int],
    accumulation: int,
    workers: int,
) -> Iterator[tuple[int, int, list[Batch]]]:
    def keys() -> Iterator[list[tuple[int, int]]]:
        epoch, position = start
        while True:
            for micro in share(plan.rows(rows.seed, rows.phase, epoch, position)):
                yield [(epoch, int(index)) for index in micro]
            epoch, position = plan.following(epoch, position)

    epoch, position = start
    batches = _load(rows, keys(), workers)
    while True:
        yield epoch, position, [next(batches) for _ in range(accumulation)]
        epoch, position = plan.following(epoch, position)


def eval_batches(
    dataset: Dataset,
    tokenizer: Any,
    sessions: Sequence[str],
    *,
    augment: Augment | None = None,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    max_tokens: int | None = None,
) -> Iterator[Batch]:
    """Yield every row exactly once over all ranks, longest first, without random augmentation.

    Args:
        augment: the training augmentation, whose smoothing also belongs to evaluation.
        batch_size: most rows in a batch.
    """
    rows = TrialRows(dataset, tokenizer, sessions, augment, max_tokens=max_tokens)
    plan = evaluation_batches(signal_lengths(dataset), batch_size, rank, world)
    keys = ([(None, int(index)) for index in batch] for batch in plan)
    return _load(rows, keys, workers)


def _load(rows: TrialRows, keys: Iterator[list[Any]], workers: int) -> Iterator[Batch]:
    loader = DataLoader(
        rows,
        batch_sampler=_Keys(keys),
        collate_fn=_collate_or_error,
        num_workers=workers,
        # Its own generator: a new loader must not advance the model's random state.
        generator=torch.Generator(),
        prefetch_factor=2 if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_calm_worker if workers else None,
        multiprocessing_context="fork" if workers else None,
    )
    with warnings.catch_warnings():
        # Python 3.12 warns of every fork beside threads; workers use numpy and Arrow alone.
        warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
        batches = iter(loader)
    for batch in batches:
        if isinstance(batch, UserError):
            raise batch
        yield batch


class _Keys:
    """Batches of keys as `DataLoader` wants them: an iterable read once."""

    def __init__(self, keys: Iterator[list[Any]]) -> None:
        self.keys = keys

    def __iter__(self) -> Iterator[list[Any]]:
        return self.keys


def _collate_or_error(examples: Sequence[Example | UserError]) -> Batch | UserError:
    errors = [example for example in examples if isinstance(example, UserError)]
    return errors[0] if errors else collate(examples)  # type: ignore[arg-type]


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


def _too_long(
    dataset: Dataset, labels: list[np.ndarray], rows: list[int], max_tokens: int
) -> UserError:
    row = dataset.select_columns(["session", "block", "trial", "text"]).with_format(None)[rows[0]]
    return UserError(
        f"trial {row_id(row)}: its text has {len(labels[rows[0]])} tokens, more than the limit of "
        f"{max_tokens} ({len(rows)} such rows): {row['text'][:60]!r}…; raise the limit or "
        "drop such rows"
    )
