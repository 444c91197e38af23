"""`b2t doctor`: each trouble is found, and says what to do."""

import json
import shutil
import socket
from collections import namedtuple

import pytest

from b2t.cli import main
from b2t.train import doctor_command as doctor

Usage = namedtuple("Usage", "total used free")


def levels(findings):
    return {finding.topic: finding.level for finding in findings}


def ds_file(folder, **changes):
    content = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2},
        **changes,
    }
    path = folder / "ds.json"
    path.write_text(json.dumps(content))
    return str(path)


@pytest.mark.parametrize(("gpus", "level"), [(False, "note"), (True, "warn")])
def test_no_compiler_and_no_ninja(monkeypatch, gpus, level):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = list(doctor.check_compiler(gpus))
    assert levels(found) == {"compiler": level, "ninja": level}
    assert all(finding.remedy for finding in found)


@pytest.mark.parametrize(("gpus", "level"), [(False, "note"), (True, "fail")])
def test_no_headers_of_python(monkeypatch, tmp_path, gpus, level):
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(doctor, "deepspeed_ops", dict)
    assert levels(doctor.check_compiler(gpus))["Python headers"] == level
    (tmp_path / "Python.h").touch()
    assert "Python headers" not in levels(doctor.check_compiler(gpus))


def test_offload_without_a_compiler_is_a_failure(monkeypatch, tmp_path):
    zero = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    monkeypatch.setenv("CXX", "no-such-compiler")
    (finding,) = doctor.check_deepspeed_file(ds_file(tmp_path, **zero))
    assert finding.level == "fail" and "no-such-compiler" in finding.text


def test_a_compiler_named_in_the_environment(monkeypatch):
    asked = []
    monkeypatch.setenv("CXX", "my-c++")
    monkeypatch.setattr(shutil, "which", lambda name: asked.append(name) or f"/bin/{name}")
    monkeypatch.setattr(doctor, "deepspeed_ops", lambda: {"cpu_adam": True, "other": False})
    (finding,) = doctor.check_compiler(False)
    assert finding.level == "ok" and "cpu_adam" in finding.text and "other" not in finding.text
    assert "my-c++" in asked


def test_interfaces_that_are_absent_or_down(monkeypatch):
    known = {"lo": (True, ["127.0.0.1"]), "eth0": (True, ["10.0.0.2"]), "ib0": (False, [])}
    monkeypatch.setattr(doctor, "interfaces", lambda: known)
    monkeypatch.setattr(socket, "gethostbyname", lambda host: "127.0.1.1")
    for variable, value, level in (
        ("GLOO_SOCKET_IFNAME", "eth", "fail"),
        ("NCCL_SOCKET_IFNAME", "eth", "ok"),
        ("NCCL_SOCKET_IFNAME", "=eth", "fail"),
        ("NCCL_SOCKET_IFNAME", "ib0", "fail"),
        ("GLOO_SOCKET_IFNAME", "eth0", "ok"),
    ):
        monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
        monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
        monkeypatch.setenv(variable, value)
        assert levels(doctor.check_network())[variable] == level, (variable, value)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "^docker")
    assert "NCCL_SOCKET_IFNAME" not in levels(doctor.check_network())


def test_a_host_that_others_cannot_reach(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(doctor, "interfaces", lambda: {"eth7": (True, ["10.0.0.2"])})
    monkeypatch.setattr(socket, "gethostbyname", lambda host: "127.0.1.1")
    finding = list(doctor.check_network())[-1]
    assert finding.topic == "host name" and "--write-env" in finding.remedy
    monkeypatch.setattr(socket, "gethostbyname", lambda host: "10.0.0.2")
    assert "host name" not in levels(doctor.check_network())


def test_little_disk_and_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 5 * doctor.GIB))
    (finding,) = doctor.check_disk(tmp_path / "deep" / "run")
    assert finding.level == "warn" and "5.0 GiB" in finding.text and str(tmp_path) in finding.text
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 500 * doctor.GIB))
    assert levels(doctor.check_disk(tmp_path)) == {"disk": "ok"}
    (tmp_path / "file").write_text("")
    assert levels(doctor.check_disk(tmp_path / "file" / "run")) == {"run.dir": "fail"}


@pytest.mark.parametrize(
    ("mib", "workers", "level"),
    [(64, 2, "fail"), (64, 0, "warn"), (512, 2, "warn"), (8192, 2, "ok")],
)
def test_shared_memory(monkeypatch, mib, workers, level):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(mib * 2**20, 0, 0))
    assert levels(doctor.check_shared_memory(workers)) == {"shared memory": level}


@pytest.mark.parametrize(
    ("soft", "level"), [(256, "fail"), (1024, "warn"), (8192, "ok"), (-1, "ok")]
)
def test_open_files(monkeypatch, soft, level):
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, -1))
    assert levels(doctor.check_limits())["open files"] == level


def test_a_misspelt_key_ends_with_status_1(tmp_path, capsys):
    path = ds_file(tmp_path, gradient_cliping=1.0)
    assert main(["doctor", "--deepspeed_config", path]) == 1
    out = capsys.readouterr().out
    assert "FAIL DeepSpeed file" in out and "gradient_clipping" in out


def test_a_configuration_that_is_wrong_or_cannot_fill_a_batch(tmp_path, tiny_trials, capsys):
    assert main(["doctor", "--config", "demo", "model.encodr.dim=3"]) == 1
    assert "FAIL configuration" in capsys.readouterr().out
    small = ["--config", "demo", f"data.path={tiny_trials}", f"run.dir={tmp_path}"]
    found = list(doctor.check_training(*training(tiny_trials, tmp_path), 64))
    assert levels(found) == {"training": "fail"} and "36 training trials" in found[0].text
    assert main(["doctor", "--deepspeed_config", ds_file(tmp_path), *small]) == 0
    out = capsys.readouterr().out
    assert "36 training trials, 6 channels" in out and "nothing would stop training" in out


def training(data, folder):
    from b2t.config import load_config

    return load_config("demo", [f"data.path={data}", f"run.dir={folder}"]), ds_file(folder)


@pytest.mark.parametrize("ranks", ["0", "-1"])
def test_numbers_of_ranks_that_cannot_be_are_refused(ranks, capsys):
    with pytest.raises(SystemExit) as left:
        main(["doctor", "--ranks", ranks])
    assert left.value.code == 2
    assert f"whole number above 0, found {ranks}" in capsys.readouterr().err
