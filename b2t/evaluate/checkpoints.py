"""Which model of a run: the best, the last, that of a step, or a folder."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from b2t.config import Config
from b2t.errors import UserError
from b2t.log import logger
from b2t.manifest import find_problem
from b2t.model.trained import trained_components
from b2t.run_files import (
    AVERAGE,
    BEST,
    CHECKPOINTS,
    MODEL_FILE,
    MOMENTS_FILE,
    REPLACED,
    STATE_FILE,
    STEP_PREFIX,
    WEIGHTS_FILE,
    WRITING,
)

if TYPE_CHECKING:
    from b2t.model import BrainToText

BEST_MODEL = Path(CHECKPOINTS) / BEST
_INTERIM = (REPLACED, WRITING)
"""Begin the names of the old and the new best model while one replaces the other."""


def choose_checkpoint(run: Path, which: str) -> Path:
    """Return the folder of a model of a run.

    Args:
        run: run folder.
        which: `best`, `best-PHASE` of an earlier phase, `last`, the number of a step (also
            `step-200`), or a folder.

    Raises:
        UserError: there is no such model.
    """
    folder = run / BEST_MODEL.parent
    if which == BEST:
        return _best(run)
    if which.startswith(f"{BEST}-"):
        return _best_of_phase(run, which.removeprefix(f"{BEST}-"))
    steps = {_step(path): path for path in folder.glob(f"{STEP_PREFIX}*") if _step(path) >= 0}
    found = ", ".join(str(step) for step in sorted(steps)) or "none"
    if which == "last":
        if not steps:
            raise UserError(f"{folder}: no checkpoint yet (checkpoint.every); best may be there")
        return steps[max(steps)]
    number = which.removeprefix("step").lstrip("- ")
    if number.isdigit():
        if int(number) not in steps:
            raise UserError(f"--checkpoint {which}: {folder} has none of that step; found {found}")
        return steps[int(number)]
    if not Path(which).is_dir():
        raise UserError(
            f"--checkpoint {which}: expected best, best-PHASE, last, the number of a step "
            f"({found}) or a folder"
        )
    path = Path(which)
    if not is_training_checkpoint(path) and not (path / MODEL_FILE).is_file():
        raise UserError(
            f"--checkpoint {which}: neither a checkpoint ({STATE_FILE}) nor a saved model "
            f"({MODEL_FILE})"
        )
    return path


def is_training_checkpoint(folder: Path) -> bool:
    """Whether a folder is one that training goes on from, and no saved model."""
    return (folder / STATE_FILE).is_file() or folder.name.startswith(STEP_PREFIX)


def load_training_checkpoint(folder: Path, best: Path) -> "BrainToText":
    """Read the model of a checkpoint that training goes on from.

    Averaged weights (`optim.weight_ema`) are taken where there are any, as validation does.

    Args:
        folder: the checkpoint.
        best: best model of the same run, whose config and tokenizer are the checkpoint's too.

    Returns:
        A `BrainToText` in evaluation mode.

    Raises:
        UserError: the checkpoint is damaged, or of another architecture than ``best``.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    from b2t.model import BrainToText, load_tokenizer
    from b2t.model.pretrained import read_config, require_sound, require_whole

    problem = find_problem(folder, (WEIGHTS_FILE, MOMENTS_FILE, STATE_FILE))
    if problem is not None:
        raise UserError(f"{folder}: damaged: {problem}; choose another with --checkpoint")
    if not (best / MODEL_FILE).is_file():
        raise UserError(
            f"{folder}: its config and tokenizer are read from {best}, which is not there yet; it "
            "is written at the first validation (evaluation.every)"
        )
    weights = load_file(folder / WEIGHTS_FILE)
    with safe_open(folder / MOMENTS_FILE, framework="pt") as moments:
        averages = [name for name in moments.keys() if name.startswith(AVERAGE)]  # noqa: SIM118
        weights |= {name.removeprefix(AVERAGE): moments.get_tensor(name) for name in averages}
    if averages:
        logger(__name__).info("%s: averaged weights (optim.weight_ema)", folder)
    require_whole(best)
    model = BrainToText(read_config(best))
    try:
        model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[-1].strip()
        raise UserError(f"{folder}: of another model than {best}: {reason}") from None
    missing = sorted({*dict(model.named_parameters()), *dict(model.named_buffers())} - {*weights})
    if missing:
        raise UserError(f"{folder}: of another model than {best}: it lacks {missing[0]}")
    require_sound(model, str(folder))
    if model.text_decoder is not None:
        model.tokenizer = load_tokenizer(best)
    model.config.chosen = None  # by a validation: that is the best
    state = json.loads((folder / STATE_FILE).read_text("utf-8"))
    progress, config = state["progress"], state.get("config")
    if config is not None:
        phases = Config.model_validate(config).phases
        model.config.trained = trained_components(
            phases, progress["phase"], progress["phase_step"], model.config.started_with
        )
    return model.eval()


def chosen_at(model: Path) -> dict[str, Any] | None:
    """Return phase, step, metric and value that chose a saved model; None where it does not say."""
    try:
        chosen = json.loads((model / MODEL_FILE).read_text("utf-8")).get("chosen")
    except (OSError, ValueError, AttributeError):
        return None
    return chosen if isinstance(chosen, dict) and "phase" in chosen else None


def best_name(model: Path) -> str | None:
    """Return `best` or `best-PHASE` where a folder is one that validation chose, else None."""
    name = model.name
    for begin in _INTERIM:
        name = name.removeprefix(begin)
    return name if name == BEST or name.startswith(f"{BEST}-") else None


def best_of(phase: str) -> str:
    """Return the name of the folder of a phase's best model, when the phase is past."""
    return f"{BEST}-{quote(phase, safe=' ')}"


def _best_of_phase(run: Path, phase: str) -> Path:
    chosen = chosen_at(run / BEST_MODEL)
    if chosen is not None and chosen["phase"] == phase:
        return run / BEST_MODEL  # a `best-PHASE` beside it is of a session gone back behind
    folder = run / BEST_MODEL.parent / best_of(phase)
    if folder.is_dir():
        return folder
    kept = [path.name for path in sorted(folder.parent.glob(f"{BEST}-*"))]
    kept += [] if chosen is None else [best_of(chosen["phase"])]
    raise UserError(
        f"--checkpoint {BEST}-{phase}: {folder.parent} has no best model of that phase; found "
        f"{', '.join(kept) or 'none'}"
    )


def _best(run: Path) -> Path:
    folder = run / BEST_MODEL
    left = [folder.with_name(f"{begin}{folder.name}") for begin in _INTERIM]
    for interim in left if not folder.is_dir() else ():
        if find_problem(interim, [MODEL_FILE]) is None:
            return interim  # the process that was replacing the best was killed
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no best model yet; it is written at the first validation "
            "(evaluation.every). Wait for it, or give the training command again"
        )
    if not (folder / MODEL_FILE).is_file():
        raise UserError(
            f"{folder}: {MODEL_FILE} is missing, so the model is damaged; restore the folder from "
            "a copy"
        )
    return folder


def _step(path: Path) -> int:
    """Return the step of a checkpoint's folder, −1 where it is none."""
    number = path.name.removeprefix(STEP_PREFIX)
    return int(number) if path.is_dir() and number.isdigit() else -1
