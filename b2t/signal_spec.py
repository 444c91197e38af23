"""What signals a model was trained on, and whether others are of the same kind."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from b2t.errors import UserError
from b2t.log import log_once
from b2t.signal_processing import ProcessingOptions

Z_SCORE = "z-score"
"""Unit of signals whose channels were brought to mean 0 and deviation 1."""

_FACTOR = 10.0
_FACTOR_OF_Z_SCORES = 4.0


@dataclass(frozen=True)
class SignalSpec:
    """Facts about signals; None where a fact is not known.

    Attributes:
        channels: number of channels C.
        sampling_rate: time bins per second, in Hz.
        channel_names: C names, in order.
        unit: `z-score`, or the unit of the recording, such as V.
        rms: root mean square of a typical trial, in that unit.
        sessions: their names; of a model, those it can tell apart.
        processing: reference and filters, as `b2t.signal_processing.ProcessingOptions`.
    """

    channels: int
    sampling_rate: float | None = None
    channel_names: Sequence[str] | None = None
    unit: str | None = None
    rms: float | None = None
    sessions: Sequence[str] = ()
    processing: dict[str, Any] | None = None

    @classmethod
    def of_model(cls, config: Any) -> "SignalSpec":
        """Return what the config of a `BrainToText` says; old ones say less."""
        known = config.signal or {}
        return cls(
            channels=config.channels,
            sampling_rate=config.sampling_rate,
            channel_names=known.get("channel_names"),
            unit=known.get("unit"),
            rms=known.get("rms"),
            sessions=config.sessions if config.adapter["enabled"] else (),
            processing=known.get("processing"),
        )


@dataclass
class Fit:
    """What comes of comparing signals with those of a model.

    Attributes:
        problems: why they are of another kind, each with its remedy.
        fatal: the first problem that no insistence helps against.
        unchecked: facts that one of the two does not tell.
        order: indices that bring the signals' channels into the model's order; None as they are.
    """

    problems: list[str] = field(default_factory=list)
    fatal: str | None = None
    unchecked: list[str] = field(default_factory=list)
    order: list[int] | None = None


def compare(model: SignalSpec, data: SignalSpec) -> Fit:
    """Compare signals with those that a model was trained on."""
    fit = Fit()
    _compare_channels(model, data, fit)
    _compare_rates(model, data, fit)
    _compare_units(model, data, fit)
    _compare_processing(model, data, fit)
    unknown = [name for name in data.sessions if name not in set(model.sessions)]
    if model.sessions and unknown:
        fit.problems.append(
            f"{len(unknown)} of {len(data.sessions)} sessions were not trained on "
            f"({_some(unknown)}): the model knows {_some(model.sessions)}"
        )
    return fit


def require_fit(
    model: SignalSpec, data: SignalSpec, name: str, of: str, *, force: bool, how: str
) -> list[int] | None:
    """Refuse signals of another kind than a model was trained on.

    Args:
        model: what the model was trained on.
        data: what it is given.
        name: of the data, for messages.
        of: the model's folder, for messages.
        force: warn once instead; channels that cannot be aligned are taken as they come.
        how: what to write to go on regardless, such as ``--force``.

    Returns:
        Indices that bring the channels into the model's order, None where they are in it.

    Raises:
        UserError: one message with all that differs.
    """
    fit = compare(model, data)
    if fit.fatal is not None:
        raise UserError(f"{name}: {fit.fatal}")
    found = "; ".join(fit.problems)
    if found and not force:
        raise UserError(
            f"{name} does not fit the model {of}: {found}. Prepare the data as for training, or "
            f"go on regardless with {how}"
        )
    if found:
        log_once(f"forced {name}", f"{name} does not fit the model {of}: {found}; going on")
    elif fit.order is not None:
        log_once(
            f"aligned {name}",
            f"{name}: channels brought by name into the order of the model",
            logging.INFO,
        )
    return fit.order


def _compare_channels(model: SignalSpec, data: SignalSpec, fit: Fit) -> None:
    wanted, found = model.channel_names, data.channel_names
    if wanted is not None and found is not None and list(wanted) != list(found):
        missing = [name for name in wanted if name not in set(found)]
        if missing:
            fit.problems.append(f"it lacks {len(missing)} of the channels ({_some(missing)})")
        elif len(set(found)) < len(found) or len(set(wanted)) < len(wanted):
            fit.problems.append("channels differ, and one name stands for two of them")
        else:
            fit.order = [list(found).index(name) for name in wanted]
            return
    if model.channels != data.channels:
        fit.fatal = (
            f"trials have {data.channels} channels, the model reads {model.channels}"
            + "".join(f"; {problem}" for problem in fit.problems)
            + "; prepare the data as for training"
        )
    elif wanted is None or found is None:
        fit.unchecked.append("the channels' names and order")


def _compare_rates(model: SignalSpec, data: SignalSpec, fit: Fit) -> None:
    wanted, found = model.sampling_rate, data.sampling_rate
    if wanted is None or found is None:
        fit.unchecked.append("the sampling rate")
    elif abs(found - wanted) > 1e-3 * wanted:
        fit.problems.append(
            f"it is sampled at {found:g} Hz (bins of {1000 / found:.4g} ms), the model at "
            f"{wanted:g} Hz (bins of {1000 / wanted:.4g} ms); `b2t prepare --resample {wanted:g}`"
        )


def _compare_units(model: SignalSpec, data: SignalSpec, fit: Fit) -> None:
    if model.unit is None or data.unit is None:
        fit.unchecked.append("the unit")
    elif model.unit != data.unit:
        remedy = "block" if model.unit == Z_SCORE else "none"
        fit.problems.append(
            f"its unit is {data.unit}, that of the model {model.unit}; "
            f"`b2t prepare --normalize {remedy}`"
        )
        return
    if not model.rms or not data.rms:
        return
    ratio = data.rms / model.rms
    limit = _FACTOR_OF_Z_SCORES if model.unit == Z_SCORE else _FACTOR
    if not 1 / limit <= ratio <= limit:
        fit.problems.append(
            f"its root mean square is {data.rms:.3g}, that of the training signals {model.rms:.3g}"
            f"{' (z-scored)' if model.unit == Z_SCORE else ''}: another unit or normalisation"
        )


def _compare_processing(model: SignalSpec, data: SignalSpec, fit: Fit) -> None:
    if model.processing is None or data.processing is None:
        return
    wanted, found = (ProcessingOptions(**each) for each in (model.processing, data.processing))
    if wanted.model_copy(update={"bad_channels": []}) != found.model_copy(
        update={"bad_channels": []}
    ):
        fit.problems.append(
            f"its signals were prepared otherwise ({found.told()}) than those of the training "
            f"({wanted.told()}); `b2t prepare --like` the training data"
        )


def _some(names: Sequence[str], most: int = 4) -> str:
    shown = ", ".join(map(str, list(names)[:most]))
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
