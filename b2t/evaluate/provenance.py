"""What a score is a score of: which split, chosen how, and how much of it was seen in training."""

from pathlib import Path
from typing import TYPE_CHECKING

from b2t.errors import UserError
from b2t.evaluate.metrics import normalise_text
from b2t.evaluate.prior import text_prior

if TYPE_CHECKING:
    from b2t.evaluate.results import Evaluation
    from b2t.evaluate.run_folder import Run
    from b2t.model.brain_to_text import BrainToText


def note_provenance(
    result: "Evaluation",
    run: "Run",
    model: "BrainToText",
    path: str,
    asked: str | None,
    seed: int = 0,
) -> None:
    """Write into a result which split it is of, whether it chose the model, and what it shares.

    Args:
        result: of one split; gets `role`, `known_sentences`, `prior` and notes.
        run: where the model comes from.
        model: the `BrainToText` that was evaluated.
        path: dataset that was evaluated.
        asked: split that the user named, None where it was chosen here.
        seed: of what the text prior draws.
    """
    result.checkpoint = run.label
    if asked is None and result.split != "test":
        result.notes.append(
            f"{path} has no test split with text: the {result.split} split was scored instead"
        )
    result.role = _role(result.split, run, model, path)
    if result.role == "chose the model":
        result.notes.append(
            f"the {result.split} split chose this model among those of the training: on trials "
            "that chose nothing expect worse"
        )
    elif result.role == "trained on":
        result.notes.append(f"the model was trained on the {result.split} split")
    texts = _training_texts(run, path)
    result.known_sentences = _known_share(result, texts)
    targets = [p.target for p in result.predictions if p.target is not None]
    if texts is not None and targets:
        result.prior = text_prior(texts, targets, seed)
    if result.known_sentences:
        result.notes.append(
            f"{100 * result.known_sentences:.1f} % of the target sentences occur in training"
        )


def note_language_model(result: "Evaluation", folder: Path, path: str) -> None:
    """Write into a result what the language model is, what tuned it, and what it has read.

    Args:
        result: of one split; gets `language_model` and notes.
        folder: of the language model.
        path: dataset that was evaluated.
    """
    from b2t.data.dataset import dataset_info
    from b2t.evaluate.language_model import known_share, read_card

    card = read_card(folder)
    predictions = result.predictions
    targets = [p.target for p in predictions if p.target is not None]
    known = known_share(folder, targets)
    result.language_model = {
        "folder": str(folder),
        "source": card.source,
        "order": card.order,
        "words": card.words,
        "known_sentences": known,
        **card.search.model_dump(),
    }
    if card.rescoring is not None and any(p.joint_prediction is not None for p in predictions):
        result.language_model["rescoring"] = card.rescoring.model_dump()
    if known:
        result.notes.append(
            f"{100 * known:.1f} % of the target sentences stand in the language model's text"
        )
    if card.tuned is None:
        result.notes.append(
            f"{folder}: the language model's weights are the defaults; `b2t lm --tune` fits them"
        )
    elif (card.tuned.fingerprint, card.tuned.split) == (
        dataset_info(path).fingerprint,
        result.split,
    ):
        result.notes.append(
            f"the {result.split} split tuned the weights of the language model: on trials that "
            "tuned nothing expect worse"
        )


def _role(split: str, run: "Run", model: "BrainToText", path: str) -> str | None:
    """Return what the split was to the training, None where it was nothing or is not known."""
    from b2t.data.dataset import dataset_info

    known = getattr(model.config, "data", None)
    if known is not None:
        same = known["fingerprint"] == dataset_info(path).fingerprint
        train, validation = known["train_split"], known["validation_split"]
    elif run.config is not None:
        same = run.config.data.path == path
        train, validation = run.config.data.train_split, run.config.data.validation_split
    else:
        return None
    if same and split == train:
        return "trained on"
    return "chose the model" if same and split == validation and run.is_best else None


def _known_share(result: "Evaluation", texts: list[str] | None) -> float | None:
    """Share of the rows with a target whose sentence occurs in training; None if not known."""
    targets = [p.target for p in result.predictions if p.target is not None]
    if not targets:
        return None
    if texts is None:
        result.notes.append(
            "the training data could not be read: how many target sentences occur in training is "
            "not known"
        )
        return None
    seen = {normalise_text(text) for text in texts}
    return sum(normalise_text(target) in seen for target in targets) / len(targets)


def _training_texts(run: "Run", path: str) -> list[str] | None:
    """Return the texts of the run's training split, else those of the evaluated dataset's."""
    from b2t.data.dataset import load_trials

    places = [(path, "train")]
    if run.config is not None and run.config.data.path is not None:
        places.insert(0, (run.config.data.path, run.config.data.train_split))
    for place, split in places:
        try:
            return [text for text in load_trials(place, split)["text"] if text]
        except UserError:
            continue
    return None
