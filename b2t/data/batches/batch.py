"""Trials padded to a common length."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from b2t.data.augment_batch import Draws, Packed, augmented, pack
from b2t.data.batches.buffers import Buffers
from b2t.data.options import AugmentOptions
from b2t.data.trials import require_finite
from b2t.labels import IGNORE


class Pending(NamedTuple):
    """Augmentation of a batch that is still to be done."""

    draws: Packed
    options: AugmentOptions


@dataclass
class Batch:
    """Trials padded to a common length.

    Attributes:
        signal: [B, T, C] float32, augmented by `to`; zero under the mask.
        target: [B, T, C] float32, what the signal decoder must give back.
        signal_mask: [B, T] bool, True = recorded. A shifted trial may also start with masked bins.
        session: [B] int64, index into the model's sessions; -1 = unseen.
        tokens: [B, L] int64 labels ending in eos, padded with -100; a row without text is all -100.
        phonemes: [B, S] int64 class ids 1..40, padded with 0.
        phoneme_lengths: [B] int64, 0 = no phonemes.
        rows: ids ``session/block/trial``.
        texts: the sentences, None where a row has none.
        hidden: [B, T] bool, True = recorded but hidden from the encoder, for the loss `masked`;
            None where nothing is.
        row_ids: [B] int64, hashes of ``rows``: what the rows are, where a device needs to know.
        pending: augmentation that `to` applies; until then signal and target [B, T', C] are as
            recorded and have other lengths than the mask.
        frames: real latent frames, where a model has counted them before the batch was moved; a
            batch made of this one does not know them.
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
    hidden: torch.Tensor | None = None
    row_ids: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    pending: Pending | None = None
    frames: int | None = field(default=None, init=False)
    _counts: dict[str, float] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if len(self.row_ids) != len(self.rows):
            digests = [hashlib.blake2b(row.encode(), digest_size=8).digest() for row in self.rows]
            self.row_ids = torch.from_numpy(np.frombuffer(b"".join(digests), "<i8").copy())

    def __len__(self) -> int:
        return len(self.rows)

    def counts(self) -> dict[str, float]:
        """Count the elements that losses are averaged over.

        Returns ``bins`` (recorded bins times channels), ``hidden`` (those that are hidden),
        ``tokens``, ``phonemes`` and ``rows``.
        Counted once, on the CPU when the batch was loaded, so that asking costs no device wait.
        """
        if self._counts is None:
            channels = self.signal.shape[-1]
            self._counts = {
                "bins": float(self.signal_mask.sum() * channels),
                "hidden": 0.0 if self.hidden is None else float(self.hidden.sum() * channels),
                "tokens": float((self.tokens != IGNORE).sum()),
                "phonemes": float(self.phoneme_lengths.sum()),
                "rows": float(len(self)),
            }
        return dict(self._counts)

    def with_channels(self, order: Sequence[int]) -> "Batch":
        """Return the batch with the channels of signal and target in this order."""
        signal, target = self.signal[..., order], self.target[..., order]
        pending = self.pending
        if pending is not None:
            pending = pending._replace(draws=pending.draws.with_channels(order))
        return replace(self, signal=signal, target=target, pending=pending, _counts=None)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Batch":
        """Move to ``device`` and augment there; ``dtype`` casts signal and target only."""
        moved = self._map(partial(torch.Tensor.to, device=device, non_blocking=True))
        if moved.pending is not None:
            draws, options = moved.pending
            signal, target = augmented(moved.signal, draws, options)
            moved = replace(moved, signal=signal, target=target, pending=None)
            moved.frames = self.frames
        if dtype is None:
            return moved
        return moved._map(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory (called by ``DataLoader``)."""
        return self._map(torch.Tensor.pin_memory)

    def share_memory(self) -> "Batch":
        """Return the batch in memory that other processes see.

        Raises:
            RuntimeError: there is not enough of it.
        """
        return self._map(torch.Tensor.share_memory_)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        once: dict[int, torch.Tensor] = {}  # signal and target may be one tensor

        def mapped(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in once:
                once[id(tensor)] = function(tensor)
            return once[id(tensor)]

        changed: dict[str, Any] = {
            name: mapped(value)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        if self.pending is not None:
            changed["pending"] = Pending(self.pending.draws.map(function), self.pending.options)
        mapped_to = replace(self, **changed)
        mapped_to.frames = self.frames
        return mapped_to


class Example(NamedTuple):
    """One row: signal and target [T, C], mask [T], labels [L], phonemes [S].

    ``hidden`` [T] bool is what the loss `masked` asks for, None where nothing is hidden. With
    ``draws`` signal and target are as recorded [T', C], and `Batch.to` augments them. A target that
    is ``checked`` is known to be finite.
    """

    signal: np.ndarray
    target: np.ndarray
    mask: np.ndarray
    session: int
    labels: np.ndarray
    phonemes: np.ndarray
    row: str
    text: str | None
    hidden: np.ndarray | None = None
    draws: Draws | None = None
    options: AugmentOptions | None = None
    checked: bool = False


def collate(examples: Sequence[Example], buffers: Buffers | None = None) -> Batch:
    """Pad ``examples`` into one batch.

    Args:
        examples: rows with the same channels.
        buffers: memory to put signals in; None allocates it.

    Raises:
        UserError: a signal holds what would poison training; the message names its row.
    """
    empty = np.empty if buffers is None else buffers.empty

    def padded(name: str, value: float, *, least: int = 0, check: bool = False) -> torch.Tensor:
        rows = [getattr(example, name) for example in examples]
        longest = max(least, *map(len, rows))
        whole = empty((len(rows), longest, *rows[0].shape[1:]), rows[0].dtype)
        for place, row, example in zip(whole, rows, examples, strict=True):
            place[: len(row)], place[len(row) :] = row, value
            if (
                check and not example.checked
            ):  # here, where the copy is still in the processor's cache
                require_finite(place[: len(row)], example.row)
        return torch.from_numpy(whole)

    def integers(values: list[int]) -> torch.Tensor:
        return torch.from_numpy(np.array(values, np.int64))

    draws = [example.draws for example in examples if example.draws is not None]
    # The target is as recorded; smoothing would spread a NaN over other bins of the signal.
    target = padded("target", 0.0, check=True)
    same = all(example.target is example.signal for example in examples)
    batch = Batch(
        signal=target if same else padded("signal", 0.0),
        target=target,
        signal_mask=padded("mask", False),
        session=integers([example.session for example in examples]),
        tokens=padded("labels", IGNORE, least=1),
        phonemes=padded("phonemes", 0, least=1),
        phoneme_lengths=integers([len(example.phonemes) for example in examples]),
        rows=[example.row for example in examples],
        texts=[example.text for example in examples],
        hidden=None if examples[0].hidden is None else padded("hidden", False),
        pending=Pending(pack(draws), examples[0].options or AugmentOptions()) if draws else None,
    )
    batch.counts()
    return batch
