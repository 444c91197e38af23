"""Launches without what Triton does anew for each: the host's time is most of a small kernel's.

Triton binds and describes every argument to find the compiled kernel. What can differ from one
launch to the next is little: the device, the type and alignment of each tensor, whether an integer
is 1, a multiple of 16 or wider than 32 bits, and the options. `launched` looks the compiled kernel
up by that, and leaves to Triton what it has not seen.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import triton
from triton.compiler import CompiledKernel

Key = tuple[Any, ...]


def ceildiv(a: int, b: int) -> int:
    """A / b rounded up; Triton's own takes microseconds."""
    return -(-a // b)


def power_of_two_above(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


class Launcher:
    """A kernel and what it was compiled to so far. Its pointers come before its numbers."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.names: list[str] = kernel.arg_names
        self.pointers = sum(name.endswith("_ptr") for name in self.names)
        assert all(name.endswith("_ptr") for name in self.names[: self.pointers])
        self.compiled: dict[Key, Any] = {}

    def key(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> Key:
        """What Triton specializes a kernel on; finer than needed where it is told not to."""
        tensors = arguments[: self.pointers]
        return (
            tensors[0].get_device(),
            *[tensor.dtype for tensor in tensors],
            *[tensor.data_ptr() & 15 for tensor in tensors],
            *[
                (number == 1) + 2 * (number & 15 == 0) + 4 * (-(1 << 31) <= number < 1 << 31)
                for number in arguments[self.pointers :]
            ],
            *options.items(),
        )

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        # A compiled kernel takes three sizes.
        whole = (*grid, 1, 1)[:3]

        def launch(*arguments: Any, **options: Any) -> None:
            key = self.key(arguments, options)
            compiled = self.compiled.get(key)
            if compiled is None:
                made = self.kernel[grid](*arguments, **options)
                if isinstance(made, CompiledKernel):
                    self.compiled[key] = made
                return
            constants = [options[name] for name in self.names[len(arguments) :]]
            compiled[whole](*arguments, *constants)

        return launch


_launchers: dict[int, Launcher] = {}


def launched(kernel: Any) -> Any:
    """The kernel, to be launched as ever; given back as it is to who traces, or if not Triton's."""
    if not isinstance(kernel, triton.JITFunction) or torch.compiler.is_dynamo_compiling():
        return kernel
    found = _launchers.get(id(kernel))
    if found is None:
        found = _launchers[id(kernel)] = Launcher(kernel)
    return found


def known() -> Iterable[Launcher]:
    """All kernels that were launched so far, with what each was compiled to."""
    return _launchers.values()
