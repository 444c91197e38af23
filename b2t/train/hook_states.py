"""What hooks keep in a checkpoint: JSON values, and tensors beside the weights."""

import base64
import logging
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from b2t.log import log_once
from b2t.train.callback import Callback
from b2t.train.guard import describe

_FOLDER = "hooks/"
"""What the names of hooks' tensors begin with."""

_TENSOR = "$tensor"
"""Only key of the JSON object that stands where a state holds a tensor; its value is the name."""

_PACKED = {"dtype", "shape", "zlib"}
"""Keys of a tensor in the JSON of older checkpoints."""


def require_names(callbacks: Sequence[Callback]) -> None:
    """Refuse hooks whose states a checkpoint could not tell apart.

    Raises:
        ValueError: one that keeps a state declares no `key`, or two declare the same.
    """
    owners: dict[str, str] = {}
    for callback in callbacks:
        kind = type(callback)
        if kind.state_dict is Callback.state_dict:
            continue
        if callback.key is None:
            raise ValueError(f"{kind.__name__} keeps a state, so it must declare a key")
        if callback.key in owners:
            both = f"{owners[callback.key]} and {kind.__name__}"
            raise ValueError(f"{both} both declare the key {callback.key!r}")
        owners[callback.key] = kind.__name__


def taken_from(callbacks: Sequence[Callback]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the states of hooks by key as JSON values, and copies of their tensors by name."""
    values: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for callback in callbacks:
        state = _state(callback)
        if state:
            name = callback.key or type(callback).__name__
            values[name] = _without(state, f"{_FOLDER}{name}", tensors)
    return values, tensors


def given_back(
    callbacks: Sequence[Callback], values: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Restore the states of hooks from what `taken_from` returned.

    Older checkpoints name a hook by its class, tensors of its state by class and name, and pack
    those of monitors into JSON.
    """
    for callback in callbacks:
        former = type(callback).__name__
        state = {
            **under(f"{former}:", tensors),
            **_with(values.get(former, {}), tensors),
            **_with(values.get(callback.key or former, {}), tensors),
        }
        if state:
            callback.load_state_dict(state)


def _state(callback: Callback) -> dict[str, Any]:
    """Return the state of a hook; of one that fails none, unless other ranks meet in it."""
    try:
        return callback.state_dict()
    except Exception as error:
        if callback.collective:
            raise
        kind = type(callback).__name__
        log_once(
            f"{kind}-state",
            f"{kind}.state_dict failed: {describe(error)}; checkpoints are written without it",
            logging.ERROR,
        )
        return {}


def _without(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """Return a state with names for tensors, which go to ``tensors``."""
    if isinstance(value, Tensor):
        name = f"{place} ({len(tensors)})" if place in tensors else place
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        return {key: _without(inner, f"{place}/{key}", tensors) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without(inner, f"{place}/{n}", tensors) for n, inner in enumerate(value)]
    return value


def _with(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return a state with its tensors, those that older checkpoints pack included."""
    if isinstance(value, Mapping):
        if value.keys() == {_TENSOR}:
            return tensors[value[_TENSOR]]
        if value.keys() == _PACKED:
            content = zlib.decompress(base64.b64decode(value["zlib"]))
            array = np.frombuffer(content, value["dtype"]).reshape(value["shape"])
            return torch.from_numpy(array.copy())
        return {key: _with(inner, tensors) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with(inner, tensors) for inner in value]
    return value


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose name begins with ``prefix``, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
