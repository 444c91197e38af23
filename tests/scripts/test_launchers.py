"""What the launch scripts start, and what they do with how it ends."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile

SCRIPTS = ("demo.sh", "run_optimized_training.sh", "slurm.sbatch")
_READ = ("HOSTFILE", "GPUS", "LAUNCHER", "MASTER_PORT", "B2T_THREADS")
"""Variables that the scripts read, and that this process may have from elsewhere."""


def bash(*command, cwd, **environment):
    inherited = {k: v for k, v in os.environ.items() if k not in _READ}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**inherited, "PATH": path, "DS_ACCELERATOR": "cpu", "BIN": "absent", **environment}
    return subprocess.run(
        ["bash", *map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def prepared(tmp_path):
    folder = tmp_path / "own data"
    folder.mkdir()
    (folder / "b2t.json").write_text("{}")
    return folder


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_can_read_it(repository, name):
    done = bash("-n", repository / "scripts" / name, cwd=repository)
    assert (done.returncode, done.stderr) == (0, "")


def planned(repository, *arguments, **environment):
    """Commands of a dry run, as words."""
    script = repository / "scripts" / "run_optimized_training.sh"
    done = bash(script, *arguments, cwd=repository, DRY_RUN="1", **environment)
    assert done.returncode == 0, done.stderr
    lines = [line[2:] for line in done.stderr.splitlines() if line.startswith("+ ")]
    return [shlex.split(line) for line in lines], done.stderr


def test_all_steps_in_order_and_settings_reach_them(repository, prepared):
    commands, said = planned(repository, prepared, "demo", "phases.0.steps=2", GPUS="3")
    doctor, train, evaluate, report = commands
    assert doctor[:2] == ["b2t", "doctor"] and doctor[doctor.index("--ranks") + 1] == "3"
    assert train[:5] == ["deepspeed", "--log_level", "error", "--num_accelerators", "3"]
    assert train[5] == "--master_port" and 1024 <= int(train[6]) < 65536
    assert train[7:9] == ["train_ds.py", "--deepspeed_config"]
    assert train[-3:] == [f"data.path={prepared}", "run.dir=runs/demo", "phases.0.steps=2"]
    assert evaluate == ["b2t", "evaluate", "runs/demo"] and report == ["b2t", "report", "runs/demo"]
    assert "no GPU: 3 ranks on the CPU, ds_configs/zero2_cpu.json" in said


def test_recordings_are_prepared_once(repository, tmp_path):
    options = {"PREPARED": str(tmp_path / "out"), "PREPARE": "--window 2", "RUN": "runs/x"}
    commands, _ = planned(repository, tmp_path, "phases.0.steps=2", **options)
    assert commands[0] == ["b2t", "prepare", str(tmp_path), str(tmp_path / "out"), "--window", "2"]
    assert "a5500x2" in commands[2] and f"data.path={tmp_path / 'out'}" in commands[2]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "b2t.json").write_text("{}")
    assert planned(repository, tmp_path, **options)[0][0][:2] == ["b2t", "doctor"]


def test_other_launchers(repository, prepared):
    def train(**environment):
        return planned(repository, prepared, **environment)[0][1]

    start = ["torchrun", "--standalone", "--nproc_per_node", "2", "train_ds.py"]
    assert train(LAUNCHER="torchrun")[:5] == start
    command = train(LAUNCHER="accelerate")
    assert command[:2] == ["accelerate", "launch"] and "--multi_gpu" in command
    # accelerate refuses --multi_gpu for one process.
    assert "--multi_gpu" not in train(LAUNCHER="accelerate", GPUS="1")


def test_several_hosts(repository, prepared, tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# mine\n\nnode1 slots=2  # first\nnode2 slots=2\n")
    commands, _ = planned(repository, prepared, HOSTFILE=str(hostfile), GPUS="2")
    doctor, train = commands[:2]
    assert doctor[doctor.index("--ranks") + 1] == "4"
    assert train[train.index("--hostfile") + 1 :][:3] == [str(hostfile), "--master_addr", "node1"]
    commands, _ = planned(repository, prepared, HOSTFILE=str(hostfile), MASTER="10.0.0.1")
    assert commands[1][commands[1].index("--master_addr") + 1] == "10.0.0.1"
    assert commands[1][commands[1].index("--master_port") + 1] == "29500", "the same on all hosts"
    commands, _ = planned(repository, prepared, HOSTFILE=str(hostfile), MASTER_PORT="4711")
    assert commands[1][commands[1].index("--master_port") + 1] == "4711"


def test_deepspeed_reads_the_hostfile_as_it_says(repository, tmp_path):
    """As it is two ranks on this host; with the lines that it shows, two on each of two."""
    shipped = repository / "hostfile"
    assert fetch_hostfile(str(shipped)) == {"localhost": 2}
    shown = [line.removeprefix("# ") for line in shipped.read_text().splitlines()]
    two = [line for line in shown if re.fullmatch(r"node\d slots=\d", line)]
    (tmp_path / "two").write_text("\n".join(two))
    assert fetch_hostfile(str(tmp_path / "two")) == {"node1": 2, "node2": 2}


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"LAUNCHER": "mpirun"}, "expected deepspeed, torchrun or accelerate"),
        ({"LAUNCHER": "torchrun", "HOSTFILE": "hostfile"}, "HOSTFILE is for LAUNCHER=deepspeed"),
        ({"PATH": "/usr/bin:/bin"}, "no b2t in absent or on PATH"),
        ({"HOSTFILE": "absent"}, "error: HOSTFILE=absent: no such file"),
        ({"HOSTFILE": "/dev/null"}, "error: HOSTFILE=/dev/null names no host"),
    ],
)
def test_mistakes_are_one_message(repository, prepared, environment, said):
    script = repository / "scripts" / "run_optimized_training.sh"
    done = bash(script, prepared, cwd=repository, DRY_RUN="1", **environment)
    assert done.returncode == 2 and said in done.stderr


FAKES = {
    "scontrol": 'if [ "$1" = show ]; then printf "node7\\nnode8\\n"; else echo "$@" >>"$CALLS"; fi',
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        for SLURM_PROCID in 0 1 2 3; do
          export SLURM_PROCID SLURM_LOCALID=$((SLURM_PROCID % 2)); "$@"; status=$?
        done
        exit $status""",
    "python": 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT '
    '$B2T_THREADS $*" >>"$CALLS"; [ -z "$CANCEL" ] || kill $SUBMITTED; exit $STATUS',
}


