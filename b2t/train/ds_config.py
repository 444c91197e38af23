"""The DeepSpeed file: read, checked key by key, summarised.

DeepSpeed accepts misspelt top-level keys in silence (`gradient_cliping` trains unclipped), so each
is compared with the keys that it reads. The file owns micro-batch, accumulation, precision, ZeRO
and clipping; the optimizer and its schedule are set per phase in the configuration.
"""

import difflib
import importlib.util
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from b2t.errors import UserError
from b2t.train.ds_values import check_values, check_whole

Precision = Literal["fp16", "bf16", "fp32"]

_KNOWN_KEYS = frozenset(
    # One key a word, in one text, reads better than a list a page long.
    """
    train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping steps_per_print
    fp16 bf16 zero_optimization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    communication_data_type prescale_gradients gradient_predivide_factor gradient_allreduce_op
    disable_allgather disable_python_gc dump_state wall_clock_breakdown memory_breakdown
    flops_profiler comms_logger csv_monitor tensorboard data_types aio timers compile
    activation_checkpointing log_level
    """.split()  # noqa: SIM905
)

_ELSEWHERE = {
    "train_batch_size": "leave it out: it is micro-batch × accumulation × ranks, and a fixed "
    "number would tie the file to one number of GPUs",
    "optimizer": "leave it out: set optim.* and phases.N.lr in the configuration",
    "scheduler": "leave it out: set phases.N.warmup_steps and phases.N.schedule in the "
    "configuration",
    "wandb": "leave it out: set log.wandb.* in the configuration",
}

_NOT_IN_STAGE_3 = (
    "zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
)  # fmt: skip


@dataclass(frozen=True)
class DeepSpeedFile:
    """A checked DeepSpeed file.

    Attributes:
        path: where it was read.
        raw: its content, as `deepspeed.initialize(config=…)` takes it.
        micro_batch: trials per rank and forward.
        accumulation: micro-batches per optimizer step.
        precision: dtype of weights and activations.
        zero_stage: 1, 2 or 3; 0 where `b2t.train.plain` found nothing to share.
        clipping: largest global gradient norm.
        offload: whether the optimizer lives on the CPU.
    """

    path: Path
    raw: dict[str, Any]
    micro_batch: int
    accumulation: int
    precision: Precision
    zero_stage: int
    clipping: float
    offload: bool

    def engine_config(self) -> dict[str, Any]:
        """Return the content for `deepspeed.initialize`, with the batch as cut for these ranks."""
        without = {} if self.zero_stage else {"zero_optimization": {"stage": 0}}
        return {
            **self.raw,
            **without,
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_accumulation_steps": self.accumulation,
        }

    def global_batch(self, world: int) -> int:
        """Trials per optimizer step over all ranks."""
        return self.micro_batch * self.accumulation * world


def shipped_files() -> dict[str, Path]:
    """DeepSpeed files that come with b2t, by name: the checkout's, or those of the package."""
    package = Path(__file__).resolve().parents[1]
    folders = (package.parent / "ds_configs", package / "ds_configs")
    folder = next((folder for folder in folders if folder.is_dir()), folders[0])
    return {file.stem: file for file in sorted(folder.glob("*.json"))}


