"""A causal model on bins as they come: what it makes of a sentence grows with the sentence."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from b2t.errors import UserError
from b2t.model.inference import session_index
from b2t.model.patches import num_patches
from b2t.smoothing import reach, smooth

if TYPE_CHECKING:
    from b2t.model.brain_to_text import BrainToText


class Frames(NamedTuple):
    """Latent frames that new bins have completed, in order; n may be 0."""

    quantized: Tensor
    """[n, D]; the latents themselves in a model without a quantizer."""
    codes: Tensor | None
    """[n, Q] int64; None without a quantizer."""
    phoneme_logits: Tensor | None
    """[n, 41] float32; None without a phoneme head."""


class Stream:
    """One sentence, read bin by bin.

    All frames together are those of the whole signal at once, within the rounding of products of
    other shapes (1e-5 of latents near 1 in float32), where the encoder is causal: the session's
    map and the quantizer see one bin or frame alone, smoothing waits for the bins that it looks
    ahead at, and the encoder keeps what it needs of the frames before.

    Args:
        model: a `BrainToText` in evaluation mode.
        session: name of its session, or index; None or −1 takes the mean over all sessions.

    Attributes:
        bins: read so far.
        frames: given so far.

    Raises:
        UserError: the encoder looks ahead, or the session is unknown.
    """

    def __init__(self, model: "BrainToText", session: str | int | None = None) -> None:
        require_causal(model)
        self.model = model
        self._session = -1 if session is None else session_index(session, model.config.sessions)
        self._smoothing = float((model.config.signal or {}).get("smoothing_bins") or 0.0)
        self._ahead = reach(self._smoothing)
        self._recorded = torch.zeros(0, model.config.channels)
        """Bins that smoothing still needs; the last `_pending` of them are not smoothed yet."""
        self._pending = 0
        self._waiting: Tensor | None = None
        """Adapted bins [n, C] of patches that are not complete."""
        self._state: Any = model.encoder.body.start()  # each kind of body has its own
        self.bins = 0
        self.frames = 0

    @property
    def bins_ahead(self) -> int:
        """Bins that must follow the first bin of a patch before its frame is given."""
        return self.model.patch_size - 1 + self._ahead

    def push(self, bins: Tensor) -> Frames:
        """Read the next bins [n, C], in the unit of the prepared recordings.

        Raises:
            UserError: other channels than the model's, NaN or infinity.
        """
        channels = self.model.config.channels
        if bins.dim() != 2 or bins.shape[1] != channels:
            shape = "×".join(map(str, bins.shape))
            raise UserError(f"bins of shape {shape}, expected n×{channels}, the model's channels")
        bins = bins.detach().to("cpu", torch.float32)
        if not bool(torch.isfinite(bins).all()):
            raise UserError(f"NaN or infinity in the bins after {self.bins}: repair the recording")
        self.bins += len(bins)
        self._recorded = torch.cat((self._recorded, bins))
        self._pending += len(bins)
        return self._encode(self._adapt(self._smoothed(ended=False)), ended=False)

    def finish(self) -> Frames:
        """Return the frames that waited for bins which will not come."""
        if not self.bins:
            return self._encode(self._adapt(self._recorded), ended=False)
        return self._encode(self._adapt(self._smoothed(ended=True)), ended=True)

    def _smoothed(self, ended: bool) -> Tensor:
        """Return the bins whose smoothing no later bin changes, and forget those not needed."""
        ready = self._pending if ended else max(self._pending - self._ahead, 0)
        first = len(self._recorded) - self._pending
        if not ready:
            return self._recorded[:0]
        found = smooth(self._recorded.numpy(), self._smoothing)[first : first + ready]
        self._pending -= ready
        self._recorded = self._recorded[max(first + ready - self._ahead, 0) :]
        return torch.from_numpy(found)

    @torch.no_grad()
    def _adapt(self, bins: Tensor) -> Tensor:
        model = self.model
        weight = model.encoder.embed.weight
        signal = bins.to(weight.device, weight.dtype)[None]
        if model.adapter is not None:
            session = torch.tensor([self._session], device=signal.device)
            signal = model.adapter(signal, session)
        return signal[0]

    @torch.no_grad()
    def _encode(self, adapted: Tensor, ended: bool) -> Frames:
        """Encode the patches that these bins complete, the last filled up with zeros at the end."""
        model, encoder = self.model, self.model.encoder
        size, stride = encoder.patch_size, encoder.patch_stride
        if self._waiting is not None:
            adapted = torch.cat((self._waiting, adapted))
        if ended:
            count = num_patches(self.bins, size, stride) - self.frames
            missing = (count - 1) * stride + size - len(adapted) if count else 0
            adapted = torch.cat((adapted, adapted.new_zeros(max(missing, 0), adapted.shape[1])))
        else:
            count = max(len(adapted) - size, -stride) // stride + 1
        self._waiting = adapted[count * stride :]
        self.frames += count
        if not count:
            return self._frames(adapted.new_zeros(1, 0, model.config.encoder["dim"]))
        patches = adapted.unfold(0, size, stride)[:count].transpose(1, 2).flatten(1)
        return self._frames(encoder.body.advance(encoder.embed(patches)[None], self._state))

    def _frames(self, latents: Tensor) -> Frames:
        model, codes, quantized = self.model, None, latents
        if model.quantizer is not None and latents.shape[1]:
            mask = torch.ones(latents.shape[:2], dtype=torch.bool, device=latents.device)
            found = model.quantizer(latents, mask, losses=(), across_ranks=False)
            quantized, codes = found.quantized, found.codes[0]
        elif model.quantizer is not None:
            layers = model.quantizer.num_quantizers
            codes = torch.zeros(0, layers, dtype=torch.int64, device=latents.device)
        head = model.phoneme_head
        return Frames(quantized[0], codes, None if head is None else head(quantized)[0])


def require_causal(model: "BrainToText") -> None:
    """Refuse a model whose encoder looks at bins that have not come.

    Raises:
        UserError: says which settings train one that does not.
    """
    if not model.encoder.causal:
        raise UserError(
            f"{model.name_or_path or 'this model'}: its encoder ({model.encoder.kind}) looks at "
            "what follows, so that it can only read whole trials; train with "
            "model.encoder.causal=true, or kind=gru and bidirectional=false"
        )
