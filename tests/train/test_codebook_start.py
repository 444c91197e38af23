"""Codebooks start the same on any number of ranks, also on more of them than there are trials."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from datasets import load_from_disk

from b2t.quantize import ResidualVQ
from b2t.train.codebook_start import enough_trials, most_frames, start_codebooks
from tests.script_modules import script

CODES, FRAMES_PER_CODE = 16, 4


def started(trials, rank, world):
    """The quantizer that one rank starts; latents are the signals themselves."""
    quantizer = ResidualVQ(6, codebook_size=CODES, num_quantizers=2, seed=3)
    model = SimpleNamespace(
        quantizer=quantizer,
        eval=lambda: None,
        train=lambda: None,
        latents=lambda signal, mask, session: (signal, mask),
    )
    start_codebooks(
        model,
        torch.float32,
        SimpleNamespace(
            train=trials, augment=None, info=SimpleNamespace(sessions=("day0", "day1"))
        ),
        SimpleNamespace(
            codebook_start=SimpleNamespace(frames_per_code=FRAMES_PER_CODE),
            model=SimpleNamespace(encoder=SimpleNamespace(patch_stride=1)),
            run=SimpleNamespace(seed=0),
            log=SimpleNamespace(progress=False),
            phases=(),
        ),
        SimpleNamespace(rank=rank, world=world, is_main=not rank, device=torch.device("cpu")),
        np.array([len(signal) for signal in trials["signal"]]),
        SimpleNamespace(until_heard=iter, agree=lambda: None),
    )
    return quantizer


def on_threads(simulate, trials, world):
    found = [None] * world
    store = dist.HashStore()

    def run(rank):
        dist.init_process_group("threaded", rank=rank, world_size=world, store=store)
        found[rank] = started(trials, rank, world)
        dist.destroy_process_group()

    with simulate.threaded_groups():
        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return found


@pytest.fixture
def trials(tiny_trials):
    return load_from_disk(str(tiny_trials))["train"]


def test_more_ranks_than_trials_start_what_one_starts(repository, trials):
    lengths = np.array([len(signal) for signal in trials["signal"]])
    assert len(enough_trials(lengths, FRAMES_PER_CODE * CODES, seed=0)) < 8
    with script(repository, "simulate_ranks") as simulate:
        (alone,), eight = (on_threads(simulate, trials, world) for world in (1, 8))
    for quantizer in eight:
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(
                quantizer.state_dict()[name], value, rtol=0, atol=0, msg=name
            )


def test_the_most_that_a_rank_brings():
    lengths = np.array([10, 7, 30])
    assert most_frames(lengths, 5, 1) == 3 + 2 + 7
    assert most_frames(lengths, 5, 2) == 3 + 7, "the first and the third trial"
    assert most_frames(lengths, 5, 8) == 7


@pytest.mark.parametrize("wanted", [1, 4, 5, 17, 99])
def test_trials_hold_the_frames_that_are_wanted_and_no_trial_more(wanted):
    frames = np.random.default_rng(1).integers(1, 9, 30)
    held = np.cumsum(frames[enough_trials(frames, wanted, seed=3)])
    assert held[-1] >= wanted and (held[:-1] < wanted).all()
