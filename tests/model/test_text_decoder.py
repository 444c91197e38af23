import pytest
import torch
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from b2t.data.batches import encode_texts
from b2t.errors import UserError
from b2t.labels import IGNORE
from b2t.model.text_decoder import TextDecoder
from b2t.model.text_models import config_from_checkpoint, config_from_mapping, small_config
from b2t.model.tokenizer import (
    bpe_tokenizer,
    build_tokenizer,
    byte_tokenizer,
    decode_texts,
    load_tokenizer,
)
from b2t.model.transformer import attention_mask

IDS = {"vocab_size": 40, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
SIZE = {"dim": 16, "depth": 2, "heads": 2, "ffn_dim": 32, "dropout": 0.0, "max_tokens": 12}
TEXTS = ["the cat sat on the mat", "a dog ran", "naïve façade — 你好", "the mat ran"]


def tiny(kind="bart", **extra):
    torch.manual_seed(0)
    config = {
        "bart": lambda: small_config(**SIZE, **IDS),
        "t5": lambda: config_from_mapping(
            {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2,
             "num_heads": 2, **extra}, **IDS),
        "pegasus": lambda: config_from_mapping(
            {"model_type": "pegasus", "d_model": 16, "encoder_layers": 1, "decoder_layers": 2,
             "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
             "decoder_ffn_dim": 32, "max_position_embeddings": 12}, **IDS),
        "mbart": lambda: config_from_mapping(
            {"model_type": "mbart", "d_model": 16, "encoder_layers": 1, "decoder_layers": 2,
             "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
             "decoder_ffn_dim": 32, "max_position_embeddings": 12}, **IDS),
    }[kind]()  # fmt: skip
    return TextDecoder(8, config, max_tokens=12).eval()


@pytest.mark.parametrize("kind", ["bart", "t5", "pegasus", "mbart"])
def test_teacher_forcing_agrees_with_free_running(kind):
    decoder = tiny(kind)
    latents = torch.randn(2, 6, 8)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    generated = decoder.generate(latents, mask, max_new_tokens=6, min_new_tokens=6)
    labels = generated[:, 1:]
    logits = decoder(latents, mask, labels)
    for step in range(5):
        allowed = logits[:, step].clone()
        allowed[:, 1] = -torch.inf
        assert torch.equal(allowed.argmax(-1), labels[:, step])


@pytest.mark.parametrize("kind", ["bart", "t5", "pegasus"])
def test_what_is_masked_changes_nothing(kind):
    decoder = tiny(kind)
    latents = torch.randn(2, 6, 8)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    tokens = torch.tensor([[5, 6, 7, 1], [8, 1, -100, -100]])
    logits = decoder(latents, mask, tokens)
    alone = decoder(latents[1:, :4], mask[1:, :4], tokens[1:, :2])
    torch.testing.assert_close(logits[1, :2], alone[0], atol=1e-5, rtol=1e-5)
    changed = tokens.clone()
    changed[0, 2] = 30
    after = decoder(latents, mask, changed)
    torch.testing.assert_close(after[0, :3], logits[0, :3], atol=1e-5, rtol=1e-5)
    assert (after[0, 3] - logits[0, 3]).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["bart", "pegasus", "mbart"])
def test_the_mask_that_a_gpu_is_given_hides_the_same(kind, monkeypatch):
    """Of keys that are seen, which transformers takes as it is, instead of frames."""
    decoder = tiny(kind)
    assert decoder.seq2seq.config._attn_implementation == "sdpa"
    latents, tokens = torch.randn(3, 9, 8), torch.randint(2, 40, (3, 5))
    mask = torch.arange(9) < torch.tensor([9, 4, 0])[:, None]
    expected = decoder(latents, mask, tokens)
    monkeypatch.setattr(decoder, "_training_mask", attention_mask)
    torch.testing.assert_close(decoder(latents, mask, tokens), expected)
    latents[1, 4:] = 7.0
    torch.testing.assert_close(decoder(latents, mask, tokens), expected)


def test_it_attends_to_the_latents_and_to_their_order():
    decoder = tiny()
    latents = torch.randn(1, 6, 8)
    mask = torch.ones(1, 6, dtype=torch.bool)
    tokens = torch.tensor([[5, 6, 7, 1]])
    logits = decoder(latents, mask, tokens)
    assert (decoder(latents + 1, mask, tokens) - logits).abs().max() > 1e-4
    assert (decoder(latents.flip(1), mask, tokens) - logits).abs().max() > 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_without_frames_or_text_stay_finite(dtype):
    decoder = tiny().train().to(dtype)
    latents = torch.randn(2, 6, 8, dtype=dtype, requires_grad=True)
    mask = torch.tensor([[True] * 6, [False] * 6])
    logits = decoder(latents, mask, torch.tensor([[-100, -100], [3, 1]]))
    logits.float().square().sum().backward()
    assert torch.isfinite(logits).all()
    assert torch.isfinite(latents.grad).all()


def test_its_own_encoder_is_gone():
    decoder = tiny()
    names = [name for name, _ in decoder.named_parameters()]
    assert not [name for name in names if "encoder.layers" in name]
    assert [name for name in names if "decoder.layers" in name]


