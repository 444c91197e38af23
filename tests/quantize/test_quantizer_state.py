import copy

import pytest
import torch
from transformers import PretrainedConfig, PreTrainedModel

from b2t.errors import UserError
from b2t.quantize import ResidualVQ

ALL_OPTIONS = [
    {},
    {"update_rule": "gradient"},
    {"shared_codebook": True},
    {"use_cosine_sim": True, "codebook_dim": 4},
    {"quantize_dropout": True, "stochastic_sample_codes": True},
]


def latents(B=4, P=25, D=6, seed=0):
    return torch.randn(B, P, D, generator=torch.Generator().manual_seed(seed))


def train(quantizer, steps, first=0):
    codes = []
    for step in range(first, first + steps):
        quantizer.set_progress(step / 20)
        out = quantizer(latents(seed=step))
        quantizer.update(out.stats)
        codes.append(out.codes)
    return torch.stack(codes)


def build(**options):
    options = {"codebook_size": 12, "num_quantizers": 2, "revival_every": 2, **options}
    return ResidualVQ(6, **options)


@pytest.mark.parametrize("options", ALL_OPTIONS)
def test_training_resumed_from_the_state_goes_on_bit_for_bit(options):
    torch.manual_seed(0)
    whole = build(**options)
    whole.initialize([(latents(8, seed=9), None)], progress=False)
    train(whole, 5)
    state = copy.deepcopy(whole.state_dict())
    expected = train(whole, 6, first=5)
    resumed = build(**options, seed=77)
    resumed.load_state_dict(state)
    assert torch.equal(train(resumed, 6, first=5), expected)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_everything_that_changes_is_in_the_state():
    quantizer = build()
    named = set(quantizer.state_dict())
    changing = {"embed", "ema_count", "ema_sum", "unscaled", "distance_scale", "gain"}
    clocks = {"seed", "updates", "initialized", "temperature", "progress"}
    assert named == {f"codebooks.{name}" for name in changing | clocks}
    assert named == {name for name, _ in quantizer.named_buffers()}


def test_a_checksum_tells_one_bit():
    quantizer = build(kmeans_init=False)
    twin = build(kmeans_init=False)
    assert quantizer.checksum() == twin.checksum()
    value = twin.codebooks.embed[1, 3, 2]
    twin.codebooks.embed[1, 3, 2] = torch.nextafter(value, value + 1)
    assert quantizer.checksum() != twin.checksum()


@pytest.mark.parametrize("options", ALL_OPTIONS)
def test_a_tokenizer_saved_alone_gives_the_same_codes(tmp_path, options):
    quantizer = build(**options)
    quantizer.initialize([(latents(8, seed=9), None)], progress=False)
    train(quantizer, 3)
    quantizer.save_pretrained(tmp_path / "tokenizer")
    loaded = ResidualVQ.from_pretrained(tmp_path / "tokenizer")
    codes = quantizer.encode(latents(seed=50))
    assert not loaded.training and torch.equal(loaded.encode(latents(seed=50)), codes)
    assert torch.equal(loaded.decode(codes), quantizer.decode(codes))
    assert loaded.config == quantizer.config


def test_a_folder_that_holds_no_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no quantizer\.json in this folder"):
        ResidualVQ.from_pretrained(tmp_path)
    build().save_pretrained(tmp_path)
    (tmp_path / "quantizer.safetensors").unlink()
    with pytest.raises(UserError, match=r"no quantizer\.safetensors"):
        ResidualVQ.from_pretrained(tmp_path)


class Host(PreTrainedModel):
    config_class = PretrainedConfig
    _keep_in_fp32_modules_strict = ["quantizer"]  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.linear = torch.nn.Linear(6, 6)
        self.quantizer = build(codebook_dim=4)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_loaded_in_half_precision_keeps_its_codebooks(tmp_path, dtype):
    model = Host(PretrainedConfig())
    model.quantizer.initialize([(latents(8, seed=9), None)], progress=False)
    train(model.quantizer, 3)
    model.save_pretrained(tmp_path)
    loaded = Host.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.linear.weight.dtype == dtype
    for name, value in model.quantizer.state_dict().items():
        assert torch.equal(value, loaded.quantizer.state_dict()[name]), name
    out = loaded.quantizer(latents().to(dtype))
    assert out.quantized.dtype == dtype and (out.codes >= 0).all()
