"""What a finished or running training left on disk: its best model and its configuration."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from b2t.config import Config, load_config
from b2t.errors import UserError
from b2t.evaluate.checkpoints import (
    BEST_MODEL,
    best_name,
    choose_checkpoint,
    is_training_checkpoint,
    load_training_checkpoint,
)
from b2t.log import log_once
from b2t.run_files import BEST, CONFIG_FILE, MODEL_FILE, STEP_PREFIX
from b2t.signal_spec import SignalSpec, compare, require_fit

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from b2t.data.batches import Batch
    from b2t.model.brain_to_text import BrainToText


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        folder: the run folder; for a saved model on its own, the model's folder.
        checkpoint: folder of the model: one that `BrainToText.from_pretrained` reads, or one that
            training goes on from.
        config: the run's configuration, None for a saved model on its own.
    """

    folder: Path
    checkpoint: Path
    config: Config | None

    @property
    def is_best(self) -> bool:
        """Whether the model is the one that validation chose."""
        return best_name(self.checkpoint) is not None

    @property
    def label(self) -> str:
        """Name the model: `best`, `best-PHASE`, `step 200`, or its folder."""
        name = self.checkpoint.name
        step = name.removeprefix(STEP_PREFIX)
        best = best_name(self.checkpoint)
        if best is not None:
            return best
        return f"step {int(step)}" if step != name and step.isdigit() else str(self.checkpoint)

    def data_path(self, override: str | None = None) -> str:
        """Return the dataset to use: ``override``, else the one that the run was trained on.

        Raises:
            UserError: neither is known.
        """
        path = override or (self.config.data.path if self.config else None)
        if path is None:
            why = f"its {CONFIG_FILE} names none (data.path)" if self.config else "it has no run"
            raise UserError(f"{self.folder}: no dataset is known, as {why}; give one with --data")
        return path