@pytest.fixture
def slurm(tmp_path, repository):
    """Runs the batch script between stand-ins for Slurm, and returns status and what was called."""
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    for name, body in FAKES.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)

    def submit(*arguments, status=0, cancel=""):
        calls.write_text("")
        job = {"SLURM_JOB_ID": "20003", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NTASKS": "4"}
        job |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "8"}
        job |= {"SLURM_SUBMIT_DIR": str(repository), "CALLS": str(calls), "STATUS": str(status)}
        path = f"{folder}{os.pathsep}{os.environ['PATH']}"
        script = 'export SUBMITTED=$$ CANCEL=$1; shift; . "$@"'
        target = repository / "scripts" / "slurm.sbatch"
        done = bash("-c", script, "sh", cancel, target, *arguments, cwd=tmp_path, PATH=path, **job)
        return done.returncode, calls.read_text().splitlines()

    return submit


def test_tasks_of_slurm_are_ranks(slurm):
    status, calls = slurm("demo", "run.dir=my runs")
    assert status == 0 and len(calls) == 4
    arguments = "train_ds.py --deepspeed_config ds_configs/zero2_fp16.json --config demo"
    for rank, line in enumerate(calls):
        head = f"{rank} {rank % 2} 4 2 node7 20003 8"
        assert line == f"{head} {arguments} run.dir=my runs"


@pytest.mark.parametrize(("status", "requeued"), [(75, True), (0, False), (3, False), (76, False)])
def test_only_a_requested_stop_goes_back_into_the_queue(slurm, status, requeued):
    ended, calls = slurm("demo", status=status)
    assert ended == status
    assert ("requeue 20003" in calls) == requeued


def test_a_cancelled_job_does_not_come_back(slurm):
    _, calls = slurm("demo", status=75, cancel="yes")
    assert len(calls) == 4 and "requeue 20003" not in calls
