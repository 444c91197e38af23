"""Models made and loaded: bitwise the same, in half precision too; what cannot work is said."""

import copy
import math

import pytest
import torch
from transformers import (
    AutoModel,
)

from b2t.errors import UserError
from b2t.model import BrainToText
from tests.model.small_model import (
    SESSIONS,
    batch_of,
    build,
    config,
    gradients,
    tiny_checkpoint,
)


def states_equal(one, two):
    first, second = one.state_dict(), two.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"quantizer": {"update_rule": "gradient", "codebook_dim": 8}},
        {"quantizer": None},
        {"text_decoder": {"enabled": False}},
        {"text_decoder": {"config": {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 32,
                                     "num_layers": 1, "num_heads": 2}}},
    ],
)  # fmt: skip
def test_save_and_load_is_bitwise(change, tmp_path):
    model, batch = build(**change), batch_of([40, 23, 11])
    if model.quantizer is not None:
        model.quantizer.update(model(batch).stats)
        model.quantizer.set_progress(1 / 3)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    for loaded in (BrainToText.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        states_equal(model, loaded)
        assert torch.equal(model.eval()(batch).loss, loaded(batch).loss)
        if loaded.text_decoder is not None:
            assert torch.equal(model.generate(batch), loaded.generate(batch))
            tied = loaded.text_decoder.seq2seq
            assert tied.lm_head.weight is tied.get_input_embeddings().weight
    assert loaded.config.sessions == SESSIONS
    assert loaded.config.simulated_data is False


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, "float16"])
def test_half_precision_keeps_the_codebooks_exactly(dtype, tmp_path):
    model, batch = build(quantizer={"codebook_dim": 8}), batch_of([40, 23, 11])
    model.quantizer.update(model(batch).stats)
    model.save_pretrained(tmp_path)
    half = BrainToText.from_pretrained(tmp_path, dtype=dtype)
    states_equal(model.quantizer.codebooks, half.quantizer.codebooks)
    wanted = torch.float16 if dtype == "float16" else dtype
    assert half.encoder.embed.weight.dtype == wanted
    out = half.train()(batch)
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert all(loss.dtype == torch.float32 for loss in out.losses.values())
    assert torch.isfinite(out.loss)
    assert all(torch.isfinite(g).all() for g in gradients(half).values())
    assert abs(float(out.losses["generation"].detach()) - math.log(30)) < 1.5
    half.save_pretrained(tmp_path / "half")
    states_equal(half, BrainToText.from_pretrained(tmp_path / "half"))
    states_equal(model.quantizer.codebooks, copy.deepcopy(model).half().quantizer.codebooks)


def test_broken_folders_say_so(tmp_path):
    with pytest.raises(UserError, match="no trained model"):
        BrainToText.from_pretrained(tmp_path / "nowhere")
    build(phoneme_head={"enabled": False}).save_pretrained(tmp_path)
    config().save_pretrained(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"lacks .*phoneme_head"):
        BrainToText.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_a_local_checkpoint_is_loaded_once_and_saved_with_the_model(kind, tmp_path):
    original = tiny_checkpoint(tmp_path / "seq2seq", kind)
    asked = config(text_decoder={"checkpoint": str(tmp_path / "seq2seq")})
    model = BrainToText(asked)
    embedding = model.text_decoder.seq2seq.get_input_embeddings().weight
    assert torch.equal(embedding, original.get_input_embeddings().weight.float())
    assert asked.text_decoder["checkpoint"] is not None
    batch = batch_of([20, 13])
    assert model(batch).text_logits.shape == (2, 7, 40)
    model.save_pretrained(tmp_path / "model")
    for file in (tmp_path / "seq2seq").iterdir():
        file.unlink()
    loaded = BrainToText.from_pretrained(tmp_path / "model")
    states_equal(model, loaded)
    assert loaded.config.text_decoder["initialized_from"] == str(tmp_path / "seq2seq")
    assert torch.equal(model.generate(batch), loaded.generate(batch))


def test_what_cannot_work_is_said_at_once(tmp_path):
    with pytest.raises(UserError, match="tokenizer has 50 tokens"):
        tiny_checkpoint(tmp_path, "bart")
        BrainToText(config(text_decoder={"checkpoint": str(tmp_path)}, vocab_size=50))
    with pytest.raises(UserError, match="max_position_embeddings=16"):
        BrainToText(config(text_decoder={"checkpoint": str(tmp_path), "max_tokens": 20}))
    batch = batch_of([20, 13])
    batch.tokens = torch.full((2, 13), -100)
    build()(batch)
    batch.tokens[1] = 5
    with pytest.raises(UserError, match=r"s/1/1.*13 tokens.*takes 12"):
        build()(batch)
    with pytest.raises(ValueError, match="dpeth"):
        config(encoder={"dpeth": 3})


def test_same_seed_same_model():
    states_equal(build(seed=4), build(seed=4))
    one, two = build(seed=4).state_dict(), build(seed=5).state_dict()
    assert not torch.equal(one["encoder.embed.weight"], two["encoder.embed.weight"])
