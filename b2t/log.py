"""Logging: one readable stream on rank 0, quiet libraries, messages that appear once."""

import logging
import os
import sys
import warnings
from contextlib import suppress

_ROOT = "b2t"
_said: set[str] = set()

_NOISY_LIBRARIES = (
    "DeepSpeed",
    "datasets",
    "transformers",
    "huggingface_hub",
    "httpx",
    "urllib3",
    "matplotlib",
    "mne",
    "absl",
    "fsspec",
    "numexpr",
    "wandb",
    "torch.distributed",
)


class _TqdmHandler(logging.Handler):
    """Writes records above an active progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        # A log on a full disk, or a terminal that is gone, must not end a training run.
        with suppress(OSError):
            tqdm.write(self.format(record), file=sys.stderr)


def logger(name: str = _ROOT) -> logging.Logger:
    """Return the logger of one module, below the project's root logger."""
    return logging.getLogger(name if name.startswith(_ROOT) else f"{_ROOT}.{name}")


def log_once(key: str, message: str, level: int = logging.WARNING) -> None:
    """Log ``message`` the first time ``key`` is seen in this process."""
    if key not in _said:
        _said.add(key)
        logger().log(level, message)


def configure(rank: int = 0, level: int = logging.INFO) -> None:
    """Send the project's records to stderr: everything on rank 0, errors only on other ranks."""
    root = logging.getLogger(_ROOT)
    root.setLevel(level if rank == 0 else logging.ERROR)
    root.propagate = False
    root.handlers.clear()
    handler = _TqdmHandler()
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(
        logging.Formatter(f"{prefix}%(levelname).1s %(asctime)s %(message)s", "%H:%M:%S")
    )
    root.addHandler(handler)


def quiet_libraries() -> None:
    """Silence progress bars and informational records of the libraries underneath.

    Call before importing them where possible: several read the environment on import.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("MNE_LOGGING_LEVEL", "ERROR")
    for name in _NOISY_LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*torch.distributed.*barrier.*")
