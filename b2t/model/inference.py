"""The model on a user's own arrays: codes, and text."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from b2t.errors import UserError
from b2t.log import log_once
from b2t.model.outputs import Encoded
from b2t.model.tokenizer import decode_texts
from b2t.signal_spec import SignalSpec, require_fit
from b2t.smoothing import smooth

if TYPE_CHECKING:
    from b2t.data.batches import Batch
    from b2t.model.brain_to_text import BrainToText

Array = Tensor | np.ndarray
Sessions = str | int | Sequence[str] | Sequence[int] | Array | None


class Signals(NamedTuple):
    """Checked signals as the encoder reads them."""

    signal: Tensor
    """[B, T, C] float32, smoothed, channels in the model's order, zero under the mask."""
    mask: Tensor
    """[B, T] bool, True = real."""
    session: Tensor
    """[B] int64, −1 = unseen."""
    single: bool
    """One trial [T, C] was given, and results come without the batch axis."""


class Inference:
    """What a trained `BrainToText` does with signals of a user."""

    def encode(
        self,
        signal: Array,
        signal_mask: Array | None = None,
        session: Sessions = None,
        *,
        sampling_rate: float | None = None,
        channels: Sequence[str] | None = None,
        force: bool = False,
    ) -> Encoded:
        """Encode signals as they were prepared for training, without dropout and gradient.

        The smoothing of the training configuration is part of the model and applied here.

        Args:
            signal: [B, T, C], or one trial [T, C]: results then have no batch axis either.
            signal_mask: [B, T] bool, True = real; None is all real.
            session: name of the session, or B names, or indices [B] into `config.sessions` with
                −1 for one not trained on; None takes the mean over all sessions.
            sampling_rate: of the signal in Hz, compared with that of training.
            channels: C names; they are brought into the model's order.
            force: go on with a warning where the signals are of another kind than in training.

        Raises:
            UserError: wrong shape, NaN or infinity, an unknown session, or signals of another
                rate, unit or with other channels than the model was trained on.
        """
        model = cast("BrainToText", self)
        given = read_signals(model, signal, signal_mask, session, sampling_rate, channels, force)
        with _inference(model):
            found = model.encode_batch(given.signal, given.mask, given.session)
        if not given.single:
            return found
        codes = None if found.codes is None else found.codes[0]
        return found._replace(
            latents=found.latents[0],
            quantized=found.quantized[0],
            codes=codes,
            frame_mask=found.frame_mask[0],
        )

    def generate(
        self,
        signal: "Batch | Array",
        signal_mask: Array | None = None,
        session: Sessions = None,
        *,
        sampling_rate: float | None = None,
        channels: Sequence[str] | None = None,
        force: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Decode text freely, without labels and without dropout.

        Args:
            signal: a batch, taken as it is, or signals as in `encode`.
            signal_mask: as in `encode`.
            session: as in `encode`.
            sampling_rate: as in `encode`.
            channels: as in `encode`.
            force: as in `encode`.
            kwargs: as in transformers' `generate` (`num_beams`, `max_new_tokens`, …); what is not
                given comes from `generation_config`.

        Returns:
            Tokens [B, ≤ max_tokens + 1] with the start token; `decode_texts` makes texts of them.

        Raises:
            UserError: the model has no text decoder, too many tokens are asked for, or signals
                that `encode` refuses.
        """
        model = cast("BrainToText", self)
        _require_text_decoder(model)
        if hasattr(signal, "signal_mask"):
            batch = cast("Batch", signal)
            inputs = batch.signal, batch.signal_mask, batch.session
        else:
            array = cast("Array", signal)
            given = read_signals(model, array, signal_mask, session, sampling_rate, channels, force)
            inputs = given.signal, given.mask, given.session
        for name in ("num_beams", "max_new_tokens"):
            value = getattr(model.generation_config, name, None)
            if value is not None and "generation_config" not in kwargs:
                kwargs.setdefault(name, value)
        with _inference(model):
            encoded = model.encode_batch(*inputs)
            return model.text_decoder.generate(*model.text_memory(encoded), **kwargs)

    def transcribe(
        self,
        signal: Array,
        session: Sessions = None,
        *,
        signal_mask: Array | None = None,
        **kwargs: Any,
    ) -> str | list[str]:
        """Return the text of one trial [T, C], or B texts of trials [B, T, C].

        Args:
            signal: as in `encode`.
            session: as in `encode`.
            signal_mask: as in `encode`.
            kwargs: as in `generate`.

        Raises:
            UserError: as in `generate`, and where the model was saved without its tokenizer.
        """
        model = cast("BrainToText", self)
        _require_text_decoder(model)
        if model.tokenizer is None:
            raise UserError(
                "this model has no tokenizer to make texts of tokens: set model.tokenizer, or load "
                "a folder that holds one, such as RUN/checkpoints/best"
            )
        tokens = self.generate(signal, signal_mask, session, **kwargs)
        texts = [text.strip() for text in decode_texts(model.tokenizer, tokens)]
        return texts[0] if np.ndim(signal) == 2 else texts


def read_signals(
    model: "BrainToText",
    signal: Array,
    mask: Array | None,
    session: Sessions,
    sampling_rate: float | None,
    channels: Sequence[str] | None,
    force: bool,
) -> Signals:
    """Check signals and bring them into the form of the model's input; see `Inference.encode`."""
    values, single = _values(signal, model.config.channels, channels)
    real = _mask(mask, values)
    _require_finite(values, real)
    sessions = _sessions(session, len(values), model.config.sessions)
    found = SignalSpec(
        channels=values.shape[2],
        sampling_rate=sampling_rate,
        channel_names=channels,
        rms=_rms(values, real),
    )
    wanted = SignalSpec.of_model(model.config)
    if sampling_rate is not None and not 0 < sampling_rate < np.inf:
        raise UserError(f"sampling_rate: found {sampling_rate}, expected a number above 0, in Hz")
    order = require_fit(wanted, found, "signal", model.name_or_path, force=force, how="force=True")
    if order is not None:
        values = values[..., order]
    values = np.where(real[..., None], values, np.float32(0))
    bins = (model.config.signal or {}).get("smoothing_bins")
    if bins:
        for row, keep in zip(values, real, strict=True):
            row[keep] = smooth(row[keep], bins)
    if sessions is None:
        sessions = np.full(len(values), -1)
        if model.adapter is not None and len(model.config.sessions) > 1:
            log_once(
                "no-session",
                f"no session given: the mean over the {len(model.config.sessions)} sessions of the "
                "training is taken (session=NAME tells which)",
            )
    device = next(model.parameters()).device
    return Signals(
        torch.from_numpy(values).to(device),
        torch.from_numpy(real).to(device),
        torch.from_numpy(sessions).to(device, torch.int64),
        single,
    )


def _values(signal: Array, wanted: int, channels: Sequence[str] | None) -> tuple[np.ndarray, bool]:
    """Return the signals as float32 [B, T, C], and whether there was no batch axis."""
    if isinstance(signal, Tensor):
        signal = signal.detach().cpu()
        signal = (signal.float() if signal.is_floating_point() else signal).numpy()
    try:
        array = np.asarray(signal)
    except ValueError as error:  # rows of unequal length
        raise UserError(f"signal: no array of numbers: {error}") from None
    if array.dtype.kind not in "fiub":
        raise UserError(f"signal: its values are of type {array.dtype}, expected real numbers")
    shape = "×".join(map(str, array.shape))
    if array.ndim not in (2, 3):
        raise UserError(
            f"signal: its shape is {shape or 'that of one number'}, expected [T, C] for one trial "
            "or [B, T, C], time bins before channels"
        )
    if 0 in array.shape:
        raise UserError(f"signal: its shape is {shape}: it holds no values")
    width = array.shape[-1]
    if channels is not None and len(channels) != width:
        raise UserError(f"signal: {width} channels, but channels names {len(channels)}")
    if width != wanted and channels is None:
        turned = array.shape[-2] == wanted
        raise UserError(
            f"signal: its shape is {shape}, so it has {width} channels, the model reads {wanted}"
            + ("; it looks transposed, time bins come before channels" if turned else "")
        )
    return np.array(array, np.float32).reshape(-1, *array.shape[-2:]), array.ndim == 2


def _mask(mask: Array | None, values: np.ndarray) -> np.ndarray:
    if mask is None:
        return np.ones(values.shape[:2], bool)
    found = np.asarray(mask.cpu() if isinstance(mask, Tensor) else mask)
    found = found[None] if found.ndim == 1 else found
    if found.shape != values.shape[:2] or found.dtype != bool:
        raise UserError(
            f"signal_mask: {found.dtype} of shape {'×'.join(map(str, found.shape))}, expected bool "
            f"of shape {values.shape[0]}×{values.shape[1]}"
        )
    return found


def _require_finite(values: np.ndarray, mask: np.ndarray) -> None:
    bad = ~np.isfinite(values) & mask[..., None]
    if bad.any():
        trial, time, channel = (int(place) for place in np.argwhere(bad)[0])
        raise UserError(
            f"signal: {values[trial, time, channel]} in trial {trial}, bin {time}, channel "
            f"{channel} ({int(bad.sum())} such values), expected finite numbers: repair or mask it"
        )


def _rms(values: np.ndarray, mask: np.ndarray) -> float | None:
    """Root mean square of the real bins; None of silence, which has no unit."""
    power = float(np.mean(np.square(values[mask], dtype=np.float64))) if mask.any() else 0.0
    return float(np.sqrt(power)) or None


def _sessions(session: Sessions, rows: int, known: Sequence[str]) -> np.ndarray | None:
    """Return the index of each row's session, None where none was given."""
    if session is None:
        return None
    given: list[Any]
    if isinstance(session, (Tensor, np.ndarray)):
        given = session.reshape(-1).tolist()
    elif isinstance(session, Sequence) and not isinstance(session, str):
        given = list(session)
    else:
        given = [session]
    given = given * rows if len(given) == 1 else given
    if len(given) != rows:
        raise UserError(f"session: {len(given)} given for {rows} trials")
    return np.array([session_index(item, known) for item in given], np.int64)


def session_index(item: str | int, known: Sequence[str]) -> int:
    """Return the index of a session among the known ones, −1 for −1, their mean.

    Raises:
        UserError: it is not one of them.
    """
    names = ", ".join(known[:4]) + (" …" if len(known) > 4 else "")
    if isinstance(item, str):
        if item not in known:
            raise UserError(
                f"session: {item} was not trained on, expected one of {len(known)} ({names}); −1 "
                "takes their mean"
            )
        return list(known).index(item)
    if not isinstance(item, (int, np.integer)) or not -1 <= item < max(len(known), 1):
        raise UserError(
            f"session: {item!r} is no index of the {len(known)} sessions ({names}); −1 takes their "
            "mean"
        )
    return int(item)


def _require_text_decoder(model: "BrainToText") -> None:
    if model.text_decoder is None:
        raise UserError(
            "this model has no text decoder (text_decoder.enabled=false): it tokenizes signals; "
            "train with text to decode text"
        )


@contextmanager
def _inference(model: "BrainToText") -> Iterator[None]:
    """No gradient and no dropout inside; the mode it came in afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
