"""The config that travels with a model, in transformers' form."""

import copy
import importlib
from typing import Any

from transformers import PretrainedConfig

_DEFAULTS: dict[str, dict[str, Any]] = {
    "signal": {"channel_names": None, "unit": None, "rms": None, "smoothing_bins": 0.0},
    "adapter": {"enabled": True, "softsign": False, "dropout": 0.0},
    "encoder": {
        "patch_size": 4,
        "patch_stride": 4,
        "dim": 512,
        "depth": 6,
        "heads": 8,
        "mlp_ratio": 4.0,
        "dropout": 0.1,
        "kind": "transformer",
        "kernel_size": 15,
        "bidirectional": False,
        "causal": False,
        "window": None,
    },
    "signal_decoder": {"dim": None, "depth": 4, "heads": 8, "mlp_ratio": 4.0, "dropout": 0.0},
    "phoneme_head": {"enabled": True, "dropout": 0.1},
    "text_decoder": {
        "enabled": True,
        "kind": "seq2seq",
        "checkpoint": None,
        "tuning": "full",
        "lora_rank": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "lora_targets": None,
        "initialized_from": None,
        "config": None,
        "tokenizer": "byte",
        "bpe_vocab_size": 2000,
        "dim": 512,
        "depth": 6,
        "heads": 8,
        "ffn_dim": 2048,
        "dropout": 0.1,
        "max_tokens": 128,
        "memory": "latents",
        "memory_depth": 2,
        "phoneme_errors": 0.1,
    },
}


class BrainToTextConfig(PretrainedConfig):
    """Architecture of `BrainToText`, in sections of one component each.

    Args:
        channels: channels C of the signal.
        sampling_rate: bins per second, in Hz.
        sessions: names of the trained sessions; a batch's session is an index into them.
        adapter: `enabled`, `softsign`, `dropout`.
        encoder: `kind`, `patch_size`, `patch_stride`, `dim`, `depth`, `heads`, `mlp_ratio`,
            `dropout`, `kernel_size`, `bidirectional`, `causal`, `window`.
        quantizer: arguments of `b2t.quantize.ResidualVQ` but `dim`; `{"enabled": False}` builds the
            same model without a quantizer.
        signal_decoder: `dim` (None: the encoder's), `depth`, `heads`, `mlp_ratio`, `dropout`.
        phoneme_head: `enabled`, `dropout`.
        text_decoder: `enabled`, `kind` (`seq2seq` or `causal_lm`), `checkpoint` (whose weights a
            new model starts from), `config` (a transformers config as a mapping), or `dim`,
            `depth`, `heads`, `ffn_dim`, `dropout` of a small one; `max_tokens`; `tuning` (`full`,
            `lora` or `frozen`), `lora_rank`, `lora_alpha`, `lora_dropout` and `lora_targets` of a
            causal language model; `memory` (`latents` or `phonemes`), `memory_depth` and
            `phoneme_errors` of the second. A saved model keeps the resolved `config`, and where its
            weights came from in `initialized_from`.
        vocab_size: tokens V of the tokenizer.
        bos_token_id: begins a text, where the tokenizer has one.
        eos_token_id: ends a text.
        pad_token_id: fills up.
        simulated_data: the model was trained on a simulation; say so beside its results.
        signal: what the signals were that it was trained on: `channel_names` (C names in order),
            `unit` (`z-score`, V …), `rms` (root mean square of a typical trial), and
            `smoothing_bins`, the Gaussian smoothing that belongs to the model's input. None in
            models that do not say; a value of None is not known.
        data: of the training: `fingerprint` of the dataset, `train_split`, and `validation_split`,
            which chose the model. None where it is not known.
        trained: names of the components that have been trained; None where it is not known.
        started_with: those that came trained from another model (`model.init_from`).

    Raises:
        ValueError: an unknown key in a section.
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
        started_with: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        # Defines the class that AutoModel then knows.
        importlib.import_module("b2t.model.brain_to_text")
        self.channels = channels
        self.sampling_rate = sampling_rate
        self.sessions = list(sessions or [])
        self.adapter = _section("adapter", adapter)
        self.encoder = _section("encoder", encoder)
        self.quantizer = {"enabled": quantizer is not None, **(quantizer or {})}
        self.signal_decoder = _section("signal_decoder", signal_decoder)
        self.phoneme_head = _section("phoneme_head", phoneme_head)
        self.text_decoder = _section("text_decoder", text_decoder)
        self.vocab_size = vocab_size
        self.simulated_data = simulated_data
        self.data = data
        self.trained = trained
        self.started_with = list(started_with or [])
        self.signal = None if signal is None else _section("signal", signal)
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=kwargs.pop("tie_word_embeddings", True),
            **kwargs,
        )


def _section(name: str, given: dict[str, Any] | None) -> dict[str, Any]:
    defaults = _DEFAULTS[name]
    unknown = set(given or {}) - set(defaults)
    if unknown:
        raise ValueError(
            f"{name}: unknown keys {sorted(unknown)}; expected some of {sorted(defaults)}"
        )
    return copy.deepcopy({**defaults, **(given or {})})
