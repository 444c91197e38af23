"""The trials that a plan is made for, and the model that would be trained on them."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from b2t.config import Config
from b2t.data.batches import Batch
from b2t.data.dataset import DatasetInfo, dataset_info, load_trials
from b2t.data.trials import signal_lengths
from b2t.errors import UserError
from b2t.model.brain_to_text import BrainToText
from b2t.model.configuration import BrainToTextConfig
from b2t.model.tokenizer import build_tokenizer
from b2t.train.build import model_config


@dataclass(frozen=True)
class Workload:
    """What trials look like.

    Attributes:
        info: channels, sessions, rate, and whether there is text and phonemes.
        bins: of the longest trial, which memory must hold.
        typical_bins: of the mean trial, which time goes by.
        tokens: of a text.
        phonemes: of a trial.
        trials: of the training split.
        source: where these numbers come from, in words.
    """

    info: DatasetInfo
    bins: int
    typical_bins: int
    tokens: int
    phonemes: int
    trials: int
    source: str

    def batch(self, size: int, dtype: torch.dtype, bins: int | None = None) -> Batch:
        """Return a micro-batch of this size with nothing in it; fake under a `FakeTensorMode`."""
        bins = bins or self.bins
        ids = torch.zeros(size, dtype=torch.int64)
        signal = torch.zeros(size, bins, self.info.channels, dtype=dtype)
        return Batch(
            signal=signal,
            target=torch.zeros_like(signal),
            signal_mask=torch.ones(size, bins, dtype=torch.bool),
            session=ids,
            tokens=torch.ones(size, self.tokens, dtype=torch.int64),
            phonemes=torch.ones(size, self.phonemes, dtype=torch.int64),
            phoneme_lengths=torch.full((size,), self.phonemes),
            rows=["planned"] * size,
            texts=[None] * size,
            row_ids=ids.clone(),
        )


def assumed(
    channels: int, rate: float, seconds: float, typical: float, sessions: int, tokens: int
) -> Workload:
    """Return a workload from arguments, with text and phonemes.

    Args:
        channels: C.
        rate: bins per second.
        seconds: of the longest trial.
        typical: seconds of the mean trial.
        sessions: that the adapter has maps for.
        tokens: of the longest text.
    """
    info = DatasetInfo(
        channels, rate, [f"session{n}" for n in range(sessions)], False, True, True, {}, ""
    )
    return Workload(
        info, max(1, round(seconds * rate)), max(1, round(typical * rate)), tokens,
        max(1, tokens // 2), 0,
        f"assumed: {channels} channels at {rate:g} Hz, trials of {seconds:g} s at most, "
        f"{typical:g} s on average, {sessions} sessions, texts of {tokens} tokens",
    )  # fmt: skip


def of_dataset(config: Config, tokens: int) -> Workload:
    """Return the workload of the configuration's training split.

    Raises:
        UserError: data that cannot be read.
    """
    path = config.data.path
    if not isinstance(path, str):
        raise UserError(f"data.path={path}: a plan is made for one dataset: name one")
    info, train = dataset_info(path), load_trials(path, config.data.train_split)
    lengths = signal_lengths(train)
    phonemes = [len(p) for p in train["phonemes"] if p] if info.has_phonemes else []
    longest, mean = int(lengths.max()), round(float(lengths.mean()))
    return Workload(
        info, longest, mean, tokens, max(phonemes, default=1), len(train),
        f"{path}: {len(train)} trials of {info.channels} channels at {info.sampling_rate:g} Hz, "
        f"{longest} bins at most, {np.round(mean)} on average",
    )  # fmt: skip


def architecture(config: Config, workload: Workload) -> BrainToTextConfig:
    """Resolve the model's architecture; a text decoder of a checkpoint has its sizes.

    Raises:
        UserError: a checkpoint that cannot be read.
    """
    if config.data.max_frames is not None:
        raise UserError(
            f"data.max_frames={config.data.max_frames}: micro-batches are planned by their trials: "
            "set data.max_frames=null, and train_micro_batch_size_per_gpu to as many of the longest"
        )
    section = config.model.text_decoder
    tokenizer: Any = None
    if section.enabled and workload.info.has_text:
        if section.tokenizer == "bpe":  # its texts are not needed, only how many tokens it has
            tokenizer = _Vocabulary(section.bpe_vocab_size)
        else:
            tokenizer = build_tokenizer(
                section.tokenizer, [], section.bpe_vocab_size,
                checkpoint=section.checkpoint, causal=section.kind == "causal_lm",
            )  # fmt: skip
    return model_config(config, workload.info, tokenizer, 1.0)


class _Vocabulary(SimpleNamespace):
    """Stands in for a tokenizer that is yet to be learnt."""

    def __init__(self, size: int) -> None:
        super().__init__(size=size, bos_token_id=1, eos_token_id=2, pad_token_id=0)

    def __len__(self) -> int:
        return self.size


def meta_model(config: Config, workload: Workload) -> BrainToText:
    """Build the model without memory for its weights."""
    resolved = architecture(config, workload)
    if resolved.text_decoder["checkpoint"] is not None:
        raise UserError(
            "model.text_decoder.checkpoint: weights of a checkpoint are read when training "
            "starts and are not planned for; give the same sizes by model.text_decoder.config"
        )
    with torch.device("meta"):
        return BrainToText(resolved)


def fake_copy(model: BrainToText, dtype: torch.dtype) -> None:
    """Give a meta model fake tensors on the CPU; call it under a `FakeTensorMode`.

    Weights are of ``dtype``, buffers as they are. The quantizer's clocks become real, and say that
    its codebooks have started.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in made:
                    value = torch.empty(parameter.shape, dtype=dtype, device="cpu")
                    made[parameter] = nn.Parameter(value, parameter.requires_grad)
                module._parameters[name] = made[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
