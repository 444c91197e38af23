"""A small model of all components, and batches for it."""

from dataclasses import replace

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from b2t.data.batches import Batch
from b2t.model import BrainToText, BrainToTextConfig

CHANNELS, SESSIONS = 6, ["a", "b", "c"]


QUANTIZER = {"codebook_size": 16, "num_quantizers": 3, "kmeans_init": False}


def config(**change):
    sections = {
        "channels": CHANNELS,
        "sessions": SESSIONS,
        "encoder": {
            "patch_size": 4, "patch_stride": 3, "dim": 16, "depth": 2, "heads": 2, "dropout": 0.0,
        },
        "quantizer": QUANTIZER,
        "signal_decoder": {"depth": 1, "heads": 2},
        "phoneme_head": {"dropout": 0.0},
        "text_decoder": {
            "dim": 16, "depth": 2, "heads": 2, "ffn_dim": 32, "dropout": 0.0, "max_tokens": 12,
        },
        "vocab_size": 30,
    }  # fmt: skip
    for name, value in change.items():
        old = sections.get(name)
        both = isinstance(old, dict) and isinstance(value, dict)
        sections[name] = {**old, **value} if both else value
    return BrainToTextConfig(**sections)


def build(seed=0, **change):
    torch.manual_seed(seed)
    model = BrainToText(config(**change))
    if model.adapter is not None:
        torch.nn.init.normal_(model.adapter.bias)
    return model


def batch_of(lengths, seed=0, text=True, phonemes=True):
    generator = torch.Generator().manual_seed(seed)
    bins, rows = max(lengths), len(lengths)
    mask = torch.arange(bins) < torch.tensor(lengths)[:, None]
    signal = torch.randn(rows, bins, CHANNELS, generator=generator) * mask[..., None]
    tokens = torch.randint(2, 30, (rows, 7), generator=generator)
    sizes = torch.randint(2, 7, (rows,), generator=generator)
    for row, size in enumerate(sizes.tolist()):
        tokens[row, size] = 1
        tokens[row, size + 1 :] = -100
    ids = torch.randint(1, 41, (rows, 4), generator=generator)
    counts = torch.randint(1, 5, (rows,), generator=generator)
    ids[torch.arange(4) >= counts[:, None]] = 0
    return Batch(
        signal=signal,
        target=signal * 1.5,
        signal_mask=mask,
        session=torch.arange(rows) % 4 - 1,
        tokens=tokens if text else torch.full_like(tokens, -100),
        phonemes=ids if phonemes else torch.zeros_like(ids),
        phoneme_lengths=counts if phonemes else torch.zeros_like(counts),
        rows=[f"s/1/{row}" for row in range(rows)],
        texts=[None] * rows,
    )


def part(batch, start, stop, bins=None):
    """Some rows of a batch, as if loaded alone."""
    tensors = {k: v[start:stop] for k, v in vars(batch).items() if isinstance(v, torch.Tensor)}
    for name in ("signal", "target", "signal_mask"):
        tensors[name] = tensors[name][:, :bins]
    rows = {"rows": batch.rows[start:stop], "texts": batch.texts[start:stop], "_counts": None}
    return replace(batch, **tensors, **rows)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def tiny_checkpoint(folder, kind):
    torch.manual_seed(5)
    shape = {"d_model": 24, "vocab_size": 40, "pad_token_id": 0, "eos_token_id": 1}
    if kind == "bart":
        model = BartForConditionalGeneration(
            BartConfig(
                **shape, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
                max_position_embeddings=16, bos_token_id=2, decoder_start_token_id=1,
            )
        )  # fmt: skip
    else:
        model = T5ForConditionalGeneration(
            T5Config(**shape, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
        ).to(torch.bfloat16)
    model.save_pretrained(folder)
    return model
