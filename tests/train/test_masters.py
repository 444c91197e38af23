"""Exact weights between phases: on a CPU in float32 the module's own, elsewhere a copy."""

import json

import pytest
import torch
from torch import nn

from b2t.config import OptimConfig, PhaseConfig
from b2t.train.ds_config import load_ds_config
from b2t.train.engine import PhaseEngine
from b2t.train.masters import initial_masters
from b2t.train.plain import PlainEngine, without_needless_zero

pytestmark = pytest.mark.usefixtures("one_rank")

OPTIM = OptimConfig()


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 8)
        self.signal_decoder = nn.Linear(8, 4)

    def forward(self, x):
        return self.signal_decoder(torch.tanh(self.encoder(x))).float().square().mean()


def engine_of(model, tmp_path, masters, kind, precision, trainable):
    content = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000, "overlap_comm": False},
    }
    if precision != "fp32":
        content[precision] = {"enabled": True}
    (tmp_path / "ds.json").write_text(json.dumps(content))
    ds_file = load_ds_config(tmp_path / "ds.json")
    for name in ("encoder", "signal_decoder"):
        getattr(model, name).requires_grad_(name in trainable)
    phase = PhaseConfig(name="p", steps=9, lr=0.05, warmup_steps=0, trainable=trainable)
    if kind is PlainEngine:
        ds_file = without_needless_zero(ds_file, OPTIM, 1)
    return kind(model, phase, OPTIM, ds_file, masters)


@pytest.mark.parametrize(
    ("kind", "precision", "shared"),
    [(PhaseEngine, "fp32", True), (PlainEngine, "fp32", True), (PhaseEngine, "bf16", False)],
)
def test_a_second_copy_is_held_only_where_the_module_has_not_the_weights(
    tmp_path, kind, precision, shared
):
    """Over two phases, of which the second freezes half; the optimizer's masters are the truth."""
    model = Toy()
    masters = initial_masters(model)
    for trainable in (["encoder", "signal_decoder"], ["signal_decoder"]):
        engine = engine_of(model, tmp_path, masters, kind, precision, trainable)
        before = {name: value.clone() for name, value in masters.items()}
        for _ in range(2):
            engine.backward(engine(torch.randn(2, 4).to(engine.dtype)))
            assert engine.step()
        truth = engine.read_masters()
        assert engine.collect_masters() is masters
        for name, parameter in model.named_parameters():
            assert (masters[name].data_ptr() == parameter.data_ptr()) == shared, name
            assert masters[name].dtype == torch.float32
            assert torch.equal(masters[name], truth.get(name, before[name])), name
        assert all(not torch.equal(before[name], truth[name]) for name in truth)
        engine.close()
