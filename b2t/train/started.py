"""A run that starts from the weights of another: what it took, also after a resume."""

import json
from pathlib import Path

from b2t.config import Config
from b2t.errors import UserError
from b2t.evaluate.run_folder import load_model, open_run
from b2t.log import logger
from b2t.model.brain_to_text import BrainToText
from b2t.model.start_from import start_from
from b2t.records import write_atomically
from b2t.run_files import CHECKPOINTS, STEP_PREFIX

STARTED_FILE = "started_from.json"


def take_start(config: Config, model: BrainToText) -> None:
    """Start from the weights of `model.init_from`, where it is set.

    A run that goes on has them already, and the source may be gone: its `started_from.json` says
    which components came trained.

    Raises:
        UserError: the source is no trained model, or its encoder is of another shape.
    """
    source = config.model.init_from
    if source is None:
        return
    record = config.run.dir / STARTED_FILE
    if record.is_file() and any((config.run.dir / CHECKPOINTS).glob(f"{STEP_PREFIX}*")):
        model.config.started_with = _read(record)["trained"]
        return
    run = open_run(source)
    given, _ = load_model(run, "cpu")
    found = start_from(model, given, source)
    log = logger(__name__)
    for component, taken in found.items():
        log.info("%s from %s: %s", component, run.checkpoint, taken.text())
    if given.config.sampling_rate != model.config.sampling_rate:
        log.warning(
            "model.init_from=%s was trained at %g Hz, this run's data are at %g Hz: its patches "
            "last another time",
            source, given.config.sampling_rate, model.config.sampling_rate,
        )  # fmt: skip
    trained = given.config.trained
    model.config.started_with = sorted(
        name
        for name, taken in found.items()
        if taken.taken and (trained is None or name in trained)
    )


def keep_start(config: Config, model: BrainToText) -> None:
    """Write what the run started from into its folder; rank 0."""
    if config.model.init_from is None:
        return
    content = {"source": config.model.init_from, "trained": model.config.started_with}
    write_atomically(config.run.dir / STARTED_FILE, json.dumps(content, indent=1) + "\n")


def _read(record: Path) -> dict[str, list[str]]:
    try:
        content: dict[str, list[str]] = json.loads(record.read_text("utf-8"))
        content["trained"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{record}: cannot be read ({error}); it says what the run started from: restore it, "
            'or write {"trained": []}'
        ) from None
    return content
