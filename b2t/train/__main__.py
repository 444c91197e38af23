"""`python -m b2t.train` does what `train_ds.py` does, where there is no checkout."""

import sys

from b2t.train.main import main

if __name__ == "__main__":
    sys.exit(main())
