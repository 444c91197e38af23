"""Exact float32 weights, which are carried from one phase's engine to the next."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from b2t.train.ds_config import DeepSpeedFile


def weights_are_masters(ds_file: DeepSpeedFile, device: torch.device) -> bool:
    """Whether the module's own weights are the exact float32 ones, whole, in the host's memory.

    A copy of them would only take memory.
    """
    return ds_file.precision == "fp32" and ds_file.zero_stage < 3 and device.type == "cpu"


def initial_masters(model: nn.Module) -> dict[str, Tensor]:
    """All parameters in float32 on the CPU, by name: the parameters' own memory where they are."""
    return {n: p.to("cpu", torch.float32) for n, p in weights_of(model).items()}


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters' own memory, by name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def load_weights(model: nn.Module, masters: Mapping[str, Tensor], shared: bool) -> None:
    """Copy masters into the module in float32, so that every engine casts from exact weights.

    Not where they are ``shared`` and the same memory already.
    """
    for name, parameter in model.named_parameters():
        master = masters[name]
        if not shared or master.data_ptr() != parameter.data_ptr():
            parameter.data = master.to(device=parameter.device, dtype=torch.float32, copy=True)
