"""Safetensors files that are hashed while they are written; the library reads them."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
"""Names of the format, in the library's order: wide types come first in a file."""

_ORDER = {dtype: number for number, dtype in enumerate(_DTYPES)}
_CHUNK = 1 << 22


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Write a file, synced to the disk, as `safetensors.torch.save_file` would, byte for byte.

    The library returns after it has written: its file would have to be read again for a checksum,
    and it copies every tensor on the way. Neither happens here, and the interpreter is free for
    other threads while chunks are written and hashed.

    Args:
        path: of the file.
        tensors: of any shape, on the CPU.

    Returns:
        Bytes written, and their SHA-256 as hexadecimal text.

    Raises:
        OSError: the file cannot be written.
        ValueError: a dtype that checkpoints do not hold.
    """
    unknown = [f"{name} ({t.dtype})" for name, t in tensors.items() if t.dtype not in _DTYPES]
    if unknown:
        raise ValueError(f"{path}: no safetensors dtype for {', '.join(unknown)}")
    names = sorted(tensors, key=lambda name: (-_ORDER[tensors[name].dtype], name))
    digest, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:

        def put(data: memoryview) -> None:
            nonlocal size
            for start in range(0, len(data), _CHUNK):
                chunk = data[start : start + _CHUNK]
                digest.update(chunk)
                while len(chunk):
                    chunk = chunk[file.write(chunk) :]
            size += len(data)

        put(memoryview(_header(names, tensors)))
        for name in names:
            flat = tensors[name].detach().contiguous().reshape(-1)
            if flat.numel():
                if flat.stride(0) != 1:  # one element of a row, which passes for contiguous
                    flat = flat.clone(memory_format=torch.contiguous_format)
                put(flat.view(torch.uint8).numpy().data)
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def _header(names: list[str], tensors: Mapping[str, Tensor]) -> bytes:
    """Length and JSON of what stands where, padded to eight bytes."""
    entries, end = {}, 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
