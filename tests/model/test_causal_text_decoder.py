import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from b2t.data.batches import encode_texts
from b2t.errors import UserError
from b2t.model import BrainToText
from b2t.model.causal_text_decoder import CausalTextDecoder, SpecialTokens
from b2t.model.options import SavedTextDecoderOptions
from b2t.model.text_models import config_from_checkpoint, config_from_mapping, small_causal_config
from b2t.model.tokenizer import build_tokenizer, load_tokenizer
from tests.model.small_model import batch_of, build, config

IDS = {"vocab_size": 40, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
TOKENS = SpecialTokens(start=2, end=1, padding=0)
MAPPINGS = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24},
    "opt": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32,
            "word_embed_proj_dim": 16, "max_position_embeddings": 24},
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "qwen2": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 1, "intermediate_size": 32},
}  # fmt: skip
SMALL = {"dim": 16, "depth": 2, "heads": 2, "ffn_dim": 32, "dropout": 0.0}


def tiny(kind="llama", tuning="full", **change):
    torch.manual_seed(0)
    made = (
        small_causal_config(**SMALL, **IDS)
        if kind == "llama"
        else config_from_mapping({"model_type": kind, **MAPPINGS[kind]}, "causal_lm", **IDS)
    )
    options = SavedTextDecoderOptions(kind="causal_lm", max_tokens=12, tuning=tuning, **change)
    decoder = CausalTextDecoder(8, made, options, tokens=TOKENS)
    torch.nn.init.normal_(decoder.project.bias)
    with torch.no_grad():
        decoder.scale.fill_(1.0)
    return decoder.eval()


def inputs():
    latents = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1))
    return latents, torch.tensor([[True] * 6, [False] + [True] * 3 + [False] * 2])


@pytest.mark.parametrize("kind", ["llama", *MAPPINGS])
def test_teacher_forcing_agrees_with_free_running(kind):
    decoder = tiny(kind)
    latents, mask = inputs()
    generated = decoder.generate(latents, mask, max_new_tokens=6, min_new_tokens=6)
    assert generated[:, 0].tolist() == [2, 2]
    labels = generated[:, 1:]
    logits = decoder(latents, mask, labels)
    for step in range(5):
        allowed = logits[:, step].clone()
        allowed[:, 1] = -torch.inf
        assert torch.equal(allowed.argmax(-1), labels[:, step])


@pytest.mark.parametrize("kind", ["llama", *MAPPINGS])
def test_a_row_alone_is_the_same_row(kind):
    decoder = tiny(kind)
    latents, mask = inputs()
    tokens = torch.tensor([[5, 6, 7, 1], [8, 1, -100, -100]])
    logits = decoder(latents, mask, tokens)
    alone = decoder(latents[1:, 1:4], mask[1:, 1:4], tokens[1:, :2])
    torch.testing.assert_close(logits[1, :2], alone[0], atol=1e-5, rtol=1e-5)
    free = {"max_new_tokens": 6, "min_new_tokens": 6}
    for beams in (1, 3):
        together = decoder.generate(latents, mask, num_beams=beams, **free)
        single = decoder.generate(latents[1:, 1:4], mask[1:, 1:4], num_beams=beams, **free)
        assert torch.equal(together[1], single[0])
    poisoned = latents.masked_fill(~mask[..., None], 1e4)
    torch.testing.assert_close(decoder(poisoned, mask, tokens), logits)


