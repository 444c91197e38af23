"""The number of ranks and who starts them do not change what is learnt."""

import pytest
import torch

pytestmark = pytest.mark.distributed

# A bias added to every key shifts all scores of a query alike, and softmax ignores it: its gradient
# is zero but for rounding, which Adam normalises to the size of a step.
UNDETERMINED = "k_proj.bias"

# The start then sees latents that the numbers of ranks have rounded apart.
LATE_START = "codebook_start.after_steps=4"


@pytest.fixture(scope="module")
def two(training):
    return training.run("two", LATE_START, launcher="deepspeed", ranks=2)


@pytest.fixture(scope="module", params=["micro-batch of 4", "accumulation of 2"])
def one(request, training, ds_file):
    """One rank that sees the same global batches."""
    key = {"m": "train_micro_batch_size_per_gpu", "a": "gradient_accumulation_steps"}
    options = ds_file()
    options[key[request.param[0]]] *= 2
    name = request.param.replace(" ", "-")
    return training.run(name, LATE_START, launcher="python", ranks=1, deepspeed=options)


def test_the_same_losses_at_every_step(one, two):
    steps = [r for r in two.metrics() if "loss/total" in r]
    assert [r["step"] for r in steps] == list(range(1, 21))
    for left, right in zip([r for r in one.metrics() if "loss/total" in r], steps, strict=True):
        names = {n for n in left if n.startswith("loss/")}
        assert names == {n for n in right if n.startswith("loss/")}
        assert {"loss/generation", "loss/phoneme", "loss/diversity"} <= names
        for name in names:
            # Diversity and perplexity are small differences of numbers near 1.
            assert left[name] == pytest.approx(right[name], rel=1e-5, abs=1e-6), (
                name,
                left["step"],
            )


def test_the_same_codebooks(one, two):
    left, right = one.weights(), two.weights()
    names = [name for name in left if name.startswith("quantizer.codebooks.")]
    assert any(name.endswith("ema_sum") for name in names)
    assert int(left["quantizer.codebooks.updates"]) == 16
    assert sum(r.get("codebook/revived", 0) for r in two.metrics()) > 0
    for name in names:
        torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=1e-5, msg=name)


def test_the_same_weights(one, two):
    left, right = one.weights(), two.weights()
    assert left.keys() == right.keys()
    for name in left:
        if not name.endswith(UNDETERMINED):
            torch.testing.assert_close(left[name], right[name], rtol=1e-3, atol=1e-5, msg=name)


def test_the_same_validation(one, two):
    left, right = ([r for r in run.metrics() if "val/loss" in r] for run in (one, two))
    assert len(left) == len(right) == 1
    for name in (n for n in left[0] if n.startswith("val/")):
        assert left[0][name] == pytest.approx(right[0][name], rel=1e-4, abs=1e-5), name


def test_training_moved_the_weights_and_lowered_the_loss(two):
    losses = [r["loss/total"] for r in two.metrics() if "loss/total" in r]
    assert sum(losses[-4:]) < sum(losses[:4])


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_other_launchers_train_the_same_bit_for_bit(training, two, launcher):
    done = training.run(launcher, LATE_START, launcher=launcher, ranks=2)
    assert done.state()["world"] == 2
    left, right = done.weights(), two.weights()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
