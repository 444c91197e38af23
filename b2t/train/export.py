"""A trained model as a folder that `BrainToText.from_pretrained` reads."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from b2t.evaluate.checkpoints import best_of, chosen_at
from b2t.model.brain_to_text import BrainToText
from b2t.train.checkpoint import is_whole
from b2t.train.replacing import recover_folder, replace_folder, sync_files, writing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def export_model(
    folder: Path,
    model: BrainToText,
    masters: Mapping[str, Tensor],
    tokenizer: "PreTrainedTokenizerBase | None",
    phase: str,
) -> None:
    """Write config, float32 weights (safetensors) and tokenizer, replacing an earlier export whole.

    An export of another phase is kept beside it.

    Args:
        folder: where to, for example RUN/checkpoints/best.
        model: the model being trained, whose weights may be 16-bit.
        masters: its exact float32 parameters by name.
        tokenizer: saved beside it, where there is one.
        phase: name of the phase that chose it.
    """
    copy = BrainToText(model.config)
    own = dict(copy.named_parameters())
    for name, value in masters.items():
        own[name].data = value.clone()
    buffers = dict(copy.named_buffers())
    for name, value in model.named_buffers():
        buffers[name].data = value.detach().cpu().clone()
    recover_folder(folder, is_whole)
    partial = writing(folder)
    shutil.rmtree(partial, ignore_errors=True)
    copy.tokenizer = tokenizer
    copy.generation_config = model.generation_config
    copy.save_pretrained(partial)
    sync_files(partial)
    keep_other_phase(folder, phase)
    replace_folder(folder)


def keep_other_phase(best: Path, phase: str) -> None:
    """Rename a best model that another phase chose to `best-PHASE`, where it stays."""
    chosen = chosen_at(best)
    if chosen is not None and chosen["phase"] != phase:
        kept = best.with_name(best_of(chosen["phase"]))
        shutil.rmtree(kept, ignore_errors=True)
        best.rename(kept)
