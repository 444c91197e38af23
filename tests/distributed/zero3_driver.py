"""Runs of `train_ds.py` one after the other on the same ranks.

deepspeed … zero3_driver.py --config … run.dir=DIR …, with $B2T_PLAN, a JSON list of
{"folder": name of the run folder beside DIR, "deepspeed_config": file, "stop": step or absent,
"status": how it must end, "optim.weight_ema": …}; further keys are overrides. After step `stop` the
last rank alone is asked to leave, as by a signal: the next step ends with a checkpoint.
"""

import json
import os
import sys

import torch.distributed as dist

from b2t.config import load_config
from b2t.log import configure
from b2t.train import launch, ranks
from b2t.train import main as entry
from b2t.train.ds_config import load_ds_config
from b2t.train.trainer import Trainer


def main():
    """Train all runs: DeepSpeed keeps groups of one that has been left."""
    arguments = entry.parser().parse_intermixed_args()
    joined = ranks.join(120.0)
    launch.join, left = lambda timeout_s: joined, launch.leave
    launch.leave = lambda: None
    configure(joined.rank)
    applied = Trainer._after_applied
    store = joined.board
    for number, run in enumerate(json.loads(os.environ["B2T_PLAN"])):
        joined.board = dist.PrefixStore(f"run-{number}", store)  # as of a start of its own
        folder, file, status, stop = (
            run.pop("folder"), run.pop("deepspeed_config"), run.pop("status"), run.pop("stop", None)
        )  # fmt: skip

        def after_applied(self, *inputs, stop=stop):
            applied(self, *inputs)
            if self.progress.step == stop and self.ranks.rank == self.ranks.world - 1:
                self.stop.requested = True

        Trainer._after_applied = after_applied
        overrides = [*arguments.overrides, *(f"{key}={value}" for key, value in run.items())]
        config = load_config(arguments.config, overrides)
        config.run.dir = config.run.dir.with_name(folder)
        ended = joined.gather(entry.train(config, load_ds_config(file), "auto"))
        if ended != [status] * joined.world:
            raise SystemExit(f"{folder}: ended with {ended}, expected {status}")
    left()


if __name__ == "__main__":
    sys.exit(main())
