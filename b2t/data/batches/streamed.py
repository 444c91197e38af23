"""Batches of a stream: each rank reads its own share, and knows where it is."""

from collections.abc import Generator, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import IterableDataset

from b2t.data.batches.batch import Batch, Example, collate
from b2t.data.batches.buffers import Buffers
from b2t.data.batches.order import BatchPlan, Budget
from b2t.data.batches.rows import TrialRows, encode_texts
from b2t.data.description import describe, row_of, stream
from b2t.data.trials import require_bins, row_id
from b2t.errors import UserError
from b2t.log import logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


log = logger(__name__)


class StreamedTrials:
    """Training trials of a stream, without end.

    A rank reads a window of rows, cuts it into batches of similar length as `BatchPlan` does, and
    goes on with the next. Which rows come together depends on the number of ranks.

    Args:
        path: of the description.
        split: that is trained on.
        rank, world: whose share is read.

    Attributes:
        position: where the next step begins, as JSON values: give it back to `go_to`.
    """

    def __init__(self, path: str, split: str, rank: int = 0, world: int = 1) -> None:
        self.path, self.split = path, split
        self.rank, self.world = rank, world
        self._reading: tuple[IterableDataset, Iterator[dict[str, Any]]] | None = None
        self.position: dict[str, Any] = {
            "epoch": 0, "windows": 0, "rows": 0, "state": None, "step": 0,
        }  # fmt: skip

    def go_to(self, positions: Sequence[dict[str, Any]]) -> None:
        """Continue where ranks were.

        As many ranks go on exactly. Of another number each has another share of the rows, and
        begins the next epoch: what nobody has read of the unfinished one waits until then.

        Args:
            positions: of every rank.
        """
        self._reading = None
        if len(positions) == self.world:
            self.position = dict(positions[self.rank])
            return
        log.warning(
            "%s: %d ranks shared this stream and %d go on with it: from its next epoch, as the "
            "rows that they read are others",
            self.path, len(positions), self.world,
        )  # fmt: skip
        epoch, windows = (max(each[name] for each in positions) for name in ("epoch", "windows"))
        self.position = {
            "epoch": epoch + 1, "windows": windows + 1, "rows": 0, "state": None, "step": 0,
        }  # fmt: skip

    def batches(
        self,
        rows: TrialRows,
        tokenizer: "PreTrainedTokenizerBase | None",
        *,
        micro_batch: int,
        accumulation: int,
        consumed: int = 0,
        max_frames: int | None = None,
        max_tokens: int | None = None,
    ) -> Generator[list[Batch], None, None]:
        """Yield the micro-batches of each step of this rank; `position` is that after them.

        Args:
            rows: makes examples; knows sessions, augmentation, seed and phase.
            tokenizer: of the texts; None for data without.
            micro_batch: trials of a micro-batch; with ``max_frames`` at most.
            accumulation: micro-batches of a step.
            consumed: global batches of the phase that are past: what augmentation ramps with.
            max_frames: padded bins of a micro-batch at most.
            max_tokens: longest label sequence, eos included.

        Raises:
            UserError: in iterating, a row that cannot be trained on.
        """
        budget = None if max_frames is None else Budget(max_frames, micro_batch, accumulation)
        buffers = Buffers()
        size = max(describe(self.path).window, micro_batch * accumulation)
        while True:
            window, following = self._window(size)
            lengths = [len(row["signal"]) for row in window]
            labels = encode_texts([row["text"] for row in window], tokenizer)
            _require_short(window, labels, max_tokens)
            plan = BatchPlan(lengths, micro_batch * accumulation, split=self.split, budget=budget)
            key = (rows.seed, rows.phase, self.position["windows"])
            for step in range(self.position["step"], plan.steps(*key)):
                micros = plan.micro_batches(
                    *key, step, micro_batch=micro_batch, accumulation=accumulation
                )
                last = step + 1 == plan.steps(*key)
                batches = [
                    collate(
                        [_example(rows, window, labels, int(row), consumed) for row in micro],
                        buffers,
                    )
                    for micro in micros
                ]
                self.position = following if last else {**self.position, "step": step + 1}
                consumed += 1
                yield batches

    def _open(self, epoch: int, state: Any) -> tuple[IterableDataset, Iterator[dict[str, Any]]]:
        data = stream(self.path, self.split, self.rank, self.world)
        data.set_epoch(epoch)
        if state is not None:
            data.load_state_dict(state)
        return data, iter(data)

    def _window(self, size: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Read the window at `position`; return it, and the position of the next."""
        here = self.position
        epoch, read = here["epoch"], here["rows"]
        if self._reading is None:
            self._reading = self._open(epoch, here["state"])
        window: list[dict[str, Any]] = []
        while len(window) < size:
            for raw in islice(self._reading[1], size - len(window)):
                number = read * self.world + self.rank
                window.append({**row_of(raw, number, self.split, self.path), "epoch": epoch})
                read += 1
            if len(window) < size:
                if not read:
                    raise UserError(f"{self.path}: rank {self.rank} finds no row to train on")
                epoch, read = epoch + 1, 0
                self._reading = self._open(epoch, None)
        state = self._reading[0].state_dict()
        following = {
            **here, "epoch": epoch, "rows": read, "state": state, "step": 0,
            "windows": here["windows"] + 1,
        }  # fmt: skip
        return window, following


def _example(
    rows: TrialRows, window: list[dict[str, Any]], labels: list[np.ndarray], place: int, step: int
) -> Example:
    row = window[place]
    require_bins(row["signal"], row_id(row))
    return rows.example_of(row, row["signal"], labels[place], row["epoch"], step=step)


def _require_short(
    window: list[dict[str, Any]], labels: list[np.ndarray], max_tokens: int | None
) -> None:
    for row, ids in zip(window, labels, strict=True):
        if max_tokens is not None and len(ids) > max_tokens:
            raise UserError(
                f"trial {row_id(row)}: its text has {len(ids)} tokens, more than the limit of "
                f"{max_tokens}: {row['text'][:60]!r}…; raise data.max_text_tokens"
            )
