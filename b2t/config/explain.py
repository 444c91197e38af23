"""The configuration told to people: what is wrong with it, and which keys there are."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from b2t.config.sections import Config
from b2t.options import Options


def explain(error: ValidationError, where: str) -> str:
    """Turn pydantic's report into lines that name key, value, expectation and nearest key."""
    lines = []
    for item in error.errors():
        dotted = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = _keys_at(item["loc"][:-1])
            wrong = str(item["loc"][-1])
            close = difflib.get_close_matches(wrong, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
            owner = _DEEPSPEED_KEYS.get(wrong)
            if owner and not close:
                hint = f"the DeepSpeed file sets this, as {owner!r}"
            lines.append(f"{dotted}: unknown key; {hint}")
        else:
            # A rule between keys names the values itself; a whole section would drown it.
            whole = item["type"] == "missing" or isinstance(item["input"], (dict, BaseModel))
            found = "" if whole else f", found {item['input']!r}"
            message = item["msg"].removeprefix("Value error, ")
            lines.append(f"{dotted or 'configuration'}: {message}{found}")
    return f"{where}: " + ("\n  " if len(lines) > 1 else "") + "\n  ".join(lines)


_DEEPSPEED_KEYS = {
    "batch_size": "train_micro_batch_size_per_gpu",
    "micro_batch_size": "train_micro_batch_size_per_gpu",
    "accumulation": "gradient_accumulation_steps",
    "gradient_accumulation": "gradient_accumulation_steps",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "fp16": "fp16.enabled",
    "bf16": "bf16.enabled",
    "precision": "fp16.enabled or bf16.enabled",
    "zero_stage": "zero_optimization.stage",
    "zero_optimization": "zero_optimization",
    "train_micro_batch_size_per_gpu": "train_micro_batch_size_per_gpu",
    "clip": "gradient_clipping",
    "gradient_clipping": "gradient_clipping",
}


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    """Keys of the section that a location of pydantic's report points to."""
    section: Any = Config
    for part in location:
        if isinstance(part, int):
            section = get_args(section)[0]
            continue
        section = section.model_fields[part].annotation
        if get_origin(section) not in (None, list):
            section = next((a for a in get_args(section) if _is_section(a)), section)
    return list(section.model_fields) if hasattr(section, "model_fields") else []


def describe(section: type[Options] = Config, prefix: str = "") -> list[tuple[str, str, str]]:
    """List (dotted key, default, help) of every field, for `--help-config`."""
    rows: list[tuple[str, str, str]] = []
    for name, field in section.model_fields.items():
        inner: Any = field.annotation
        item: Any = get_args(inner)[0] if get_origin(inner) is list else None
        if _is_section(item):
            if field.default == []:  # a list that may stay empty has a row of its own
                rows.append((prefix + name, "[]", " ".join((field.description or "").split())))
            rows += describe(item, f"{prefix}{name}.0.")
        elif _is_section(inner):
            rows += describe(inner, f"{prefix}{name}.")
        else:
            default = "required" if field.is_required() else _plain(field.default)
            rows.append((prefix + name, default, " ".join((field.description or "").split())))
            for part in get_args(inner):
                if _is_section(part):
                    rows += describe(part, f"{prefix}{name}.")
    return rows


def _is_section(kind: Any) -> bool:
    # In Python 3.10 list[int] is an instance of type too, and issubclass refuses it.
    return get_origin(kind) is None and isinstance(kind, type) and issubclass(kind, Options)


def _plain(value: Any) -> str:
    if isinstance(value, BaseModel):
        return str(value.model_dump(mode="json"))
    return str(value) if isinstance(value, (Mapping, list, tuple, Path)) else repr(value)
