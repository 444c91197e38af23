"""Ways to damage a file, each a function of a generator: what disks, copies and editors do."""

import json
import re
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import yaml

Damage = Callable[[np.random.Generator, bytes], bytes]


def _place(generator: np.random.Generator, content: bytes) -> int:
    # Half of all damage near the beginning, where headers are.
    end = len(content) if generator.random() < 0.5 else min(len(content), 2048)
    return int(generator.integers(0, max(1, end)))


def cut(generator: np.random.Generator, content: bytes) -> bytes:
    """Keep the beginning."""
    return content[: int(generator.integers(0, len(content)))]


def flip(generator: np.random.Generator, content: bytes) -> bytes:
    """Flip one bit."""
    damaged = bytearray(content)
    damaged[_place(generator, content)] ^= 1 << int(generator.integers(0, 8))
    return bytes(damaged)


def scatter(generator: np.random.Generator, content: bytes) -> bytes:
    """Replace a few bytes here and there."""
    damaged = bytearray(content)
    for _ in range(int(generator.integers(2, 12))):
        damaged[_place(generator, content)] = int(generator.integers(0, 256))
    return bytes(damaged)


def blank(generator: np.random.Generator, content: bytes) -> bytes:
    """Zero a stretch, as a disk does that lost a block."""
    start = _place(generator, content)
    length = min(int(generator.integers(1, 600)), len(content) - start)
    return content[:start] + bytes(length) + content[start + length :]


def noise(generator: np.random.Generator, content: bytes) -> bytes:
    """Put random bytes over a stretch."""
    start = _place(generator, content)
    length = min(int(generator.integers(1, 300)), len(content) - start)
    return content[:start] + generator.bytes(length) + content[start + length :]


def drop(generator: np.random.Generator, content: bytes) -> bytes:
    """Leave a stretch out."""
    start = _place(generator, content)
    return content[:start] + content[start + int(generator.integers(1, 40)) :]


def repeat(generator: np.random.Generator, content: bytes) -> bytes:
    """Write a stretch twice."""
    start = _place(generator, content)
    stop = start + int(generator.integers(1, 200))
    return content[:stop] + content[start:]


def number(generator: np.random.Generator, content: bytes) -> bytes:
    """Put a number that means trouble, in a random width and byte order, at an aligned place."""
    form = str(generator.choice(["<i", ">i", "<q", "<d", ">d", "<f", ">h"]))
    if form[1] in "df":
        value: Any = generator.choice([np.nan, np.inf, -1.0, 1e30, 0.0])
    else:
        value = int(generator.choice([-1, 0, 2**15 - 1]))
        value = value if form[1] == "h" else int(generator.choice([value, 2**31 - 1, -(2**31)]))
    packed = struct.pack(form, value)
    start = _place(generator, content) // 4 * 4
    return content[:start] + packed + content[start + len(packed) :]


def other(generator: np.random.Generator, content: bytes) -> bytes:
    """Put something else in the file's place."""
    choices = [b"", b"\0" * 64, b"not what you think\n", generator.bytes(500), content[::-1]]
    return choices[int(generator.integers(0, len(choices)))]


BYTES: dict[str, Damage] = {
    name.__name__: name for name in (cut, flip, scatter, blank, noise, drop, repeat, number, other)
}


STRANGE = [
    None, True, -1, 0, 2**70, 1.5, float("nan"), float("inf"), 1e308, "", "text", "\ud7ff", [], {},
    [[]], [None], {"a": {"b": []}}, ["x"] * 3, "1e9", "2026-11-24", [1, "2", None],
]  # fmt: skip


def replace_value(generator: np.random.Generator, tree: Any) -> Any:
    """Put something strange in the place of a random value at any depth."""
    paths = list(_paths(tree))
    path = paths[int(generator.integers(0, len(paths)))]
    strange = STRANGE[int(generator.integers(0, len(STRANGE)))]
    return _replaced(tree, path, strange)