def test_it_is_the_language_model_on_a_sequence_of_embeddings():
    """Against transformers' own forward on one unpadded row, laid out by hand."""
    decoder = tiny()
    latents, mask = inputs()
    tokens = torch.tensor([[5, 6, 7, 1], [8, 1, -100, -100]])
    frames = decoder.norm(decoder.project(latents[1, 1:4])) * decoder.scale
    text = decoder.lm.get_input_embeddings()(torch.tensor([2, 8]))
    expected = decoder.lm(inputs_embeds=torch.cat((frames, text))[None]).logits[0, -2:]
    found = decoder(latents, mask, tokens)[1, :2]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_it_reads_the_latents_in_their_order_and_no_later_token():
    decoder = tiny()
    latents, mask = inputs()
    latents, mask = latents[:1], mask[:1]
    tokens = torch.tensor([[5, 6, 7, 1]])
    logits = decoder(latents, mask, tokens)
    assert (decoder(latents.flip(1), mask, tokens) - logits).abs().max() > 1e-4
    after = decoder(latents, mask, torch.tensor([[5, 6, 30, 1]]))
    torch.testing.assert_close(after[0, :3], logits[0, :3])
    assert (after[0, 3] - logits[0, 3]).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("recompute", [False, True])
def test_rows_without_frames_or_text_stay_finite(dtype, recompute):
    decoder = tiny(tuning="lora").train().to(dtype)
    decoder.checkpoint_activations(recompute)
    latents = torch.randn(2, 6, 8, dtype=dtype, requires_grad=True)
    mask = torch.tensor([[True] * 6, [False] * 6])
    logits = decoder(latents, mask, torch.tensor([[-100, -100], [3, 1]]))
    logits.float().square().sum().backward()
    assert torch.isfinite(logits).all()
    assert torch.isfinite(latents.grad).all() and latents.grad[0].any()


def test_what_trains():
    def moved(tuning):
        decoder = tiny(tuning=tuning).train()
        return {name for name, each in decoder.named_parameters() if each.requires_grad}

    own = {"project.weight", "project.bias", "norm.weight", "norm.bias", "scale"}
    assert moved("frozen") == own
    low_rank = moved("lora") - own
    assert low_rank and all("lora_" in name for name in low_rank)
    assert any("mlp.down_proj" in n for n in low_rank) and not any("lm_head" in n for n in low_rank)
    assert {"lm.model.embed_tokens.weight", *own} <= moved("full")


@pytest.mark.parametrize("tuning", ["full", "lora", "frozen"])
def test_a_real_checkpoint_is_taken_frozen_saved_and_loaded(tuning, tmp_path, real_data):
    folder = real_data / "tiny_llama"
    original = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    section = {
        "kind": "causal_lm", "checkpoint": str(folder), "tuning": tuning, "max_tokens": 16,
        "lora_rank": 2,
    }  # fmt: skip
    asked = config(
        text_decoder=section, vocab_size=512, bos_token_id=1, eos_token_id=2, pad_token_id=2
    )
    torch.manual_seed(0)
    model = BrainToText(asked)
    lm = {n.replace(".base_layer", ""): v for n, v in model.text_decoder.lm.state_dict().items()}
    assert [n for n, value in original.items() if not torch.equal(lm[n], value)] == []
    added = [v for n, v in model.text_decoder.lm.named_parameters() if "lora_B" in n]
    assert bool(added) == (tuning == "lora") and not any(v.any() for v in added)
    model.freeze(["encoder"])
    free = {n for n, p in model.text_decoder.lm.named_parameters() if p.requires_grad}
    assert bool(free) == (tuning != "frozen")
    assert all(("lora_" in n) == (tuning == "lora") for n in free)
    for value in added:
        torch.nn.init.normal_(value)

    model.eval().save_pretrained(tmp_path / "saved")
    loaded = BrainToText.from_pretrained(tmp_path / "saved").eval()
    batch = batch_of([20, 13])
    batch.tokens.clamp_(max=29)
    expected, found = (m(batch, weights={"generation": 1.0}).text_logits for m in (model, loaded))
    assert torch.equal(expected, found)
    assert torch.equal(model.generate(batch), loaded.generate(batch))
    head, embedding = (
        loaded.text_decoder.lm.lm_head,
        loaded.text_decoder.lm.get_input_embeddings(),
    )
    assert head.weight is embedding.weight
    assert {n for n, p in loaded.text_decoder.named_parameters() if p.requires_grad} == {
        n for n, p in model.text_decoder.named_parameters() if p.requires_grad
    }


