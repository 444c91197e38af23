"""The order of rows: global batches of similar length in training, every row once in evaluation.

The order is our own and not transformers' ``DistributedLengthGroupedSampler``: that one repeats
rows until the split divides by the world size, and deals rows to ranks in an order that changes
with it, so that neither a resume at a position nor "one rank sees what two ranks see" can hold.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from b2t.errors import UserError

_DEALT = 4
"""Neighbouring batches over which stratified sessions are dealt: more is evener and pads more."""


@dataclass(frozen=True)
class Budget:
    """Bounds of a micro-batch where trials differ in length.

    Attributes:
        frames: time bins at most, padding included: trials times the longest of them.
        trials: trials at most.
        micro_batches: of a global batch: accumulation times world size.
    """

    frames: int
    trials: int
    micro_batches: int


class BatchPlan:
    """The order of training rows: global batches of rows of similar length.

    A global batch is a function of (seed, phase, epoch, position) and of the rows' lengths; ranks
    and micro-batches only share it out. Each epoch shuffles the rows, leaves out the few that do
    not fill a batch, sorts groups of ``group`` batches by length, and shuffles the batches.

    With a budget a global batch is a fixed number of micro-batches, each of as many trials as fit,
    so that an epoch has more or fewer global batches from one to the next.

    Args:
        lengths: time bins of each row, [rows].
        batch_size: rows of a global batch: micro-batch times accumulation times world size; with a
            budget at most so many.
        group: batches whose rows are sorted together: more means less padding and less chance.
        split: name used in errors.
        budget: of micro-batches; None counts trials alone.
        sessions: session of each row, [rows], to deal evenly over neighbouring batches; None
            leaves it to chance.
        weights: how often each row comes in an epoch, [rows]; None means once. Row ``r + k·rows``
            is row ``r`` for the time ``k + 1``.

    Raises:
        UserError: the split has fewer rows than one global batch, or a trial exceeds the budget.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        batch_size: int,
        *,
        group: int = 20,
        split: str = "train",
        budget: Budget | None = None,
        sessions: np.ndarray | None = None,
        weights: np.ndarray | None = None,
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.batch_size = batch_size
        self.group = group
        self.budget = budget
        self._sessions = None if sessions is None else np.unique(sessions, return_inverse=True)[1]
        self._weights = weights
        self._order: dict[tuple[int, int, int], list[np.ndarray]] = {}
        self._rows = len(self.lengths) if weights is None else sum(n for *_, n in self._shares())
        longest = int(self.lengths.max(initial=0))
        if budget is not None and longest > budget.frames:
            raise UserError(
                f"data.max_frames={budget.frames}: the longest trial of the {split} split has "
                f"{longest} bins and fits into no micro-batch; raise it, or leave out such trials"
            )
        if self.steps(0, 0, 0) < 1:
            raise UserError(
                f"the {split} split has {self._rows} rows, fewer than one global batch of "
                f"{batch_size} (micro-batch × accumulation × ranks): lower "
                "train_micro_batch_size_per_gpu or gradient_accumulation_steps in the DeepSpeed "
                "file, use fewer ranks, or prepare more data"
            )

    def __len__(self) -> int:
        """Return the number of global batches in an epoch; with a budget in the very first one."""
        return self.steps(0, 0, 0)

    def steps(self, seed: int, phase: int, epoch: int) -> int:
        """Return the number of global batches in an epoch."""
        if self.budget is None:
            return self._rows // self.batch_size
        return len(self._epoch(seed, phase, epoch)) // self.budget.micro_batches

    def place(self, seed: int, phase: int, consumed: int) -> tuple[int, int]:
        """Return the (epoch, position) of the global batch after ``consumed`` of a phase."""
        if self.budget is None:
            return divmod(consumed, self._rows // self.batch_size)
        epoch = 0
        while consumed >= (steps := self.steps(seed, phase, epoch)):
            consumed, epoch = consumed - steps, epoch + 1
        return epoch, consumed

    def rows(self, seed: int, phase: int, epoch: int, position: int) -> np.ndarray:
        """Return the row indices of one global batch, [batch_size] without a budget."""
        return np.concatenate(self._units(seed, phase, epoch, position))

    def micro_batches(
        self,
        seed: int,
        phase: int,
        epoch: int,
        position: int,
        *,
        micro_batch: int,
        accumulation: int,
        rank: int = 0,
        world: int = 1,
    ) -> list[np.ndarray]:
        """Cut a global batch into this rank's ``accumulation`` micro-batches.

        Ranks take every ``world``-th row of a stretch, or with a budget every ``world``-th
        micro-batch, so that all pad to about the same length.
        """
        units = self._units(seed, phase, epoch, position)
        if self.budget is not None:
            if accumulation * world != self.budget.micro_batches:
                raise ValueError(
                    f"{accumulation} micro-batches × {world} ranks are not the "
                    f"{self.budget.micro_batches} of a global batch"
                )
            return units[rank::world]
        if micro_batch * accumulation * world != self.batch_size:
            raise ValueError(
                f"{micro_batch} rows × {accumulation} micro-batches × {world} ranks is not the "
                f"global batch of {self.batch_size}"
            )
        stretches = units[0].reshape(accumulation, micro_batch * world)
        return [stretch[rank::world] for stretch in stretches]

    def following(self, seed: int, phase: int, epoch: int, position: int) -> tuple[int, int]:
        """Return the (epoch, position) after this one: where a resumed run begins."""
        last = position + 1 >= self.steps(seed, phase, epoch)
        return (epoch + 1, 0) if last else (epoch, position + 1)

    def _units(self, seed: int, phase: int, epoch: int, position: int) -> list[np.ndarray]:
        """Return a global batch: whole, or in its micro-batches where there is a budget."""
        each = 1 if self.budget is None else self.budget.micro_batches
        return self._epoch(seed, phase, epoch)[position * each : (position + 1) * each]

    def _epoch(self, seed: int, phase: int, epoch: int) -> list[np.ndarray]:
        key = (seed, phase, epoch)
        if key not in self._order:
            newest = list(self._order.items())[-1:]  # workers read ahead into the next epoch
            self._order = dict(newest) | {key: self._shuffled(np.random.default_rng([*key, 0x0B2]))}
        return self._order[key]

    def _shuffled(self, generator: np.random.Generator) -> list[np.ndarray]:
        kept = self._drawn(generator)
        if self.budget is None:
            kept = kept[: len(kept) // self.batch_size * self.batch_size]
        groups = np.split(kept, np.arange(0, len(kept), self.group * self.batch_size)[1:])
        units = [unit for group in groups for unit in self._cut(group)]
        if self.budget is None:
            return list(generator.permutation(np.array(units), axis=0)) if units else []
        each = self.budget.micro_batches
        batches = generator.permutation(len(units) // each)
        return [units[batch * each + place] for batch in batches for place in range(each)]

    def _shares(self) -> list[tuple[np.ndarray, float, int]]:
        """Return the rows of each weight, the weight, and how many of them an epoch holds."""
        assert self._weights is not None
        return [
            (rows, float(weight), round(float(weight) * len(rows)))
            for weight in np.unique(self._weights)
            for rows in [np.flatnonzero(self._weights == weight)]
        ]

    def _drawn(self, generator: np.random.Generator) -> np.ndarray:
        """Draw the rows of an epoch in random order, as often as their weights say."""
        count = len(self.lengths)
        if self._weights is None:
            return generator.permutation(count)
        drawn = []
        for rows, weight, wanted in self._shares():
            times = int(weight)
            drawn += [rows + copy * count for copy in range(times)]
            rest = generator.permutation(rows)[: wanted - times * len(rows)]
            drawn.append(rest + times * count)
        return generator.permutation(np.concatenate(drawn))

    def _cut(self, rows: np.ndarray) -> list[np.ndarray]:
        """Cut rows into batches, or micro-batches, of similar length."""
        lengths = self.lengths[rows % len(self.lengths)]
        order = np.argsort(lengths, kind="stable")
        rows, lengths = rows[order], lengths[order]
        together = 1 if self._sessions is None else _DEALT
        units: list[np.ndarray] = []
        start = 0
        while start < len(rows):
            size = self._size(lengths, start, together)
            window = rows[start : start + size * together]
            start += len(window)
            units += self._dealt(window, -(-len(window) // size))
        return units

    def _size(self, lengths: np.ndarray, start: int, together: int) -> int:
        """Return how many rows a unit holds of ``together`` that begin at ``start``."""
        if self.budget is None:
            return self.batch_size
        size = self.budget.trials
        while True:
            end = min(start + size * together, len(lengths))
            fits = max(1, self.budget.frames // max(1, int(lengths[end - 1])))
            if size <= fits:
                return size
            size -= 1

    def _dealt(self, rows: np.ndarray, units: int) -> list[np.ndarray]:
        """Share rows out over units, each session as evenly as it goes."""
        if self._sessions is None or units == 1:
            return np.array_split(rows, units)
        order = np.argsort(self._sessions[rows % len(self.lengths)], kind="stable")
        # Sorted by length again: ranks and micro-batches take their shares in this order.
        return [rows[np.sort(order[unit::units])] for unit in range(units)]


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