def rename_key(generator: np.random.Generator, tree: Any) -> Any:
    """Misspell or remove a random key."""
    paths = [path for path in _paths(tree) if path and isinstance(path[-1], str)]
    path = paths[int(generator.integers(0, len(paths)))]
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    name = path[-1]
    changed = {
        (name[:-1] + "ß" if key == name else key): value
        for key, value in parent.items()
        if key != name or generator.random() < 0.5
    }
    return _replaced(tree, path[:-1], changed)


def _paths(tree: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield prefix
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _paths(value, (*prefix, key))
    elif isinstance(tree, list):
        for index, value in enumerate(tree[:4]):
            yield from _paths(value, (*prefix, index))


def _replaced(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    if isinstance(tree, dict):
        return {k: _replaced(v, path[1:], value) if k == path[0] else v for k, v in tree.items()}
    return [_replaced(v, path[1:], value) if k == path[0] else v for k, v in enumerate(tree)]


def json_value(generator: np.random.Generator, content: bytes) -> bytes:
    """A strange value in JSON."""
    return json.dumps(replace_value(generator, json.loads(content))).encode("utf-8", "replace")


def json_key(generator: np.random.Generator, content: bytes) -> bytes:
    """A misspelt or missing key in JSON."""
    return json.dumps(rename_key(generator, json.loads(content))).encode()


def lines_value(generator: np.random.Generator, content: bytes) -> bytes:
    """A strange value in one line of JSON lines."""
    lines = content.splitlines()
    index = int(generator.integers(0, len(lines)))
    lines[index] = json_value(generator, lines[index])
    return b"\n".join(lines) + b"\n"


def yaml_value(generator: np.random.Generator, content: bytes) -> bytes:
    """A strange value in YAML."""
    tree = replace_value(generator, yaml.safe_load(content))
    return yaml.safe_dump(tree, sort_keys=False).encode("utf-8", "replace")


def yaml_key(generator: np.random.Generator, content: bytes) -> bytes:
    """A misspelt or missing key in YAML."""
    return yaml.safe_dump(rename_key(generator, yaml.safe_load(content)), sort_keys=False).encode()


def markup(generator: np.random.Generator, content: bytes) -> bytes:
    """What editors and hands leave in text files."""
    lines = content.decode().splitlines()
    index = int(generator.integers(0, len(lines)))
    choices = [
        "\t" + lines[index], "? [a, b]: 1", "{[: x", "- " * 3000, "[" * 3000, "key: &a [*a]",
        "!!python/object/apply:os.system [ls]", "<<: 5", "\x00\x07", "ü" * 9, "- &x [*x, *x]",
        "{1: 2, 1: 3}", "a: 1\na: 2", '"' + lines[index], "%YAML 9.9", "---", "1: 1", "null: 2",
    ]  # fmt: skip
    lines[index] = choices[int(generator.integers(0, len(choices)))]
    encoding = str(generator.choice(["utf-8", "utf-8", "utf-16", "latin-1"]))
    return "\n".join(lines).encode(encoding)


def edf_field(generator: np.random.Generator, content: bytes) -> bytes:
    """Write nonsense in one eight-character field of an EDF or BDF header."""
    start = 8 * int(generator.integers(0, 32 * 4))
    choices = [b"nan", b"-1", b"0", b"99999999", b"1e9", b"", b"text", b"-0.0", b"\xff\xfe", b"inf"]
    field = choices[int(generator.integers(0, len(choices)))].ljust(8)
    return content[:start] + field + content[start + 8 :]


def edf_numbers(generator: np.random.Generator, content: bytes) -> bytes:
    """Replace one whole number of an EDF header by another."""
    numbers = [m.span() for m in re.finditer(rb"(?<= )-?\d+(?= )", content[:1500])]
    start, stop = numbers[int(generator.integers(0, len(numbers)))]
    value = str(generator.choice([0, 1, 2, 7, 99, 65535, 9999999])).encode()[: stop - start]
    return content[:start] + value.ljust(stop - start) + content[stop:]
