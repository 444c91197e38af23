"""Settings by their dotted keys."""

from typing import Any


def flattened(value: Any, key: str = "") -> dict[str, Any]:
    """Return the values of a tree of JSON values by key, as overrides name them: `phases.0.lr`.

    Args:
        value: a tree; lists of anything but mappings are values.
        key: what the keys begin with.
    """
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = {str(index): item for index, item in enumerate(value)}
    if not isinstance(value, dict) or not value:
        return {key: value}
    found: dict[str, Any] = {}
    for name, item in value.items():
        found |= flattened(item, f"{key}.{name}" if key else str(name))
    return found
