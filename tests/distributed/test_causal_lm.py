"""A causal language model as text decoder on two ranks, with low-rank additions (ZeRO-2 and 3)."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from b2t.model import BrainToText
from b2t.model.tokenizer import byte_tokenizer

pytestmark = pytest.mark.distributed

STEPS = 6


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(training, tiny, ds_file, language_model):
    """Finished runs by name; `stopped` was asked to leave after three steps and went on."""
    config = tiny(
        phases=[{"name": "joint", "steps": STEPS, "lr": 3e-3, "warmup_steps": 2}],
        evaluation={
            "every": 3, "decode_trials": 3, "max_trials": 3, "batch_size": 1, "max_new_tokens": 4,
        },
    )  # fmt: skip
    config["model"]["text_decoder"] = {
        "kind": "causal_lm", "checkpoint": str(language_model), "tuning": "lora", "lora_rank": 2,
        "lora_dropout": 0.0,
    }  # fmt: skip
    config["model"]["activation_checkpointing"] = {"text_decoder": 1}
    training.folder.mkdir(exist_ok=True)
    files = {}
    for stage in (2, 3):
        content = ds_file()
        content["zero_optimization"]["stage"] = stage
        if stage == 3:
            content["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        files[stage] = training.folder / f"causal{stage}.json"
        files[stage].write_text(json.dumps(content))

    def run(folder, stage, status=0, **more):
        file = str(files[stage])
        return {"folder": folder, "deepspeed_config": file, "status": status, **more}

    plan = [run("lora2", 2), run("lora3", 3), run("stopped", 2, 75, stop=3), run("stopped", 2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("B2T_PLAN", json.dumps(plan))
        patch.setenv("PYTHONPATH", str(training.repository), prepend=":")
        script = "tests/distributed/zero3_driver.py"
        done = training.run("causal", config=config, deepspeed=files[2], script=script)
    return {
        name: replace(done, folder=training.folder / name) for name in ("lora2", "lora3", "stopped")
    }


def test_zero3_trains_what_zero2_trains_and_a_resume_is_exact(runs):
    expected = runs["lora2"].weights(STEPS)
    for name, value in runs["lora3"].weights(STEPS).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=2e-5, msg=name)
    again = runs["stopped"].weights(STEPS)
    assert [n for n, value in again.items() if not torch.equal(value, expected[n])] == []


@pytest.mark.parametrize("name", ["lora2", "lora3"])
def test_the_language_model_stays_and_what_was_added_moves(runs, language_model, name):
    model = BrainToText.from_pretrained(runs[name].folder / "checkpoints" / "best")
    original = LlamaForCausalLM.from_pretrained(language_model).state_dict()
    lm = model.text_decoder.lm.state_dict()
    kept = {n.replace(".base_layer", ""): v for n, v in lm.items() if "lora_" not in n}
    assert kept.keys() == original.keys()
    assert all(torch.equal(kept[n], value) for n, value in original.items())
    assert all(v.any() for n, v in lm.items() if "lora_B" in n)
    moments = {n for n in runs[name].moments(STEPS) if n.startswith("text_decoder.lm.")}
    assert moments and all("lora_" in n for n in moments)
    assert any("val/wer" in record for record in runs[name].metrics())
