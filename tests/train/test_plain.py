"""Without ZeRO on one rank: where it is used, and states that pass between engines."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from b2t.config import OptimConfig, PhaseConfig
from b2t.train.ds_config import load_ds_config
from b2t.train.engine import PhaseEngine
from b2t.train.masters import initial_masters
from b2t.train.phase import _ENGINES
from b2t.train.plain import without_needless_zero
from b2t.train.weight_ema import WeightEma

OPTIM = OptimConfig()
PHASE = PhaseConfig(name="p", steps=8, lr=0.02, warmup_steps=2)


@pytest.fixture
def file(tmp_path):
    def write(**sections):
        content = {
            "train_micro_batch_size_per_gpu": 8,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.5,
            "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000, "overlap_comm": False},
            **sections,
        }
        (tmp_path / "ds.json").write_text(json.dumps(content))
        return load_ds_config(tmp_path / "ds.json")

    return write


def test_only_one_rank_in_float32_goes_without(file):
    offloaded = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    for world, optim, sections, stage in (
        (1, OPTIM, {}, 0),
        (1, OPTIM, {"zero_optimization": {"stage": 3}}, 0),
        (2, OPTIM, {}, 2),
        (1, OptimConfig(zero_on_one_rank=True), {}, 2),
        (1, OPTIM, {"bf16": {"enabled": True}}, 2),
        (1, OPTIM, {"fp16": {"enabled": True}}, 2),
        (1, OPTIM, {"zero_optimization": offloaded}, 2),
    ):
        loaded = file(**sections)
        found = without_needless_zero(loaded, optim, world)
        assert found.zero_stage == stage, (world, optim, sections)
        assert found.raw == loaded.raw, "checkpoints keep what the file says"
    assert without_needless_zero(file(), OPTIM, 1).engine_config()["zero_optimization"] == {
        "stage": 0
    }


class Model(nn.Module):
    """Two components, one of them with a norm that does not decay."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
        self.signal_decoder = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(self.signal_decoder(torch.tanh(self.encoder(x))), x.sin())


def trained(files, one_rank):
    """Two steps under each file in turn, each from the state of the one before."""
    masters, averages, state = initial_masters(Model()), {}, None
    for number, ds_file in enumerate(files):
        model = Model()
        engine = _ENGINES.get(ds_file.zero_stage, PhaseEngine)(
            model, PHASE, OPTIM, ds_file, masters
        )
        if state is not None:
            engine.load_state(*state)
        ema = WeightEma(engine, 0.5, averages)
        for step in range(2 * number, 2 * number + 2):
            generator = torch.Generator().manual_seed(step)
            engine.backward(engine(torch.randn(8, 4, generator=generator)))
            assert engine.step()
            ema.update(step + 1)
        norms = {name: float(norm) for name, norm in engine.grad_norms().items()}
        masters = {name: value.clone() for name, value in engine.collect_masters().items()}
        averages = {name: value.clone() for name, value in ema.collect().items()}
        tensors, numbers = engine.state()
        state = ({n: t.clone() for n, t in tensors.items()}, json.loads(json.dumps(numbers)))
        engine.close()
    return masters, averages, state, norms


def test_a_state_goes_from_one_engine_to_another(file, one_rank):
    """With or without ZeRO, whichever comes first: the same weights, moments, averages, norms."""
    zero2 = file()
    plain, zero3 = without_needless_zero(zero2, OPTIM, 1), file(zero_optimization={"stage": 3})
    whole = trained([zero2, zero2, zero2], one_rank)
    for files in ([plain] * 3, [plain, zero2, plain], [zero2, plain, zero3]):
        masters, averages, (moments, numbers), norms = trained(files, one_rank)
        close = {"rtol": 1e-4, "atol": 1e-7}
        torch.testing.assert_close(masters, whole[0], **close)
        torch.testing.assert_close(averages, whole[1], **close)
        torch.testing.assert_close(moments, whole[2][0], **close)
        assert norms == pytest.approx(whole[3], rel=1e-4)
        expected = {**whole[2][1], "scaler": numbers["scaler"]}  # ZeRO has one, of 1, in float32
        assert numbers.pop("grad_norm") == pytest.approx(expected.pop("grad_norm"), rel=1e-4)
        assert numbers == expected


def test_a_step_that_is_not_finite_is_skipped(file, one_rank):
    """And named, counted, and without a trace in weights, moments or schedule."""
    model = Model()
    ds_file = without_needless_zero(file(), OPTIM, 1)
    engine = _ENGINES[0](model, PHASE, OPTIM, ds_file, initial_masters(model))
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    engine.backward(engine(x))
    assert engine.step()
    before, (moments, numbers) = engine.gather_masters(), engine.state()
    before, moments = ({n: t.clone() for n, t in ts.items()} for ts in (before, moments))
    norms = engine.grad_norms()
    handle = model.signal_decoder.weight.register_hook(lambda gradient: gradient * float("nan"))
    engine.backward(engine(x))
    assert not engine.step() and engine.overflowed == ["signal_decoder"]
    assert engine.grad_norm() == float("inf") and engine.grad_norms() == norms
    handle.remove()
    after_moments, after = engine.state()
    assert all(torch.equal(before[n], t) for n, t in engine.gather_masters().items())
    assert all(torch.equal(moments[n], t) for n, t in after_moments.items())
    assert after["skipped_steps"] == 1 and after["adam_step"] == numbers["adam_step"] == 1
    assert after["scheduler_step"] == numbers["scheduler_step"]
    engine.backward(engine(x))
    assert engine.step()
    engine.close()
