"""train_ds.py on CPU ranks that are taken for able to train in fp16, for tests alone."""

import sys

from deepspeed.accelerator import get_accelerator

from b2t.train.main import main

if __name__ == "__main__":
    get_accelerator().is_fp16_supported = lambda: True
    sys.exit(main())
