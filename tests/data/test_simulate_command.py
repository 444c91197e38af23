import argparse
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from b2t.data import simulate_command
from b2t.errors import UserError


def call(*arguments):
    parser = argparse.ArgumentParser()
    simulate_command.add_arguments(parser)
    return simulate_command.run(parser.parse_args([str(item) for item in arguments]))


def test_options_reach_the_simulation(tmp_path, capsys):
    out = tmp_path / "out"
    options = "--sessions 2 --trials 6 2 2 --electrodes 8 --select-from 16 --seed 3 --jobs 1"
    options += " --vocabulary 1000 --speaking-rate 90 --tuning 2 --noise 0.5 --drift 0"
    options += " --variability 0.2 --block-trials 2 --unlabelled-test"
    assert call(out, *options.split()) == 0
    assert "simulated 2 sessions: 6 train, 2 val, 2 test" in capsys.readouterr().out
    config = json.loads((out / "simulation.json").read_text())["config"]
    population = config.pop("population")
    assert config == {
        "sessions": 2,
        "trials": [6, 2, 2],
        "electrodes": 8,
        "select_from": 16,
        "vocabulary": 1000,
        "seed": 3,
        "speaking_rate": 90.0,
        "variability": 0.2,
        "block_trials": 2,
        "labelled_test": False,
    }
    assert (population["tuning"], population["noise"]) == (2.0, 0.5)
    assert population["drift_per_day"] == population["gain_spread"] == 0


def test_output_is_named_and_not_overwritten(tmp_path):
    with pytest.raises(UserError, match="OUT"):
        call()
    small = ["--sessions", 1, "--trials", 2, 1, 1, "--electrodes", 4, "--jobs", 1]
    call(tmp_path, *small)
    with pytest.raises(UserError, match="--force"):
        call(tmp_path, *small)
    assert call(tmp_path, *small, "--force") == 0
    assert json.loads((tmp_path / "simulation.json").read_text())["config"]["vocabulary"] == 50


def test_sentences_of_a_file(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("I am cold.\nI'm late.\nYou know.\nI am, cold?\nNot me.\n")
    small = ["--sessions", 1, "--trials", 2, 1, 1, "--electrodes", 4, "--jobs", 1]
    options = [*small, "--sentences", tmp_path / "mine.txt"]
    assert call(tmp_path / "out", *options) == 0
    assert "mine.txt: 5 sentences, 1 dropped" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "simulation.json").read_text())
    assert record["sentences"]["sentences"] == 4
    assert call(tmp_path / "everyday", *small, "--vocabulary", "everyday") == 0
    assert "dropped" not in capsys.readouterr().out
    record = json.loads((tmp_path / "everyday" / "simulation.json").read_text())
    assert record["config"]["vocabulary"] == "everyday"
    assert record["sentences"]["file"] == "everyday.txt"


@pytest.mark.parametrize("vocabulary", ["50", "everyday"])
def test_a_file_and_a_vocabulary_exclude_each_other(tmp_path, vocabulary, capsys):
    with pytest.raises(SystemExit):
        call(tmp_path / "out", "--sentences", "mine.txt", "--vocabulary", vocabulary)
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vocabulary", 60], "unknown vocabulary 60"),
        (["--vocabulary", "daily"], "unknown vocabulary daily"),
        (["--vocabulary", "everyday", "--trials", 2400, 200, 200], "holds 2561"),
        (["--sentences", "absent.txt"], r"absent\.txt"),
        (["--trials", 0, 1, 1], "at least 1"),
        (["--drift", -1], "--drift"),
        (["--jobs", -1], "jobs"),
    ],
)
def test_mistakes(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        call(tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_compare_prints_a_table(tmp_path, capsys):
    counts = np.random.default_rng(0).poisson(0.5, (16, 400))
    np.save(tmp_path / "x.npy", np.log1p(counts))
    assert call("--compare", tmp_path / "x.npy") == 0
    printed = capsys.readouterr().out
    assert "8 electrodes, 400 bins" in printed
    rate = next(line for line in printed.splitlines() if line.startswith("rate (Hz) "))
    expected = np.median(counts.reshape(2, 2, 4, 400)[:, 0].mean(axis=-1)) * 50
    assert float(rate.split()[2]) == pytest.approx(expected, abs=0.01)


def test_single_options_go_before_the_setting(tmp_path):
    small = ["--trials", 4, 1, 1, "--electrodes", 4, "--jobs", 1, "--sessions", 1]
    assert call(tmp_path / "a", "--setting", "hard", *small) == 0
    assert call(tmp_path / "b", "--setting", "hard", *small, "--noise", 1, "--vocabulary", 50) == 0
    hard, own = (
        json.loads((tmp_path / name / "simulation.json").read_text())["config"] for name in "ab"
    )
    assert hard["vocabulary"] == "everyday" and own["vocabulary"] == 50
    assert hard["population"]["noise"] == 2.0 and own["population"]["noise"] == 1.0
    assert hard["population"]["tuning"] == own["population"]["tuning"] < 1.0
    assert hard["trials"] == own["trials"] == [4, 1, 1] and hard["electrodes"] == 4


@pytest.mark.usefixtures("answers_interrupts")
def test_ctrl_c_is_answered_once_whatever_the_processes_are_doing(tmp_path, repository):
    """As a terminal sends it: to all processes, while those that work still import."""
    command = [sys.executable, "-m", "b2t.cli", "simulate", str(tmp_path / "out"), "--jobs", "2"]
    with subprocess.Popen(
        command, cwd=repository, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        parent = psutil.Process(process.pid)
        importing = 0
        while process.poll() is None and importing < 2:
            workers = [c for c in parent.children() if "spawn_main" in " ".join(c.cmdline())]
            importing = sum(
                any("numpy" in library.path for library in worker.memory_maps())
                for worker in workers
            )
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 130
    assert "Traceback" not in said and said.endswith("b2t simulate: interrupted\n")
    assert not (tmp_path / "out" / "simulation.json").exists()
