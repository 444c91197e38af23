"""Versions and devices that a result depends on."""

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch


def environment(device: torch.device, run: Mapping[str, Any]) -> dict[str, Any]:
    """Describe what trains: ``device``, facts about the ``run``, this machine and its packages."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or "cpu",
        **run,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        **versions(),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    names = ("b2t", "torch", "deepspeed", "transformers", "datasets", "triton", "numpy")
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
