"""From a configuration to the objects that train: data, tokenizer, model."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from b2t.config import Config
from b2t.data.augment import Augment
from b2t.data.batches import StreamedTrials, TrialRows, encode_texts
from b2t.data.dataset import DatasetInfo, load_trials, opened
from b2t.data.description import is_stream
from b2t.data.masking import Masking
from b2t.data.mixture import mixed
from b2t.data.texts import OF_TRIALS, Sentence, read_sentences, sentences_checksum
from b2t.data.trials import typical_rms
from b2t.errors import UserError
from b2t.log import logger
from b2t.model.brain_to_text import BrainToText
from b2t.model.configuration import BrainToTextConfig
from b2t.model.tokenizer import build_tokenizer
from b2t.train.started import take_start


@dataclass
class Materials:
    """What a run trains with.

    Attributes:
        info: facts about the dataset.
        train, validation: trials.
        sentences: what is learnt without signals, None where no phase does.
        stream: what is trained on instead of ``train``, which then holds its first rows.
        weights: how often each training trial comes in an epoch, [rows]; None means once.
        tokenizer: None where no text is trained on.
        model: on the CPU, float32.
        augment: of training signals.
    """

    info: DatasetInfo
    train: Dataset
    validation: Dataset
    tokenizer: PreTrainedTokenizerBase | None
    model: BrainToText
    augment: Augment
    weights: np.ndarray | None = None
    stream: StreamedTrials | None = None
    sentences: list[Sentence] | None = None

    @property
    def fingerprint(self) -> str:
        """What identifies all that is trained on."""
        if self.sentences is None:
            return self.info.fingerprint
        return f"{self.info.fingerprint}+{sentences_checksum(self.sentences)}"


def build(config: Config, rank: int = 0, world: int = 1) -> Materials:
    """Open the data and build tokenizer and model; of a stream the share of a rank.

    Raises:
        UserError: on data that cannot be trained on.
    """
    data = config.data
    if data.path is None:
        raise UserError(
            "data.path is not set: give a folder made by `b2t prepare`, a Hugging Face dataset id "
            "or a parquet glob, for example data.path=prepared/t15"
        )
    info, train, weights = mixed(
        data.path, data.train_split, [(more.path, more.weight) for more in data.more]
    )
    validation = load_trials(data.path, data.validation_split)
    with_text = info.has_text and config.model.text_decoder.enabled
    if config.model.text_decoder.enabled and not info.has_text:
        logger(__name__).info("%s has no text: training a tokenizer of signals only", data.path)
    sentences = _sentences(config, train) if with_text else None
    tokenizer = _tokenizer(config, train, sentences) if with_text else None
    if sentences is not None:
        sentences = _short(sentences, tokenizer, data.max_text_tokens)
    for split in (train, validation):
        # Refuses texts that are too long now, on all ranks, and not in the middle of a phase.
        TrialRows(split, tokenizer, info.sessions, max_tokens=data.max_text_tokens)
    # Weights are made on every rank from the same seed.
    torch.manual_seed(config.run.seed)
    model = BrainToText(model_config(config, info, tokenizer, typical_rms(train)))
    take_start(config, model)
    if model.quantizer is not None:
        model.quantizer.reminders.start_follows = True  # codebook_start.after_steps
    if model.generation_config is not None:
        model.generation_config.num_beams = config.evaluation.num_beams
        model.generation_config.max_new_tokens = config.evaluation.max_new_tokens
    knobs = config.model.activation_checkpointing
    model.checkpoint_activations(knobs.encoder, knobs.signal_decoder, knobs.text_decoder)
    model.compile_blocks(config.model.compile_blocks)
    model.pack_frames(config.model.pack_frames)
    return Materials(
        info, train, validation, tokenizer, model,
        Augment(**data.augment.at_rate(info.sampling_rate).model_dump()), weights,
        _stream(config, rank, world), sentences,
    )  # fmt: skip


def _sentences(config: Config, train: Dataset) -> list[Sentence] | None:
    """Sentences that are learnt without signals, where a phase does."""
    if all(phase.text_from != "texts" for phase in config.phases):
        return None
    data = config.data
    splits = opened(str(data.path)).splits
    held_out = [split for name, split in splits.items() if name != data.train_split]
    return read_sentences(data.texts, train, held_out)


def _short(
    sentences: list[Sentence], tokenizer: PreTrainedTokenizerBase, limit: int
) -> list[Sentence]:
    """Leave out sentences of more than ``limit`` tokens, logging how many."""
    labels = encode_texts([sentence.text for sentence in sentences], tokenizer)
    kept = [s for s, ids in zip(sentences, labels, strict=True) if len(ids) <= limit]
    if len(kept) < len(sentences):
        logger(__name__).warning(
            "%d of %d sentences of data.texts have more than data.max_text_tokens=%d tokens and "
            "are left out",
            len(sentences) - len(kept), len(sentences), limit,
        )  # fmt: skip
    return kept


def _stream(config: Config, rank: int, world: int) -> StreamedTrials | None:
    """Open what is trained on row by row; None where the data lie on this disk.

    Raises:
        UserError: other data beside it.
    """
    path = str(config.data.path)
    described = [p for p in (path, *(m.path for m in config.data.more)) if is_stream(p)]
    if not described:
        return None
    if config.data.more or config.data.sessions != "mixed":
        raise UserError(
            f"{described[0]} is a stream: data.more and data.sessions=stratified need to know all "
            "trials; leave them out, or set streaming: false"
        )
    return StreamedTrials(path, config.data.train_split, rank, world)


def _tokenizer(
    config: Config, train: Dataset, sentences: list[Sentence] | None
) -> PreTrainedTokenizerBase:
    section = config.model.text_decoder
    texts = [text for text in train["text"] if text] if section.tokenizer == "bpe" else []
    if texts and sentences is not None:
        texts += [s.text for s in sentences if not s.name.startswith(OF_TRIALS)]
    return build_tokenizer(
        section.tokenizer,
        texts,
        section.bpe_vocab_size,
        checkpoint=section.checkpoint,
        causal=section.kind == "causal_lm",
    )


def masking_of(config: Config, number: int) -> Masking | None:
    """What a phase hides of its trials, None where it does not ask for what was hidden."""
    phase = config.phases[number]
    if not phase.losses.masked:
        return None
    stride = config.model.encoder.patch_stride
    return Masking(patch_stride=stride, **phase.masking.model_dump())


def model_config(
    config: Config,
    info: DatasetInfo,
    tokenizer: PreTrainedTokenizerBase | None,
    rms: float | None = None,
) -> BrainToTextConfig:
    """Resolve the architecture for one dataset, whose typical trial has this root mean square."""
    model = config.model
    smoothing = config.data.augment.at_rate(info.sampling_rate).smoothing_bins
    text: dict[str, Any] = model.text_decoder.model_dump()
    text["enabled"] = tokenizer is not None
    text["max_tokens"] = config.data.max_text_tokens
    phonemes = model.phoneme_head.model_dump()
    phonemes["enabled"] = phonemes["enabled"] and info.has_phonemes
    quantizer = model.quantizer.model_dump()
    quantizer["seed"] = config.run.seed
    quantizer["temperature"] = config.temperature.start
    quantizer["temperature_end"] = config.temperature.end
    quantizer["temperature_schedule"] = config.temperature.schedule
    special: dict[str, Any] = {}
    if tokenizer is not None:
        special = {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
    return BrainToTextConfig(
        channels=info.channels,
        sampling_rate=info.sampling_rate,
        sessions=info.sessions,
        adapter=model.adapter.model_dump(),
        encoder=model.encoder.model_dump(),
        quantizer=quantizer,
        signal_decoder=model.signal_decoder.model_dump(),
        phoneme_head=phonemes,
        text_decoder=text,
        simulated_data=info.simulated,
        data={
            "fingerprint": info.fingerprint,
            "train_split": config.data.train_split,
            "validation_split": config.data.validation_split,
        },
        signal={
            "channel_names": info.channel_names,
            "unit": info.unit,
            "rms": rms,
            "smoothing_bins": smoothing,
            "processing": info.processing,
            "normalization": info.normalization,
        },
        **special,
    )
