"""When a run saves, what it gathers for a checkpoint, and the thread that writes it."""

import copy
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from b2t.log import logger
from b2t.train import snapshot
from b2t.train.callback import Callback, Run
from b2t.train.checkpoint import Checkpoint, CheckpointStore
from b2t.train.host_copies import HostCopies

log = logger(__name__)


class Saving(Callback):
    """Writes a checkpoint every so many steps, and where it is told to.

    Training stands still while weights, moments and buffers are copied to the memory of rank 0; a
    thread there writes them. One checkpoint is written at a time: the next waits for it, and so
    does whoever leaves. A process that is killed meanwhile leaves the one before.

    Args:
        every: steps between two checkpoints.
    """

    collective = True

    def __init__(self, every: int) -> None:
        self.every = every
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._buffers = HostCopies()
        self._origin: dict[str, Any] | None = None

    def after_step(self, trainer: Run, last: bool) -> None:
        """Save where it is due; the end of a phase does so anyway.

        Also where early stopping may come back to this step.
        """
        step = trainer.progress.step
        if (step % self.every == 0 or step == trainer.progress.restorable) and not last:
            self.save(trainer)

    def save(self, trainer: Run) -> None:
        """Copy this moment and let it be written. Collective."""
        trainer.ranks.place = f"saving after step {trainer.progress.step}"
        _note_streams(trainer)
        self.wait()
        moments, numbers = trainer.engine.state()
        averages = trainer.gather_averages()
        gathered = trainer.engine.gather_masters()
        window = trainer.window.state()
        if trainer.ranks.is_main:
            masters = {**trainer.masters, **gathered}
            self._write(trainer, masters, moments, averages, numbers, window)
        trainer.clock.restart()

    def save_between_phases(self, trainer: Run) -> None:
        """Save the start of a phase, whose optimizer is new."""
        trainer.ranks.place = f"saving before phase {trainer.phase.name}"
        _note_streams(trainer)
        self.wait()
        if trainer.ranks.is_main:
            # The next phase may move these very weights while the thread writes them.
            masters = {name: weight.clone() for name, weight in trainer.masters.items()}
            self._write(trainer, masters, {}, trainer.averages, None, None)
        trainer.clock.restart()

    def wait(self) -> None:
        """Return when the last checkpoint is on the disk, or its failure logged."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def settle(self, trainer: Run) -> None:
        """Let all ranks wait until the last checkpoint is on the disk. Collective."""
        self.wait()
        trainer.ranks.barrier()

    def _write(
        self,
        trainer: Run,
        masters: Mapping[str, Tensor],
        moments: dict[str, Tensor],
        averages: Mapping[str, Tensor],
        engine: dict[str, Any] | None,
        window: dict[str, Any] | None,
    ) -> None:
        if self._origin is None:
            self._origin = snapshot.origin(
                trainer.config, trainer.ds_file, trainer.ranks, trainer.materials.fingerprint
            )
        buffers = self._buffers.take(dict(trainer.model.named_buffers()))
        progress = trainer.progress
        checkpoint = snapshot.take(
            weights={**masters, **buffers},
            moments=moments,
            averages=averages,
            progress=progress,
            callbacks=trainer.callbacks,
            numbers={"engine": engine, "window": window},
            origin=self._origin,
        )
        checkpoint.state = copy.deepcopy(checkpoint.state)  # hooks may go on with theirs
        self._writing = self._thread.submit(
            _write_and_say,
            trainer.store,
            progress.step,
            checkpoint,
            milestone=progress.finished or engine is None,
            spare={progress.restorable},
        )


def _note_streams(trainer: Run) -> None:
    """Take where every rank is in a streamed dataset into the clocks. Collective."""
    stream = trainer.materials.stream
    if stream is not None:
        trainer.progress.streams = trainer.ranks.gather(stream.position)


def _write_and_say(
    store: CheckpointStore, step: int, checkpoint: Checkpoint, milestone: bool, spare: set[int]
) -> None:
    path = store.save(step, checkpoint, milestone, spare)
    if path is not None:
        log.info("checkpoint %s", path)
