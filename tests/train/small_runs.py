"""A run of the demo's phases so small that a test can train it, in this process."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from b2t.config import load_config
from b2t.train.build import build
from b2t.train.callbacks import MetricsFile
from b2t.train.ds_config import DeepSpeedFile, load_ds_config
from b2t.train.ranks import Ranks
from b2t.train.trainer import Trainer

SMALL = """
    model.encoder.dim=16 model.encoder.depth=1 model.encoder.heads=2 model.signal_decoder.depth=1
    model.signal_decoder.heads=2 model.text_decoder.dim=16 model.text_decoder.depth=1
    model.text_decoder.heads=2 model.text_decoder.ffn_dim=16 model.text_decoder.tokenizer=byte
    model.quantizer.codebook_size=8 model.quantizer.num_quantizers=2
    codebook_start.frames_per_code=2 evaluation.decode_trials=0 log.progress=false log.report=false
""".split()  # noqa: SIM905


def zero2(folder: Path, micro_batch: int, accumulation: int, **sections: Any) -> DeepSpeedFile:
    """ZeRO-2 from a file in ``folder``; DeepSpeed touches whole buckets, so they are small."""
    content = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "zero_optimization": {
            "stage": 2,
            "overlap_comm": False,
            "reduce_bucket_size": 20000,
            "allgather_bucket_size": 20000,
        },
        **sections,
    }
    (folder / "ds.json").write_text(json.dumps(content))
    return load_ds_config(folder / "ds.json")


def small_trainer(data: Path, folder: Path, ranks: Ranks, ds_file: DeepSpeedFile, *overrides: str):
    """A run in ``folder``, from the start or from its newest checkpoint, with its metrics file."""
    config = load_config("demo", [f"data.path={data}", f"run.dir={folder}", *SMALL, *overrides])
    stop = SimpleNamespace(requested=False)
    trainer = Trainer(config, ds_file, build(config), ranks, [MetricsFile(folder)], stop)
    folder.mkdir(exist_ok=True)
    trainer.store.recover()
    found = trainer.store.load()
    if found is not None:
        trainer.restore(found)
    return trainer
