"""When a run validates and decodes, and whom it tells."""

from b2t.model.trained import trained_components
from b2t.train.callback import Callback, Run
from b2t.train.metric_names import DECODED, active_losses
from b2t.train.validation import (
    decode,
    decoding_due,
    scores,
    show_decoded,
    validate,
    validation_batches,
)


class Validating(Callback):
    """Validates every `evaluation.every` steps (or the phase's own) and at the end of each phase.

    Decoding goes with the first validation after every `evaluation.decode_every` steps, and with
    the end of each phase.
    """

    collective = True

    def after_step(self, trainer: Run, last: bool) -> None:
        """Validate where it is due; the end of a phase does so anyway.

        Raises:
            Interrupted: on all ranks, on request; nothing of this validation is left, and a resume
                begins with it.
        """
        every = trainer.phase.evaluate_every or trainer.config.evaluation.every
        if trainer.progress.step % every == 0 and not last:
            self._validate(trainer)

    @staticmethod
    def missed(trainer: Run) -> bool:
        """Whether a request to stop cut off the validation of this step."""
        progress = trainer.progress
        every = trainer.phase.evaluate_every or trainer.config.evaluation.every
        within = 0 < progress.phase_step < trainer.phase.steps
        return within and progress.step % every == 0 and progress.validated < progress.step

    def before_phase_end(self, trainer: Run) -> None:
        """Decode, and validate but where the phase stopped early, just validated."""
        self._validate(trainer, ending=True)

    def _validate(self, trainer: Run, ending: bool = False) -> None:
        config, progress, phase = trainer.config, trainer.progress, trainer.phase
        fresh = progress.validated < progress.step
        due = decoding_due(config.evaluation, phase, progress.step)
        metrics, decoded = {}, None
        with trainer.evaluated():
            if fresh:
                trainer.ranks.place = f"validating after step {progress.step}"
                metrics = self._metrics(trainer)
                trainer.stops.agree()
            if (due or ending) if fresh else not due:
                trainer.ranks.place = f"decoding after step {progress.step} of phase {phase.name}"
                decoded = decode(
                    trainer.model, config, trainer.materials, phase, trainer.ranks, trainer.stops
                )
        before = trainer.model.config.started_with
        trained = trained_components(config.phases, progress.phase, progress.phase_step, before)
        said = scores(decoded, trained)
        texts = {name: value for name, value in said.items() if name in DECODED}
        trainer.hook("on_scores", {**metrics, **texts}, fresh)
        progress.validated = progress.step
        for found in (metrics, said):
            if found:
                trainer.hook("on_eval", found)
        if decoded is not None:
            trainer.hook("on_decode", decoded.predictions)
            show_decoded(decoded)
        trainer.clock.restart()

    @staticmethod
    def _metrics(trainer: Run) -> dict[str, float]:
        config, model, ranks = trainer.config, trainer.model, trainer.ranks
        limit = config.evaluation.max_trials
        phase = trainer.progress.phase
        batches = validation_batches(config, trainer.materials, ranks, limit, phase)
        weights = active_losses(model, trainer.phase)
        heard = trainer.stops.until_heard(batches)
        return validate(model, heard, weights, trainer.engine.dtype, ranks)
