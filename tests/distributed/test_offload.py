"""CPU offload (DeepSpeed's C++ Adam) trains the same model, and resumes exactly."""

import shutil

import pytest
import torch

pytestmark = pytest.mark.distributed

SAVING = "checkpoint.every=6"


@pytest.fixture(scope="module")
def offloaded(training, ds_file):
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler: DeepSpeed builds its CPU optimizer when it is first used")
    options = ds_file()
    options["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    return training.run("offloaded", SAVING, ranks=2, deepspeed=options), options


def losses(run):
    return [
        {name: r[name] for name in r if name.startswith(("loss/", "optim/grad_norm"))}
        for r in run.metrics()
        if "loss/total" in r
    ]


def test_offload_trains_what_the_device_would(training, offloaded):
    kept, (moved, _) = training.run("kept", SAVING, ranks=2), offloaded
    assert len(losses(moved)) == 20
    for step, (left, right) in enumerate(zip(losses(kept), losses(moved), strict=True), 1):
        assert left.keys() == right.keys() and "optim/grad_norm/encoder" in left
        for name, value in left.items():
            assert right[name] == pytest.approx(value, rel=1e-4, abs=1e-6), (name, step)


def test_offload_resumes_bit_for_bit(training, offloaded):
    done, options = offloaded
    weights, moments = done.weights(), done.moments()
    for step in done.checkpoints:
        if step > 12:
            shutil.rmtree(done.folder / "checkpoints" / f"step-{step:08d}")
    again = training.run("offloaded", SAVING, ranks=2, deepspeed=options)
    assert "at step 12" in again.output
    assert all(torch.equal(again.weights()[name], weights[name]) for name in weights)
    assert moments and all(torch.equal(again.moments()[name], moments[name]) for name in moments)
