"""A small run that is stopped and goes on, and how its end is compared."""

import re

import torch

from b2t.records import read_jsonl

SETTINGS = """
    codebook_start.after_steps=1 evaluation.every=100 phases.0.steps=8 phases.1.steps=2
    phases.2.steps=2 checkpoint.every=100 checkpoint.keep=1 log.every=3
    stability.max_consecutive_skips=2 optim.weight_decay=0.1
""".split()  # noqa: SIM905

END = 12

FP16 = {
    "enabled": True,
    "loss_scale": 0,
    "initial_scale_power": 4,
    "loss_scale_window": 3,
    "hysteresis": 1,
    "min_loss_scale": 1,
}


def ask_to_stop(trainer):
    trainer.stop.requested = True


def end_of(trainer):
    """Masters, buffers, and records without times of a run that is over."""
    lines = read_jsonl(trainer.config.run.dir / "metrics.jsonl").records
    timed = re.compile("time|throughput|memory")
    records = [{k: v for k, v in line.items() if not timed.match(k)} for line in lines]
    return trainer.masters, dict(trainer.model.named_buffers()), records


def assert_same_end(left, right):
    for mine, other in zip(left[:2], right[:2], strict=True):
        assert mine.keys() == other.keys()
        assert [name for name in mine if not torch.equal(mine[name], other[name])] == []
    assert left[2] == right[2]
