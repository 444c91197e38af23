"""The gradient rule under a real half-precision ZeRO-2 engine on two ranks."""

import os

import pytest
import torch
import torch.multiprocessing as mp

from b2t.quantize import ResidualVQ
from tests.distributed.ports import free_port

pytestmark = pytest.mark.distributed


class Tokenizer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(6, 6)
        self.quantizer = ResidualVQ(
            6,
            12,
            2,
            update_rule="gradient",
            kmeans_init=False,
            revival_every=3,
            decay=0.0,
            revival_threshold=0.5,
        )

    def forward(self, x):
        return self.quantizer(self.linear(x))


def rank_main(rank, folder, port):
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
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    get_accelerator().is_fp16_supported = lambda: True  # this CPU refuses, its kernels do not
    torch.manual_seed(0)
    model = Tokenizer()
    books = model.quantizer.codebooks
    start = books.embed.clone()
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 2},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}},
            "fp16": {"enabled": True, "initial_scale_power": 8},
        },
    )
    model.quantizer.attach_master(safe_get_full_fp32_param, safe_set_full_fp32_param)
    master = safe_get_full_fp32_param(books.weight).view_as(start)
    result = {"dtype": books.weight.dtype, "exact_start": torch.equal(master, start), "steps": []}
    generator = torch.Generator().manual_seed(rank)
    for _ in range(6):
        before = books.embed.clone()
        out = engine(torch.randn(1, 50, 6, generator=generator).half())
        engine.backward(sum(out.losses.values()))
        engine.step()
        report = model.quantizer.update(out.stats)
        master = safe_get_full_fp32_param(books.weight).view_as(start)
        kept = (books.embed - before).norm(dim=-1) < 0.1  # not revived
        result["steps"].append(
            {
                "applied": engine.was_step_applied(),
                "is_master": torch.equal(master, books.embed),
                "float32": not torch.equal(books.embed, books.embed.half().float()),
                "moved": float((books.embed - before)[kept].abs().max()),
                "revived": sum(report.revived),
                "checksum": int(model.quantizer.checksum()),
            }
        )
    torch.save(result, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_codebooks_are_the_float32_master_in_a_half_precision_engine(tmp_path):
    mp.spawn(rank_main, args=(str(tmp_path), free_port()), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["dtype"] == torch.float16 and first["exact_start"]
    for step, other in zip(first["steps"], second["steps"], strict=True):
        assert step["applied"] and step["is_master"] and step["float32"]
        # Adam's first steps are as long as the learning rate, far below what fp16 resolves.
        assert 1e-6 < step["moved"] < 1e-4
        assert step["checksum"] == other["checksum"]
    assert sum(step["revived"] for step in first["steps"]) > 0
