"""What pyproject.toml declares, against what the code imports and what the lock pins."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.script_modules import script

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
RUNTIME = ("b2t", "kernels", "train_ds.py")
DEVELOPMENT = ("scripts", "tests")
DEVELOPMENT_EXTRAS = {"dev", "peers"}
BY_NAME = {"import_module", "importorskip"}


def project(repository: Path) -> dict:
    tomllib = pytest.importorskip("tomllib")
    return tomllib.loads((repository / "pyproject.toml").read_text())["project"]


def declared(repository: Path, *, development: bool) -> list[Requirement]:
    table = project(repository)
    texts = list(table["dependencies"])
    for extra, more in table["optional-dependencies"].items():
        if development or extra not in DEVELOPMENT_EXTRAS:
            texts += more
    return [Requirement(text) for text in texts]


def imported(source: str) -> Iterator[str]:
    """Top-level names of absolute imports, and of modules imported by a literal name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module is not None
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Call) and node.args:
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            name = node.args[0]
            if called in BY_NAME and isinstance(name, ast.Constant):
                yield str(name.value).split(".")[0]


def undeclared(files: list[Path], own: set[str], requirements: list[Requirement]) -> dict:
    """Distributions (or modules that none brings) that the files import and nothing declares."""
    known = {canonicalize_name(requirement.name) for requirement in requirements}
    distributions = metadata.packages_distributions()
    found: dict[str, str] = {}
    for file in files:
        for name in imported(file.read_text()):
            if name in own or name in sys.stdlib_module_names:
                continue
            bringing = {canonicalize_name(each) for each in distributions.get(name, [name])}
            if not bringing & known:
                found.setdefault(" or ".join(sorted(bringing)), str(file))
    return found


def python_files(repository: Path, *places: str) -> list[Path]:
    files = []
    for place in places:
        path = repository / place
        files += [path] if path.is_file() else sorted(path.rglob("*.py"))
    return files


def own_modules(repository: Path) -> set[str]:
    beside_scripts = {path.stem for path in (repository / "scripts").iterdir()}
    return {"b2t", "b2t_kernels", "tests", "train_ds", *beside_scripts}


def test_every_direct_import_is_declared(repository):
    own = own_modules(repository)
    runtime = python_files(repository, *RUNTIME)
    assert undeclared(runtime, own, declared(repository, development=False)) == {}
    every = runtime + python_files(repository, *DEVELOPMENT)
    assert undeclared(every, own, declared(repository, development=True)) == {}


def test_an_undeclared_import_is_found(tmp_path):
    file = tmp_path / "some.py"
    file.write_text("import os\nfrom PIL import Image\nimport yaml, own\nfrom . import torch\n")
    assert set(undeclared([file], {"own"}, [Requirement("pyyaml")])) == {"pillow"}
    assert undeclared([file], {"own"}, [Requirement("PyYAML"), Requirement("Pillow>=10")]) == {}
    file.write_text("faiss = pytest.importorskip('no_such_module.part')")
    assert set(undeclared([file], set(), [])) == {"no-such-module"}


def pinned(repository: Path, python: str, platform: str = "linux") -> dict[str, Version]:
    """What the lock pins on one Python."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.1",
        "sys_platform": platform,
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
    }
    pins: dict[str, Version] = {}
    for line in (repository / "requirements.lock").read_text().splitlines():
        if line.startswith("#"):
            continue
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate(environment):
            continue
        (pin,) = requirement.specifier
        name = canonicalize_name(requirement.name)
        assert pin.operator == "==" and not requirement.extras and name not in pins, line
        pins[name] = Version(pin.version)
    return pins


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_pins_what_is_declared(repository, python):
    pins = pinned(repository, python)
    for requirement in declared(repository, development=True):
        marker: Marker | None = requirement.marker
        if marker and not marker.evaluate({"python_version": python}):
            continue
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is not locked for {python}: make lock"
        assert version in requirement.specifier, f"{requirement} is locked at {version}"


def test_the_lock_pins_what_its_packages_require(repository):
    """Each installed package that has the locked version asks for nothing else."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    if python not in PYTHONS or sys.platform != "linux":
        pytest.skip(f"no lock for Python {python} on {sys.platform}")
    pins = pinned(repository, python)
    compared = 0
    for name, version in pins.items():
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if Version(distribution.version).public != version.public:
            continue
        for text in distribution.requires or []:
            requirement = Requirement(text)
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            needed = pins.get(canonicalize_name(requirement.name))
            assert needed is not None, f"{name} needs {requirement}, which is not locked"
            assert requirement.specifier.contains(needed, prereleases=True), f"{name}: {text}"
            compared += 1
    assert compared > 0


def test_the_lock_names_no_place_and_no_build(repository):
    """Versions and markers only: no index, path, hash or local build such as +cpu."""
    text = (repository / "requirements.lock").read_text()
    assert not re.search(r"://|@|--|\+|(^|\s)\.?/", text)


def test_the_lock_has_the_triton_that_its_torch_brings(repository):
    with script(repository, "kernel_tritons") as module:
        known = module.TRITONS
    pins = pinned(repository, "3.11")
    assert f"{pins['torch'].major}.{pins['torch'].minor}" in known[str(pins["triton"])].split(", ")
    triton = next(
        requirement
        for requirement in declared(repository, development=False)
        if requirement.name == "triton"
    )
    assert all(version in triton.specifier for version in known)


def test_the_lock_is_what_make_installs_from(repository):
    """A dry run prints the command; a renewed lock makes it run again."""
    command = ["make", "--dry-run", "--always-make", "install", "VENV=.envs/none"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (install,) = [line for line in done.stdout.splitlines() if "pip install" in line]
    assert "PIP_CONSTRAINT=requirements.lock" in install
    rule = (repository / "Makefile").read_text()
    assert re.search(r"^\$\(VENV\)/\.installed:.* \$\(LOCK\)$", rule, flags=re.MULTILINE)