def load_ds_config(path: str | Path) -> DeepSpeedFile:
    """Read and check a DeepSpeed JSON file.

    Args:
        path: of the file, or the name of one that comes with b2t.

    Raises:
        UserError: on an unreadable file, unknown or misplaced keys, or bad values.
    """
    given, path = str(path), Path(path)
    if not path.is_file():
        path = shipped_files().get(given, path)
    raw = _read(path)
    for key in raw:
        _check_key(key, path)
    _check_tensorboard(raw, path)
    micro_batch = _positive_int(raw, "train_micro_batch_size_per_gpu", path)
    accumulation = _positive_int(raw, "gradient_accumulation_steps", path)
    clipping = raw.get("gradient_clipping")
    if (
        not isinstance(clipping, (int, float))
        or isinstance(clipping, bool)
        or not 0 < clipping < math.inf
    ):
        raise UserError(
            f"{path}: gradient_clipping: found {clipping!r}, expected a number above 0 "
            "(its default changes between DeepSpeed versions, so the file must say it)"
        )
    zero = _zero_section(raw, path)
    precision = _precision(raw, path)
    check_values(raw, path)
    check_whole(raw, path)
    return DeepSpeedFile(
        path=path,
        raw=raw,
        micro_batch=micro_batch,
        accumulation=accumulation,
        precision=precision,
        zero_stage=int(zero.stage),
        clipping=float(clipping),
        offload=zero.offload_optimizer is not None and zero.offload_optimizer.device != "none",
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        shipped = shipped_files()
        close = difflib.get_close_matches(path.stem, shipped, n=1)
        raise UserError(
            f"--deepspeed_config {path}: no such file"
            + (f"; did you mean {close[0]}?" if close else ".")
            + f" Shipped with b2t: {', '.join(shipped)}."
        )
    try:
        raw = json.loads(
            path.read_text("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a valid JSON file: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(raw).__name__}")
    return raw


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"key {key!r} appears twice")
    return dict(pairs)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON; for no limit write a large one, as 1e9")


def _check_key(key: str, path: Path) -> None:
    if key in _KNOWN_KEYS:
        return
    if key in _ELSEWHERE:
        raise UserError(f"{path}: {key}: {_ELSEWHERE[key]}")
    close = difflib.get_close_matches(key, _KNOWN_KEYS, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"known keys: {sorted(_KNOWN_KEYS)}"
    raise UserError(f"{path}: {key}: unknown key (DeepSpeed would ignore it); {hint}")


def _check_tensorboard(raw: dict[str, Any], path: Path) -> None:
    section = raw.get("tensorboard", {})
    on = isinstance(section, dict) and section.get("enabled")
    if on and importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            f"{path}: tensorboard.enabled: the package tensorboard is not installed; "
            "`pip install tensorboard`, or use csv_monitor"
        )


def _positive_int(raw: dict[str, Any], key: str, path: Path) -> int:
    value = raw.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{path}: {key}: found {value!r}, expected a whole number from 1")
    return value


def _zero_section(raw: dict[str, Any], path: Path) -> Any:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    section = raw.get("zero_optimization")
    if not isinstance(section, dict):
        raise UserError(
            f"{path}: zero_optimization: found {section!r}, expected a section such as "
            '{"stage": 2}'
        )
    zero = _checked(DeepSpeedZeroConfig, section, "zero_optimization", path)
    if int(zero.stage) == 0:
        raise UserError(
            f"{path}: zero_optimization.stage: found 0, expected 1, 2 or 3: the phases keep "
            "float32 masters of each weight, which stage 0 has not"
        )
    if zero.allgather_bucket_size < 1:  # DeepSpeed divides by it
        raise UserError(
            f"{path}: zero_optimization.allgather_bucket_size: found 0, expected a whole number "
            "from 1"
        )
    if int(zero.stage) == 3:
        _check_stage3(zero, path)
    return zero


def _check_stage3(zero: Any, path: Path) -> None:
    """Refuse what DeepSpeed knows for stage 3 and the phases' exact masters do not go with."""
    for key in ("offload_optimizer", "offload_param"):
        section = getattr(zero, key)
        if section is not None and section.device != "none":
            raise UserError(
                f"{path}: zero_optimization.{key}: not supported with stage 3; leave it out, or "
                "use stage 2 with offload_optimizer (ds_configs/zero2_offload.json)"
            )
    for key in _NOT_IN_STAGE_3:
        if getattr(zero, key) != type(zero).model_fields[key].default:
            raise UserError(
                f"{path}: zero_optimization.{key}: found {getattr(zero, key)!r}; weights and "
                "gradients must be exact and in one place: leave it out"
            )


def _precision(raw: dict[str, Any], path: Path) -> Precision:
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config

    fp16 = _checked(DeepSpeedFP16Config, raw.get("fp16", {}), "fp16", path)
    bf16 = _checked(DeepSpeedBF16Config, raw.get("bf16", {}), "bf16", path)
    if fp16.enabled and bf16.enabled:
        raise UserError(f"{path}: fp16 and bf16 are both enabled; expected at most one")
    return "fp16" if fp16.enabled else "bf16" if bf16.enabled else "fp32"


def _checked(model: Any, section: Any, name: str, path: Path) -> Any:
    """Validate one section with DeepSpeed's own pydantic model."""
    from pydantic import ValidationError

    if not isinstance(section, dict):
        raise UserError(f"{path}: {name}: found {section!r}, expected a JSON object")
    try:
        return model(**section)
    except ValidationError as error:
        item = error.errors()[0]
        key = ".".join([name, *map(str, item["loc"])])
        hint = ""
        if item["type"] == "extra_forbidden":
            known = [n for n in model.model_fields if re.fullmatch(r"[a-z0-9_]+", n)]
            close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
            if close:
                hint = f"; did you mean {close[0]!r}?"
            elif len(item["loc"]) == 1:
                hint = f"; known keys: {known}"
            message = "unknown key"
        else:
            message = f"{item['msg'].removeprefix('Value error, ')}, found {item['input']!r}"
        raise UserError(f"{path}: {key}: {message}{hint}") from None
