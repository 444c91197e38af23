"""Rows of a dataset: read, checked, augmented, their texts tokenized."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset

from b2t.data.augment import Augment, AugmentCourse, row_generator
from b2t.data.batches.batch import Example
from b2t.data.masking import Masking
from b2t.data.trial_reader import TrialReader
from b2t.data.trials import require_finite, row_id, values_of
from b2t.errors import UserError
from b2t.labels import UNSEEN_SESSION

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TrialRows(TorchDataset):
    """Rows of a trial dataset as `Example`, ready to collate; `Batch.to` augments them.

    Texts are tokenized here, in the process that builds the object: workers only read and augment.

    Args:
        dataset: trials, as `b2t.data.dataset.load_trials` returns them.
        tokenizer: any transformers tokenizer with an eos token; None for data without text.
        sessions: the model's sessions in order.
        augment: None leaves signals as recorded.
        masking: hides parts of the signals from the encoder; None hides nothing.
        max_tokens: longest label sequence, eos included.

    Raises:
        UserError: a text is longer than ``max_tokens``.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: "PreTrainedTokenizerBase | None",
        sessions: Sequence[str],
        augment: Augment | AugmentCourse | None = None,
        *,
        seed: int = 0,
        phase: int = 0,
        max_tokens: int | None = None,
        masking: Masking | None = None,
    ) -> None:
        self.masking = masking
        self.dataset = dataset
        self._reader = TrialReader(dataset)
        self._checked = np.zeros(len(self._reader), bool)
        self.labels = _labels(dataset, tokenizer)
        self.sessions = {name: index for index, name in enumerate(sessions)}
        self.augment = augment or Augment(enabled=False)
        self.seed = seed
        self.phase = phase
        self._require_short(max_tokens)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int | None, int, int]) -> Example | UserError:
        """Read the row ``key`` = (epoch, index, step); no epoch (None) reads it as it is.

        A user's error is returned, not raised: `DataLoader` would wrap it in a worker's traceback.
        """
        epoch, index, step = key
        copy, row = divmod(int(index), len(self))
        try:
            return self.example(epoch, row, copy, step)
        except UserError as error:
            return error

    def example(self, epoch: int | None, index: int, copy: int = 0, step: int = 0) -> Example:
        """Read one row, and draw its augmentation: another one for each ``copy`` of an epoch.

        ``step``, counted in global batches of the phase, is what augmentation may ramp with.
        """
        row = self._reader.row(index)
        signal = self._signal(index, row)
        example = self.example_of(row, signal, self.labels[index], epoch, copy, step)
        return example._replace(checked=True)

    def _signal(self, index: int, row: dict[str, Any]) -> np.ndarray:
        """Read the signal [T, C] of a row, and check it when it is read for the first time.

        Raises:
            UserError: it cannot be trained on; the message names the row.
        """
        try:
            signal = self._reader.signal(index)
        except ValueError as error:
            raise UserError(
                f"trial {row_id(row)}: {error}: every bin needs the same channels"
            ) from None
        if not self._checked[index]:  # what is mapped into memory stays as it is
            require_finite(signal, row_id(row))
            self._checked[index] = True
        return signal

    def example_of(
        self,
        row: dict[str, Any],
        signal: np.ndarray,
        labels: np.ndarray,
        epoch: int | None,
        copy: int = 0,
        step: int = 0,
    ) -> Example:
        """Make an example of a row's columns, its signal [T, C] and its labels [L]."""
        name = row_id(row)
        drawn_by = f"{name} {copy}" if copy else name
        session = self.sessions.get(row["session"], UNSEEN_SESSION)
        augment = self.augment.at(step)
        draws = None
        if epoch is None or not augment.enabled:
            signal, target, mask = augment.evaluation(signal)
        else:
            generator = row_generator(self.seed, self.phase, epoch, drawn_by)
            draws = augment.draw(signal.shape, row["sampling_rate"], generator)
            session = augment.mixed(session, len(self.sessions), generator)
            target, mask = signal, draws.mask()
        return Example(
            signal=signal,
            target=target,
            mask=mask,
            session=session,
            labels=labels,
            phonemes=np.asarray(() if row["phonemes"] is None else row["phonemes"], np.int64),
            row=name,
            text=row["text"],
            hidden=self._hidden(mask, drawn_by, epoch),
            draws=draws,
            options=None if draws is None else augment,
        )

    def _hidden(self, mask: np.ndarray, name: str, epoch: int | None) -> np.ndarray | None:
        if self.masking is None:
            return None
        if epoch is None:  # the same at every validation
            return self.masking(mask, 0, 0, 0, name)
        return self.masking(mask, self.seed, self.phase, epoch, name)

    def _require_short(self, max_tokens: int | None) -> None:
        if max_tokens is None:
            return
        too_long = [index for index, ids in enumerate(self.labels) if len(ids) > max_tokens]
        if too_long:
            raise _too_long(self.dataset, self.labels, too_long, max_tokens)


_LABELS: WeakKeyDictionary[Any, dict[str, list[np.ndarray]]] = WeakKeyDictionary()
"""Labels by tokenizer and by the fingerprint that `datasets` gives rows: a split is tokenized once,
not at each validation."""


def _labels(dataset: Dataset, tokenizer: "PreTrainedTokenizerBase | None") -> list[np.ndarray]:
    if tokenizer is None:
        return encode_texts(_texts(dataset), None)
    known = _LABELS.setdefault(tokenizer, {})
    if dataset._fingerprint not in known:
        known[dataset._fingerprint] = encode_texts(_texts(dataset), tokenizer)
    return known[dataset._fingerprint]


def encode_texts(
    texts: Sequence[str | None], tokenizer: "PreTrainedTokenizerBase | None"
) -> list[np.ndarray]:
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
    return values_of(dataset, "text")


def _too_long(
    dataset: Dataset, labels: list[np.ndarray], rows: list[int], max_tokens: int
) -> UserError:
    row = dataset.select_columns(["session", "block", "trial", "text"]).with_format(None)[rows[0]]
    return UserError(
        f"trial {row_id(row)}: its text has {len(labels[rows[0]])} tokens, more than the limit of "
        f"{max_tokens} ({len(rows)} such rows): {row['text'][:60]!r}…; raise the limit or "
        "drop such rows"
    )