def save_bart(folder, **change):
    torch.manual_seed(1)
    config = BartConfig(
        vocab_size=40, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        max_position_embeddings=32, pad_token_id=0, bos_token_id=2, eos_token_id=1,
        decoder_start_token_id=1, **change,
    )  # fmt: skip
    model = BartForConditionalGeneration(config)
    model.save_pretrained(folder)
    return model


def test_a_checkpoint_brings_its_decoder_weights(tmp_path):
    original = save_bart(tmp_path)
    decoder = TextDecoder(8, config_from_checkpoint(str(tmp_path)), str(tmp_path), max_tokens=12)
    loaded = decoder.seq2seq.state_dict()
    for name, value in original.state_dict().items():
        if "encoder.layers" not in name and name in loaded:
            assert torch.equal(loaded[name], value), name
    assert decoder.seq2seq.lm_head.weight is decoder.seq2seq.model.shared.weight


def test_a_t5_checkpoint_saved_in_bf16(tmp_path):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    original = T5ForConditionalGeneration(config).to(torch.bfloat16)
    original.save_pretrained(tmp_path)
    decoder = TextDecoder(8, config_from_checkpoint(str(tmp_path)), str(tmp_path), max_tokens=12)
    assert torch.equal(decoder.seq2seq.shared.weight, original.shared.weight.float())
    logits = decoder(torch.randn(1, 4, 8), torch.ones(1, 4).bool(), torch.tensor([[3, 1]]))
    assert torch.isfinite(logits).all()


def test_a_causal_checkpoint_is_refused(tmp_path, real_data):
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    for folder in (tmp_path, real_data / "tiny_llama"):
        with pytest.raises(UserError, match=r"'llama'.*causal.*bart"):
            config_from_checkpoint(str(folder))
    with pytest.raises(UserError, match="causal"):
        config_from_mapping({"model_type": "gpt2"}, **IDS)


def test_unusable_checkpoints_and_configs_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such folder"):
        config_from_checkpoint("./nowhere")
    with pytest.raises(UserError, match=r"nobody/nothing.*Without a network"):
        import huggingface_hub.constants as constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        config_from_checkpoint("nobody/nothing")
    with pytest.raises(UserError, match="model_type"):
        config_from_mapping({"d_model": 8}, **IDS)
    with pytest.raises(UserError, match="nosuch"):
        config_from_mapping({"model_type": "nosuch"}, **IDS)
    save_bart(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    for damaged in (weights[: len(weights) // 2], weights[:5], b""):
        (tmp_path / "model.safetensors").write_bytes(damaged)
        with pytest.raises(UserError, match="weights could not be read"):
            TextDecoder(8, config_from_checkpoint(str(tmp_path)), str(tmp_path), max_tokens=12)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="weights could not be read"):
        TextDecoder(8, config_from_checkpoint(str(tmp_path)), str(tmp_path), max_tokens=12)
    with pytest.raises(UserError, match="expected at most 12"):
        tiny().generate(torch.randn(1, 3, 8), torch.ones(1, 3).bool(), max_new_tokens=13)


def test_t5_in_fp16_is_warned_of(caplog, monkeypatch):
    monkeypatch.setattr("b2t.log._said", set())
    with caplog.at_level("WARNING", logger="b2t"):
        tiny("t5").half()(
            torch.randn(1, 3, 8).half(), torch.ones(1, 3).bool(), torch.tensor([[3, 1]])
        )
    assert "overflow in fp16" in caplog.text


def padded_labels(tokenizer, texts):
    rows = [torch.from_numpy(ids) for ids in encode_texts(texts, tokenizer)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORE)


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_tokenizers_give_texts_back(kind, tmp_path):
    tokenizer = build_tokenizer(kind, TEXTS, vocab_size=300)
    labels = padded_labels(tokenizer, [*TEXTS, None, ""])
    assert decode_texts(tokenizer, labels) == [*TEXTS, "", ""]
    assert (labels == tokenizer.eos_token_id).sum(1).tolist() == [1, 1, 1, 1, 0, 1]
    assert (labels[4] == -100).all()
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert torch.equal(padded_labels(again, TEXTS), padded_labels(tokenizer, TEXTS))
    assert len(again) == len(tokenizer)


def test_bpe_is_reproducible_learns_merges_and_knows_unseen_text():
    one, two = (bpe_tokenizer(order, 300) for order in (TEXTS, TEXTS[::-1]))
    assert one.get_vocab() == two.get_vocab()
    short, long = (encode_texts(["the mat"], t)[0] for t in (one, byte_tokenizer()))
    assert len(short) < len(long)
    unseen = "Żółw #7"
    assert decode_texts(one, padded_labels(one, [unseen])) == [unseen]
    assert set(encode_texts([unseen], one)[0]).isdisjoint({one.unk_token_id})


def test_tokenizer_errors(tmp_path):
    with pytest.raises(UserError, match="no text to learn from"):
        bpe_tokenizer(["", ""], 300)
    with pytest.raises(UserError, match="at least 260"):
        bpe_tokenizer(TEXTS, 100)
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="byte or bpe"):
        build_tokenizer("words")


def test_decoded_text_ends_at_the_first_end_token_and_skips_the_start():
    tokenizer = byte_tokenizer()
    a, b = tokenizer("ab", add_special_tokens=False)["input_ids"]
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    rows = torch.tensor([[eos, a, b, eos, a], [pad, a, eos, pad, pad], [eos, eos, a, a, a]])
    assert decode_texts(tokenizer, rows) == ["ab", "a", ""]
