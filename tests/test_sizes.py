"""No file and no function outgrows what can be read at once."""

import ast

FILE_LINES = 450
FUNCTION_LINES = 60


def sizes(name: str, source: str) -> dict[str, int]:
    """Lines of a file, and of each function in it, where they are above the limits."""
    found = {name: len(source.splitlines())} if len(source.splitlines()) > FILE_LINES else {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES:
                found[f"{name} {node.name}"] = lines
    return found


def test_no_file_and_no_function_is_too_long(repository):
    found: dict[str, int] = {}
    for folder in ("b2t", "kernels", "scripts", "tests"):
        for path in (repository / folder).rglob("*.py"):
            name = path.relative_to(repository).as_posix()
            found |= sizes(name, path.read_text("utf-8"))
    assert len(list((repository / "b2t").rglob("*.py"))) > 100
    assert found == {}, f"above {FILE_LINES} lines a file or {FUNCTION_LINES} a function: split it"


def test_a_long_file_and_a_long_function_are_seen():
    long = "def f():\n" + "    x = 1\n" * 60
    assert sizes("a.py", long) == {"a.py f": 61}
    assert sizes("a.py", "def f():\n" + "    x = 1\n" * 59) == {}
    assert sizes("a.py", "x = 1\n" * 451) == {"a.py": 451}
