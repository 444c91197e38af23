"""fp16 with DeepSpeed's loss scaler: a step that overflows leaves no trace but a smaller scale."""

import json
from dataclasses import replace

import pytest
import torch

pytestmark = pytest.mark.distributed

FP16 = {
    "enabled": True,
    "loss_scale": 0,
    "initial_scale_power": 8,
    "loss_scale_window": 6,
    "hysteresis": 1,
    "min_loss_scale": 1,
}


@pytest.fixture(scope="module", params=[2, 3])
def overflowed(request, training, tiny, ds_file, tmp_path_factory):
    options = ds_file(fp16=FP16, gradient_accumulation_steps=2)
    options["zero_optimization"]["stage"] = request.param
    if request.param == 3:  # by default small parameters are not split
        options["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    probe = tmp_path_factory.mktemp("probe") / "probe.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("B2T_PROBE", str(probe))
        patch.setenv("PYTHONPATH", str(training.repository), prepend=":")
        done = replace(training, folder=training.folder / f"zero{request.param}").run(
            "fp16",
            "phases.0.steps=14",
            config=tiny(),
            deepspeed=options,
            script="tests/distributed/fp16_driver.py",
        )
    return done, json.loads(probe.read_text())


def test_weights_codebooks_and_clocks_are_untouched(overflowed):
    _, seen = overflowed
    before, after = seen["before"], seen["after"]
    kept = ("masters", "weights", "moments", "buffers", "scheduler", "adam", "clocks")
    assert {name: before[name] for name in kept} == {name: after[name] for name in kept}
    assert before["clocks"]["step"] == 4


def test_the_scale_is_halved_and_the_skip_counted(overflowed):
    _, seen = overflowed
    assert seen["before"]["scale"] == 256 and seen["after"]["scale"] == 128
    assert (seen["before"]["skipped"], seen["after"]["skipped"]) == (0, 1)
    assert seen["after"]["consumed"] == seen["before"]["consumed"] + 1


def test_the_run_goes_on_and_the_scale_grows_again(overflowed):
    done, _ = overflowed
    records = [r for r in done.metrics() if "loss/total" in r]
    assert [r["step"] for r in records] == list(range(1, 15))
    assert [r["optim/skipped_steps"] for r in records] == [0.0] * 4 + [1.0] * 10
    assert records[4]["optim/loss_scale"] == 128 and records[-1]["optim/loss_scale"] >= 256
    assert all(r["loss/total"] == r["loss/total"] for r in records)


def test_a_stop_after_it_resumes_bitwise(overflowed):
    """On two ranks, with the scaler between two growths."""
    done, seen = overflowed
    assert seen["statuses"]["stopped"] == [75, 75] and seen["statuses"]["resumed"] == [0, 0]
    again = replace(done, folder=done.folder.with_name("stopped"))
    assert again.checkpoints == [6, 14] and done.checkpoints == [14]
    assert again.state(6)["engine"]["scaler"]["cur_scale"] == 128
    for kind in ("weights", "moments"):
        mine, other = getattr(again, kind)(14), getattr(done, kind)(14)
        assert mine.keys() == other.keys()
        differing = [name for name in mine if not torch.equal(mine[name], other[name])]
        assert differing == [], kind
    assert again.state(14)["engine"] == done.state(14)["engine"]


def test_a_run_without_hope_ends_on_all_ranks_with_a_diagnosis(overflowed):
    """NaN in gradients of one rank alone; DeepSpeed raises once the scale is at its smallest."""
    done, seen = overflowed
    assert seen["statuses"]["hopeless"] == [3, 3]
    folder = done.folder.with_name("hopeless")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (alert,) = (line["alert"] for line in lines if "alert" in line)
    assert alert["rule"] == "gradients-not-finite" and alert["severity"] == "critical"
    message = alert["message"]
    assert "10 optimizer steps in a row were skipped at loss scale 1:" in message
    assert "gradients not finite, first those of signal_decoder" in message
    assert message.count("t15.") == 8, "2 trials of 2 micro-batches of 2 ranks"
    assert json.loads((folder / "status.json").read_text())["state"].startswith("failed: 10 optim")
    assert [p.name for p in (folder / "checkpoints").glob("step-*")] == ["step-00000004"]
    kept = json.loads((folder / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert kept["progress"]["step"] == 4 and kept["progress"]["skipped"] == 10


def test_masters_are_finer_than_fp16(overflowed):
    done, _ = overflowed
    weights = done.weights()
    encoder = weights["encoder.embed.weight"]
    assert encoder.dtype.itemsize == 4 and not encoder.half().float().equal(encoder)
    assert weights["quantizer.codebooks.embed"].dtype.itemsize == 4
