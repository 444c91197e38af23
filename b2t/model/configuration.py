"""The config that travels with a model, in transformers' form."""

import importlib
from typing import Any

from transformers import PretrainedConfig

from b2t.model.options import (
    AdapterOptions,
    EncoderOptions,
    PhonemeHeadOptions,
    SavedTextDecoderOptions,
    SignalDecoderOptions,
    SignalOptions,
)
from b2t.options import Options, checked


class BrainToTextConfig(PretrainedConfig):
    """Architecture of `BrainToText`, in sections of one component each.

    Args:
        channels: channels C of the signal.
        sampling_rate: bins per second, in Hz.
        sessions: names of the trained sessions; a batch's session is an index into them.
        adapter: `b2t.model.options.AdapterOptions`, as a mapping.
        encoder: `EncoderOptions`.
        quantizer: arguments of `b2t.quantize.ResidualVQ` but `dim`; `{"enabled": False}` builds the
            same model without a quantizer.
        signal_decoder: `SignalDecoderOptions`.
        phoneme_head: `PhonemeHeadOptions`.
        text_decoder: `SavedTextDecoderOptions`. A saved model keeps the resolved `config` of
            transformers, and where its weights came from in `initialized_from`.
        vocab_size: tokens V of the tokenizer.
        bos_token_id: begins a text, where the tokenizer has one.
        eos_token_id: ends a text.
        pad_token_id: fills up.
        simulated_data: the model was trained on a simulation; say so beside its results.
        signal: what the signals were that it was trained on, as `SignalOptions`; None in models
            that do not say.
        data: of the training: `fingerprint` of the dataset, `train_split`, and `validation_split`,
            which chose the model. None where it is not known.
        trained: names of the components that have been trained; None where it is not known.
        chosen: of a best model: `phase`, `step`, `metric` and `value` that chose it.
        started_with: those that came trained from another model (`model.init_from`).

    Raises:
        ValueError: an unknown key in a section.
        UserError: a value out of its range.
    """

    model_type = "brain_to_text"

    def __init__(
        self,
        channels: int = 256,
        sampling_rate: float = 50.0,
        sessions: list[str] | None = None,
        adapter: dict[str, Any] | None = None,
        encoder: dict[str, Any] | None = None,
        quantizer: dict[str, Any] | None = None,
        signal_decoder: dict[str, Any] | None = None,
        phoneme_head: dict[str, Any] | None = None,
        text_decoder: dict[str, Any] | None = None,
        vocab_size: int = 259,
        bos_token_id: int | None = None,
        eos_token_id: int = 1,
        pad_token_id: int = 0,
        simulated_data: bool = False,
        signal: dict[str, Any] | None = None,
        data: dict[str, str] | None = None,
        trained: list[str] | None = None,
        chosen: dict[str, Any] | None = None,
        started_with: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        # Defines the class that AutoModel then knows.
        importlib.import_module("b2t.model.brain_to_text")
        self.channels = channels
        self.sampling_rate = sampling_rate
        self.sessions = list(sessions or [])
        self.adapter = _section(AdapterOptions, "adapter", adapter)
        self.encoder = _section(EncoderOptions, "encoder", encoder)
        self.quantizer = {"enabled": quantizer is not None, **(quantizer or {})}
        self.signal_decoder = _section(SignalDecoderOptions, "signal_decoder", signal_decoder)
        self.phoneme_head = _section(PhonemeHeadOptions, "phoneme_head", phoneme_head)
        self.text_decoder = _section(SavedTextDecoderOptions, "text_decoder", text_decoder)
        self.vocab_size = vocab_size
        self.simulated_data = simulated_data
        self.data = data
        self.trained = trained
        self.chosen = chosen
        self.started_with = list(started_with or [])
        self.signal = None if signal is None else _section(SignalOptions, "signal", signal)
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=kwargs.pop("tie_word_embeddings", True),
            **kwargs,
        )


def _section(options: type[Options], name: str, given: dict[str, Any] | None) -> dict[str, Any]:
    given = given or {}
    unknown = set(given) - set(options.model_fields)
    if unknown:
        known = sorted(options.model_fields)
        raise ValueError(f"{name}: unknown keys {sorted(unknown)}; expected some of {known}")
    return checked(options, given, name).model_dump()
