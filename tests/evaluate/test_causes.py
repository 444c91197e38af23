"""A score that means nothing says why, with the right cause."""

import json

import pytest
import torch
from datasets import DatasetDict

from b2t.config import load_config
from b2t.errors import UserError
from b2t.evaluate import decode_command, evaluate_command, tokenize_command
from b2t.evaluate.evaluation import evaluate_model
from b2t.model import BrainToText
from b2t.model.trained import trained_components
from b2t.report.advice import advise
from b2t.report.run_data import load_run
from tests.evaluate.saved_runs import call, save_dataset, save_run, trials
from tests.evaluate.test_evaluation import Letters, Reader, batch_of

SIGNAL = {"unit": "z-score", "rms": 1.0}


def fill(component, value):
    def change(model):
        with torch.no_grad():
            for parameter in getattr(model, component).parameters():
                parameter.fill_(value)

    return change


@pytest.mark.parametrize(
    ("component", "value", "told"),
    [
        ("encoder", float("nan"), r"encoder\.\S+ holds NaN or infinity.*not undertrained"),
        ("text_decoder", float("inf"), r"text_decoder\.\S+ holds NaN or infinity"),
        ("encoder", 0.0, "all weights of encoder are zero.*not undertrained"),
        ("text_decoder", 0.0, "all weights of text_decoder are zero"),
    ],
)
def test_broken_weights_are_called_broken(tmp_path, component, value, told):
    data = save_dataset(tmp_path / "data")
    run = save_run(tmp_path / "run", data, change=fill(component, value))
    commands = (
        (evaluate_command, run),
        (decode_command, run, data),
        (tokenize_command, run, data, tmp_path / "codes"),
    )
    for command in commands:
        with pytest.raises(UserError, match=told):
            call(*command)


CONFIGS = {
    "a list": b"[]",
    "null": b"null",
    "a text for a section": b'{"encoder": "large"}',
    "a text for a number": b'{"vocab_size": "many"}',
    "an unknown key": b'{"encoder": {"depht": 3}}',
}


@pytest.mark.parametrize(
    "change", ["cut weights", "cut config", "cut tokenizer", "other width", *CONFIGS]
)
def test_damaged_files_of_models_without_checksums_are_one_message(tmp_path, change):
    data = save_dataset(tmp_path / "data")
    run = save_run(tmp_path / "run", data)
    best = run / "checkpoints" / "best"
    (best / "manifest.json").unlink()
    name = {"cut weights": "model.safetensors", "cut tokenizer": "tokenizer_config.json"}
    file = best / name.get(change, "config.json")
    content = file.read_bytes()
    if change in CONFIGS:
        file.write_bytes(CONFIGS[change])
    elif change == "other width":
        file.write_bytes(
            content.replace(b'"ffn_dim": 16', b'"ffn_dim": 24').replace(
                b'"decoder_ffn_dim": 16', b'"decoder_ffn_dim": 24'
            )
        )
    else:
        file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=str(best)):
        call(decode_command, run, data)


def test_signals_out_of_range_are_the_cause_and_not_the_language(tmp_path, capsys):
    run = save_run(tmp_path / "run", save_dataset(tmp_path / "data"), signal=SIGNAL)
    loud = save_dataset(tmp_path / "loud", change=lambda signal: signal * 1e15)
    with pytest.raises(UserError, match=r"root mean square is .*e\+(14|15)"):
        call(evaluate_command, run, "--data", loud)
    call(evaluate_command, run, "--data", loud, "--force")
    assert "5 of 5 trials are over 100 times louder" in " ".join(capsys.readouterr().out.split())
    record = json.loads((run / "evaluation.json").read_text())
    assert record["odd_trials"] == 5
    told = [advice.symptom for advice in advise(load_run(run))]
    assert any("5 of 5 evaluated trials" in symptom for symptom in told)
    assert not any("hardly better" in symptom for symptom in told)


def test_a_single_broken_trial_is_named(tmp_path):
    data = tmp_path / "data"
    loud = trials("test", 5, change=lambda signal: signal * (1e15 if len(signal) == 22 else 1))
    splits = {"train": trials("train", 3), "val": trials("val", 3), "test": loud}
    DatasetDict(splits).save_to_disk(str(data))
    run = save_run(tmp_path / "run", data, signal=SIGNAL)
    call(evaluate_command, run, "--no-noise")
    record = json.loads((run / "evaluation.json").read_text())
    assert record["odd_trials"] == 1
    assert any("1 of 5" in note and "day0/1/2" in note for note in record["notes"])


def test_what_never_trained_is_marked(tmp_path, capsys):
    data = save_dataset(tmp_path / "data")
    run = save_run(tmp_path / "run", data, trained=["encoder", "quantizer", "signal_decoder"])
    call(evaluate_command, run)
    printed = " ".join(capsys.readouterr().out.split())
    assert "(WER), untrained" in printed and "(PER), untrained" in printed
    assert "text_decoder was never trained" in printed
    record = json.loads((run / "evaluation.json").read_text())
    assert record["untrained"] == ["text_decoder", "phoneme_head"]
    told = [advice.symptom for advice in advise(load_run(run))]
    assert any("untrained text decoder" in symptom for symptom in told)
    assert not any("hardly better" in symptom for symptom in told)
    assert "PER means nothing" in printed and "reconstruction SNR" in printed
    blind = save_run(tmp_path / "blind", data, trained=["encoder", "text_decoder", "phoneme_head"])
    call(evaluate_command, blind, "--no-noise")
    printed = " ".join(capsys.readouterr().out.split())
    assert "the reconstruction means nothing" in printed and "SNR" not in printed
    everything = ["encoder", "quantizer", "signal_decoder", "phoneme_head", "text_decoder"]
    whole = save_run(tmp_path / "whole", data, trained=everything)
    call(evaluate_command, whole)
    assert "untrained" not in capsys.readouterr().out


def test_components_count_as_trained_once_a_step_reached_them():
    phases = load_config("demo").phases
    tokenizer = ["adapter", "encoder", "phoneme_head", "quantizer", "signal_decoder"]
    assert trained_components(phases, 0, 0) == []
    assert trained_components(phases, 0, 1) == tokenizer
    assert trained_components(phases, 1, 0) == tokenizer
    assert trained_components(phases, 1, 1) == [*tokenizer, "text_decoder"]
    silent = load_config("demo", ["phases.0.losses.phoneme=0", "phases.0.trainable=[encoder]"])
    assert trained_components(silent.phases, 0, 9) == ["encoder"]


def test_codebooks_that_never_started_are_said_to_be_so(tmp_path):
    data = save_dataset(tmp_path / "data")

    def restart(model):
        model.quantizer.codebooks.initialized.zero_()

    run = save_run(tmp_path / "run", data, change=restart)
    call(evaluate_command, run, "--no-noise")
    record = json.loads((run / "evaluation.json").read_text())
    assert record["utilization"] == [] and record["frames"] > 0
    assert any("codebooks had not started" in note for note in record["notes"])
    with pytest.raises(UserError, match="never initialized"):
        call(tokenize_command, run, data, tmp_path / "codes")


def test_frames_are_counted_without_a_quantizer():
    batch = batch_of(["ab", "gg"], [[1], [2]], bins=6)
    result = evaluate_model(Reader(quantizer=False), [batch], Letters())
    assert result.frames == 6 + 5


def test_an_export_says_what_was_trained(tmp_path):
    run = save_run(tmp_path / "run", save_dataset(tmp_path / "data"), trained=["encoder"])
    assert BrainToText.from_pretrained(run / "checkpoints" / "best").config.trained == ["encoder"]
