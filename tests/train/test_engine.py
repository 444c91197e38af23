"""One real DeepSpeed engine per phase, on one CPU rank."""

import gc
import json
import math
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from b2t.config import OptimConfig, PhaseConfig
from b2t.train.ds_config import load_ds_config
from b2t.train.engine import PhaseEngine, parameter_groups
from b2t.train.masters import initial_masters
from b2t.train.plain import PlainEngine, without_needless_zero
from b2t.train.schedule import lr_factor
from b2t.train.zero3 import Zero3Engine

pytestmark = pytest.mark.usefixtures("one_rank")

OPTIM = OptimConfig(weight_decay=0.1)
ALL = ["adapter", "encoder", "quantizer", "signal_decoder", "phoneme_head", "text_decoder"]


class Toy(nn.Module):
    """The components of `BrainToText`, as small as they get; some are absent."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.adapter = nn.Linear(4, 4)
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8))
        self.quantizer = None
        self.signal_decoder = nn.Linear(8, 4)
        self.phoneme_head = None
        self.text_decoder = None

    def freeze(self, names: list[str]) -> None:
        for component in ALL:
            module = getattr(self, component)
            if module is not None:
                module.requires_grad_(component not in names)

    def forward(self, x: torch.Tensor, adapted: bool = True) -> torch.Tensor:
        y = self.signal_decoder(torch.tanh(self.encoder(self.adapter(x) if adapted else x)))
        return F.mse_loss(y.float(), x.float().sin())


@pytest.fixture(params=["fp32", "bf16", "fp16"])
def precision(request):
    return request.param


@pytest.fixture(params=[0, 2, 3])
def stage(request, precision):
    if request.param == 0 and precision != "fp32":
        pytest.skip("16-bit weights need ZeRO's masters")
    return request.param


@pytest.fixture
def ds_file(precision, stage, tmp_path, monkeypatch):
    from deepspeed.accelerator import get_accelerator

    # DeepSpeed refuses fp16 on CPUs; its engine and loss scaler work there all the same.
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    content = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "zero_optimization": {
            "stage": stage or 2,
            "reduce_bucket_size": 1000,
            "overlap_comm": False,
        },
    }
    if stage == 3:
        content["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    if precision == "bf16":
        content["bf16"] = {"enabled": True}
    if precision == "fp16":
        content["fp16"] = {
            "enabled": True,
            "loss_scale": 0,
            "initial_scale_power": 6,
            "loss_scale_window": 3,
            "hysteresis": 1,
        }
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(content))
    loaded = load_ds_config(file)
    return without_needless_zero(loaded, OPTIM, world=1) if stage == 0 else loaded


def phase(**changes) -> PhaseConfig:
    settings = {"name": "p", "steps": 12, "lr": 0.02, "warmup_steps": 4, **changes}
    return PhaseConfig(**settings)


def engine_for(model, ds_file, masters, the_phase=None) -> PhaseEngine:
    the_phase = the_phase or phase()
    model.freeze([name for name in ALL if name not in the_phase.trainable])
    build = {0: PlainEngine, 2: PhaseEngine, 3: Zero3Engine}[ds_file.zero_stage]
    return build(model, the_phase, OPTIM, ds_file, masters)


def batch(number: int) -> torch.Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(number))


def train(engine: PhaseEngine, steps: range) -> list[bool]:
    applied = []
    for step in steps:
        for micro in range(2):
            engine.backward(engine(batch(2 * step + micro).to(engine.dtype)))
            done = engine.step()
            assert micro == 1 or not done, "only the boundary applies a step"
        applied.append(done)
    return applied


def copies(tensors: dict) -> dict:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def differing(left: dict, right: dict) -> list[str]:
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


def same_weights(engine, plain):
    trained = engine.collect_masters()
    for name, expected in plain.named_parameters():
        torch.testing.assert_close(trained[name], expected.detach(), rtol=1e-4, atol=1e-6, msg=name)


def test_groups_cover_every_trained_parameter_once():
    model = Toy()
    model.freeze(["adapter"])
    groups = parameter_groups(model, phase(trainable=ALL, lr_scale={"encoder": 0.5}), OPTIM)
    got = {group["name"]: group for group in groups}
    assert set(got) == {"encoder", "encoder/no_decay", "signal_decoder", "signal_decoder/no_decay"}
    grouped = [id(p) for group in groups for p in group["params"]]
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trained)
    assert all(p.ndim > 1 for p in got["encoder"]["params"])
    assert all(p.ndim == 1 for p in got["encoder/no_decay"]["params"])
    assert got["encoder"]["lr"] == 0.01 and got["signal_decoder"]["lr"] == 0.02
    assert got["encoder"]["weight_decay"] == 0.1
    assert got["encoder/no_decay"]["weight_decay"] == 0.0


def test_session_weights_do_not_decay():
    groups = parameter_groups(Toy(), phase(trainable=["adapter"]), OPTIM)
    assert [group["weight_decay"] for group in groups] == [0.0]
    assert len(groups[0]["params"]) == 2


@pytest.mark.parametrize("precision", ["fp32"], indirect=True)
def test_equals_plain_adamw_with_clipping(ds_file):
    model, plain = Toy(), Toy()
    engine = engine_for(model, ds_file, initial_masters(model))
    train(engine, range(10))
    groups = parameter_groups(plain, phase(), OPTIM)
    optimizer = torch.optim.AdamW(groups, betas=OPTIM.betas, eps=OPTIM.eps)
    for step in range(10):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * lr_factor(step, phase())
        optimizer.zero_grad()
        for micro in range(2):
            (plain(batch(2 * step + micro)) / 2).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
    same_weights(engine, plain)
    engine.close()


def test_resume_is_bitwise(ds_file):
    model = Toy()
    engine = engine_for(model, ds_file, initial_masters(model))
    assert all(train(engine, range(5)))
    moments, numbers = engine.state()
    moments, masters = copies(moments), copies(engine.collect_masters())
    train(engine, range(5, 12))
    whole, (whole_moments, whole_numbers) = copies(engine.collect_masters()), engine.state()
    whole_moments = copies(whole_moments)
    engine.close()

    numbers = json.loads(json.dumps(numbers))
    again = Toy()
    resumed = engine_for(again, ds_file, masters)
    resumed.load_state(moments, numbers)
    train(resumed, range(5, 12))
    got, (got_moments, got_numbers) = resumed.collect_masters(), resumed.state()
    assert differing(whole, got) == []
    assert differing(whole_moments, got_moments) == []
    assert whole_numbers == got_numbers
    assert {name.rsplit("/", 1)[1] for name in got_moments} == {"exp_avg", "exp_avg_sq"}
    assert len(got_moments) == 2 * len(whole), "moments of all groups, not of the first alone"
    assert all(bool(moment.any()) for moment in got_moments.values())
    resumed.close()


def test_moments_are_those_that_are_read_back(ds_file):
    """`state` right after `load_state` gives back what was loaded."""
    model = Toy()
    engine = engine_for(model, ds_file, initial_masters(model))
    train(engine, range(3))
    moments, numbers = engine.state()
    moments, masters = copies(moments), copies(engine.collect_masters())
    engine.close()
    resumed = engine_for(Toy(), ds_file, masters)
    resumed.load_state(moments, numbers)
    back, back_numbers = resumed.state()
    assert differing(moments, back) == [] and back_numbers == numbers
    assert differing(masters, resumed.collect_masters()) == []
    resumed.close()


@pytest.mark.parametrize("stage", [2, 3], indirect=True)
def test_what_is_gathered_is_what_deepspeed_says_itself(ds_file):
    from deepspeed.utils import safe_get_full_optimizer_state

    model = Toy()
    engine = engine_for(model, ds_file, initial_masters(model), phase(trainable=ALL[1:]))
    train(engine, range(3))
    gathered, (moments, _) = engine.gather_masters(), engine.state()
    engine._link_moments()  # DeepSpeed misses all parameter groups but the first
    own = engine.read_masters()
    assert differing(gathered, own) == [] and not any(n.startswith(ALL[0]) for n in own)
    for name, parameter in model.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq") if name in own else ():
            full = safe_get_full_optimizer_state(parameter, moment)
            assert torch.equal(moments.pop(f"{name}/{moment}"), full.cpu()), name
    assert moments == {}
    engine.close()


def test_the_schedule_continues(ds_file):
    model = Toy()
    the_phase = phase(lr_scale={"encoder": 0.5})
    engine = engine_for(model, ds_file, initial_masters(model), the_phase)
    rates = []
    for step in range(7):
        rates.append(engine.learning_rates())
        train(engine, range(step, step + 1))
        if step == 3:
            saved = (copies(engine.collect_masters()), *engine.state())
            saved = (saved[0], copies(saved[1]), saved[2])
    engine.close()
    for step, rate in enumerate(rates):
        peak = 0.02 * lr_factor(step, the_phase)
        assert rate["adapter"] == pytest.approx(peak)
        assert rate["encoder"] == pytest.approx(0.5 * peak)
    resumed = engine_for(Toy(), ds_file, saved[0], the_phase)
    resumed.load_state(saved[1], saved[2])
    for step in range(4, 7):
        assert resumed.learning_rates() == rates[step]
        train(resumed, range(step, step + 1))
    resumed.close()


def test_frozen_weights_are_exact_and_train_again(ds_file, precision):
    """Momentum and weight decay from before a freeze must not move weights during it."""
    model = Toy()
    masters = initial_masters(model)
    first = engine_for(model, ds_file, masters)
    train(first, range(6))
    before = copies(first.collect_masters())
    first.close()
    if precision != "fp32":
        dtype = first.dtype
        coarse = [name for name, w in before.items() if torch.equal(w.to(dtype).float(), w)]
        assert not [name for name in coarse if before[name].ndim > 1], "masters must be finer"

    second = engine_for(model, ds_file, masters, phase(trainable=["signal_decoder"]))
    assert differing(before, second.collect_masters()) == [], "a new engine starts from them"
    train(second, range(6))
    assert all(p.grad is None for p in model.encoder.parameters()), "no gradient is computed"
    during = copies(second.collect_masters())
    moments, _ = second.state()
    second.close()
    frozen = [name for name in before if not name.startswith("signal_decoder")]
    assert set(differing(before, during)) == set(before) - set(frozen)
    assert {name.split(".")[0] for name in moments} == {"signal_decoder"}
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter.detach(), before[name].to(parameter.dtype)), name

    third = engine_for(model, ds_file, masters)
    assert differing(during, third.collect_masters()) == []
    train(third, range(6))
    assert set(differing(during, third.collect_masters())) == set(during)
    third.close()


@pytest.mark.parametrize("precision", ["fp16"], indirect=True)
def test_an_overflow_changes_nothing_but_the_scale(ds_file):
    model = Toy()
    engine = engine_for(model, ds_file, initial_masters(model))
    train(engine, range(2))
    scale = engine.loss_scale
    before, (moments, numbers) = copies(engine.collect_masters()), engine.state()
    moments = copies(moments)
    for micro in range(2):
        loss = engine(batch(99 + micro).to(engine.dtype))
        engine.backward(loss * (math.inf if micro else 1.0))
        applied = engine.step()
    assert not applied and engine.loss_scale == scale / 2
    after_moments, after = engine.state()
    assert differing(before, engine.collect_masters()) == []
    assert differing(moments, after_moments) == []
    assert after["scheduler_step"] == numbers["scheduler_step"] == 2
    assert after["adam_step"] == numbers["adam_step"] == 2
    assert after["skipped_steps"] == numbers["skipped_steps"] + 1
    assert train(engine, range(2, 4)) == [True, True]
    engine.close()


@pytest.mark.parametrize("precision", ["fp16"], indirect=True)
def test_the_scaler_continues_where_it_was(ds_file):
    model = Toy()
    engine = engine_for(model, ds_file, initial_masters(model))
    train(engine, range(4))
    (moments, numbers), masters = engine.state(), copies(engine.collect_masters())
    moments, scale = copies(moments), engine.loss_scale
    assert scale > 64, "it has grown"
    engine.close()
    resumed = engine_for(Toy(), ds_file, masters)
    resumed.load_state(moments, numbers)
    assert resumed.loss_scale == scale
    resumed.close()


@pytest.mark.parametrize("precision", ["fp32"], indirect=True)
def test_the_gradient_norm_is_before_clipping(ds_file):
    model, plain = Toy(), Toy()
    engine = engine_for(model, ds_file, initial_masters(model))
    train(engine, range(1))
    for micro in range(2):
        (plain(batch(micro)) / 2).backward()
    expected = torch.stack([p.grad.square().sum() for p in plain.parameters()]).sum().sqrt()
    assert engine.grad_norm() == pytest.approx(float(expected), rel=1e-5)
    engine.close()


@pytest.mark.parametrize("precision", ["fp32"], indirect=True)
def test_no_gradient_is_a_gradient_of_zero(ds_file):
    """A component that a step leaves out moves by its momentum alone."""
    model, plain = Toy(), Toy()
    engine = engine_for(model, ds_file, initial_masters(model))
    optimizer = torch.optim.AdamW(parameter_groups(plain, phase(), OPTIM), betas=OPTIM.betas)
    for step, adapted in enumerate([(True, True), (True, True), (False, False), (False, True)]):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * lr_factor(step, phase())
        optimizer.zero_grad(set_to_none=step == 0)
        for micro in range(2):
            x = batch(2 * step + micro)
            engine.backward(engine(x, adapted[micro]))
            engine.step()
            (plain(x, adapted[micro]) / 2).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
    same_weights(engine, plain)
    engine.close()


def test_nothing_of_it_is_left_when_it_closes(ds_file, stage):
    model, plain = Toy(), Toy()
    linear = F.linear
    engine = engine_for(model, ds_file, initial_masters(model))
    train(engine, range(2))
    masters, dtype = copies(engine.collect_masters()), engine.dtype
    optimizer = weakref.ref(engine._engine.optimizer)
    engine.close()
    assert optimizer() is None, "its float32 weights and moments take memory"
    assert F.linear is linear
    for (name, parameter), shape in zip(model.named_parameters(), shapes(plain), strict=True):
        assert torch.equal(parameter.detach(), masters[name].to(dtype)), name
        assert parameter.shape == shape and parameter.is_leaf and parameter.grad is None
        assert stage < 3 or not parameter.__dict__
    for module, untouched in zip(model.modules(), plain.modules(), strict=True):
        assert module.__dict__.keys() == untouched.__dict__.keys()
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert type(module._parameters) is type(untouched._parameters)


def shapes(model: nn.Module) -> list[torch.Size]:
    return [parameter.shape for parameter in model.parameters()]


@pytest.mark.parametrize("precision", ["fp32"], indirect=True)
def test_weights_are_whole_for_what_runs_outside_and_training_goes_on(ds_file):
    runs = {}
    for looks in (False, True):
        model = Toy()
        engine = engine_for(model, ds_file, initial_masters(model))
        for step in range(6):
            train(engine, range(step, step + 1))
            if looks and step % 2:
                with engine.whole(model.encoder), torch.no_grad():
                    model.encoder(batch(0))
                with engine.whole(), torch.no_grad():
                    loss = model(batch(0))
                    # Ranks that run it another number of times must not wait for each other.
                    assert shapes(model) == shapes(Toy()), "nothing is released"
        runs[looks] = copies(engine.collect_masters())
        engine.close()
    assert differing(runs[False], runs[True]) == []
    torch.testing.assert_close(loss, model(batch(0)).detach(), rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["fp32"], indirect=True)
def test_the_next_engine_survives_the_end_of_the_one_before(ds_file):
    """Whenever the garbage collector comes: DeepSpeed's destructor undoes what parameters hold."""
    model = Toy()
    engine = engine_for(model, ds_file, initial_masters(model))
    train(engine, range(2))
    masters, deepspeeds = copies(engine.collect_masters()), engine._engine
    engine.close()
    again = engine_for(model, ds_file, dict(masters))
    del engine, deepspeeds
    gc.collect()
    assert differing(masters, again.read_masters()) == []
    train(again, range(2))
    assert set(differing(masters, again.read_masters())) == set(masters)
    again.close()
