"""Launches without what Triton does anew for each: the host's time is most of a small kernel's.

Triton binds and describes every argument to find the compiled kernel, and its launcher asks each
tensor for its address and the driver what that is. What can differ from one launch to the next is
little: the device, the type and alignment of each tensor, whether an integer is 1, a multiple of 16
or wider than 32 bits, and the options. `launched` looks the compiled kernel up by that, starts it
with plain addresses, and leaves to Triton what it has not seen. `scratch` takes all that a few
launches share and nobody else sees from torch at once.
"""

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

Key = tuple[Any, ...]

ADDRESSES = not triton.knobs.runtime.interpret
"""Whether launches take addresses; if not, every buffer is a tensor of its own (for watchers)."""

_ALIGNED = 512
_dtype_of = operator.attrgetter("dtype")


def ceildiv(a: int, b: int) -> int:
    """A / b rounded up; Triton's own takes microseconds."""
    return -(-a // b)


def power_of_two_above(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


class Address(int):
    """Where a buffer lies in a tensor that it keeps alive; a launch takes it for a tensor."""

    dtype: torch.dtype
    block: Tensor

    def get_device(self) -> int:
        """Number of the device."""
        return self.block.get_device()

    def data_ptr(self) -> int:
        """The address itself."""
        return int(self)


Buffer = Tensor | Address


def address_of(block: Tensor, offset: int, dtype: torch.dtype) -> Address:
    """What lies ``offset`` bytes from the start of ``block``."""
    found = Address(block.data_ptr() + offset)
    found.block, found.dtype = block, dtype
    return found


def scratch(device: torch.device, *parts: tuple[int, torch.dtype]) -> list[Buffer]:
    """Uninitialised buffers of so many elements for kernels alone, in one allocation."""
    if not ADDRESSES:
        return [torch.empty(count, dtype=dtype, device=device) for count, dtype in parts]
    offsets, total = [], 0
    for count, dtype in parts:
        offsets.append(total)
        total += -(-count * dtype.itemsize // _ALIGNED) * _ALIGNED
    block = torch.empty(total, dtype=torch.uint8, device=device)
    return [
        address_of(block, offset, dtype) for offset, (_, dtype) in zip(offsets, parts, strict=True)
    ]


def beyond(tensor: Tensor, start: int) -> Buffer:
    """The elements of a contiguous tensor from ``start`` on, for a launch."""
    if not ADDRESSES:
        return tensor.view(-1)[start:]
    return address_of(tensor, start * tensor.dtype.itemsize, tensor.dtype)


@functools.lru_cache(1 << 12)
def _kind(number: int) -> int:
    """What Triton specializes a kernel on; finer than needed where it is told not to."""
    return (number == 1) + 2 * (number & 15 == 0) + 4 * (-(1 << 31) <= number < 1 << 31)


def _watched() -> Any:
    """Whether something wants to be told of launches."""
    runtime = triton.knobs.runtime
    before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
    # Up to 3.4 a hook is a function or None, then a list of them.
    return (before is not None and getattr(before, "calls", True)) or (
        after is not None and getattr(after, "calls", True)
    )


class _Pointer:
    """An address as Triton takes it itself: of a number it would make a number."""

    def __init__(self, address: Address) -> None:
        self.data_ptr, self.dtype = address.data_ptr, address.dtype


class Start(NamedTuple):
    """A compiled kernel as its launcher takes it, and the values of its compile-time arguments."""

    compiled: Any
    run: Callable[..., None]
    function: Any
    metadata: Any
    stream: Callable[[int], int]
    constants: tuple[Any, ...]


class Launcher:
    """A kernel and what it was compiled to so far. Its pointers come before its numbers."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.names: list[str] = kernel.arg_names
        self.pointers = sum(name.endswith("_ptr") for name in self.names)
        assert all(name.endswith("_ptr") for name in self.names[: self.pointers])
        self.compiled: dict[Key, Start] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        # A compiled kernel takes three sizes.
        x, y, z = (*grid, 1, 1)[:3]

        def launch(*arguments: Any, **options: Any) -> None:
            tensors, numbers = arguments[: self.pointers], arguments[self.pointers :]
            addresses = [each if type(each) is Address else each.data_ptr() for each in tensors]
            joined = 0
            for address in addresses:
                joined |= address
            aligned = () if joined & 15 == 0 else [address & 15 for address in addresses]
            device = tensors[0].get_device()
            key = (
                device, *aligned, *map(_dtype_of, tensors), *map(_kind, numbers),
                *options, *options.values(),
            )  # fmt: skip
            known = self.compiled.get(key)
            if known is None:
                self._first(key, grid, arguments, options)
            elif _watched():
                known.compiled[x, y, z](*addresses, *numbers, *known.constants)
            else:
                known.run(
                    x, y, z, known.stream(device), known.function, known.metadata,
                    None, None, None, *addresses, *numbers, *known.constants,
                )  # fmt: skip

        return launch

    def _first(
        self, key: Key, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        """Launch by Triton, and note what it found."""
        taken = [_Pointer(each) if isinstance(each, Address) else each for each in arguments]
        made = self.kernel[grid](*taken, **options)
        if isinstance(made, CompiledKernel):
            constants = tuple(options[name] for name in self.names[len(arguments) :])
            self.compiled[key] = Start(
                made, made.run, made.function, made.packed_metadata,
                triton.runtime.driver.active.get_current_stream, constants,
            )  # fmt: skip


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
