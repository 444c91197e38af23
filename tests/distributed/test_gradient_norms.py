"""Norms by component under ZeRO on two ranks equal those of plain backward on all rows."""

import os

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from b2t.train.gradient_norms import GradientNorms
from tests.distributed.ports import free_port

pytestmark = pytest.mark.distributed
PRECISIONS = {"fp32": 1e-5, "fp16": 1e-2}


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(6, 33), nn.Tanh(), nn.Linear(33, 7))
        self.head = nn.Linear(7, 5)

    def forward(self, x):
        return self.head(self.encoder(x)).square().mean()


def groups(model):
    return [
        {"name": "encoder", "params": [p for p in model.encoder.parameters() if p.ndim > 1]},
        {
            "name": "encoder/no_decay",
            "params": [p for p in model.encoder.parameters() if p.ndim < 2],
        },
        {"name": "head", "params": list(model.head.parameters())},
    ]


def rows():
    return 5 * torch.randn(8, 6, generator=torch.Generator().manual_seed(1))


def rank_main(rank, folder, port, precision, stage):
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
    )
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # this CPU refuses, its kernels do not
    model = Parts()
    engine, optimizer, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(groups(model), lr=1e-4),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 1e-3,
            "zero_optimization": {"stage": stage},
            "fp16": {"enabled": precision == "fp16", "initial_scale_power": 10},
        },
    )
    norms = GradientNorms(optimizer, [group["name"] for group in groups(model)])
    for micro in rows().chunk(4)[rank::2]:
        engine.backward(engine(micro.to(next(model.parameters()).dtype)))
        engine.step()
    found = {name: float(norm) for name, norm in norms.norms().items()}
    found["global"] = float(engine.get_global_grad_norm())
    if precision == "fp16":
        for _ in range(2):
            engine.backward(engine(rows()[:2].half()) * 1e4)
            engine.step()
        assert not engine.was_step_applied()
        found["after_overflow"] = {name: float(n) for name, n in norms.norms().items()}
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("precision", "stage"), [("fp32", 2), ("fp16", 2), ("fp16", 3)])
def test_norms_are_unsharded_unclipped_and_unscaled(tmp_path, precision, stage):
    mp.spawn(rank_main, (str(tmp_path), free_port(), precision, stage), nprocs=2)
    model = Parts()
    model(rows()).backward()
    expected = {
        name: float(torch.cat([p.grad.flatten() for p in getattr(model, name).parameters()]).norm())
        for name in ("encoder", "head")
    }
    expected["global"] = sum(norm**2 for norm in expected.values()) ** 0.5
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        after = found.pop("after_overflow", None)
        assert found == pytest.approx(expected, rel=PRECISIONS[precision])
        if after is not None:
            assert after == {name: found[name] for name in after}, "a skipped step changes nothing"


def test_an_unknown_optimizer_gives_no_norms():
    assert GradientNorms(object(), ["encoder"]).norms() == {}
