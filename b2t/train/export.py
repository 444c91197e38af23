"""A trained model as a folder that `BrainToText.from_pretrained` reads."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from b2t.model.brain_to_text import BrainToText


def export_model(
    folder: Path, model: BrainToText, masters: Mapping[str, Tensor], tokenizer: Any | None
) -> None:
    """Write config, float32 weights (safetensors) and tokenizer, replacing an earlier export whole.

    Args:
        folder: where to, for example RUN/checkpoints/best.
        model: the model being trained, whose weights may be 16-bit.
        masters: its exact float32 parameters by name.
        tokenizer: saved beside it, where there is one.
    """
    copy = BrainToText(model.config)
    own = dict(copy.named_parameters())
    for name, value in masters.items():
        own[name].data = value.clone()
    buffers = dict(copy.named_buffers())
    for name, value in model.named_buffers():
        buffers[name].data = value.detach().cpu().clone()
    partial = folder.with_name(f".writing-{folder.name}")
    replaced = folder.with_name(f".replaced-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
    copy.tokenizer = tokenizer
    copy.generation_config = model.generation_config
    copy.save_pretrained(partial)
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)
