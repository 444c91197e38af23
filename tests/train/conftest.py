"""A process group for the tests of training that run in this process."""

import os

import pytest
import torch

from b2t.train.ranks import join, leave


@pytest.fixture(scope="session")
def one_rank():
    """A process group of one, whose traces are removed.

    One for all modules: DeepSpeed keeps the groups that it made for the first, and cannot use
    another one's.
    """
    environment = dict(os.environ)
    os.environ["B2T_THREADS"] = "1"
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    threads = torch.get_num_threads()
    yield join()
    leave()
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(environment)
