"""Tensors as JSON values, so that the state of a monitor fits into a checkpoint's JSON file."""

import base64
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor


def pack(tensor: Tensor) -> dict[str, Any]:
    """Return a JSON value that holds ``tensor`` exactly."""
    array = tensor.detach().cpu().contiguous().numpy()
    data = base64.b64encode(zlib.compress(array.tobytes(), level=1)).decode()
    return {"dtype": array.dtype.str, "shape": list(array.shape), "zlib": data}


def unpack(packed: dict[str, Any]) -> Tensor:
    """Return the tensor that `pack` was given, on the CPU."""
    array = np.frombuffer(zlib.decompress(base64.b64decode(packed["zlib"])), packed["dtype"])
    return torch.from_numpy(array.reshape(packed["shape"]).copy())
