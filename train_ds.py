"""Train a brain-to-text model: `deepspeed train_ds.py --deepspeed_config FILE --config NAME`."""

import sys

from b2t.train.main import main

if __name__ == "__main__":
    sys.exit(main())
