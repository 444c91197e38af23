"""Reading a configuration: YAML presets and files, dotted overrides."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from b2t.config.explain import explain
from b2t.config.phases import default_phases
from b2t.config.sections import Config
from b2t.errors import UserError


def preset_names() -> list[str]:
    """Names accepted by `--config` besides paths."""
    files = resources.files("b2t.presets").iterdir()
    return sorted(Path(f.name).stem for f in files if f.name.endswith(".yaml"))


def load_config(source: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """Read a preset or a YAML file and apply dotted overrides.

    Args:
        source: name of a preset, path of a YAML file, or None for the defaults.
        overrides: `section.key=value`; list items by number (`phases.0.steps=200`); values are
            YAML.

    Raises:
        UserError: on an unreadable file, a misspelt key or a bad value.
    """
    tree = _read_yaml(source) if source is not None else {}
    where = str(source) if source is not None else "the defaults"
    for override in overrides:
        _apply_override(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(explain(error, where)) from None


def completed(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a saved configuration in today's form: keys that came later have their defaults.

    One that today's form refuses is returned as it is.
    """
    try:
        return Config.model_validate(tree).model_dump(mode="json")
    except ValidationError:
        return tree


class _DistinctKeys(yaml.SafeLoader):
    """PyYAML takes the last of two equal keys in silence: here they are an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping; raise where a key appears twice."""
        seen = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value!r} appears twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_yaml(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if str(source) in preset_names():
        text = resources.files("b2t.presets").joinpath(f"{source}.yaml").read_text("utf-8")
    elif path.is_file():
        text = _text(path)
    else:
        names = preset_names()
        hint = difflib.get_close_matches(str(source), names, n=1)
        raise UserError(
            f"--config {source}: neither a file nor a preset"
            + (f"; did you mean {hint[0]}?" if hint else ".")
            + f" Presets: {', '.join(names)}."
        )
    try:
        tree = yaml.load(text, _DistinctKeys)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        # PyYAML passes on what Python says of strange dates, keys and depths.
        raise UserError(f"{source}: not valid YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(
            f"{source}: expected a mapping of sections ({', '.join(Config.model_fields)}), "
            f"found a {type(tree).__name__}"
        )
    return tree


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text in UTF-8: {error}") from None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    """Set `a.b.0.c=value` in a tree of mappings and lists.

    OmegaConf's dot lists would make a mapping with a key 0 of a list that is not there, and take
    `${…}` in a value for a reference; neither says which position a list has.
    """
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(
            f"override {override!r}: expected section.key=value, for example "
            "phases.0.steps=200 or data.path=prepared/"
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: the value is not valid YAML: {error}") from None
    keys = dotted.split(".")
    if keys[0] == "phases" and "phases" not in tree:
        tree["phases"] = [phase.model_dump(mode="json") for phase in default_phases()]
    node: Any = tree
    for key, following in pairwise(keys):
        if isinstance(node, list):
            node = node[_index(node, key, dotted)]
        else:
            if not isinstance(node.get(key), (dict, list)):
                node[key] = [] if following.isdigit() else {}
            node = node[key]
    if isinstance(node, list):
        node[_index(node, keys[-1], dotted)] = value
    else:
        node[keys[-1]] = value


def _index(node: list[Any], key: str, dotted: str) -> int:
    if not node:
        raise UserError(
            f"override {dotted}: the list is not set in the file, so it has no position {key!r}; "
            f"give it whole, as {dotted.rpartition('.')[0]}=[…]"
        )
    if not key.isdigit() or int(key) >= len(node):
        raise UserError(
            f"override {dotted}: {key!r} is not a position in a list of {len(node)} items; "
            f"expected 0 to {len(node) - 1}"
        )
    return int(key)
