"""Launches that skip Triton's own search for the compiled kernel: the same kernel, same arguments.

In a process of its own, with a driver that notes launches instead of making them.
"""

from tests.kernels.compiling import run

PROGRAM = """
import itertools
import torch
import triton
from triton.backends.compiler import GPUTarget

LAUNCHES = []


class Utils:
    def get_device_properties(self, device):
        return {"max_shared_mem": 232_448}

    def load_binary(self, *binary):
        return 0, 0, 0, 0, 1024


class Driver:
    utils = Utils()

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 7

    def launcher_cls(self, source, metadata):
        return lambda *arguments: LAUNCHES.append((source.hash(), arguments))


def addressed(argument):
    # An address where there is a tensor.
    return argument.data_ptr() if isinstance(argument, torch.Tensor) else argument


triton.runtime.driver.set_active(Driver())
from b2t_kernels.launching import launched
from b2t_kernels.residual import leave_kernel
from b2t_kernels.rows import rows_kernel

room = torch.zeros(100)
aligned, shifted = room[4:40], room[5:41]
assert aligned.data_ptr() % 16 == 0
blocks = {"BLOCK_N": 16, "BLOCK_D": 128, "ERRORS": False, "GAIN": True, "num_warps": 4}
indices = torch.zeros(16, dtype=torch.int64)
seen = {}
cases = itertools.product((aligned, shifted, aligned.half()), (1, 16, 33), (1, 16, 48, 33), (4, 8))
for left, N, D, warps in cases:
    arguments = (left, left, aligned, aligned, indices, aligned, N, 20, D)
    options = {**blocks, "num_warps": warps}
    for _ in range(2):
        launched(leave_kernel)[(2,)](*arguments, **options)
    LAUNCHES.clear()
    leave_kernel[(2,)](*arguments, **options)
    launched(leave_kernel)[(2,)](*arguments, **options)
    (theirs, passed), (ours, given) = LAUNCHES
    assert theirs == ours, (left.dtype, N, D, "another kernel")
    # Grid, stream and function, then hooks and what they are told, then a kernel's own arguments.
    assert passed[:6] == given[:6]
    assert given[6:9] == (None, None, None)
    assert [addressed(each) for each in passed[9:]] == [addressed(each) for each in given[9:]]
    seen.setdefault(ours, []).append((left.dtype, left.data_ptr() % 16 == 0, D == 1, D % 16 == 0))
for like in seen.values():
    assert len(set(like)) == 1
assert len(launched(leave_kernel).compiled) < 3 * 3 * 4 * 2
assert launched("not a kernel of Triton's") == "not a kernel of Triton's"
print("launched", len(seen))
"""


def test_a_launch_finds_what_triton_would(repository):
    assert run(repository, "-c", PROGRAM).startswith("launched ")
