"""Values that change from step to step within a phase."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from b2t.data.options import AugmentOptions
from b2t.options import Options, PositiveInt

FIXED = ("enabled", "array_size", "array_features", "smoothing_bins", "smoothing_ms")
"""Keys of `AugmentOptions` that do not change within a phase."""

Value = float | tuple[float, float]


class Ramp(Options):
    """From one value in a straight line to another, where it then stays."""

    first: Value = Field(alias="from")
    """At the first step of the phase: a number, or [low, high] where the key is a range."""
    last: Value = Field(alias="to")
    """At the end of the ramp and after it."""
    steps: PositiveInt | None = None
    """Steps after which the end is reached."""
    share: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """The same as a share of the phase's steps; null, with `steps`, means all of them."""

    @model_validator(mode="after")
    def _one_way(self) -> Ramp:
        if self.steps is not None and self.share is not None:
            raise ValueError("steps and share say the same: give one of them")
        if isinstance(self.first, tuple) != isinstance(self.last, tuple):
            raise ValueError("from and to must both be numbers or both be [low, high]")
        return self

    def length(self, phase_steps: int) -> int:
        """Steps of the ramp in a phase of ``phase_steps``."""
        return self.steps or max(1, round((self.share or 1.0) * phase_steps))

    def at(self, step: int, phase_steps: int) -> Value:
        """Value of step ``step``, counted from 0."""
        way = min(1.0, step / self.length(phase_steps))
        if isinstance(self.first, tuple) and isinstance(self.last, tuple):
            low, high = (a + way * (b - a) for a, b in zip(self.first, self.last, strict=True))
            return low, high
        assert isinstance(self.first, (int, float)) and isinstance(self.last, (int, float))
        return self.first + way * (self.last - self.first)


def ramps_of(given: dict[str, Any]) -> dict[str, Ramp]:
    """Return the keys of an augmentation whose values are ramps.

    Args:
        given: keys of `AugmentOptions`; a ramp is a mapping with `from` and `to`.

    Raises:
        ValueError: a mapping that is no ramp, or a key that cannot change; names the key.
    """
    found = {}
    for key, value in given.items():
        if not isinstance(value, dict):
            continue
        if key in FIXED:
            raise ValueError(f"{key}: is the same in all steps; give one value, not a ramp")
        try:
            found[key] = Ramp(**value)
        except ValidationError as error:
            item = error.errors()[0]
            place = ".".join([key, *map(str, item["loc"][:1])])
            message = item["msg"].removeprefix("Value error, ")
            raise ValueError(
                f"{place}: {message}; a ramp is {{from: VALUE, to: VALUE}} with steps or share"
            ) from None
    return found


def values_at(given: dict[str, Any], step: int, phase_steps: int) -> dict[str, Any]:
    """Return keys of an augmentation with each ramp replaced by its value.

    Args:
        given: keys of `AugmentOptions`, values or ramps.
        step: global batches of the phase before this one, skipped steps included.
        phase_steps: of the phase.

    Raises:
        ValueError: as `ramps_of`.
    """
    values = dict(given)
    for key, ramp in ramps_of(given).items():
        value = ramp.at(step, phase_steps)
        field = AugmentOptions.model_fields.get(key)
        whole = field is not None and isinstance(field.default, int)
        values[key] = round(value) if whole and isinstance(value, float) else value
    return values
