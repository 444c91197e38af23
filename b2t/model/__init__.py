"""The model: session adapter, encoder, decoders, and `BrainToText` around them."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from b2t.model.brain_to_text import BrainToText
    from b2t.model.configuration import BrainToTextConfig
    from b2t.model.objectives import COMPONENTS, DEFAULT_WEIGHTS
    from b2t.model.outputs import BrainToTextOutput, Encoded
    from b2t.model.streaming import Stream
    from b2t.model.tokenizer import build_tokenizer, decode_texts, load_tokenizer

_PLACES = {
    "BrainToText": "brain_to_text",
    "BrainToTextConfig": "configuration",
    "BrainToTextOutput": "outputs",
    "COMPONENTS": "objectives",
    "DEFAULT_WEIGHTS": "objectives",
    "Encoded": "outputs",
    "Stream": "streaming",
    "build_tokenizer": "tokenizer",
    "decode_texts": "tokenizer",
    "load_tokenizer": "tokenizer",
}

__all__ = [
    "BrainToText",
    "BrainToTextConfig",
    "BrainToTextOutput",
    "COMPONENTS",
    "DEFAULT_WEIGHTS",
    "Encoded",
    "Stream",
    "build_tokenizer",
    "decode_texts",
    "load_tokenizer",
]


def __getattr__(name: str) -> Any:
    # transformers' Auto classes import the configuration while they are imported themselves.
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
