"""On the kernels' way through a quantizer's step the host reads nothing from the device.

As a CUDA graph needs it. A driver that starts nothing stands for the GPU; in a process of its own.
"""

import os
import subprocess
import sys

PROGRAM = """
import sys
import torch
from torch.utils._python_dispatch import TorchDispatchMode
sys.path.insert(0, "scripts")
import host_time
from b2t.quantize import ResidualVQ

READS = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal",
    "bincount", "unique_consecutive", "is_nonzero",
}


class Refuse(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        tensors = [each for each in args if isinstance(each, torch.Tensor)]
        # The clocks are scalars of the CPU wherever the codebooks are.
        clock = name == "_local_scalar_dense" and tensors[0].data_ptr() in CLOCKS
        masks = name.startswith("index") and any(
            getattr(each, "dtype", None) == torch.bool
            for arg in args if isinstance(arg, (list, tuple)) for each in arg
        )
        if (name in READS and not clock) or masks:
            raise AssertionError(f"the host reads: {function}")
        return function(*args, **(kwargs or {}))


def step(quantizer, x, mask, **known):
    with torch.enable_grad():
        out = quantizer(x, mask, **known)
        total = torch.stack(list(out.losses.values())).sum() + out.quantized.sum()
        torch.autograd.grad(total, x)
    quantizer.update(out.stats)


def refused(*given, **known):
    try:
        with Refuse():
            step(*given, **known)
    except AssertionError as error:
        return str(error)
    return ""


sizes = {"dim": 12, "codebook_size": 70, "num_quantizers": 3, "kmeans_init": False}
variants = [{}, {"use_cosine_sim": True}, {"shared_codebook": True}, {"joint_update": True},
            {"rotation_trick": True}, {"update_rule": "gradient"}]
# No kernel runs: what it would write is zero, which is a code too.
torch.empty = torch.zeros
x = torch.randn(4, 20, 12, requires_grad=True)
mask = torch.arange(20)[None] < torch.tensor([20, 3, 0, 11])[:, None]
with host_time.as_on_a_gpu():
    for variant in variants:
        quantizer = ResidualVQ(**sizes, **variant, revival=None).train()
        books = quantizer.codebooks
        CLOCKS = {getattr(books, name).data_ptr() for name in
                  ("seed", "updates", "initialized", "temperature", "progress")}
        for given, known in (((x, None), {}), ((x, mask), {"count": 34})):
            step(quantizer, *given, finite=True, **known)
            assert refused(quantizer, *given, finite=True, **known) == "", variant
            assert refused(quantizer, *given, **known), "the check finds nothing"
        print("read nothing:", variant)
"""


def test_forward_backward_and_update_read_nothing(repository):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=repository,
        env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("read nothing:") == 6
