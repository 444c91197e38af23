"""When a run writes a checkpoint of itself, and what it gathers for one."""

from typing import Any

from torch import Tensor

from b2t.log import logger
from b2t.train import snapshot
from b2t.train.callback import Callback, Run

log = logger(__name__)


class Saving(Callback):
    """Writes a checkpoint every so many steps, and where it is told to.

    Args:
        every: steps between two checkpoints.
    """

    collective = True

    def __init__(self, every: int) -> None:
        self.every = every

    def after_step(self, trainer: Run, last: bool) -> None:
        """Save where it is due; the end of a phase does so anyway.

        Also where early stopping may come back to this step.
        """
        step = trainer.progress.step
        if (step % self.every == 0 or step == trainer.progress.restorable) and not last:
            self.save(trainer)

    def save(self, trainer: Run) -> None:
        """Write a checkpoint of this moment. Collective."""
        trainer.ranks.place = f"saving after step {trainer.progress.step}"
        moments, numbers = trainer.engine.state()
        trainer.collect_averages()
        masters = trainer.engine.collect_masters()
        self._write(trainer, masters, moments, numbers, trainer.window.state())

    def save_between_phases(self, trainer: Run) -> None:
        """Write a checkpoint of the start of a phase, whose optimizer is new. Collective."""
        trainer.ranks.place = f"saving before phase {trainer.phase.name}"
        self._write(trainer, trainer.masters, {}, None, None)

    @staticmethod
    def _write(
        trainer: Run,
        masters: dict[str, Tensor],
        moments: dict[str, Tensor],
        engine: dict[str, Any] | None,
        window: dict[str, Any] | None,
    ) -> None:
        if trainer.ranks.is_main:
            origin = snapshot.origin(
                trainer.config, trainer.ds_file, trainer.ranks, trainer.materials.info.fingerprint
            )
            checkpoint = snapshot.take(
                weights={**masters, **dict(trainer.model.named_buffers())},
                moments=moments,
                averages=trainer.averages,
                progress=trainer.progress,
                callbacks=trainer.callbacks,
                numbers={"engine": engine, "window": window},
                origin=origin,
            )
            path = trainer.store.save(
                trainer.progress.step,
                checkpoint,
                milestone=trainer.progress.finished or engine is None,
                spare={trainer.progress.restorable},
            )
            if path is not None:
                log.info("checkpoint %s", path)
        trainer.ranks.barrier()
        trainer.clock.restart()
