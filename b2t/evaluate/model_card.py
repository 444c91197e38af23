"""The README.md of a shared model: what it is, what it was trained on, what it can do."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from b2t.evaluate.results import EVALUATION_FILE
from b2t.evaluate.verdict import KINDS, NAMES

if TYPE_CHECKING:
    from b2t.model.brain_to_text import BrainToText
    from b2t.model.configuration import BrainToTextConfig

CARD_FILE = "README.md"

_USE = """\
```python
import b2t  # pip install b2t; registers the architecture with transformers
from transformers import AutoModel

model = AutoModel.from_pretrained("{name}")
codes = model.encode(signal, session="{session}").codes   # signal [T, C], as it was prepared
{text}```
"""


def read_evaluation(folder: Path, label: str) -> dict[str, Any] | None:
    """Return the results that `b2t evaluate` wrote of the same checkpoint, None where it did not.

    Args:
        folder: run folder.
        label: of the checkpoint that is shared, as `Run.label` says it.
    """
    try:
        found = json.loads((folder / EVALUATION_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("checkpoint") == label else None


def model_card(
    model: "BrainToText", name: str, license: str | None, evaluation: dict[str, Any] | None
) -> str:
    """Write the card of a model.

    Args:
        model: a `BrainToText`.
        name: what `from_pretrained` is to be given.
        license: of the weights, an identifier of the Hub; None is said to be unknown.
        evaluation: results of `b2t evaluate`, None where this model was not evaluated.
    """
    config = model.config
    header: dict[str, Any] = {
        "library_name": "b2t",
        "tags": ["brain-computer-interface", "brain-to-text", "residual-vector-quantizer"],
    }
    if license is not None:
        header["license"] = license
    if evaluation is not None:
        header["model-index"] = [_index(name, evaluation)]
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---",
        f"# {Path(name).name}",
        _what(model),
        "## Data\n\n" + _data(config),
        "## Results\n\n" + _results(evaluation),
        "## Licence\n\n" + _licence(license),
        "## Use\n\n" + _use(model, name),
    ]
    return "\n\n".join(parts) + "\n"


def _what(model: "BrainToText") -> str:
    config, parameters = model.config, sum(p.numel() for p in model.parameters())
    parts = [f"A b2t model that reads recordings of the brain ({parameters:,} parameters)."]
    if model.quantizer is not None:
        sizes = config.quantizer
        parts.append(
            f"A signal becomes {sizes['num_quantizers']} codes of {sizes['codebook_size']:,} per "
            "latent frame."
        )
    heads = [
        name
        for name, part in (
            ("the signal again", model.signal_decoder),
            ("phonemes", model.phoneme_head),
            ("text", model.text_decoder),
        )
        if part is not None
    ]
    parts.append(f"It was built to write {', '.join(heads)}.")
    if config.trained is not None:
        parts.append(f"Trained components: {', '.join(config.trained)}.")
    return " ".join(parts)


def _data(config: "BrainToTextConfig") -> str:
    signal, data = config.signal or {}, getattr(config, "data", None) or {}
    facts = {
        "channels": config.channels,
        "sampling rate": f"{config.sampling_rate:g} Hz" if config.sampling_rate else None,
        "unit": signal.get("unit"),
        "smoothing": f"{signal['smoothing_bins']:g} bins" if signal.get("smoothing_bins") else None,
        "sessions": len(config.sessions),
        "split trained on": data.get("train_split"),
        "fingerprint of the data": data.get("fingerprint"),
    }
    lines = [f"- {name}: {value}" for name, value in facts.items() if value not in (None, "")]
    if config.simulated_data:
        lines.insert(0, "**Simulated recordings** (`b2t simulate`), not of a brain.\n")
    return "\n".join(lines)


def _results(evaluation: dict[str, Any] | None) -> str:
    if evaluation is None:
        return "This checkpoint was not evaluated (`b2t evaluate` before `b2t export`)."
    lines = []
    if evaluation.get("verdict"):
        lines.append(f"**{evaluation['verdict']}.**\n")
    role = f" (the split {evaluation['role']})" if evaluation.get("role") else ""
    lines.append(
        f"Split {evaluation.get('split')}{role}, {evaluation.get('rows')} trials, decoded freely. "
        "Controls are what the same model says without the brain: a model is worth what it is "
        "better than they are.\n"
    )
    lines += ["| error rate | model | 95 % |", "|---|---|---|"]
    for field, name in KINDS.items():
        if evaluation.get(field) is not None:
            low, high = evaluation.get(f"{field}_interval") or (float("nan"),) * 2
            lines.append(
                f"| {name} | {100 * evaluation[field]:.1f} % | {100 * low:.1f} – {100 * high:.1f} |"
            )
    lines += ["", "| control | " + " | ".join(KINDS.values()) + " |", "|---|" + "---|" * len(KINDS)]
    for control, told in NAMES.items():
        rates = [_control(evaluation, control, field) for field in KINDS]
        if any(rates):
            lines.append(f"| {told} | " + " | ".join(rate or "–" for rate in rates) + " |")
    lines += ["", *(f"- {note}" for note in evaluation.get("notes") or [])]
    return "\n".join(lines).rstrip()


def _control(evaluation: dict[str, Any], control: str, field: str) -> str | None:
    if control == "constant":
        prior = evaluation.get("prior") or {}
        rate = prior.get("wer_constant") if field.startswith("wer") else None
    else:
        others = (evaluation.get("controls") or {}).get(control) or {}
        rate = evaluation.get(f"{field}_{control}", others.get(field))
    return None if rate is None or evaluation.get(field) is None else f"{100 * rate:.1f} %"


def _licence(license: str | None) -> str:
    if license is None:
        return (
            "None was stated (`b2t export --license`). What the recordings may be used for binds "
            "what is trained on them: ask whoever shares this model."
        )
    return f"`{license}`. What the recordings may be used for may bind what is trained on them."


def _use(model: "BrainToText", name: str) -> str:
    session = (model.config.sessions or ["day0"])[0]
    text = ""
    if model.text_decoder is not None:
        text = f'text = model.transcribe(signal, session="{session}")\n'
    return _USE.format(name=name, session=session, text=text)


def _index(name: str, evaluation: dict[str, Any]) -> dict[str, Any]:
    """What the Hub reads of the results."""
    metrics = [
        {"type": field.partition("_")[0], "value": round(100 * evaluation[field], 2), "name": told}
        for field, told in KINDS.items()
        if evaluation.get(field) is not None
    ]
    return {
        "name": Path(name).name,
        "results": [
            {
                "task": {"type": "automatic-speech-recognition", "name": "brain to text"},
                "dataset": {"name": "own recordings", "type": "b2t", "split": evaluation["split"]},
                "metrics": metrics,
            }
        ],
    }
