"""Requests to stop that come while ranks work apart: in validation, decoding and k-means."""

from types import SimpleNamespace

import pytest
import torch

from b2t.quantize import start as codebook_fits
from b2t.records import read_jsonl
from b2t.train import stopping, validating
from b2t.train.stopping import Interrupted, StopRequests
from b2t.train.trainer import Stopped
from tests.train.small_runs import small_trainer, zero2

SETTINGS = """
    codebook_start.after_steps=1 evaluation.every=2 phases.0.steps=4 phases.1.steps=2
    phases.2.steps=2 checkpoint.every=100 log.every=1 evaluation.decode_every=2
    phases.0.decode_trials=2 evaluation.batch_size=1 evaluation.max_new_tokens=4
    phases.2.early_stopping={metric: val/loss, patience: 9}
""".strip().split("\n")
SETTINGS = [word for line in SETTINGS[:-1] for word in line.split()] + [SETTINGS[-1].strip()]
END = 8


@pytest.fixture
def start(tiny_trials, tmp_path, one_rank):
    return lambda name: small_trainer(
        tiny_trials, tmp_path / name, one_rank, zero2(tmp_path, 2, 2), *SETTINGS
    )


@pytest.fixture
def whole(start):
    trainer = start("whole")
    trainer.fit()
    return end_of(trainer)


def end_of(trainer):
    timed = ("time", "throughput", "memory")
    lines = read_jsonl(trainer.config.run.dir / "metrics.jsonl").records
    lines = [{k: v for k, v in line.items() if not k.startswith(timed)} for line in lines]
    return lines, trainer.store.read(END)


def in_validation(trainer, monkeypatch):
    """The request comes with the second batch of the validation of step 2."""
    seen = []
    forward = trainer.model.forward

    def asked(batch, *arguments, **options):
        if not trainer.model.training and trainer.progress.step == 2:
            seen.append(batch.rows)
            trainer.stop.requested = len(seen) == 2
        return forward(batch, *arguments, **options)

    monkeypatch.setattr(trainer.model, "forward", asked)
    return seen, 2, 2


def in_decoding(trainer, monkeypatch):
    """The request comes with the first trial that is decoded after step 2."""
    seen = []
    decode = validating.decode

    def asked(model, *arguments):
        forward = model.forward

        def first(batch, *more, **options):
            seen.append(batch.rows)
            trainer.stop.requested = True
            return forward(batch, *more, **options)

        monkeypatch.setattr(model, "forward", first)
        return decode(model, *arguments)

    monkeypatch.setattr(validating, "decode", asked)
    return seen, 1, 2


def in_kmeans(trainer, monkeypatch):
    """The request comes with the first of two layers."""
    seen = []
    fit = codebook_fits._fit

    def asked(books, layer, *arguments):
        seen.append(layer)
        trainer.stop.requested = True
        return fit(books, layer, *arguments)

    monkeypatch.setattr(codebook_fits, "_fit", asked)
    return seen, 1, 1


@pytest.mark.parametrize("ask", [in_validation, in_decoding, in_kmeans])
def test_it_is_heard_there_and_the_resume_is_exact(start, whole, monkeypatch, ask):
    trainer = start("again")
    seen, until, step = ask(trainer, monkeypatch)
    with pytest.raises(Stopped):
        trainer.fit()
    assert len(seen) == until, "nothing more was done"
    assert trainer.outcome == "stopped on request" and trainer.store.steps() == [step]
    lines = end_of(trainer)[0]
    assert not any(name.startswith("val/") for line in lines for name in line)
    monkeypatch.undo()
    again = start("again")
    assert again.progress.step == step
    again.fit()
    lines, checkpoint = end_of(again)
    assert lines == whole[0]
    for name in ("weights", "moments"):
        mine, other = getattr(checkpoint, name), getattr(whole[1], name)
        assert mine.keys() == other.keys()
        assert [key for key in mine if not torch.equal(mine[key], other[key])] == []


class Others:
    """Ranks of which another one may have been asked."""

    def __init__(self):
        self.posted = self.looks = 0
        self.asked = False

    def post_stop(self):
        self.posted += 1

    def stop_posted(self):
        self.looks += 1
        return self.asked

    def any(self, flag):
        return flag or self.asked

    def gather(self, value):
        return [value, ("theirs", self.asked)]


@pytest.fixture
def clock(monkeypatch):
    time = SimpleNamespace(now=100.0)
    monkeypatch.setattr(stopping.time, "monotonic", lambda: time.now)
    return time


def test_other_ranks_are_looked_at_once_a_second(clock):
    ranks = Others()
    stops = StopRequests(ranks, SimpleNamespace(requested=False))
    taken = []
    for number in stops.until_heard(range(100)):
        taken.append(number)
        clock.now += 0.1
        ranks.asked = number >= 55
    assert 56 <= len(taken) <= 66, "heard within a second"
    assert ranks.looks <= 8 and ranks.posted == 0
    with pytest.raises(Interrupted):
        stops.agree()


def test_a_request_is_posted_once_and_one_item_is_always_taken(clock):
    ranks = Others()
    stops = StopRequests(ranks, SimpleNamespace(requested=True))
    assert list(stops.until_heard("abc")) == ["a"]
    assert list(stops.until_heard("")) == []
    assert stops.heard() and ranks.posted == 1
    with pytest.raises(Interrupted):
        stops.gather("mine")


def test_nobody_asked(clock):
    ranks = Others()
    for asked in (SimpleNamespace(requested=False), None):
        stops = StopRequests(ranks, asked)
        assert list(stops.until_heard("abc")) == ["a", "b", "c"]
        stops.agree()
        assert stops.gather("mine") == ["mine", "theirs"]
