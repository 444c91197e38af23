"""What holds up work that is timed is counted."""

import gc
import warnings

import pytest
import torch

from b2t_kernels import launching
from tests.script_modules import script


@pytest.fixture
def stalls(repository):
    with script(repository, "stalls") as module:
        yield module


def test_settled_work_is_held_up_by_nothing(stalls):
    with stalls.watched(cuda=False) as found:
        torch.ones(8).sum()
    assert (found, str(found)) == (stalls.Stalls(0, 0, 0), "")


def test_waits_memory_and_compilations_are_counted(stalls, monkeypatch):
    """As on a GPU, whose part this test plays."""
    memory, modes = {"num_device_alloc": 5}, []
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: memory)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    class Kernel:
        arg_names = ("x_ptr",)

    launcher = launching.Launcher(Kernel())
    monkeypatch.setitem(launching._launchers, -1, launcher)
    with stalls.watched(cuda=True) as found:
        memory["num_device_alloc"] += 1
        launcher.compiled[("a key",)] = "a kernel"
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert str(found) == "2 waits, 1 device allocation, 1 compilation"
    assert modes == ["warn", 0]


def test_no_garbage_is_collected_meanwhile(stalls):
    collections = []
    gc.callbacks.append(lambda phase, info: collections.append(phase))
    try:
        with stalls.watched(cuda=False):
            before = len(collections)
            kept = [[] for _ in range(100_000)]
            assert len(collections) == before, "the collector ran"
    finally:
        gc.callbacks.pop()
    assert gc.isenabled() and kept
