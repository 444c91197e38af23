"""Saving and loading: weights, config, tokenizer, generation config, and their checksums."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from b2t.errors import UserError
from b2t.log import log_once
from b2t.manifest import MANIFEST, find_problem, write_manifest
from b2t.model.configuration import BrainToTextConfig
from b2t.model.tokenizer import load_tokenizer

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class Pretrained(PreTrainedModel):
    """What travels with a saved `BrainToText`, besides its weights.

    Attributes:
        generation_config: how `generate` decodes where a call does not say.
    """

    _tokenizer: PreTrainedTokenizerBase | None = None
    _tokenizer_source: tuple[str, dict[str, Any]] | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer that the model was trained with; None where it came without one."""
        if self._tokenizer is None and self._tokenizer_source is not None:
            (source, options), self._tokenizer_source = self._tokenizer_source, None
            try:
                self._tokenizer = load_tokenizer(source, **options)
            except UserError:
                self._tokenizer = None
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer, self._tokenizer_source = tokenizer, None

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Write config, weights, tokenizer, generation config and their checksums.

        Arguments as in transformers.
        """
        folder = Path(save_directory)
        main = kwargs.get("is_main_process", True)
        if main:
            (folder / MANIFEST).unlink(missing_ok=True)
        super().save_pretrained(save_directory, **kwargs)
        if not main:
            return
        written = [path.name for path in folder.glob("*.safetensors*")]
        if self.generation_config is not None:
            self.generation_config.save_pretrained(folder)
            written.append(GENERATION_FILE)
        if self.tokenizer is not None:
            files = self.tokenizer.save_pretrained(folder)
            written += [os.path.relpath(file, folder) for file in files if Path(file).is_file()]
        write_manifest(folder, {CONFIG_FILE, *written})

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a saved model; arguments as in transformers.

        Whatever the dtype asked for, codebooks and their averages come back in float32, bit for
        bit.

        Raises:
            UserError: no model there, one that lacks weights, or files that are not as they were
                written.
        """
        require_whole(Path(path))
        with_info = kwargs.pop("output_loading_info", False)
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", "auto"))
        hub = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
        try:
            saved = kwargs.get("config") or read_config(path, **hub)
            dtype = saved.dtype if dtype in ("auto", None) else dtype
            # Not every transformers 5 spares buffers the cast to `dtype`; `.to` below always does.
            model, info = super().from_pretrained(
                path, *args, output_loading_info=True, dtype=torch.float32, **kwargs
            )
        except (OSError, SafetensorError) as error:
            raise _no_model(path, error) from None
        except (RuntimeError, TypeError, ValueError) as error:  # as what is damaged leads to
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"{path}: its model.safetensors is not of the architecture in its config.json "
                f"({reason}); restore both from one copy"
            ) from None
        missing = sorted(info["missing_keys"])
        if missing:
            raise UserError(
                f"{path}: its model.safetensors lacks {len(missing)} tensors of this architecture, "
                f"such as {missing[0]}; it was written by another version or cut short"
            )
        require_sound(model, str(path))
        if dtype is not None:
            model = model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        if model.text_decoder is not None:
            model.text_decoder.keep_frozen()  # loading makes every parameter anew
        model._take_company(str(path), hub)
        return (model, info) if with_info else model

    def _take_company(self, path: str, hub: dict[str, Any]) -> None:
        """Take the generation config, and the tokenizer when it is asked for."""
        self._tokenizer_source = (path, hub) if self.text_decoder is not None else None
        try:
            if self.text_decoder is not None:
                self.generation_config = GenerationConfig.from_pretrained(path, **hub)
        except OSError:
            pass  # saved by an earlier version: the config's own limits hold
        if self.config.signal is None:
            log_once(
                f"unknown signals {path}",
                f"{path}: its config.json does not say what signals it was trained on (names of "
                "channels, unit, smoothing): whether others are of that kind cannot be checked",
            )


def read_config(path: Any, **hub: Any) -> BrainToTextConfig:
    """Read the config of a saved model; ``hub`` as in transformers.

    Raises:
        UserError: it cannot be read, or describes no `BrainToText`.
    """
    try:
        return BrainToTextConfig.from_pretrained(path, **hub)
    except UserError:
        raise
    except OSError as error:
        raise _no_model(path, error) from None
    except Exception as error:  # transformers passes on whatever damaged values lead to
        raise UserError(
            f"{path}: its config.json describes no model of b2t ({_first_line(error)}); restore it "
            "from a copy"
        ) from None


def _no_model(path: Any, error: Exception) -> UserError:
    return UserError(
        f"{path}: no trained model ({_first_line(error)}); expected a folder with config.json and "
        "model.safetensors, such as RUN/checkpoints/best"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def require_sound(model: PreTrainedModel, name: str) -> None:
    """Refuse weights that cannot have come of training.

    Args:
        model: whose parameters are looked at.
        name: of it, for the message.

    Raises:
        UserError: NaN or infinity, or a component whose matrices are all zero.
    """
    lively: dict[str, bool] = {}
    for parameter, value in model.named_parameters():
        if not bool(torch.isfinite(value).all()):
            raise UserError(
                f"{name}: {parameter} holds NaN or infinity: the model is broken, not "
                "undertrained; take an earlier checkpoint (--checkpoint)"
            )
        if value.dim() > 1:
            component = parameter.partition(".")[0]
            lively[component] = lively.get(component, False) or bool(value.any())
    dead = sorted(component for component, alive in lively.items() if not alive)
    if dead:
        raise UserError(
            f"{name}: all weights of {dead[0]} are zero: the model is broken, not undertrained; "
            "take another checkpoint or restore it from a copy"
        )


def require_whole(folder: Path) -> None:
    """Refuse a local folder whose files are not those of its manifest; older ones have none.

    Raises:
        UserError: names the first file that was damaged or changed.
    """
    if not (folder / MANIFEST).is_file():
        return
    problem = find_problem(folder, [CONFIG_FILE])
    if problem is not None:
        raise UserError(
            f"{folder}: {problem}: the saved model was damaged or changed after it was written; "
            f"restore it from a copy, or remove {folder / MANIFEST} if the change was meant"
        )
