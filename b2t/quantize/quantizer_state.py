"""What a quantizer keeps: codebooks, options, clocks and switches."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from b2t.errors import UserError
from b2t.options import checked
from b2t.quantize.codebook import Codebooks, Read, Write
from b2t.quantize.frames import FrameSpace
from b2t.quantize.layers import Layers
from b2t.quantize.options import ResidualVQOptions
from b2t.quantize.reminders import Reminders
from b2t.quantize.schedules import anneal, drawn_layers
from b2t.quantize.search import BACKENDS
from b2t.quantize.update import revives_next


class QuantizerState(FrameSpace):
    """Codebooks and everything that says how they are used at present.

    Arguments and attributes as in `b2t.quantize.ResidualVQ`, which quantizes with them.

    Raises:
        UserError: an option out of its range.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        num_quantizers: int,
        codebook_dim: int | None = None,
        *,
        backend: str = "kernels",
        seed: int = 0,
        **options: Any,
    ) -> None:
        options |= {
            "codebook_size": codebook_size,
            "num_quantizers": num_quantizers,
            "codebook_dim": codebook_dim,
        }
        chosen = checked(ResidualVQOptions, options, "quantizer")
        _check(dim, backend)
        super().__init__(dim, codebook_dim or dim, unit=chosen.use_cosine_sim)
        self.options, self.backend = chosen, backend
        self.config = {"dim": dim, **chosen.model_dump(), "backend": backend, "seed": seed}
        self.codebook_size, self.num_quantizers = codebook_size, num_quantizers
        self.revival_enabled = True
        self.reminders = Reminders()
        self.codebooks = Codebooks(
            1 if chosen.shared_codebook else num_quantizers,
            codebook_size,
            self.codebook_dim,
            learnable=chosen.update_rule == "gradient",
            seed=seed,
        )
        if not self.codebooks.embed.is_meta:
            self.codebooks.temperature.fill_(chosen.temperature)
            if not chosen.kmeans_init:
                self.codebooks.start_random(num_quantizers, chosen.use_cosine_sim)

    @property
    def initialized(self) -> bool:
        """Whether the codebooks have started; until then the input passes through."""
        return int(self.codebooks.initialized) == self.num_quantizers

    @property
    def temperature(self) -> float:
        """τ, dimensionless."""
        return float(self.codebooks.temperature)

    @property
    def decay(self) -> float:
        """Decay of the running averages, per update."""
        return self.options.averaging_decay

    def set_temperature(self, value: float) -> None:
        """Set τ > 0."""
        if not value > 0:
            raise ValueError(f"temperature must be positive, got {value}")
        self.codebooks.temperature.fill_(value)

    def set_progress(self, progress: float) -> None:
        """Tell how much of training is done, in [0, 1]: sets τ and ends revival in time."""
        self.codebooks.progress.fill_(progress)
        course = self.options
        self.set_temperature(
            anneal(
                course.temperature, course.temperature_end, progress, course.temperature_schedule
            )
        )

    def attach_master(self, read: Read, write: Write) -> None:
        """See `Codebooks.attach_master`; needed for the gradient rule in half precision."""
        self.codebooks.attach_master(read, write)

    def checksum(self) -> Tensor:
        """A number [] int64 that is equal on two ranks whose codebooks are bitwise equal."""
        return self.codebooks.checksum()

    def _revives_next(self) -> bool:
        return self.revival_enabled and revives_next(self.codebooks, self.options)

    def _active_layers(self) -> int:
        """Layers of this step: all of them, or a number drawn from (seed, update)."""
        if not (self.options.quantize_dropout and self.num_quantizers > 1):
            return self.num_quantizers
        lowest = self.options.quantize_dropout_cutoff_index + 1
        books = self.codebooks
        return drawn_layers(lowest, self.num_quantizers, int(books.seed), int(books.updates))

    def _layers(self, books: Tensor) -> Layers:
        return Layers(
            books,
            gain=self.codebooks.gain,
            distance=self.codebooks.distance_scale,
            quantizers=self.num_quantizers,
            temperature=self.temperature,
            cosine=self.options.use_cosine_sim,
            backend=self.backend,
            joint=self.options.joint_update,
        )

    def _require_start(self, action: str) -> None:
        if not self.initialized:
            raise RuntimeError(f"cannot {action}: the codebooks have not started (initialize)")


def _check(dim: int, backend: str) -> None:
    if not (isinstance(dim, int) and dim >= 1):
        raise UserError(f"quantizer: dim is {dim!r}, expected a positive integer")
    if backend not in BACKENDS:
        raise UserError(f"quantizer: backend is {backend!r}, expected one of {BACKENDS}")
