"""The model: session adapter, encoder, decoders, and `BrainToText` around them."""

from transformers import AutoConfig, AutoModel

from b2t.model.brain_to_text import COMPONENTS, DEFAULT_WEIGHTS, BrainToText
from b2t.model.configuration import BrainToTextConfig
from b2t.model.outputs import BrainToTextOutput, Encoded
from b2t.model.tokenizer import (
    build_tokenizer,
    decode_texts,
    load_tokenizer,
)

AutoConfig.register("brain_to_text", BrainToTextConfig, exist_ok=True)
AutoModel.register(BrainToTextConfig, BrainToText, exist_ok=True)

__all__ = [
    "BrainToText",
    "BrainToTextConfig",
    "BrainToTextOutput",
    "COMPONENTS",
    "DEFAULT_WEIGHTS",
    "Encoded",
    "build_tokenizer",
    "decode_texts",
    "load_tokenizer",
]
