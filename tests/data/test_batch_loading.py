"""Loading of batches: memory that is used again, and reading while one is worked on."""

import errno
import os
import threading
import time

import numpy as np
import pytest
import torch

from b2t.data.batches import BatchPlan, train_batches
from b2t.data.batches.buffers import Buffers
from b2t.data.batches.loading import _HEAD_START_S, _one_ahead
from b2t.errors import UserError
from tests.data.test_trial_reader import prepared

SIDE = 1 << 10


def address(tensor):
    return tensor.untyped_storage().data_ptr()


def test_memory_is_given_again_only_when_no_tensor_holds_it():
    buffers = Buffers()
    first = torch.from_numpy(buffers.empty((SIDE, SIDE), np.float32))
    place, part = address(first), first[3:5]
    assert address(torch.from_numpy(buffers.empty((SIDE, SIDE), np.float32))) != place
    del first
    second = torch.from_numpy(buffers.empty((SIDE, SIDE), np.float32))
    assert address(second) != place, "a part of it is still held"
    through = part.numpy()
    del part
    assert address(torch.from_numpy(buffers.empty((SIDE, SIDE), np.float32))) != place
    del through
    third = torch.from_numpy(buffers.empty((SIDE, SIDE - 7), np.float16))
    fourth = torch.from_numpy(buffers.empty((SIDE, SIDE + 7), np.float32))
    assert third.shape == (SIDE, SIDE - 7) and third.dtype == torch.float16
    assert place in (address(third), address(fourth)) and address(third) != address(fourth)


def test_what_is_kept_is_bounded_and_small_arrays_are_numpys():
    buffers = Buffers(kept=2)
    held = [buffers.empty((SIDE * (n + 1), SIDE), np.float32) for n in range(5)]
    del held
    assert sorted(each.size for each in buffers._free.values()) == [
        4 * SIDE * SIDE * n * 9 // 8 for n in (4, 5)
    ]
    small = buffers.empty((3, 4), np.float32)
    del small
    assert len(buffers._free) == 2


def test_threads_never_share_memory():
    buffers, wrong = Buffers(), []

    def work(number):
        for turn in range(60):
            rows = 300 + (turn * 37 + number * 11) % 200
            tensor = torch.from_numpy(buffers.empty((rows, SIDE), np.float32)).fill_(number)
            if not bool((tensor == number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_batches_that_are_kept_stay_as_they_were(monkeypatch):
    monkeypatch.setattr("b2t.data.batches.buffers._LARGE", 16)
    dataset = prepared(24)
    plan = BatchPlan([len(signal) for signal in dataset["signal"]], 4)
    loader = train_batches(dataset, plan, None, ["day0", "day1"], None, seed=0, micro_batch=4)
    kept = [next(loader)[2][0] for _ in range(2 * len(plan))]
    copies = [batch.signal.clone() for batch in kept]
    places = {address(batch.signal) for batch in kept}
    del kept[::2]
    later = [address(next(loader)[2][0].signal) for _ in range(len(plan))]
    loader.close()
    assert len(places) == 2 * len(plan) and places & set(later)
    assert all(
        torch.equal(batch.signal, copy) for batch, copy in zip(kept, copies[1::2], strict=True)
    )


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1_2_0>: No space (28)"
        ),
        RuntimeError("unable to write to file </torch_1_2_0>: No space left on device (28)"),
    ],
)
def test_too_little_shared_memory_is_one_message_and_not_a_wait_without_end(monkeypatch, error):
    """The processes are forked, and so have the function that fails."""

    def full(_):
        raise error

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    dataset = prepared(24)
    plan = BatchPlan([len(signal) for signal in dataset["signal"]], 4)
    loader = train_batches(dataset, plan, None, ["day0"], None, seed=0, micro_batch=4, workers=1)
    with pytest.raises(UserError, match=r"data\.workers=1: .* /dev/shm .* data\.workers=0"):
        next(loader)


def test_workers_that_cannot_start_for_want_of_it_are_the_same_message(monkeypatch):
    def none_left(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("b2t.data.batches.loading.DataLoader.__iter__", none_left)
    dataset = prepared(24)
    plan = BatchPlan([len(signal) for signal in dataset["signal"]], 4)
    loader = train_batches(dataset, plan, None, ["day0"], None, seed=0, micro_batch=4, workers=1)
    with pytest.raises(UserError, match=r"data\.workers=1: "):
        next(loader)


def test_the_next_batch_is_read_meanwhile_and_at_once_when_asked_for():
    read = []

    def source(count):
        for number in range(count):
            read.append(number)
            yield number

    batches = _one_ahead(source(3))
    assert next(batches) == 0
    time.sleep(0.2)
    assert read == [0, 1], "one ahead, and no more"
    assert list(batches) == [1, 2]
    began = time.monotonic()
    assert list(_one_ahead(source(400))) == list(range(400))
    assert time.monotonic() - began < 400 * _HEAD_START_S / 4


def test_whoever_got_a_batch_goes_first():
    began, got = [], []

    def source():
        while True:
            began.append(time.monotonic())
            yield 0

    batches = _one_ahead(source())
    for _ in range(8):
        next(batches)
        got.append(time.monotonic())
        time.sleep(0.03)
    batches.close()
    heads = [start - end for start, end in zip(began[1:], got, strict=False)]
    assert len(heads) >= 7 and min(heads) >= 0.8 * _HEAD_START_S
