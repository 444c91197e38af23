"""Discrete codes of trials, for people who want neural tokens."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from b2t.data.batches import Batch
from b2t.errors import UserError
from b2t.evaluate.decode import to_model

if TYPE_CHECKING:
    from b2t.model.brain_to_text import BrainToText


@torch.no_grad()
def tokenize_trials(
    model: "BrainToText", batches: Iterable[Batch], layers: int | None = None
) -> dict[str, list[list[int]]]:
    """Encode trials to codes.

    Args:
        model: a `BrainToText` with a quantizer, put in evaluation mode.
        batches: unaugmented batches.
        layers: keep the first ``layers`` codes of each frame; None keeps all.

    Returns:
        Row id → [P valid frames][layers] codes.

    Raises:
        UserError: the codebooks were never initialized.
    """
    model.eval()
    found: dict[str, list[list[int]]] = {}
    for batch in batches:
        batch = to_model(batch, model)
        encoded = model.encode_batch(batch.signal, batch.signal_mask, batch.session)
        assert encoded.codes is not None and model.quantizer is not None
        codes, mask = encoded.codes[..., :layers].cpu(), encoded.frame_mask.cpu()
        for row, row_codes, keep in zip(batch.rows, codes, mask, strict=True):
            valid = row_codes[keep]
            if (valid < 0).any() and model.quantizer.initialized:
                raise UserError(
                    f"trial {row}: its latents are not finite, so it has no codes: its signal is "
                    f"out of range (root mean square {_rms(batch, row):.3g})"
                )
            if (valid < 0).any():
                raise UserError(
                    f"trial {row}: the model's codebooks were never initialized (training ended "
                    "before codebook_start.after_steps); train longer"
                )
            found[row] = valid.tolist()
    return found


def _rms(batch: Batch, row: str) -> float:
    place = batch.rows.index(row)
    return float(batch.target[place, batch.signal_mask[place]].double().square().mean().sqrt())
