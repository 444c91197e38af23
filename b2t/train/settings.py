"""Settings that no step could follow: refused, or adapted with a warning, at the start."""

from typing import TYPE_CHECKING

from b2t.config import Config
from b2t.errors import UserError
from b2t.log import logger
from b2t.model.objectives import OBJECTIVES
from b2t.train.schedule import shortened_warmup

if TYPE_CHECKING:
    from b2t.model import BrainToText

log = logger(__name__)

_BEFORE = {"adapter", "encoder", "quantizer"}


def check_lengths(config: Config) -> None:
    """Compare warm-ups and the start of the codebooks with the phases' steps.

    Raises:
        UserError: no step would be left to train codebooks.
    """
    asked, first = config.codebook_start.after_steps, config.phases[0]
    start = config.codebooks_start_after if isinstance(asked, str) else asked
    if config.model.quantizer.enabled and start >= config.total_steps:
        raise UserError(
            f"codebook_start.after_steps={start}, but all phases together have "
            f"{config.total_steps} steps: the codebooks would never train; lower it (3 % of the "
            "steps is a good start), or lengthen a phase"
        )
    if config.model.quantizer.enabled and start >= first.steps:
        log.warning(
            "codebook_start.after_steps=%d lies beyond phase %s of %d steps: the codebooks start "
            "after %d, half of it",
            start, first.name, first.steps, config.codebooks_start_after,
        )  # fmt: skip
    for number, phase in enumerate(config.phases):
        warmups = {"warmup_steps": phase.warmup_steps}
        for name, steps in (phase.component_warmup_steps or {}).items():
            warmups[f"component_warmup_steps.{name}"] = steps
        for key, steps in warmups.items():
            used = shortened_warmup(steps, phase.steps)
            if used != steps:
                log.warning(
                    "phases.%d.%s=%d is longer than phase %s of %d steps: it is shortened to %d, a "
                    "tenth of the phase",
                    number, key, steps, phase.name, phase.steps, used,
                )  # fmt: skip


def check_losses(config: Config, model: "BrainToText") -> None:
    """Refuse a phase whose losses reach nothing that it trains.

    Raises:
        UserError: names the phase, its losses and what it trains.
    """
    for number, phase in enumerate(config.phases):
        if phase.text_from != "signals" and not model.reads_phonemes:
            raise UserError(
                f"phases.{number}.text_from={phase.text_from}: this model's text decoder reads "
                f"latents, which {phase.text_from} have none of; set "
                "model.text_decoder.memory=phonemes or posteriors"
            )
        asked = [name for name, weight in phase.losses.model_dump().items() if weight > 0]
        if phase.text_from == "texts" and asked != ["generation"]:
            raise UserError(
                f"phases.{number}.text_from=texts: sentences alone have no signal for "
                f"{', '.join(name for name in asked if name != 'generation')}; give generation "
                "alone a weight, or take text_from=labels"
            )
        reached = {OBJECTIVES[name].component for name in asked}
        found = {name for name in reached if getattr(model, name) is not None}
        trained = [name for name in phase.trainable if getattr(model, name) is not None]
        if not found:
            raise UserError(
                f"phases.{number}.losses: phase {phase.name} asks for {', '.join(asked)}, and this "
                "model has no component for it (generation needs text, phoneme needs phonemes); "
                "give another loss a weight"
            )
        if trained and not (found | _BEFORE) & set(trained):
            raise UserError(
                f"phases.{number}: phase {phase.name} trains {', '.join(trained)}, which none of "
                f"its losses ({', '.join(asked)}) reaches; give its loss a weight, or train "
                "something else"
            )
