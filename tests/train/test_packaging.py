"""What the repository promises as a package."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from b2t.cli import COMMANDS

TOP_LEVEL = {
    "b2t",
    "ds_configs",
    "kernels",
    "scripts",
    "tests",
    "docs",
    "train_ds.py",
    "hostfile",
    "pyproject.toml",
    "requirements.lock",
    "Makefile",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "LICENSE",
    "MANIFEST.in",
}


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_top_level_is_exactly_what_was_agreed(repository):
    listed = run("git", "ls-files", cwd=repository)
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert {name for name in names if not name.startswith(".")} == TOP_LEVEL


def test_the_folder_of_kernels_does_not_shadow_hugging_faces_package(repository):
    """With the root on sys.path first, as `deepspeed train_ds.py` puts it."""
    assert importlib.util.find_spec("kernels"), "the dev extra brings Hugging Face's kernels"
    code = (
        "import transformers, kernels, b2t_kernels; print(kernels.__file__, b2t_kernels.__file__)"
    )
    done = run(sys.executable, "-c", f"import sys; sys.path.insert(0, '.'); {code}", cwd=repository)
    assert done.returncode == 0, done.stderr
    theirs, ours = map(Path, done.stdout.split())
    assert repository / "kernels" not in theirs.resolve().parents
    assert theirs.parent.name == "kernels" and hasattr(_module(theirs), "get_kernel")
    assert ours.resolve().parent == (repository / "kernels" / "b2t_kernels").resolve()


def _module(init: Path):
    import kernels

    assert Path(kernels.__file__).resolve() == init.resolve()
    return kernels


def test_console_script_lists_all_commands(repository, tmp_path):
    script = Path(sys.executable).parent / "b2t"
    done = run(str(script), "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert command in done.stdout


def test_package_data_is_declared_for_every_non_python_file(repository):
    """Files that the code reads must be in a wheel, not only in a checkout."""
    tomllib = pytest.importorskip("tomllib")
    tool = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = tool["package-data"]
    for file in (repository / "b2t").rglob("*"):
        if file.is_dir() or file.suffix in (".py", ".pyc"):
            continue
        parts = file.relative_to(repository).parts
        declared = [
            (package, pattern)
            for package, globs in patterns.items()
            for pattern in globs
            if file in (repository / Path(*package.split("."))).glob(pattern)
        ]
        assert declared, f"{'/'.join(parts)} is not in [tool.setuptools.package-data]"


def test_every_package_is_declared(repository):
    tomllib = pytest.importorskip("tomllib")
    tool = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        ".".join(init.parent.relative_to(root).parts)
        for root, name in ((repository, "b2t"), (repository / "kernels", "b2t_kernels"))
        for init in (root / name).rglob("__init__.py")
    }
    # The DeepSpeed files of the checkout are data of the package, below its name.
    assert tool["package-dir"]["b2t.ds_configs"] == "ds_configs"
    assert found | {"b2t.ds_configs"} == set(tool["packages"])


def test_a_source_archive_is_the_checkout(repository, tmp_path):
    """Whoever unpacks it can run what the README names: demo, tests, launchers, scripts."""
    listed = run("git", "ls-files", cwd=repository)
    if listed.returncode:
        pytest.skip("not a git checkout")
    tracked = [name for name in listed.stdout.splitlines() if not name.startswith(".")]
    source = tmp_path / "source"
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(repository / name, source / name)
    (source / "tests" / "__pycache__").mkdir()
    (source / "tests" / "__pycache__" / "conftest.cpython-311.pyc").touch()
    build = "from setuptools.build_meta import build_sdist; print(build_sdist('..'))"
    done = run(sys.executable, "-c", build, cwd=source)
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / done.stdout.splitlines()[-1]) as archive:
        brought = {member.name.partition("/")[2] for member in archive if member.isfile()}
    made = {"PKG-INFO", "setup.cfg", *(name for name in brought if ".egg-info/" in name)}
    assert brought - made == set(tracked)


def test_a_wheel_brings_all_that_is_read_and_trains_outside_the_checkout(repository, tmp_path):
    """Built without isolation and unpacked beside nothing else of the checkout."""
    wheels, place, source = (tmp_path / name for name in ("wheels", "place", "source"))
    for name in ("b2t", "kernels", "ds_configs"):
        shutil.copytree(repository / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / name, source)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    wheels.mkdir()
    done = run(sys.executable, "-c", build, str(wheels), cwd=source)
    assert done.returncode == 0, done.stderr
    (wheel,) = wheels.glob("b2t-*.whl")
    shutil.unpack_archive(wheel, place, "zip")
    for folder in ("b2t", "kernels/b2t_kernels", "ds_configs"):
        below = "b2t/ds_configs" if folder == "ds_configs" else folder.removeprefix("kernels/")
        ours = {f.relative_to(repository / folder) for f in (repository / folder).rglob("*.*")}
        theirs = {f.relative_to(place / below) for f in (place / below).rglob("*.*")}
        assert {f for f in ours if "__pycache__" not in f.parts} <= theirs
    command = [sys.executable, "-m", "b2t.train", "--config", "demo", "--print-config"]
    environment = {**os.environ, "PYTHONPATH": str(place)}
    done = subprocess.run(
        [*command, "--deepspeed_config", "zero2_bf16"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("run:\n  dir: runs/demo")
