"""A small model saved as a run, and datasets for it."""

import argparse
import json

import numpy as np
import torch
from datasets import Dataset, DatasetDict, load_from_disk

from b2t.config import Config
from b2t.data.batches import eval_batches
from b2t.data.prepare import arrow_state
from b2t.data.trials import trial_features
from b2t.model import BrainToText, BrainToTextConfig
from b2t.model.tokenizer import byte_tokenizer

CHANNELS = 6
TEXTS = ["yes", "no [ok]", "water please", "i am cold"]


NAMES = [f"C{i}" for i in range(CHANNELS)]


def trials(split, rows, text=True, seed=0, rate=50.0, change=lambda signal: signal):
    generator = np.random.default_rng(seed)
    records = [
        {
            "signal": change(generator.standard_normal((12 + 5 * i, CHANNELS)).astype("f4")),
            "text": TEXTS[i % 4] if text else None,
            "phonemes": [1 + i, 40, 7] if text else None,
            "session": f"day{i % 2}",
            "subject": "s",
            "block": 1,
            "trial": i,
            "sampling_rate": rate,
            "split": split,
        }
        for i in range(rows)
    ]
    return Dataset.from_list(records, features=trial_features(CHANNELS))


def save_dataset(path, test_text=True, text=True, **how):
    splits = {"train": trials("train", 3, text, **how), "val": trials("val", 4, text, 1, **how)}
    splits["test"] = trials("test", 5, text and test_text, 2, **how)
    DatasetDict(splits).save_to_disk(str(path))
    return path


def describe(path, **record):
    """Write what `b2t prepare` records beside a dataset."""
    marks = {split: arrow_state(path / split) for split in ("train", "val", "test")}
    record = {"channels": NAMES, "unit": "z-score", "fingerprint": "f", **record, "arrow": marks}
    (path / "b2t.json").write_text(json.dumps(record))
    return path


def save_run(folder, data, text=True, signal=None, change=None, trained=None):
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    decoder = {"dim": 16, "depth": 1, "heads": 2, "ffn_dim": 16, "max_tokens": 20}
    model = BrainToText(
        BrainToTextConfig(
            channels=CHANNELS,
            sessions=["day0", "day1"],
            encoder={"dim": 16, "depth": 1, "heads": 2, "patch_size": 4, "patch_stride": 4},
            signal_decoder={"dim": None, "depth": 1, "heads": 2},
            quantizer={"codebook_size": 8, "num_quantizers": 3},
            phoneme_head={"enabled": text},
            text_decoder={**decoder, "enabled": text},
            vocab_size=len(tokenizer),
            simulated_data=True,
            signal=signal,
            trained=trained,
        )
    ).eval()
    batches = eval_batches(load_from_disk(str(data))["val"], tokenizer, ["day0"], batch_size=4)
    encoded = [model.encode(b.signal, b.signal_mask, b.session) for b in batches]
    frames = [(e.latents.detach(), e.frame_mask) for e in encoded]
    model.quantizer.initialize(frames, progress=False)
    if change is not None:
        change(model)
    best = folder / "checkpoints" / "best"
    model.save_pretrained(best)
    tokenizer.save_pretrained(best)
    config = Config.model_validate(
        {"data": {"path": str(data)}, "evaluation": {"max_new_tokens": 12}}
    )
    (folder / "config.yaml").write_text(config.to_yaml())
    return folder


def call(command, *arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(a) for a in arguments]))
