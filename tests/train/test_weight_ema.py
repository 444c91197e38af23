"""The running average of weights, against one computed by hand from the masters."""

import json

import pytest
import torch
from torch import nn

from b2t.config import OptimConfig, PhaseConfig
from b2t.train.ds_config import load_ds_config
from b2t.train.engine import PhaseEngine
from b2t.train.masters import initial_masters
from b2t.train.weight_ema import WeightEma

pytestmark = pytest.mark.usefixtures("one_rank")

DECAY = 0.5


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.encoder = nn.Linear(4, 8)
        self.signal_decoder = nn.Linear(8, 4)
        self.quantizer = nn.Module()
        self.quantizer.codebooks = nn.Linear(4, 2, bias=False)

    def forward(self, x):
        code = self.quantizer.codebooks(x).sum()
        return self.signal_decoder(torch.tanh(self.encoder(x))).float().square().mean() + code


@pytest.fixture(params=["fp32", "bf16"])
def ds_file(request, tmp_path):
    content = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000, "overlap_comm": False},
    }
    if request.param == "bf16":
        content["bf16"] = {"enabled": True}
    (tmp_path / "ds.json").write_text(json.dumps(content))
    return load_ds_config(tmp_path / "ds.json")


def engine_for(ds_file, masters=None, trainable=("encoder", "signal_decoder", "quantizer")):
    model = Toy()
    for name in ("encoder", "signal_decoder", "quantizer"):
        getattr(model, name).requires_grad_(name in trainable)
    phase = PhaseConfig(name="p", steps=9, lr=0.05, warmup_steps=0, trainable=list(trainable))
    return PhaseEngine(model, phase, OptimConfig(), ds_file, masters or initial_masters(model))


def step(engine, number):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(number))
    engine.backward(engine(x.to(engine.dtype)))
    assert engine.step()


def by_hand(average, masters, number):
    decay = min(DECAY, (1 + number) / (10 + number))
    return {n: decay * average[n] + (1 - decay) * masters[n] for n in average}


def assert_close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)


def test_the_average_is_that_of_the_masters_and_moves_none(ds_file):
    plain, engine = engine_for(ds_file), engine_for(ds_file)
    ema = WeightEma(engine, DECAY, {})
    masters = initial_masters(engine.model)
    expected = {n: v.clone() for n, v in masters.items() if "codebooks" not in n}
    for number in range(1, 13):
        for each in (plain, engine):
            step(each, number)
        ema.update(number)
        expected = by_hand(expected, engine.read_masters(), number)
        if number == 6:  # asked for in the middle
            assert_close(ema.collect(), expected)
    found = ema.collect()
    assert_close(found, expected)
    assert not torch.equal(found["encoder.weight"], engine.read_masters()["encoder.weight"])
    for name, master in plain.read_masters().items():
        assert torch.equal(master, engine.read_masters()[name]), name


def test_codebooks_keep_their_own_averages(ds_file):
    ema = WeightEma(engine_for(ds_file), DECAY, {})
    assert set(ema.collect()) == {
        "encoder.weight", "encoder.bias", "signal_decoder.weight", "signal_decoder.bias"
    }  # fmt: skip


def test_it_continues_where_it_was(ds_file):
    engine = engine_for(ds_file)
    ema = WeightEma(engine, DECAY, {})
    step(engine, 1)
    ema.update(1)
    averages, masters = ema.collect(), dict(engine.collect_masters())
    again = WeightEma(engine_for(ds_file, masters), DECAY, averages)
    for name, value in again.collect().items():
        assert torch.equal(value, averages[name]), name
    for name, value in again.engine.read_masters().items():
        assert torch.equal(value, masters[name]), name


def test_frozen_weights_are_used_as_they_are(ds_file):
    engine = engine_for(ds_file, trainable=("signal_decoder",))
    ema = WeightEma(engine, DECAY, {"encoder.weight": torch.full((8, 4), 9.0)})
    assert set(ema.collect()) == {"signal_decoder.weight", "signal_decoder.bias"}


def test_it_is_lent_and_taken_back(ds_file):
    engine = engine_for(ds_file)
    ema = WeightEma(engine, DECAY, {"encoder.weight": torch.full((8, 4), 2.0)})
    weight = engine.model.encoder.weight
    own, before = weight.data_ptr(), weight.detach().clone()
    with pytest.raises(ZeroDivisionError), ema.in_use():
        assert (weight == 2.0).all() and weight.dtype == engine.dtype
        raise ZeroDivisionError
    assert weight.data_ptr() == own, "the engine's flat buffer holds the weight again"
    assert torch.equal(weight, before)
    step(engine, 1)
    assert not torch.equal(weight, before), "and training goes on"
