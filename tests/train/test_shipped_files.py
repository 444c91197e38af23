"""Each DeepSpeed file of the repository trains, but for what needs a compiler or a GPU's memory."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from b2t.config import OptimConfig, PhaseConfig
from b2t.train.ds_config import load_ds_config
from b2t.train.engine import PhaseEngine
from b2t.train.masters import initial_masters
from b2t.train.phase import _ENGINES

pytestmark = pytest.mark.usefixtures("one_rank")

NAMES = ("zero2_cpu", "zero2_fp16", "zero2_bf16", "zero3_cpu", "zero3_fp16")
"""All but `zero2_offload`, whose C++ optimizer tests/distributed/test_offload.py compiles."""


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16))
        self.signal_decoder = nn.Linear(16, 8)

    def forward(self, x):
        return (self.signal_decoder(self.encoder(x)).float() - x.float().sin()).square().mean()


@pytest.mark.parametrize("name", NAMES)
def test_it_trains(name, repository, monkeypatch):
    from deepspeed.accelerator import get_accelerator

    # DeepSpeed refuses fp16 on CPUs; its engine and loss scaler work there all the same.
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    file = load_ds_config(repository / "ds_configs" / f"{name}.json")
    # Its buckets are for millions of weights: they would be most of the time.
    zero = {**file.raw["zero_optimization"], "reduce_bucket_size": 10_000}
    file = replace(file, raw={**file.raw, "zero_optimization": zero})
    phase = PhaseConfig(
        name="p", steps=99, lr=0.01, warmup_steps=0, trainable=["encoder", "signal_decoder"]
    )
    model = Toy()
    engine = _ENGINES.get(file.zero_stage, PhaseEngine)(
        model, phase, OptimConfig(), file, initial_masters(model)
    )
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1)).to(engine.dtype)
    losses, applied = [], 0
    for _ in range(40):
        for _ in range(file.accumulation):
            loss = engine(x)
            engine.backward(loss)
            moved = engine.step()
        losses.append(float(loss.detach()))
        applied += moved
    assert applied >= 30 and losses[-1] < 0.7 * losses[0], losses
    assert engine.grad_norms().keys() == {"encoder", "signal_decoder"}
    engine.close()
