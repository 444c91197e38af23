"""A phase that learns without labels, and the one after it."""

import math
from types import SimpleNamespace

import torch

from b2t.config import load_config
from b2t.records import read_jsonl
from b2t.train.build import build
from b2t.train.callbacks import MetricsFile
from b2t.train.trainer import Trainer
from tests.train.small_runs import SMALL, zero2

OTHERS = ("generation", "reconstruction", "commitment", "diversity", "perplexity", "phoneme")
SETTINGS = [
    "codebook_start.after_steps=3",
    "evaluation.every=100",
    "checkpoint.every=100",
    "log.every=1",
    *(f"phases.{phase}.steps={steps}" for phase, steps in enumerate((4, 1, 2))),
    "phases.0.trainable=[adapter,encoder,signal_decoder]",
    *(f"phases.0.losses.{name}=0" for name in OTHERS),
    "phases.0.losses.masked=1",
    "phases.2.losses.masked=0.5",
]


def test_hidden_patches_are_learnt_then_everything(tiny_trials, tmp_path, one_rank):
    places = [f"data.path={tiny_trials}", f"run.dir={tmp_path / 'run'}"]
    config = load_config("demo", [*places, *SMALL, *SETTINGS])
    materials = build(config)
    hooks = [MetricsFile(config.run.dir)]
    stop = SimpleNamespace(requested=False)
    trainer = Trainer(config, zero2(tmp_path, 4, 2), materials, one_rank, hooks, stop)
    config.run.dir.mkdir(exist_ok=True)
    untouched = {n: p.clone() for n, p in trainer.masters.items()}
    trainer.fit()
    records = read_jsonl(config.run.dir / "metrics.jsonl").records
    phases = {name: [r for r in records if r["phase"] == name] for name in ("tokenizer", "joint")}
    first = [r for r in phases["tokenizer"] if "loss/total" in r]
    assert len(first) == 4
    for record in first:
        losses = {k for k in record if k.startswith("loss/") and k != "loss/total"}
        assert losses == {"loss/masked"} and 0 < record["loss/masked"] < math.inf
    assert len({r["loss/masked"] for r in first}) == 4
    assert {"loss/masked", "loss/reconstruction"} <= phases["joint"][0].keys()
    assert any("val/masked" in r for r in phases["tokenizer"])
    assert any("val/masked" in r for r in phases["joint"])
    assert not any("val/masked" in r for r in records if r["phase"] == "codebook")
    state = trainer.model.config.trained
    assert {"encoder", "signal_decoder", "text_decoder"} <= {*state}
    moved = {
        n.split(".")[0] for n, p in trainer.masters.items() if not torch.equal(p, untouched[n])
    }
    assert {"encoder", "signal_decoder", "phoneme_head", "text_decoder"} <= moved
