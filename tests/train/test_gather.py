"""State that lies in pieces on three ranks, brought together by the first of them."""

import threading
from types import SimpleNamespace

import pytest
import torch

from b2t.train import gather
from b2t.train.gather import Gatherer, Part

SHAPES = {"a": torch.Size([5, 4]), "b": torch.Size([]), "c": torch.Size([17]), "d": torch.Size([3])}
GROUPS = [["a", "b"], ["c", "d"]]
WORLD = 3


def split(values):
    """Flat tensors and parts of each rank: groups cut into equal shares, the last one padded."""
    flats = [[] for _ in range(WORLD)]
    parts = [[] for _ in range(WORLD)]
    for number, names in enumerate(GROUPS):
        whole = torch.cat([values[name].flatten() for name in names])
        share = -(-len(whole) // WORLD)
        padded = torch.nn.functional.pad(whole, (0, share * WORLD - len(whole)), value=-1.0)
        for rank in range(WORLD):
            flats[rank].append(padded[rank * share : (rank + 1) * share])
        begin = 0
        for name in names:
            for rank in range(WORLD):
                low = max(begin, rank * share)
                high = min(begin + values[name].numel(), (rank + 1) * share)
                if low < high:
                    place = Part(name, number, low - rank * share, low - begin, high - low)
                    parts[rank].append(place)
            begin += values[name].numel()
    return flats, parts


class Group:
    """Stands for torch.distributed on one thread per rank."""

    def __init__(self):
        self.rank = threading.local()
        self.box = [None] * WORLD
        self.barrier = threading.Barrier(WORLD)

    def exchange(self, value):
        self.box[self.rank.number] = value
        self.barrier.wait(30)
        found = list(self.box)
        self.barrier.wait(30)
        return found

    def all_gather_object(self, into, value):
        into[:] = self.exchange(value)

    def gather(self, value, into, dst):
        assert (into is None) == (self.rank.number != dst)
        found = self.exchange(value)
        for target, source in zip(into or [], found, strict=False):
            target.copy_(source)

    def module(self):
        return SimpleNamespace(
            get_rank=lambda: self.rank.number,
            get_world_size=lambda: WORLD,
            all_gather_object=self.all_gather_object,
            gather=self.gather,
        )


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_every_element_comes_to_its_place_on_rank_0_alone(monkeypatch, chunk):
    group, found = Group(), [None] * WORLD
    monkeypatch.setattr(gather, "dist", group.module())
    monkeypatch.setattr(gather, "_CHUNK", chunk)
    rounds = [{n: torch.randn(s) for n, s in SHAPES.items()} for _ in range(2)]

    def rank(number):
        group.rank.number = number
        gatherer = Gatherer(split(rounds[0])[1][number], SHAPES, torch.device("cpu"))
        found[number] = [
            {n: t.clone() for n, t in gatherer.gather(split(r)[0][number], "masters").items()}
            for r in rounds
        ]

    threads = [threading.Thread(target=rank, args=[number]) for number in range(WORLD)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found[1:] == [[{}, {}]] * (WORLD - 1)
    for mine, values in zip(found[0], rounds, strict=True):
        assert mine.keys() == SHAPES.keys()
        assert all(torch.equal(mine[name], values[name]) for name in SHAPES)
