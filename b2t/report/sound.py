"""What a run's JSON files hold, entry by entry: those of another kind than written are left out."""

from typing import Any

_TEXTS = ("split", "checkpoint", "role", "normalisation", "verdict")
_MAPPINGS = ("decoding", "language_model", "controls", "prior", "details")
_LISTS_OF_TEXT = ("untrained", "notes")
_LISTS_OF_NUMBERS = ("utilization", "perplexity")
_INTERVAL = "_interval"


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def sound_evaluation(evaluation: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the entries of `evaluation.json` that are what `b2t evaluate` writes, and the others.

    Returns:
        The entries, and a text about each one that was left out.
    """
    kept = {name: value for name, value in evaluation.items() if _fits(name, value)}
    lost = [f"evaluation.json: {name} is left out" for name in evaluation if name not in kept]
    return kept, lost


def _fits(name: str, value: Any) -> bool:
    if value is None:
        return True
    if name in _TEXTS:
        return isinstance(value, str)
    if name == "simulated":
        return isinstance(value, bool)
    if name in _MAPPINGS:
        return isinstance(value, dict)
    if name in _LISTS_OF_TEXT:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if name.endswith(_INTERVAL):
        return _is_numbers(value) and len(value) == 2
    if name in _LISTS_OF_NUMBERS:
        return isinstance(value, list) and all(item is None or is_number(item) for item in value)
    return is_number(value)


def sound_traces(traces: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return `reconstruction.json` where it can be drawn, else nothing and why."""
    trials, spectrum = traces.get("trials"), traces.get("spectrum")
    rate = traces.get("sampling_rate")
    if not trials and not spectrum:
        return traces, []
    fits = isinstance(rate, (int, float)) and 0 < rate < float("inf")
    fits = fits and isinstance(trials, list) and all(_is_trial(trial) for trial in trials)
    if fits and (spectrum is None or _is_spectrum(spectrum)):
        return traces, []
    return {}, ["reconstruction.json: it is left out, as it holds no traces that can be drawn"]


def _is_trial(trial: Any) -> bool:
    if not isinstance(trial, dict) or not isinstance(trial.get("row"), str):
        return False
    tables = [trial.get(name) for name in ("target", "reconstruction")]
    if not all(isinstance(t, list) and t and all(map(_is_numbers, t)) for t in tables):
        return False
    shapes = {tuple(map(len, table)) for table in tables if isinstance(table, list)}
    channels = trial.get("channels", [])
    one = len(shapes) == 1 and len(set(next(iter(shapes)))) == 1 and all(next(iter(shapes)))
    return one and _is_numbers(channels) and len(channels) == len(next(iter(shapes)))


def _is_spectrum(spectrum: Any) -> bool:
    if not isinstance(spectrum, dict):
        return False
    lines = [spectrum.get(name) for name in ("hz", "target", "reconstruction")]
    return all(map(_is_numbers, lines)) and len({len(line) for line in lines if line}) == 1


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_number, value))
