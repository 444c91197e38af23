"""What a validation is for: the best model so far is kept, and a phase may stop early."""

from collections.abc import Mapping

from safetensors import SafetensorError

from b2t.log import log_once, logger
from b2t.model.trained import trained_components
from b2t.run_files import BEST
from b2t.train.callback import Callback, Run
from b2t.train.export import export_model
from b2t.train.metric_names import DECODED

log = logger(__name__)


class BestModel(Callback):
    """Keeps the best model of a phase as `checkpoints/best`; counts towards early stopping.

    That of an earlier phase, whose losses differ, is kept as `checkpoints/best-PHASE`.
    """

    collective = True

    def on_scores(self, trainer: Run, metrics: Mapping[str, float], fresh: bool) -> None:
        """Keep the model where it is the best so far.

        A metric that this validation does not say, as between two decodings, counts for nothing.
        """
        step = trainer.progress.step
        best, stopping = trainer.progress.best, trainer.progress.stopping
        if best.metric in metrics and best.update(metrics[best.metric], step):
            self._export(trainer)
        if stopping is not None and stopping.metric in metrics:
            stopping.update(metrics[stopping.metric], step)
        wanted = {rule.metric for rule in (best, stopping) if rule is not None}
        for name in sorted(wanted - metrics.keys() - set(DECODED)) if fresh else ():
            log_once(
                f"absent-{name}",
                f"step {step}: the validation has no {name}, by which a model is "
                "chosen or a phase stopped: this one does not count",
            )

    @staticmethod
    def _export(trainer: Run) -> None:
        averages = trainer.collect_averages()
        masters = {**trainer.engine.collect_masters(), **averages}
        progress, model = trainer.progress, trainer.model
        model.config.trained = trained_components(
            trainer.config.phases, progress.phase, progress.phase_step, model.config.started_with
        )
        best, phase = progress.best, trainer.phase.name
        model.config.chosen = {
            "phase": phase, "step": progress.step, "metric": best.metric, "value": best.best,
        }  # fmt: skip
        if trainer.ranks.is_main:
            folder = trainer.store.folder / BEST
            try:
                export_model(folder, model, masters, trainer.materials.tokenizer, phase)
            except (OSError, SafetensorError) as error:
                log.error("%s could not be written (%s): training goes on", folder, error)
        trainer.ranks.barrier()
