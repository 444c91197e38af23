"""What a configuration says of the quantizer is what the quantizer does; nothing is said twice."""

import pytest
import torch

from b2t.config import load_config
from b2t.data.dataset import DatasetInfo
from b2t.model import BrainToText, BrainToTextConfig
from b2t.quantize import ResidualVQ
from b2t.quantize.options import QuantizerOptions
from b2t.train.build import model_config

OTHERWISE = {
    "num_quantizers": 3, "codebook_size": 12, "codebook_dim": 6, "update_rule": "gradient",
    "decay": 0.9, "eps": 0.5, "codebook_gradient_scale": 3.0, "use_cosine_sim": True,
    "rotation_trick": True, "quantize_dropout": True, "quantize_dropout_cutoff_index": 1,
    "shared_codebook": True, "kmeans_init": False, "kmeans_iters": 2, "revival": "frames",
    "revival_threshold": 0.2, "revival_every": 3, "revival_max_share": 0.4, "revival_until": 0.5,
    "stochastic_sample_codes": True, "beam_size": 2, "eval_beam_size": 3, "joint_update": True,
    "half_width_sums": True,
}  # fmt: skip
"""A value of every option that is not its default."""


FACTS = DatasetInfo(
    channels=4, sampling_rate=50.0, sessions=["a"], simulated=True, has_text=False,
    has_phonemes=False, splits={}, fingerprint="x",
)  # fmt: skip


def built(*overrides):
    small = ("encoder.dim=8", "encoder.heads=2", "encoder.depth=1", "signal_decoder.heads=2")
    config = load_config(None, [f"model.{text}" for text in (*small, *overrides)])
    return BrainToText(model_config(config, FACTS, None)).quantizer


def test_the_table_of_other_values_is_whole():
    defaults = QuantizerOptions().model_dump()
    assert OTHERWISE.keys() == defaults.keys()
    assert [name for name, value in OTHERWISE.items() if value == defaults[name]] == []


@pytest.mark.parametrize("name", sorted(OTHERWISE))
def test_every_option_can_be_configured_and_reaches_the_quantizer(name):
    small = {"num_quantizers": 2, "codebook_size": 16} | {name: OTHERWISE[name]}
    found = built(*(f"quantizer.{key}={value}" for key, value in small.items()))
    assert found.options.model_dump(include={name}) == {name: OTHERWISE[name]}


def test_a_configuration_that_says_nothing_builds_the_quantizer_that_a_call_builds():
    ours = built("quantizer.codebook_size=16").options.model_dump()
    alone = ResidualVQ(8, codebook_size=16, num_quantizers=8).options.model_dump()
    assert ours == alone


@pytest.mark.parametrize("size, decay", [(255, 0.95), (256, 0.98), (8192, 0.98)])
def test_the_decay_follows_the_number_of_codes_unless_it_is_given(size, decay):
    assert ResidualVQ(4, size, 1).decay == decay
    assert ResidualVQ(4, size, 1, decay=0.5).decay == 0.5


@pytest.mark.parametrize("written, meant", [(True, "split"), (False, None)])
def test_models_and_configurations_of_before_load(written, meant, tmp_path):
    torch.manual_seed(0)
    small = {"dim": 8, "heads": 2, "depth": 1}
    before = {"codebook_size": 16, "num_quantizers": 2, "decay": 0.98, "revival": written}
    model = BrainToText(
        BrainToTextConfig(
            channels=4, encoder=small, signal_decoder=small, quantizer={"enabled": True, **before},
            phoneme_head={"enabled": False}, text_decoder={"enabled": False},
        )
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    assert BrainToText.from_pretrained(tmp_path).quantizer.options.revival == meant
    ours = load_config(None, [f"model.quantizer.revival={str(written).lower()}"])
    assert ours.model.quantizer.revival == meant
