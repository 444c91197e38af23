"""The order of rows: global batches of similar length in training, every row once in evaluation.

The order is our own and not transformers' ``DistributedLengthGroupedSampler``: that one repeats
rows until the split divides by the world size, and deals rows to ranks in an order that changes
with it, so that neither a resume at a position nor "one rank sees what two ranks see" can hold.
"""

from collections.abc import Sequence

import numpy as np

from b2t.errors import UserError


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