def open_run(folder: str | Path, checkpoint: str = BEST) -> Run:
    """Find a model of a run, or a saved model on its own.

    Args:
        folder: run folder, or folder of a saved model.
        checkpoint: `best`, `last`, the number of a step, or a folder.

    Raises:
        UserError: there is no such folder, or no such model in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such run folder; expected the run.dir of a training, which holds "
            f"{CONFIG_FILE} and {BEST_MODEL}"
        )
    config_file = folder / CONFIG_FILE
    if (folder / MODEL_FILE).is_file() and not config_file.is_file():
        if checkpoint != BEST:
            raise UserError(
                f"--checkpoint {checkpoint}: {folder} is a saved model on its own; name its run"
            )
        return Run(folder, folder, None)
    if not config_file.is_file():
        raise UserError(
            f"{folder}: not a run folder: it has neither {CONFIG_FILE} (written when training "
            f"starts) nor {MODEL_FILE} of a saved model"
        )
    return Run(folder, choose_checkpoint(folder, checkpoint), load_config(config_file))


def load_model(
    run: Run, device: str | None = None
) -> "tuple[BrainToText, PreTrainedTokenizerBase | None]":
    """Load the model, in evaluation mode, and its tokenizer.

    Args:
        run: from `open_run`.
        device: a torch device; None takes a GPU where there is one.

    Returns:
        The `BrainToText` and its tokenizer, None for a model without text.
    """
    import torch

    from b2t.model.attention_backends import without_plans_per_length

    without_plans_per_length()
    if is_training_checkpoint(run.checkpoint):
        model = load_training_checkpoint(run.checkpoint, run.folder / BEST_MODEL)
    else:
        from b2t.model import BrainToText

        model = BrainToText.from_pretrained(run.checkpoint, dtype=torch.float32)
    tokenizer = model.tokenizer if model.text_decoder is not None else None
    if model.text_decoder is not None and tokenizer is None:
        raise UserError(
            f"{run.checkpoint}: its tokenizer is missing or damaged (tokenizer_config.json and "
            "what stands beside it); restore it from a copy"
        )
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return model.eval().to(chosen), tokenizer
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"--device {chosen}: {reason}; expected cpu or a GPU of this machine"
        ) from None


def choose_split(path: str, split: str | None) -> str:
    """Return ``split`` after looking that it is there; by default `test`.

    `val` instead where it alone has text, as in releases that keep the sentences of `test` back.

    Raises:
        UserError: the dataset has no such split.
    """
    from b2t.data.dataset import dataset_info

    splits = list(dataset_info(path).splits)
    if split is not None:
        if split not in splits:
            raise UserError(f"{path}: no split {split!r}; expected one of {', '.join(splits)}")
        return split
    if "test" in splits:
        val_alone = "val" in splits and _has_text(path, "val") and not _has_text(path, "test")
        return "val" if val_alone else "test"
    if "val" in splits:
        return "val"
    raise UserError(
        f"{path}: neither a test nor a val split; found {', '.join(splits)}. Name one with --split"
    )


def load_batches(
    run: Run,
    model: "BrainToText",
    path: str,
    split: str,
    tokenizer: "PreTrainedTokenizerBase | None",
    batch_size: int,
    limit: int | None = None,
    force: bool = False,
    texts: bool = False,
) -> Iterator["Batch"]:
    """Yield the rows of a split as batches for ``model``, after checking that they fit it.

    Channels in another order are brought by name into that of the model. The smoothing of the
    training configuration is applied.

    Args:
        run: where the model comes from.
        model: a `BrainToText`.
        path: dataset.
        split: of the dataset.
        tokenizer: None leaves texts out, unless ``texts`` keeps them.
        batch_size: most rows in a batch.
        limit: rows at most, spread evenly over the sessions.
        force: warn instead of refusing signals of another kind than the model was trained on.
        texts: keep the texts of a model without a text decoder, to score words read from phonemes.

    Raises:
        UserError: signals of another kind, or rows that cannot be read.
    """
    from b2t.data.augment import Augment
    from b2t.data.batches import eval_batches
    from b2t.data.dataset import load_trials
    from b2t.data.trials import spread_over_sessions

    trials = load_trials(path, split)
    if tokenizer is None and not texts:  # before rows are selected, which it would write to disk
        trials = trials.remove_columns("text").add_column("text", [None] * len(trials))
    if limit is not None:
        trials = trials.select(spread_over_sessions(trials, limit))
    order = require_same_kind(run, model, path, trials, force)
    batches = eval_batches(
        trials,
        tokenizer,
        model.config.sessions,
        augment=Augment(smoothing_bins=_smoothing(run, model), enabled=False),
        batch_size=batch_size,
    )
    return batches if order is None else (batch.with_channels(order) for batch in batches)


def count_trials(path: str, split: str, limit: int | None = None) -> int:
    """Return how many rows `load_batches` yields."""
    from b2t.data.dataset import load_trials

    rows = len(load_trials(path, split))
    return rows if limit is None else min(rows, limit)


def require_same_kind(
    run: Run, model: "BrainToText", path: str, trials: "Dataset", force: bool = False
) -> list[int] | None:
    """Refuse trials of another kind than the model was trained on; see `require_fit`."""
    from b2t.data.dataset import dataset_info
    from b2t.data.trials import typical_rms, values_of

    info = dataset_info(path)
    found = SignalSpec(
        channels=info.channels,
        sampling_rate=info.sampling_rate,
        channel_names=info.channel_names,
        unit=info.unit,
        rms=typical_rms(trials),
        sessions=sorted({*values_of(trials, "session")}),
        processing=info.processing,
    )
    wanted = SignalSpec.of_model(model.config)
    order = require_fit(wanted, found, path, str(run.checkpoint), force=force, how="--force")
    unchecked = compare(wanted, found).unchecked
    if unchecked and model.config.signal is not None:
        log_once(
            f"unchecked {path}",
            f"{path}: {' and '.join(unchecked)} could not be compared with those of the training, "
            "as the model or the dataset does not say",
        )
    return order


def _smoothing(run: Run, model: "BrainToText") -> float:
    """Return the smoothing of the model; older ones leave it to the run's configuration."""
    if model.config.signal is not None:
        return float(model.config.signal["smoothing_bins"])
    return run.config.data.augment.smoothing_bins if run.config else 0.0


def is_simulated(model: "BrainToText", path: str) -> bool:
    """Whether the model or the dataset says that its recordings are simulated."""
    from b2t.data.dataset import dataset_info

    return bool(model.config.simulated_data or dataset_info(path).simulated)


def _has_text(path: str, split: str) -> bool:
    from b2t.data.dataset import load_trials

    return any(text for text in load_trials(path, split)["text"])
