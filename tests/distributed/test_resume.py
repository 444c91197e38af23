"""A run that is stopped or killed and started again ends as one that never was."""

import os
import shutil
import signal

import pytest
import torch

pytestmark = pytest.mark.distributed

TOKENIZER = ["adapter", "encoder", "quantizer", "signal_decoder", "phoneme_head"]
PHASES = [
    {"name": "tokenizer", "steps": 8, "trainable": TOKENIZER, "losses": {"generation": 0.0}},
    {
        "name": "codebook",
        "steps": 7,
        "trainable": ["quantizer", "signal_decoder", "phoneme_head", "text_decoder"],
    },
    {"name": "joint", "steps": 9},
]
TOTAL = 24


@pytest.fixture(scope="module")
def options(tiny, ds_file):
    """Three phases, dropout, weight decay, accumulation, workers; 6 batches in an epoch."""
    config = tiny(
        phases=[{**phase, "lr": 3e-3, "warmup_steps": 3} for phase in PHASES],
        optim={"weight_decay": 0.1},
        codebook_start={"after_steps": 2, "frames_per_code": 8},
        evaluation={
            "every": 5, "decode_trials": 4, "max_trials": 4, "batch_size": 2, "max_new_tokens": 8,
        },
        checkpoint={"every": 3, "keep": 100},
    )  # fmt: skip
    config["model"]["encoder"]["dropout"] = 0.1
    config["model"]["text_decoder"]["dropout"] = 0.1
    config["data"]["workers"] = 2
    return {"config": config, "deepspeed": ds_file(gradient_accumulation_steps=2)}


@pytest.fixture(scope="module")
def whole(training, options):
    """Never interrupted."""
    done = training.run("whole", **options)
    assert done.checkpoints == [3, 6, 8, 9, 12, 15, 18, 21, 24]
    return done


@pytest.fixture(scope="module")
def stopped(training, options, whole):
    """SIGTERM to one rank only, in the first phase, within an epoch."""
    running = training.start("again", **options)
    running.wait_for_step(3)
    os.kill(running.rank_process(1), signal.SIGTERM)
    seen = running.last_step()
    return running.wait(), seen


@pytest.fixture(scope="module")
def killed(training, options, stopped):
    """The same command again, then SIGKILL to all in a later phase."""
    running = training.start("again", **options)
    running.wait_for_step(17)
    running.kill_all()
    return running.wait()


@pytest.fixture(scope="module")
def resumed(training, options, killed):
    """The same command once more, to the end."""
    return training.run("again", **options)


def test_sigterm_to_one_rank_stops_all_with_a_checkpoint(stopped):
    done, seen = stopped
    assert done.status == 75, done.output[-4000:]
    assert "stopped at step" in done.output and "Traceback" not in done.output
    assert seen <= done.checkpoints[-1] <= seen + 2
    assert done.state()["progress"]["step"] == done.checkpoints[-1] < TOTAL


def test_sigkill_was_in_the_middle(killed):
    assert killed.status == -signal.SIGKILL
    assert 15 <= killed.checkpoints[-1] < TOTAL
    assert "resuming" in killed.output


def test_an_interrupt_to_the_launcher_and_all_ranks(training, options):
    """Ctrl-C: ranks get SIGINT, and SIGTERM from the launcher right after it."""
    running = training.start("interrupted", **options)
    running.wait_for_step(2)
    os.killpg(running.process.pid, signal.SIGINT)
    done = running.wait()
    # DeepSpeed's runner itself says KeyboardInterrupt.
    assert "stopped at step" in done.output and "DataLoader worker" not in done.output, done.output
    assert done.checkpoints[-1] == done.state()["progress"]["step"] < TOTAL
    assert done.metrics()[-1]["step"] == done.checkpoints[-1], "it left within that step"


def test_final_checkpoint_is_bitwise_equal(whole, resumed):
    assert_same_end(whole, resumed)


def assert_same_end(left, right):
    for kind in ("weights", "moments"):
        mine, other = getattr(left, kind)(TOTAL), getattr(right, kind)(TOTAL)
        assert mine.keys() == other.keys()
        differing = [n for n in mine if not torch.equal(bits(mine[n]), bits(other[n]))]
        assert differing == [], kind
    mine, other = left.state(TOTAL), right.state(TOTAL)
    assert {**mine["progress"], "seconds": 0} == {**other["progress"], "seconds": 0}
    assert mine["engine"] == other["engine"]


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


def test_final_moments_are_those_of_all_components(whole):
    components = {name.split(".")[0] for name in whole.moments(TOTAL) if name.endswith("exp_avg")}
    assert {"adapter", "encoder", "signal_decoder", "phoneme_head", "text_decoder"} <= components


def comparable(run):
    kept = ("loss/", "val/", "codebook/", "optim/", "reconstruction/", "text/")
    return [
        {k: v for k, v in r.items() if k in ("step", "phase") or k.startswith(kept)}
        for r in run.metrics()
        if "alert" not in r
    ]


def test_metrics_are_equal_and_complete(whole, resumed):
    steps = [r["step"] for r in whole.metrics() if "loss/total" in r]
    assert steps == list(range(1, TOTAL + 1))
    assert comparable(resumed) == comparable(whole)


def test_killed_at_a_phase_change(training, options, whole):
    """The checkpoint between the first two phases is the newest that is whole."""
    again = training.folder / "between"
    shutil.copytree(whole.folder, again)
    for step in whole.checkpoints:
        if step > 9:
            shutil.rmtree(again / "checkpoints" / f"step-{step:08d}")
    damaged = again / "checkpoints" / "step-00000009" / "weights.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 0x01
    damaged.write_bytes(content)
    done = training.run("between", **options)
    assert "step-00000009 is damaged (weights.safetensors has another checksum" in done.output
    assert "resuming" in done.output and "at step 8 (phase codebook" in done.output
    assert_same_end(whole, done)
    assert comparable(done) == comparable(whole)


def part(run, step, component):
    return {n: v for n, v in run.weights(step).items() if n.startswith(f"{component}.")}


def same(left, right):
    return all(torch.equal(bits(left[name]), bits(right[name])) for name in left)


@pytest.mark.parametrize("component", ["adapter", "encoder"])
def test_frozen_weights_do_not_move_and_train_again_later(whole, component):
    before, after, end = (part(whole, step, component) for step in (8, 15, 24))
    assert before and same(before, after)
    assert not any(torch.equal(after[name], end[name]) for name in end if end[name].ndim > 1)


def test_other_components_trained_meanwhile(whole):
    for component in ("signal_decoder", "text_decoder", "quantizer"):
        assert not same(part(whole, 8, component), part(whole, 15, component)), component
    assert same(part(whole, 3, "text_decoder"), part(whole, 8, "text_decoder"))
