"""Monitors, alerts and evaluation on two ranks give the values of one rank with all rows."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from b2t.config import AlertRule
from b2t.data.batches import Batch
from b2t.evaluate.evaluation import evaluate_model
from b2t.monitor.context import StepContext
from b2t.monitor.ema import EMAMonitor
from b2t.monitor.monitors import Monitors
from b2t.monitor.reconstruction import ReconstructionMonitor
from b2t.quantize import ResidualVQ
from tests.distributed.ports import free_port

pytestmark = pytest.mark.distributed


def signals(step):
    generator = torch.Generator().manual_seed(step)
    target = torch.randn(4, 30, 3, generator=generator)
    output = target + 0.5 * torch.randn(4, 30, 3, generator=generator)
    return target, output, torch.rand(4, 30, generator=generator) > 0.3


def reconstruction_metrics(rows):
    monitor = ReconstructionMonitor(50.0, window=4)
    for step in range(6):
        target, output, mask = (x[rows] for x in signals(step))
        monitor.update(
            StepContext(phase="p", reconstruction=output, target=target, signal_mask=mask)
        )
    found = monitor.metrics()
    return {name: value for name, value in found.items() if "spectral" not in name}


def ranks_differ(rank, same):
    quantizer = ResidualVQ(4, 8, 2, kmeans_init=False, seed=0)
    if not same and rank == 1:
        quantizer.codebooks.embed[1, 3, 2] += 1e-6
    monitor = EMAMonitor(quantizer)
    report = SimpleNamespace(applied=True, revived=[0, 0])
    monitor.update(StepContext(phase="p", update_report=report))
    return monitor.metrics()["ema/ranks_differ"]


def alerts(rank):
    rule = AlertRule(name="low", metric="x", threshold=0.5, message="{value}")
    raised = Monitors({}, [rule]).check(1, {"x": 0.1 if rank == 0 else 0.9})
    return [(alert.rule, alert.message) for alert in raised]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.text_decoder = nn.Identity()
        self.quantizer = SimpleNamespace(codebook_size=5)
        self.config = SimpleNamespace(sampling_rate=50.0)

    def forward(self, batch, weights):
        codes = batch.signal[..., :2].abs().long().clamp(max=4)
        return SimpleNamespace(
            reconstruction=0.5 * batch.signal,
            codes=codes.masked_fill(~batch.signal_mask[..., None], -1),
            frame_mask=batch.signal_mask,
            phoneme_logits=None,
        )

    def generate(self, batch, **options):
        return (batch.signal[:, :4, 0] > 0).long()


class Letters:
    eos_token_id, bos_token_id = 9, 8

    def decode(self, tokens, skip_special_tokens):
        return " ".join("ab"[t] for t in tokens)


def batches(rows):
    for row in rows:
        target, _, mask = (x[:1] for x in signals(row))
        none = torch.zeros(1, dtype=torch.int64)
        texts = ["a b a a" if row % 2 else "b b a"]
        yield Batch(target, target, mask, none, none[None], none[None], none, [f"s/0/{row}"], texts)


def gather(value):
    if not dist.is_initialized():
        return [value]
    values = [None, None]
    dist.all_gather_object(values, value)
    return values


def evaluation(rows):
    result = evaluate_model(Model(), batches(rows), Letters(), gather=gather)
    return {**result.to_dict(), "said": [p.prediction for p in result.predictions]}


def rank_main(rank, folder, port):
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    found = {
        "reconstruction": reconstruction_metrics(slice(rank, None, 2)),
        "differ": (ranks_differ(rank, True), ranks_differ(rank, False)),
        "alerts": alerts(rank),
        "evaluation": evaluation(range(rank, 7, 2)),
        "one_sided": evaluation(range(3) if rank == 1 else []),
    }
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):

    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(rank_main, (str(folder), free_port()), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_reconstruction_is_pooled_over_ranks(two_ranks):
    alone = reconstruction_metrics(slice(None))
    for found in two_ranks:
        assert found["reconstruction"] == pytest.approx(alone, rel=1e-6)


def test_ranks_that_differ_by_one_bit_are_seen_by_all(two_ranks):
    assert [found["differ"] for found in two_ranks] == [(0.0, 1.0)] * 2


def test_rank_0_decides_alerts_for_all(two_ranks):
    assert [found["alerts"] for found in two_ranks] == [[("low", "0.1")]] * 2


@pytest.mark.parametrize(("key", "rows"), [("evaluation", 7), ("one_sided", 3)])
def test_evaluation_is_that_of_all_rows_on_every_rank(two_ranks, key, rows):
    alone = evaluation(range(rows))
    assert alone["wer"] is not None and alone["wer_noise"] is not None and alone["rows"] == rows
    for found in two_ranks:
        assert found[key].keys() == alone.keys()
        for name, value in alone.items():
            if isinstance(value, float) and math.isfinite(value):
                assert found[key][name] == pytest.approx(value, rel=1e-9), name
            else:
                assert found[key][name] == value, name