def test_it_learns_to_read_codes_through_a_frozen_language_model(real_data):
    """Two signals, two sentences: only a prefix that is heeded tells them apart."""
    folder = real_data / "tiny_llama"
    section = {"kind": "causal_lm", "checkpoint": str(folder), "tuning": "frozen", "max_tokens": 16}
    model = build(
        text_decoder=section, vocab_size=512, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        quantizer={"enabled": False},
    )  # fmt: skip
    batch = batch_of([16, 16])
    tokenizer = build_tokenizer(checkpoint=str(folder), causal=True)
    labels = encode_texts(["The cat sat.", "A dog ran."], tokenizer)
    batch.tokens = torch.nn.utils.rnn.pad_sequence(
        [torch.from_numpy(ids) for ids in labels], batch_first=True, padding_value=-100
    )
    before = {n: p.clone() for n, p in model.text_decoder.lm.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(120):
        loss = model(batch, weights={"generation": 1.0}).loss
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    model.tokenizer = tokenizer
    # Nothing frozen makes it end: its end token occurs in none of the stories it was trained on.
    first, second = model.transcribe(batch.signal, batch.session)
    assert first.startswith("The cat sat.") and second.startswith("A dog ran.")
    assert all(torch.equal(before[n], p) for n, p in model.text_decoder.lm.named_parameters())


def test_a_start_token_is_no_label(real_data, tmp_path):
    folder = real_data / "tiny_llama"
    tokenizer = AutoTokenizer.from_pretrained(folder, add_bos_token=True)
    tokenizer.save_pretrained(tmp_path)
    if tokenizer("a cat")["input_ids"][0] != tokenizer.bos_token_id:
        pytest.skip("this transformers does not let a tokenizer add its start token")
    causal = build_tokenizer(checkpoint=str(tmp_path), causal=True)
    assert encode_texts(["a cat"], causal)[0][0] != tokenizer.bos_token_id
    causal.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert encode_texts(["a cat"], again)[0].tolist() == encode_texts(["a cat"], causal)[0].tolist()
    kept = build_tokenizer(checkpoint=str(tmp_path))
    assert encode_texts(["a cat"], kept)[0][0] == tokenizer.bos_token_id


def test_mistakes_say_what_to_do(tmp_path, monkeypatch):
    latents, mask = inputs()
    with pytest.raises(UserError, match=r"6 latent frames.*20 tokens.*24 positions"):
        tiny("gpt2")(latents, mask, torch.full((2, 20), 3))
    with pytest.raises(UserError, match=r"24 positions"):
        tiny("gpt2").generate(latents, mask, max_new_tokens=20)
    with pytest.raises(UserError, match=r"lora_targets=\['nowhere'\]"):
        tiny(tuning="lora", lora_targets=["nowhere"])
    with pytest.raises(UserError, match=r"'t5' is no causal language model.*kind=seq2seq"):
        config_from_mapping({"model_type": "t5"}, "causal_lm", **IDS)
    GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2)).save_pretrained(
        tmp_path
    )
    with pytest.raises(UserError, match="kind=causal_lm"):
        config_from_checkpoint(str(tmp_path))
    assert config_from_checkpoint(str(tmp_path), "causal_lm").model_type == "gpt2"
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(UserError, match=r"b2t\[lora\]"):
        tiny(tuning="lora")


def test_low_rank_additions_are_scaled_by_alpha_over_rank():
    lora_layer = pytest.importorskip("peft.tuners.lora").LoraLayer
    decoder = tiny(tuning="lora", lora_rank=4, lora_alpha=12, lora_dropout=0.25)
    layers = [module for module in decoder.lm.modules() if isinstance(module, lora_layer)]
    assert layers
    for layer in layers:
        assert layer.scaling == {"default": 3.0} and layer.r == {"default": 4}
        assert [dropout.p for dropout in layer.lora_dropout.values()] == [0.25]
