"""ZeRO-3 on two ranks trains what ZeRO-2 trains, through frozen phases, stops and evaluation."""

import json
import math
from dataclasses import replace

import pytest
import torch

pytestmark = pytest.mark.distributed

TOKENIZER = ["adapter", "encoder", "quantizer", "signal_decoder", "phoneme_head"]
PHASES = [
    {"name": "tokenizer", "steps": 5, "trainable": TOKENIZER, "losses": {"generation": 0.0}},
    {
        "name": "codebook",
        "steps": 4,
        "trainable": ["quantizer", "signal_decoder", "phoneme_head", "text_decoder"],
    },
    {"name": "joint", "steps": 5},
]
TOTAL = 14
STOPPED = 75
SIDES = {"optim.weight_ema": 0.9, "model.quantizer.update_rule": "gradient"}


@pytest.fixture(scope="module")
def runs(training, tiny, ds_file):
    """Finished runs by name; `resumed` was stopped within the frozen phase and in the last."""
    config = tiny(
        phases=[{**phase, "lr": 3e-3, "warmup_steps": 3} for phase in PHASES],
        optim={"weight_decay": 0.1},
        codebook_start={"after_steps": 2, "frames_per_code": 8},
        # 3 trials on 2 ranks: one of them evaluates a batch that the other has not.
        evaluation={
            "every": 4, "decode_trials": 3, "max_trials": 3, "batch_size": 1, "max_new_tokens": 4,
        },
    )  # fmt: skip
    config["model"]["encoder"]["dropout"] = 0.1
    config["model"]["activation_checkpointing"] = {"encoder": 1, "text_decoder": 1}
    training.folder.mkdir(exist_ok=True)
    files = {}
    for stage in (2, 3):
        content = ds_file(gradient_accumulation_steps=2)
        content["zero_optimization"]["stage"] = stage
        if stage == 3:  # by default small parameters are not split
            content["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        files[stage] = training.folder / f"zero{stage}.json"
        files[stage].write_text(json.dumps(content))

    def run(folder, stage, status=0, **more):
        file = str(files[stage])
        return {"folder": folder, "deepspeed_config": file, "status": status, **more}

    plan = [
        run("zero2", 2),
        run("zero3", 3),
        run("resumed", 3, STOPPED, stop=6),
        run("resumed", 3, STOPPED, stop=10),
        run("resumed", 3),
        run("mixed", 2, STOPPED, stop=3),
        run("mixed", 3, STOPPED, stop=10),
        run("mixed", 2),
        run("sides2", 2, **SIDES),
        run("sides3", 3, STOPPED, stop=6, **SIDES),
        run("sides3", 3, **SIDES),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("B2T_PLAN", json.dumps(plan))
        patch.setenv("PYTHONPATH", str(training.repository), prepend=":")
        script = "tests/distributed/zero3_driver.py"
        done = training.run("all", config=config, deepspeed=files[2], script=script)
    names = {each["folder"] for each in plan}
    return {name: replace(done, folder=training.folder / name) for name in names}


def records(run):
    kept = ("loss/", "val/", "codebook/", "optim/")
    return [
        {k: v for k, v in r.items() if k in ("step", "phase") or k.startswith(kept)}
        for r in run.metrics()
        if "alert" not in r
    ]


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("names", [("zero2", "zero3"), ("zero2", "mixed"), ("sides2", "sides3")])
def test_weights_and_records_are_those_of_zero2(runs, names):
    """Within rounding: gradients are summed in another order."""
    expected, found = (runs[name] for name in names)
    for kind in ("weights", "moments"):
        left, right = getattr(expected, kind)(TOTAL), getattr(found, kind)(TOTAL)
        assert left.keys() == right.keys()
        # A key's bias has no gradient but rounding, which Adam makes as large as any other.
        for name in (n for n in left if not n.endswith("k_proj.bias")):
            torch.testing.assert_close(right[name], left[name], rtol=1e-3, atol=2e-5, msg=name)
    for left, right in zip(records(expected), records(found), strict=True):
        assert left.keys() == right.keys() and left.pop("phase") == right.pop("phase")
        for name, value in left.items():
            assert right[name] == pytest.approx(value, rel=1e-3, abs=1e-3), (name, left["step"])
    trained = {name.split(".")[0] for name in found.moments(TOTAL) if name.endswith("exp_avg")}
    assert {"adapter", "encoder", "signal_decoder", "phoneme_head", "text_decoder"} <= trained
    assert "optim/grad_norm/encoder" in records(found)[-3]


def test_stopped_and_resumed_is_bitwise_equal(runs):
    whole, resumed = runs["zero3"], runs["resumed"]
    assert resumed.checkpoints == [5, 7, 9, 11, 14]
    for kind in ("weights", "moments"):
        left, right = getattr(whole, kind)(TOTAL), getattr(resumed, kind)(TOTAL)
        assert left.keys() == right.keys()
        assert [n for n in left if not torch.equal(bits(left[n]), bits(right[n]))] == [], kind
    assert whole.state(TOTAL)["engine"] == resumed.state(TOTAL)["engine"]
    assert whole.state(TOTAL)["engine"]["adam_step"] == 5, "the last phase's own"
    assert records(whole) == records(resumed)


@pytest.mark.parametrize("name", ["zero3", "sides3"])
def test_frozen_weights_do_not_move_and_train_again(runs, name):
    steps = [runs[name].weights(step) for step in (5, 9, 14)]
    frozen = [n for n in steps[0] if n.split(".")[0] in ("adapter", "encoder")]
    assert frozen
    for weight in frozen:
        before, during, after = (step[weight] for step in steps)
        assert torch.equal(bits(before), bits(during)), weight
        assert after.ndim < 2 or not torch.equal(during, after), weight
    assert any(not torch.equal(steps[0][n], steps[1][n]) for n in steps[0] if n not in frozen)


def test_validation_and_decoding_are_finite(runs):
    found = [r for r in records(runs["zero3"]) if any(key.startswith("val/") for key in r)]
    assert {r["step"] for r in found} == {4, 5, 8, 9, 12, 14}
    assert all(math.isfinite(v) for r in found for k, v in r.items() if k.startswith("val/"))
    assert any("val/wer" in r for r in found) and any("val/snr_db" in r for r in found)


def test_the_best_model_is_whole(runs):
    from b2t.model.brain_to_text import BrainToText

    best = BrainToText.from_pretrained(runs["zero3"].folder / "checkpoints" / "best")
    weights = runs["zero3"].weights(TOTAL)
    for name, parameter in best.named_parameters():
        assert parameter.shape == weights[name].shape and bool(parameter.isfinite().all()), name
