"""Operations of a phase against those that torch counts in a whole forward and backward."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from b2t.config import Config
from b2t.data.batches import Batch
from b2t.model import BrainToText, BrainToTextConfig
from b2t.train.flops import forward_flops, phase_flops

ALL = ["adapter", "encoder", "quantizer", "signal_decoder", "phoneme_head", "text_decoder"]
LOSSES = {"reconstruction": 1.0, "phoneme": 1.0, "generation": 1.0}


def model(quantizer=False):
    torch.manual_seed(0)
    return BrainToText(
        BrainToTextConfig(
            channels=12,
            sessions=["a"],
            encoder={"patch_size": 4, "patch_stride": 4, "dim": 64, "depth": 4, "heads": 4},
            quantizer={"enabled": quantizer, "codebook_size": 32, "num_quantizers": 3},
            signal_decoder={"depth": 2, "heads": 4},
            text_decoder={"dim": 64, "depth": 2, "heads": 4, "ffn_dim": 128, "max_tokens": 40},
            vocab_size=30,
        )
    )


def one_trial():
    signal = torch.randn(1, 160, 12)
    return Batch(
        signal=signal,
        target=signal,
        signal_mask=torch.ones(1, 160, dtype=torch.bool),
        session=torch.zeros(1, dtype=torch.int64),
        tokens=torch.randint(0, 30, (1, 20)),
        phonemes=torch.randint(1, 41, (1, 9)),
        phoneme_lengths=torch.tensor([9]),
        rows=["a/0/0"],
        texts=["x"],
    )


def counted(built, batch, losses=LOSSES):
    # As matrix products: the counter does not know the fused attention of CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        built(batch, weights=losses).loss.backward()
    return counter.get_total_flops()


def expected(built, batch, every=0, accumulation=1, **phase):
    config = Config(
        model={"activation_checkpointing": {"encoder": every, "signal_decoder": every}},
        phases=[{"name": "p", "steps": 1, **phase}],
    )
    config.model.activation_checkpointing.text_decoder = 0
    return phase_flops(config, config.phases[0], forward_flops(built, batch), 40, accumulation)


@pytest.mark.parametrize(
    ("trainable", "losses"),
    [
        (ALL, LOSSES),
        (ALL, {"reconstruction": 1.0, "phoneme": 0.0, "generation": 0.0}),
        (["phoneme_head", "text_decoder"], LOSSES),
        (["adapter", "encoder"], {"reconstruction": 1.0, "phoneme": 1.0, "generation": 0.0}),
    ],
)
def test_a_phase_costs_what_torch_counts(trainable, losses):
    built, batch = model(), one_trial()
    built.freeze([name for name in ALL if name not in trainable])
    truth = counted(built, batch, losses)
    found = expected(built, batch, trainable=trainable, losses=losses)
    assert 40 * found.per_frame == pytest.approx(truth, rel=0.05)
    assert found.recomputed == 0


@pytest.mark.parametrize("every", [1, 2])
def test_recomputation_is_what_is_executed_beyond(every):
    built, batch = model(), one_trial()
    plain = counted(built, batch)
    built.zero_grad()
    built.checkpoint_activations(every, every, 0)
    built.train()
    truth = counted(built, batch) / plain - 1
    found = expected(built, batch, every=every, trainable=ALL, losses=LOSSES)
    # torch stops recomputing a block once it has all that backward asks for.
    assert 0.05 < truth <= found.recomputed < 1.25 * truth


def test_a_forward_is_what_one_counts_by_hand():
    """Two operations for each weight and frame, and twice 2·P·D for each frame that attends."""
    built, batch = model(quantizer=True), one_trial()
    found = forward_flops(built, batch)
    frames, dim, channels, patch, tokens, vocabulary = 40, 64, 12, 4, 20, 30
    block = 2 * (4 * dim * dim + 2 * dim * 4 * dim) + 4 * frames * dim
    adapter = 2 * channels * channels * 160
    embedding = 2 * patch * channels * dim
    assert found["encoder"] == frames * (4 * block + embedding) + adapter
    entrance = 2 * dim * dim
    assert found["signal_decoder"] == frames * (entrance + 2 * block + embedding)
    assert found["phoneme_head"] == frames * 2 * dim * 41
    self_attention = 2 * 4 * dim * dim + 4 * tokens * dim
    cross_attention = 2 * 2 * dim * dim + 4 * frames * dim
    layer = tokens * (self_attention + cross_attention + 2 * 2 * dim * 128)
    layer += frames * 2 * 2 * dim * dim  # keys and values of the frames
    output = tokens * 2 * dim * vocabulary
    assert found["text_decoder"] == frames * entrance + 2 * layer + output


def test_the_search_of_the_quantizer_and_the_pass_for_the_regularisers():
    built, batch = model(quantizer=True), one_trial()
    forward = forward_flops(built, batch)
    assert forward["quantizer"] == 2 * 40 * 3 * 32 * 64
    weights = {**LOSSES, "diversity": 0.1}
    once = expected(built, batch, losses=weights)
    twice = expected(built, batch, losses=weights, accumulation=2)
    assert once.per_frame == twice.per_frame
    extra = (twice.recomputed - once.recomputed) * once.per_frame * 40
    assert extra == pytest.approx(forward["encoder"])
    assert built.training
