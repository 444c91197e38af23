"""What the options of every component are built on: pydantic, no unknown keys, ranges by name.

A component owns its options in a module of its own, `b2t.<room>.options`, which imports nothing
heavy; the configuration is made of them. A default therefore stands in one place.
"""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from b2t.errors import UserError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]
PositiveInt = Annotated[int, Field(ge=1)]

Chosen = TypeVar("Chosen", bound="Options")


class Options(BaseModel):
    """Base of all options: unknown keys are errors, docstrings below fields are their help."""

    model_config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        validate_assignment=True,
        allow_inf_nan=False,
    )


def checked(options: type[Chosen], given: dict[str, Any], where: str) -> Chosen:
    """Build options from arguments of a call.

    Args:
        options: their class.
        given: values by name.
        where: what the message of a mistake begins with.

    Raises:
        UserError: a value out of its range.
        TypeError: an unknown name, as for any call.
    """
    try:
        return options(**given)
    except ValidationError as error:
        unknown = [item["loc"][-1] for item in error.errors() if item["type"] == "extra_forbidden"]
        if unknown:
            raise TypeError(f"{where}: unexpected argument {unknown[0]!r}") from None
        raise UserError(f"{where}: " + "; ".join(map(_problem, error.errors()))) from None


def _problem(item: Any) -> str:
    message = item["msg"].removeprefix("Value error, ")
    name = ".".join(str(part) for part in item["loc"])
    return f"{name} is {item['input']!r}: {message}" if name else message
