"""The order of rooms that docs/ARCHITECTURE.md promises, held against the imports of the code."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ENTRANCES = {"b2t", "b2t.auto_classes", "b2t.cli"}
"""Nothing below imports them, but for the version, which is no module."""


def modules(root: Path) -> dict[str, str]:
    """Sources of the packages below ``root`` by dotted name."""
    found = {}
    for folder in (root, root / "kernels"):
        for package in ("b2t", "b2t_kernels"):
            for path in (folder / package).rglob("*.py"):
                name = ".".join(path.relative_to(folder).with_suffix("").parts)
                found[name.removesuffix(".__init__")] = path.read_text("utf-8")
    return found


def imports(sources: dict[str, str]) -> dict[str, set[str]]:
    """Our modules that each module imports, at its top or in a function; not for types alone."""
    found: dict[str, set[str]] = {name: set() for name in sources}
    for name, source in sources.items():
        for node in _running(ast.parse(source)):
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                wanted = [n if n in sources else node.module for n in inner]
            else:
                continue
            found[name] |= {other for other in wanted if other in sources and other != "b2t"}
        found[name].discard(name)
    return found


def _running(tree: ast.AST):
    """Nodes of a tree, less those under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        yield node
        yield from _running(node)


def order(architecture: str) -> list[set[str]]:
    """The rooms from the bottom up; those in one set stand side by side."""
    line = re.search(r"Imports point downwards: (.+?)\.\s", architecture, re.DOTALL)
    assert line, "docs/ARCHITECTURE.md does not say which way imports point"
    steps = re.split(r"\s*→\s*", line[1])
    return [set(re.split(r",\s*", step.strip())) for step in reversed(steps)]


def room(module: str, rooms: set[str]) -> str:
    """The room of a module; the floor is what lies directly in `b2t/`."""
    if module in ENTRANCES:
        return "cli"
    parts = module.split(".")
    inner = parts[1] if parts[0] == "b2t" else parts[0]
    return inner if inner in rooms or len(parts) > 2 else "floor"


def upward(sources: dict[str, str], floors: list[set[str]]) -> list[str]:
    """Imports that do not point downwards."""
    height = {name: level for level, names in enumerate(floors) for name in names}
    height["floor"] = -1
    found = []
    for name, others in imports(sources).items():
        for other in others:
            here, there = room(name, {*height}), room(other, {*height})
            if here != there and height[there] >= height[here]:
                found.append(f"{name} ({here}) imports {other} ({there})")
    return sorted(found)


@pytest.fixture(scope="module")
def sources(repository) -> dict[str, str]:
    return modules(repository)


@pytest.fixture(scope="module")
def architecture(repository) -> str:
    return (repository / "docs" / "ARCHITECTURE.md").read_text("utf-8")


def test_imports_point_downwards(sources, architecture):
    assert upward(sources, order(architecture)) == []


def test_no_modules_import_each_other_in_a_circle(sources):
    try:
        TopologicalSorter(imports(sources)).prepare()
    except CycleError as circle:
        pytest.fail(" ← ".join(circle.args[1]))


def test_every_room_stands_in_the_table_and_in_the_order(repository, architecture):
    rooms = {path.parent.name for path in (repository / "b2t").glob("*/__init__.py")}
    table = re.findall(r"`b2t/(\w+)/`", architecture)
    ordered = set.union(*order(architecture))
    assert sorted(table) == sorted(rooms), "each room is named, and once"
    assert ordered == (rooms - {"presets"}) | {"cli", "b2t_kernels"}


@pytest.mark.parametrize(
    "name, source, found",
    [
        ("b2t.low.a", "from b2t.high import x", ["b2t.low.a (low) imports b2t.high (high)"]),
        (
            "b2t.low.a",
            "def f():\n    import b2t.high.b",
            ["b2t.low.a (low) imports b2t.high.b (high)"],
        ),
        ("b2t.left.a", "import b2t.right.a", ["b2t.left.a (left) imports b2t.right.a (right)"]),
        ("b2t.errors", "import b2t.low.a", ["b2t.errors (floor) imports b2t.low.a (low)"]),
        ("b2t.high.a", "from b2t.low import a\nimport b2t.errors", []),
        ("b2t.low.a", "if TYPE_CHECKING:\n    import b2t.high.b", []),
    ],
)
def test_an_import_upwards_is_seen(name, source, found):
    names = ("b2t.errors", "b2t.low", "b2t.low.a", "b2t.high", "b2t.high.b", "b2t.right.a")
    house = {**dict.fromkeys(names, ""), name: source}
    assert upward(house, order("Imports point downwards: high → left, right → low. \n")) == found
