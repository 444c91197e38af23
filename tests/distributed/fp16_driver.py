"""train_ds.py in fp16 on CPU ranks, with an overflow injected on one rank at one step.

The capability check is overridden here, for tests alone. What surrounds the injected step is
written as JSON to $B2T_PROBE: digests of all state before and after it.
"""

import hashlib
import json
import os
import sys
from dataclasses import asdict

import torch
from deepspeed.accelerator import get_accelerator

from b2t.train.engine import PhaseEngine
from b2t.train.main import main
from b2t.train.trainer import Trainer

STEP = 4
"""Optimizer steps (applied or not) before the injected overflow."""


def digest(tensors):
    text = hashlib.sha256()
    for name in sorted(tensors):
        text.update(name.encode())
        text.update(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return text.hexdigest()


def snapshot(trainer):
    """Digests of all that a skipped step must leave alone, and the clocks. Collective."""
    trainer._set_clocks()  # each step begins so: temperature and progress follow the applied steps
    moments, numbers = trainer.engine.state()
    clocks = asdict(trainer.progress)
    return {
        "masters": digest(trainer.engine.collect_masters()),
        "weights": digest(dict(trainer.model.named_parameters())),
        "moments": digest(moments),
        "buffers": digest(dict(trainer.model.named_buffers())),
        "scheduler": numbers["scheduler_step"],
        "adam": numbers["adam_step"],
        "scale": trainer.engine.loss_scale,
        "clocks": {name: clocks[name] for name in ("phase", "phase_step", "step")},
        "skipped": clocks["skipped"],
        "consumed": clocks["consumed"],
    }


def install():
    backward, step = PhaseEngine.backward, Trainer._step
    overflow = {"now": False}
    seen = {}

    def overflowing_backward(self, loss):
        backward(self, loss * float("inf") if overflow["now"] else loss)

    def watched_step(self, *arguments):
        place = self.progress.consumed
        if place != STEP:
            return step(self, *arguments)
        seen["before"] = snapshot(self)
        overflow["now"] = self.ranks.rank == 1
        step(self, *arguments)
        overflow["now"] = False
        seen["after"] = snapshot(self)
        if self.ranks.is_main:
            with open(os.environ["B2T_PROBE"], "w") as out:
                json.dump(seen, out)

    PhaseEngine.backward = overflowing_backward
    Trainer._step = watched_step


if __name__ == "__main__":
    get_accelerator().is_fp16_supported = lambda: True
    install()
    sys.exit(main())
