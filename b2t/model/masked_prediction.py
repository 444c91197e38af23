"""Learning without labels: what was there, told from what stands around it."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from b2t.model import losses as sums
from b2t.model.outputs import BrainToTextOutput
from b2t.quantize import StepNorms

if TYPE_CHECKING:
    from b2t.data.batches import Batch
    from b2t.model.signal_decoder import SignalDecoder


class MaskedPrediction:
    """The objective `masked` of `BrainToText`: encoder and signal decoder, past the quantizer."""

    if TYPE_CHECKING:
        signal_decoder: SignalDecoder
        latents: Callable[..., tuple[Tensor, Tensor]]
        _counted: Callable[[StepNorms, Batch, Tensor], StepNorms]

    def _predict_hidden(self, batch: "Batch") -> tuple[Tensor, Tensor, Tensor]:
        """Squared error over the hidden bins of signals that were encoded without them.

        Returns:
            The sum, the latents [B, P, D] and the mask of real frames [B, P].
        """
        hidden = batch.hidden
        if hidden is None:
            hidden = torch.zeros_like(batch.signal_mask)
        latents, frames = self.latents(
            batch.signal, batch.signal_mask, batch.session, hidden=hidden
        )
        signal = self.signal_decoder(latents, frames, batch.signal.shape[1])
        found = sums.reconstruction_sums(signal, batch.target, hidden & batch.signal_mask)
        return found.squared_error, latents, frames

    def _pretrain(
        self, batch: "Batch", norms: StepNorms, weights: Mapping[str, float]
    ) -> BrainToTextOutput:
        """Losses of hidden bins alone: nothing is quantized, and no label is looked at."""
        total, latents, frames = self._predict_hidden(batch)
        loss = sums.normalise(total, self._counted(norms, batch, frames).count("hidden"))
        return BrainToTextOutput(
            loss=weights["masked"] * loss,
            losses={"masked": loss},
            latents=latents,
            frame_mask=frames,
            metrics={"frames": frames.sum()},
        )
