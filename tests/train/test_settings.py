"""Settings that no step could follow."""

from types import SimpleNamespace

import pytest

from b2t.config import COMPONENTS, load_config
from b2t.errors import UserError
from b2t.model.objectives import WEIGHTED
from b2t.train import settings
from b2t.train.launch import check_compiling, require_compiler


@pytest.fixture
def warned(monkeypatch):
    lines = []
    monkeypatch.setattr(settings.log, "warning", lambda text, *args: lines.append(text % args))
    return lines


def test_a_short_trial_is_told_what_is_shortened(warned):
    settings.check_lengths(load_config("a5500x2", ["phases.0.steps=200"]))
    assert len(warned) == 2, warned
    assert "codebook_start.after_steps=300 lies beyond phase tokenizer of 200 steps" in warned[0]
    assert "the codebooks start after 100, half of it" in warned[0]
    assert "phases.0.warmup_steps=2000 is longer" in warned[1] and "shortened to 20" in warned[1]


@pytest.mark.parametrize("preset", ["a5500x2", "demo", "eeg", "rqvae", "t15"])
def test_presets_are_followed_as_they_are(warned, preset):
    settings.check_lengths(load_config(preset))
    assert warned == []


def test_codebooks_that_would_never_train_are_refused(warned):
    config = load_config("demo", ["codebook_start.after_steps=700"])
    with pytest.raises(UserError, match=r"codebook_start\.after_steps=700, but .* 700 steps"):
        settings.check_lengths(config)
    settings.check_lengths(load_config("demo", ["codebook_start.after_steps=699"]))
    config.model.quantizer.enabled = False
    settings.check_lengths(config)


@pytest.mark.parametrize(
    ("preset", "steps", "asked", "start"),
    [
        ("eeg", 1500, None, 750),
        ("eeg", 201, None, 100),
        ("eeg", 800, 749, 749),
        ("demo", 240, None, 30),
        ("demo", 31, None, 30),
        ("demo", 30, None, 15),
        ("demo", 1, None, 0),
    ],
)
def test_codebooks_start_within_the_first_phase(warned, preset, steps, asked, start):
    late = [] if asked is None else [f"codebook_start.after_steps={asked}"]
    config = load_config(preset, [f"phases.0.steps={steps}", *late])
    assert config.codebooks_start_after == start
    settings.check_lengths(config)
    assert any("half of it" in text for text in warned) == (preset == "demo" and steps <= 30)


@pytest.mark.parametrize("asked", ["-1", "100%", "1.5", "half", "true"])
def test_a_start_is_steps_or_a_share(asked):
    with pytest.raises(UserError, match=r"after_steps: .*steps from 0, or a share such as 50%"):
        load_config("eeg", [f"codebook_start.after_steps={asked}"])


def losses_of(name):
    zero = [f"phases.0.losses.{n}=0" for n in WEIGHTED if n != name]
    return [*zero, f"phases.0.losses.{name}=1"]


def test_blocks_are_not_compiled_where_zero_3_fetches_their_weights():
    compiled = load_config("demo", ["model.compile_blocks=true"])
    for stage in (0, 1, 2):
        check_compiling(compiled, SimpleNamespace(zero_stage=stage, path="f.json"))
    check_compiling(load_config("demo"), SimpleNamespace(zero_stage=3, path="f.json"))
    with pytest.raises(UserError, match=r"model.compile_blocks=true with f.json: ZeRO-3"):
        check_compiling(compiled, SimpleNamespace(zero_stage=3, path="f.json"))


def test_what_needs_a_compiler_is_refused_without_one_and_nothing_else(monkeypatch):
    plain, compiled = load_config("demo"), load_config("demo", ["model.compile_blocks=true"])
    on_gpu, offloaded = (SimpleNamespace(path="f.json", offload=some) for some in (False, True))
    monkeypatch.setenv("CXX", "no-such-compiler")
    require_compiler(plain, on_gpu)
    with pytest.raises(
        UserError, match=r"f\.json: .*offload_optimizer.* no no-such-compiler: .*g\+\+"
    ):
        require_compiler(plain, offloaded)
    with pytest.raises(UserError, match=r"compile_blocks=true takes a C\+\+ compiler"):
        require_compiler(compiled, on_gpu)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # Triton compiles them there
    require_compiler(compiled, on_gpu)
    monkeypatch.setenv("CXX", "sh")  # is there
    require_compiler(compiled, offloaded)


def test_losses_that_reach_nothing_trained_are_refused():
    model = SimpleNamespace(**dict.fromkeys(COMPONENTS, object()))
    settings.check_losses(load_config("demo"), model)
    alone = load_config("demo", [*losses_of("reconstruction"), "phases.0.trainable=[text_decoder]"])
    with pytest.raises(UserError, match=r"phases\.0: phase tokenizer trains text_decoder, which"):
        settings.check_losses(alone, model)
    config = load_config("demo", losses_of("phoneme"))
    settings.check_losses(config, model)
    model.phoneme_head = None
    with pytest.raises(UserError, match=r"phases\.0\.losses: .* no component for it"):
        settings.check_losses(config, model)
