"""Launches by plain addresses through Triton's own launcher in C: what a GPU would be handed.

In a process of its own, with a libcuda that notes launches instead of making them, so that no GPU
is needed. Each Triton compiles its launcher for itself: `kernel_tritons.py` runs this under all.
"""

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from tests.kernels.compiling import run

PROGRAM = """
import ctypes
import itertools
import sys
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

CUDA = ctypes.CDLL("libcuda.so.1")
LENGTHS = {"i32": 4, "i64": 8}

driver = nvidia.CudaDriver.__new__(nvidia.CudaDriver)
driver.utils = nvidia.CudaUtils()
driver.launcher_cls = nvidia.CudaLauncher
driver.get_current_target = lambda: GPUTarget("cuda", 90, 32)
driver.get_current_device = lambda: 0
driver.get_current_stream = lambda device: 7

sys.path.insert(0, "scripts")
import host_time
from b2t_kernels.launching import address_of, launched
from b2t_kernels.residual import leave_kernel


def launches():
    return CUDA.last_launch(ctypes.create_string_buffer(2048), (ctypes.c_ulonglong * 8)())


def expect(compiled):
    kinds = [kind for kind in compiled.src.signature.values() if kind != "constexpr"]
    lengths = [8 if kind[0] == "*" else LENGTHS[kind] for kind in kinds]
    CUDA.expect(len(lengths), (ctypes.c_int * len(lengths))(*lengths))
    return len(lengths)


def last(number):
    arguments, rest = ctypes.create_string_buffer(8 * number), (ctypes.c_ulonglong * 8)()
    CUDA.last_launch(arguments, rest)
    words = [int.from_bytes(arguments.raw[at : at + 8], "little") for at in range(0, 8 * number, 8)]
    return words, list(rest)


with host_time.as_on_a_gpu(), torch.no_grad():
    triton.runtime.driver.set_active(driver)
    room = torch.zeros(100)
    aligned, shifted = room[4:40], room[5:41]
    indices = torch.zeros(16, dtype=torch.int64)
    blocks = {"BLOCK_N": 16, "BLOCK_D": 128, "ERRORS": False, "GAIN": True, "num_warps": 4}
    sizes = itertools.product((1, 16, 33, 1 << 33), (1, 16, 33))
    for left, (N, D) in itertools.product((aligned, shifted, aligned.half()), sizes):
        arguments = (left, left, aligned, aligned, indices, aligned, N, 20, D)
        number = expect(leave_kernel[(2, 3)](*arguments, **blocks))
        leave_kernel[(2, 3)](*arguments, **blocks)
        words, rest = theirs = last(number)
        pointers = [each.data_ptr() for each in arguments[:6]]
        assert words == pointers + [N, 20] + ([D] if D != 1 else []), words
        assert rest[:3] == [2, 3, 1] and rest[3:7] == [128, 1, 1, 7], rest
        for first in (left, address_of(room, left.data_ptr() - room.data_ptr(), left.dtype)):
            for _ in range(2):
                before = launches()
                launched(leave_kernel)[(2, 3)](first, *arguments[1:], **blocks)
                assert launches() == before + 1
                assert last(number) == theirs, (left.dtype, N, D, type(first))
    CUDA.expect(0, (ctypes.c_int * 1)())
    for operator, call in host_time.operators(300, 300, 20, 2).items():
        before = launches()
        call(), call()
        assert launches() > before, operator
        print(operator)
"""


@pytest.fixture
def without_gpu(tmp_path):
    """A folder with a libcuda.so.1 that starts nothing."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("Triton's launcher is compiled here: no C compiler, or no headers of Python")
    library = tmp_path / "libcuda.so.1"
    source = Path(__file__).with_name("stand_in_cuda.c")
    subprocess.run(
        [compiler, "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", library, source],
        check=True,
    )
    (tmp_path / "libcuda.so").symlink_to(library)
    return tmp_path


def test_the_launcher_in_c_hands_a_gpu_the_same(repository, without_gpu):
    """Addresses reach the driver as those of tensors do, with the numbers, grid and stream."""
    folder = str(without_gpu)
    said = run(repository, "-c", PROGRAM, TRITON_LIBCUDA_PATH=folder, LD_LIBRARY_PATH=folder)
    assert len(said.splitlines()) > 10
