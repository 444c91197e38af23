"""Values of the DeepSpeed file that DeepSpeed meets with a traceback, or takes for granted."""

from pathlib import Path
from typing import Any

from b2t.errors import UserError

_FLAGS = (
    "prescale_gradients", "disable_allgather", "disable_python_gc", "dump_state",
    "wall_clock_breakdown", "memory_breakdown", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
)  # fmt: skip

_SECTIONS = (
    "flops_profiler", "comms_logger", "csv_monitor", "tensorboard", "data_types", "aio", "timers",
    "compile", "activation_checkpointing",
)  # fmt: skip

_DTYPES = ("fp16", "bf16", "fp32")


def check_values(raw: dict[str, Any], path: Path) -> None:
    """Check what no section of `b2t.train.ds_config` owns.

    Raises:
        UserError: names the key, what was found and what was expected.
    """
    for key in _FLAGS:
        _require(isinstance(raw.get(key, False), bool), raw, key, "true or false", path)
    for key in _SECTIONS:
        _require(isinstance(raw.get(key, {}), dict), raw, key, "a JSON object", path)
    steps = raw.get("steps_per_print", 1)
    whole = isinstance(steps, int) and not isinstance(steps, bool) and steps >= 1
    _require(whole, raw, "steps_per_print", "a whole number from 1", path)
    factor = raw.get("gradient_predivide_factor", 1.0)
    number = isinstance(factor, (int, float)) and not isinstance(factor, bool)
    finite = number and 0 < factor < float("inf")
    _require(finite, raw, "gradient_predivide_factor", "a number above 0", path)
    kind = raw.get("communication_data_type")
    expected = " or ".join(_DTYPES)
    _require(kind is None or kind in _DTYPES, raw, "communication_data_type", expected, path)
    levels = ("debug", "info", "warning", "error", "critical")
    level = raw.get("log_level")
    _require(level is None or level in levels, raw, "log_level", " or ".join(levels), path)
    types = raw.get("data_types", {})
    kind = types.get("grad_accum_dtype")
    if kind is not None and kind not in _DTYPES:
        raise UserError(f"{path}: data_types.grad_accum_dtype: found {kind!r}, expected {expected}")


def _require(good: bool, raw: dict[str, Any], key: str, expected: str, path: Path) -> None:
    if not good:
        raise UserError(f"{path}: {key}: found {raw[key]!r}, expected {expected}")


def check_whole(raw: dict[str, Any], path: Path) -> None:
    """Let DeepSpeed read the whole file as it will when training starts.

    Raises:
        UserError: with DeepSpeed's own words.
    """
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    try:
        DeepSpeedConfig(dict(raw))
    except ValidationError as error:
        item = error.errors()[0]
        key = ".".join(str(part) for part in item["loc"])
        section = error.title.removeprefix("DeepSpeed").removesuffix("Config")
        raise UserError(
            f"{path}: DeepSpeed refuses {key} ({section}): {item['msg']}, found {item['input']!r}"
        ) from None
    except Exception as error:  # it raises whatever its parts do
        raise UserError(f"{path}: DeepSpeed refuses it: {error}") from None
