"""Commands that README and docs show can be given as they stand there."""

import argparse
import re
import shlex

import pytest

from b2t.cli import parser
from b2t.config import load_config
from b2t.train import main
from b2t.train.ds_config import load_ds_config

OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")


@pytest.fixture(scope="module")
def texts(repository):
    files = [repository / "README.md", *sorted((repository / "docs").glob("*.md"))]
    return {file.name: file.read_text("utf-8") for file in files}


def shown(texts, start):
    """Commands of indented blocks, continued lines joined, without comments and pipes."""
    for name, text in texts.items():
        joined = re.sub(r"\\\n\s*", " ", text)
        for line in joined.splitlines():
            words = line.strip()
            if line.startswith("    ") and words.startswith(start) and "…" not in words:
                command = re.split(r"\s+#\s|\s+[|>&]", words)[0]
                command = re.sub(r"(?<=\s)\[(\S+)\](?=\s|$)", r"\1", command)  # may be left out
                yield name, re.sub(r"\$\{?\w+\}?", "1", command)


def subcommands():
    groups = parser()._subparsers._group_actions
    return next(group.choices for group in groups if isinstance(group.choices, dict))


def test_commands_of_b2t_are_understood(texts):
    found = list(shown(texts, "b2t "))
    assert len(found) > 15
    for name, command in found:
        try:
            parser().parse_args(shlex.split(command)[1:])
        except SystemExit:
            pytest.fail(f"{name}: {command}")


def test_options_named_in_the_text_exist(texts):
    known = {
        name: {option for action in each._actions for option in action.option_strings}
        for name, each in subcommands().items()
    }
    named = 0
    for name, text in texts.items():
        for command, rest in re.findall(r"`b2t ([a-z]+)([^`]*)`", text):
            assert command in known, f"{name}: b2t {command}"
            missing = {*OPTION.findall(rest)} - known[command]
            assert not missing, f"{name}: b2t {command} has no {missing}"
            named += 1
    assert named > 20


def test_trainings_have_keys_and_files_that_exist(texts):
    found = [*shown(texts, "deepspeed "), *shown(texts, "torchrun "), *shown(texts, "python ")]
    trainings = [(name, command) for name, command in found if "train_ds.py" in command]
    assert len(trainings) > 4
    for name, command in trainings:
        words = shlex.split(command.partition("train_ds.py")[2])
        try:
            arguments = main.parser().parse_intermixed_args(words)
        except (SystemExit, argparse.ArgumentError):
            pytest.fail(f"{name}: {command}")
        given = [each for each in arguments.overrides if not re.search(r"=[A-Z]$", each)]
        load_config(arguments.config, given)
        # Those that a script has written into its folder, shown with a variable, are not here.
        if arguments.deepspeed_config not in (None, "DS") and "/1/" not in str(
            arguments.deepspeed_config
        ):
            load_ds_config(arguments.deepspeed_config)


def test_scripts_that_are_named_exist(texts, repository):
    for name, text in texts.items():
        for script in {*re.findall(r"scripts/[a-z_/0-9]+\.(?:py|sh|sbatch)", text)}:
            assert (repository / script).is_file(), f"{name}: {script}"
