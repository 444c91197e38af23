"""One rank of `train_ds.py` that is told to stop or to fall asleep after an applied step.

RANK=0 WORLD_SIZE=2 … python trainer_driver.py '{"stop": 4}' ARGUMENTS OF train_ds.py
"""

import json
import sys
import time

from b2t.train.main import main
from b2t.train.trainer import Trainer

orders = json.loads(sys.argv[1])
applied = Trainer._after_applied


def after_applied(self, *arguments):
    applied(self, *arguments)
    if self.progress.step == orders.get("stop"):
        self.stop.requested = True
    if self.progress.step == orders.get("sleep") and self.ranks.rank == orders["rank"]:
        time.sleep(600)


Trainer._after_applied = after_applied
sys.exit(main(sys.argv[2:]))
