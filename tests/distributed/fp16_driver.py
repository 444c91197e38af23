"""train_ds.py in fp16 on CPU ranks, with overflows injected on one rank: at one step, and for ever.

The capability check is overridden here, for tests alone. What surrounds the single overflow is
written as JSON to $B2T_PROBE: digests of all state before and after it, and the exit statuses of
both ranks in both runs. The second run's folder lies beside the first's, named `hopeless`.
"""

import hashlib
import json
import os
import sys
from dataclasses import asdict

import torch
from deepspeed.accelerator import get_accelerator

from b2t.config import load_config
from b2t.log import configure
from b2t.train import launch, ranks
from b2t.train import main as entry
from b2t.train.ds_config import load_ds_config
from b2t.train.engine import PhaseEngine
from b2t.train.trainer import Trainer

STEP = 4
"""Optimizer steps (applied or not) before the injected overflow."""

seen = {}


def digest(tensors):
    text = hashlib.sha256()
    for name in sorted(tensors):
        text.update(name.encode())
        text.update(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return text.hexdigest()


def snapshot(trainer):
    """Digests of all that a skipped step must leave alone, and the clocks. Collective."""
    # Each step begins so: temperature and progress follow the applied steps.
    trainer._stepping.set_clocks()
    trainer.wait_for_checkpoint()  # which is written from the memory that is used here
    moments, numbers = trainer.engine.state()
    clocks = asdict(trainer.progress)
    with trainer.engine.whole():
        weights = digest(dict(trainer.model.named_parameters()))
    return {
        "masters": digest(trainer.engine.collect_masters()),
        "weights": weights,
        "moments": digest(moments),
        "buffers": digest(dict(trainer.model.named_buffers())),
        "scheduler": numbers["scheduler_step"],
        "adam": numbers["adam_step"],
        "scale": trainer.engine.loss_scale,
        "clocks": {name: clocks[name] for name in ("phase", "phase_step", "step")},
        "skipped": clocks["skipped"],
        "consumed": clocks["consumed"],
    }


def overflow_once():
    """Let one step overflow, on the last rank alone, and look at what it changes."""
    backward, step = PhaseEngine.backward, Trainer._step
    overflow = {"now": False}

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

    PhaseEngine.backward, Trainer._step = overflowing_backward, watched_step
    return lambda: setattr(PhaseEngine, "backward", backward) or setattr(Trainer, "_step", step)


def stop_after_overflow():
    """The same overflow, and two steps after it the last rank is asked to stop."""
    repair, step = overflow_once(), Trainer._step

    def asked(self, *arguments):
        if self.progress.consumed == STEP + 2 and self.ranks.rank == 1:
            self.stop.requested = True
        step(self, *arguments)

    Trainer._step = asked
    return repair


def overflow_for_ever():
    """From one step on, let the gradients of a component overflow on the last rank."""
    step = Trainer._step

    def spoiled_step(self, *arguments):
        if self.progress.consumed == STEP and self.ranks.rank == 1:
            decoder = self.model.signal_decoder.parameters()
            weight = next(p for p in decoder if len(getattr(p, "ds_shape", p.shape)) > 1)
            weight.register_hook(lambda gradient: gradient * float("nan"))
        step(self, *arguments)

    Trainer._step = spoiled_step
    return lambda: setattr(Trainer, "_step", step)


def main():
    """Train both runs on the same ranks: DeepSpeed keeps groups of one that has been left."""
    arguments = entry.parser().parse_intermixed_args()
    joined = ranks.join(120.0)
    launch.join, left = lambda timeout_s: joined, launch.leave
    launch.leave = lambda: None
    configure(joined.rank)
    statuses = {}
    for name, folder, sabotage in (
        ("once", None, overflow_once),
        ("stopped", "stopped", stop_after_overflow),
        ("resumed", "stopped", overflow_once),
        ("hopeless", "hopeless", overflow_for_ever),
    ):
        config = load_config(arguments.config, arguments.overrides)
        if folder is not None:
            config.run.dir = config.run.dir.with_name(folder)
            config.stability.max_consecutive_skips = 10
        repair = sabotage()
        status = entry.train(config, load_ds_config(arguments.deepspeed_config), "auto")
        repair()
        statuses[name] = joined.gather(status)
    if joined.is_main:
        with open(os.environ["B2T_PROBE"], "w") as out:
            json.dump({**seen, "statuses": statuses}, out)
    left()
    return 0


if __name__ == "__main__":
    get_accelerator().is_fp16_supported = lambda: True
    sys.exit(main())
