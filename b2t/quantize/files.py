"""A quantizer on disk by itself: options as JSON, everything else as safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from b2t.errors import UserError

OPTIONS_FILE, WEIGHTS_FILE = "quantizer.json", "quantizer.safetensors"


def write_quantizer(folder: str | Path, options: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Write arguments and state of a quantizer into ``folder``, made where absent."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in state.items()}, folder / WEIGHTS_FILE)
    (folder / OPTIONS_FILE).write_text(json.dumps(options, indent=2) + "\n")


def read_quantizer(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `write_quantizer` wrote.

    Raises:
        UserError: a file is missing.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    for name in (OPTIONS_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder}: no {name} in this folder; expected one written by save_pretrained"
            )
    return json.loads((folder / OPTIONS_FILE).read_text()), load_file(folder / WEIGHTS_FILE)
