import json
import re
import subprocess
import sys

import pytest
import yaml

from b2t.config import COMPONENTS, Config, LossWeights, describe, load_config, preset_names
from b2t.errors import UserError
from b2t.train.ds_config import load_ds_config

BALANCED = {
    "generation": 1.0,
    "reconstruction": 0.5,
    "commitment": 0.2,
    "diversity": 0.1,
    "perplexity": 0.05,
}


def test_presets_are_shipped_and_valid():
    names = ["a5500x2", "demo", "eeg", "gru", "phonemes", "rqvae", "t15", "words"]
    assert preset_names() == names
    for name in preset_names():
        assert load_config(name).total_steps > 0


@pytest.mark.parametrize("source", [None, "a5500x2", "rqvae"])
def test_default_phases_have_the_numbers_of_the_house(source):
    config = load_config(source)
    assert [phase.steps for phase in config.phases] == [10_000, 5_000, 20_000]
    tokenizer, codebook, joint = config.phases
    assert {"encoder", "quantizer", "signal_decoder"} <= set(tokenizer.trainable)
    assert "text_decoder" not in tokenizer.trainable and tokenizer.losses.generation == 0
    assert tokenizer.losses.reconstruction == max(tokenizer.losses.model_dump().values())
    assert "encoder" not in codebook.trainable
    assert codebook.losses.diversity > joint.losses.diversity
    assert codebook.losses.perplexity > joint.losses.perplexity
    assert joint.trainable == list(COMPONENTS)
    assert {k: v for k, v in joint.losses.model_dump().items() if k in BALANCED} == BALANCED
    assert tokenizer.warmup_steps == joint.warmup_steps == 2_000
    assert (config.temperature.start, config.temperature.end) == (2.0, 0.5)
    augment = config.data.augment
    assert augment.enabled and augment.time_shift_ms == 100 and augment.channel_dropout == 0.1
    assert augment.noise_std == 0.01 and augment.scale == (0.9, 1.1)


def test_codebooks_of_the_presets():
    large, wide = load_config("a5500x2").model, load_config("rqvae").model
    assert (large.quantizer.num_quantizers, large.quantizer.codebook_size) == (8, 8192)
    assert (wide.quantizer.num_quantizers, wide.quantizer.codebook_size) == (8, 256)
    assert wide.encoder.dim == 1024 and wide.quantizer.codebook_dim is None


def test_two_gpus_see_64_trials_a_step(repository):
    ds_file = load_ds_config(repository / "ds_configs" / "zero2_fp16.json")
    assert (ds_file.micro_batch, ds_file.accumulation) == (8, 4)
    assert ds_file.global_batch(2) == 64
    assert (ds_file.precision, ds_file.zero_stage) == ("fp16", 2)
    assert ds_file.raw["fp16"]["loss_scale"] == 0, "the loss scale must be dynamic"


def test_own_yaml_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("model: {encoder: {dim: 64}}\nphases:\n  - {name: only, steps: 7}\n")
    config = load_config(file)
    assert config.model.encoder.dim == 64
    assert [(phase.name, phase.steps) for phase in config.phases] == [("only", 7)]
    assert config.model.quantizer == Config().model.quantizer


def test_an_empty_file_is_the_defaults(tmp_path):
    file = tmp_path / "empty.yaml"
    file.write_text("# nothing yet\n")
    assert load_config(file) == Config()


@pytest.mark.parametrize(
    ("override", "path", "expected"),
    [
        ("phases.0.steps=200", ("phases", 0, "steps"), 200),
        ("phases.2.losses.diversity=0.7", ("phases", 2, "losses", "diversity"), 0.7),
        ("phases.1.trainable=[encoder]", ("phases", 1, "trainable"), ["encoder"]),
        ("phases.0.trainable.1=quantizer", ("phases", 0, "trainable", 1), "quantizer"),
        ("phases.0.lr_scale.encoder=0.1", ("phases", 0, "lr_scale", "encoder"), 0.1),
        ("phases.0.lr=1e-4", ("phases", 0, "lr"), 1e-4),
        ("data.path=a=b", ("data", "path"), "a=b"),
        ("data.augment.scale=[0.8, 1.2]", ("data", "augment", "scale"), (0.8, 1.2)),
        ("model.quantizer.codebook_dim=null", ("model", "quantizer", "codebook_dim"), None),
        ("log.wandb.tags=[a, b]", ("log", "wandb", "tags"), ["a", "b"]),
    ],
)
@pytest.mark.parametrize("source", [None, "a5500x2"])
def test_dotted_overrides(source, override, path, expected):
    changed, plain = load_config(source, [override]), load_config(source)
    value = changed
    for key in path:
        value = value[key] if isinstance(key, int) else _get(value, key)
    assert value == expected
    assert len(changed.phases) == len(plain.phases)


def _get(value, key):
    return value[key] if isinstance(value, dict) else getattr(value, key)


def test_later_overrides_win():
    assert load_config("demo", ["run.seed=1", "run.seed=2"]).run.seed == 2


@pytest.mark.parametrize(
    ("override", "found", "suggested"),
    [
        ("modle.encoder.dim=3", "modle", "model"),
        ("data.pathh=x", "data.pathh", "path"),
        ("model.encoder.dimm=3", "model.encoder.dimm", "dim"),
        ("data.augment.noise_sdt=0", "data.augment.noise_sdt", "noise_std"),
        ("phases.1.stepz=3", "phases.1.stepz", "steps"),
        ("phases.0.losses.reconstrucion=1", "phases.0.losses.reconstrucion", "reconstruction"),
        (
            "phases.2.early_stopping.pateince=3",
            "phases.2.early_stopping.pateince",
            "patience",
        ),
        ("log.wandb.projcet=a", "log.wandb.projcet", "project"),
    ],
)
@pytest.mark.parametrize("source", [None, "demo"])
def test_a_misspelt_key_suggests_the_right_one(source, override, found, suggested):
    with pytest.raises(UserError) as caught:
        load_config(source, [override])
    assert f"{found}: unknown key; did you mean {suggested!r}?" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "owner"),
    [
        ("batch_size=8", "train_micro_batch_size_per_gpu"),
        ("data.batch_size=8", "train_micro_batch_size_per_gpu"),
        ("optim.gradient_clipping=1", "gradient_clipping"),
        ("run.precision=fp16", "fp16.enabled or bf16.enabled"),
        ("fp16.enabled=true", "fp16.enabled"),
        ("bf16.enabled=true", "bf16.enabled"),
        ("zero_optimization.stage=2", "zero_optimization"),
        ("gradient_accumulation_steps=4", "gradient_accumulation_steps"),
        ("train_micro_batch_size_per_gpu=4", "train_micro_batch_size_per_gpu"),
    ],
)
def test_keys_of_the_deepspeed_file_are_named(override, owner):
    with pytest.raises(UserError, match=re.escape(f"the DeepSpeed file sets this, as {owner!r}")):
        load_config("demo", [override])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("phases=[]", "phases"),
        ("phases=3", "phases: Input should be a valid list"),
        ("phases.0=3", "phases.0"),
        ("phases.0.steps=0", "phases.0.steps: Input should be greater than or equal to 1, found 0"),
        ("phases.0.steps=many", "phases.0.steps: Input should be a valid integer"),
        ("phases.0.trainable=[]", "phases.0.trainable: a phase must train at least one component"),
        ("phases.0.trainable=[encodr]", "phases.0.trainable.0: Input should be 'adapter'"),
        ("phases.0.lr_scale.encodr=2", "phases.0.lr_scale.encodr"),
        ("phases.0.name=joint", "distinct names"),
        ("phases.3.steps=3", "'3' is not a position in a list of 3 items; expected 0 to 2"),
        ("phases.x.steps=3", "'x' is not a position"),
        ("log.wandb.tags.0=new", "give it whole, as log.wandb.tags=[…]"),
        ("model.encoder.dim=33", "model.encoder: dim 33 over heads 4 must give an even"),
        ("model.encoder.patch_stride=9", "patch_stride 9 above patch_size 5 skips bins"),
        ("model.quantizer.decay=1.0", "model.quantizer.decay: Input should be less than 1"),
        ("data.augment.scale=[1.1, 0.9]", "scale must be [low, high]"),
        ("data.augment.channel_dropout=-0.1", "data.augment.channel_dropout"),
        ("temperature.end=0", "temperature.end: Input should be greater than 0, found 0"),
        ("run.seed=x", "run.seed: Input should be a valid integer"),
        ("model.quantizer.update_rule=sgd", "Input should be 'ema' or 'gradient', found 'sgd'"),
        ("no-equals-sign", "expected section.key=value"),
        ("=3", "expected section.key=value"),
        ("run.seed=[1", "the value is not valid YAML"),
    ],
)
def test_bad_values_are_named(override, says):
    with pytest.raises(UserError) as caught:
        load_config("demo", [override])
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["run.seed=-1"], "run.seed: Input should be greater than or equal to 0, found -1"),
        (["run.seed=99999999999999999999"], "run.seed: Input should be less than"),
        (["run.dir=''"], "run.dir: give a folder, for example runs/first"),
        (["run.dir="], "run.dir: give a folder, for example runs/first"),
        (["phases.0.lr=.inf"], "phases.0.lr: Input should be a finite number, found inf"),
        (["optim.weight_decay=.nan"], "optim.weight_decay: Input should be a finite number"),
        (
            ["monitor.extra_rules=[{name: a, metric: loss/total, threshold: .nan, message: b}]"],
            "monitor.extra_rules.0.threshold: Input should be a finite number",
        ),
        (["data.audit_seconds=1e400"], "data.audit_seconds: Input should be a finite number"),
        (
            [f"phases.1.losses.{name}=0" for name in LossWeights.model_fields],
            "phases.1.losses: all weights are 0: a phase must have at least one loss",
        ),
    ],
)
def test_what_could_not_be_trained_is_refused(overrides, says):
    with pytest.raises(UserError) as caught:
        load_config("demo", overrides)
    assert says in str(caught.value)
    assert load_config("demo", ["run.dir=."]).run.dir.name == ""


def test_all_mistakes_are_reported_at_once():
    with pytest.raises(UserError) as caught:
        load_config("demo", ["run.sead=1", "phases.0.steps=0", "fp17=1"])
    message = str(caught.value)
    assert all(key in message for key in ("run.sead", "phases.0.steps", "fp17"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: [1, 2", "not valid YAML"),
        ("- a\n- b\n", "found a list"),
        ("just words\n", "found a str"),
        ("run: {seed: 1}\nrun: {seed: 2}\n", "key 'run' appears twice"),
        ("run: {seed: 1, seed: 2}\n", "key 'seed' appears twice"),
        ("model: {encoder: {dimm: 1}}\n", "model.encoder.dimm: unknown key; did you mean 'dim'?"),
        ("!!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
)
def test_bad_files_are_named(tmp_path, text, says):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(file)
    assert str(file) in str(caught.value) and says in str(caught.value)


def test_an_unknown_preset_suggests_one():
    with pytest.raises(UserError, match="did you mean a5500x2"):
        load_config("a550x2")


def test_every_key_is_documented():
    rows = describe()
    keys = [key for key, _, _ in rows]
    assert [key for key, _, text in rows if len(text) < 5] == []
    assert len(keys) == len(set(keys))
    config = load_config("a5500x2", ["phases.0.early_stopping.patience=2"])
    leaves = set(_leaves(config.model_dump(mode="json")))
    assert "phases.early_stopping.min_delta" in leaves
    documented = {re.sub(r"^phases\.0\.", "phases.", key) for key in keys}
    assert leaves - documented == set()


def _leaves(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        elif key == "phases":
            for phase in value:
                yield from _leaves(phase, "phases.")
        else:
            yield prefix + key


@pytest.mark.parametrize("source", [None, "demo", "eeg", "a5500x2", "rqvae"])
def test_yaml_round_trip(tmp_path, source):
    config = load_config(
        source, ["phases.0.early_stopping.patience=2", "data.augment.scale=[1, 2]"]
    )
    file = tmp_path / "resolved.yaml"
    file.write_text(config.to_yaml())
    assert load_config(file) == config


def test_print_config_of_the_command_reloads_to_the_same(tmp_path, repository):
    command = [sys.executable, "train_ds.py", "--config", "demo", "--print-config"]
    overrides = ["phases.1.steps=3", "run.dir=somewhere/else"]
    done = subprocess.run(
        [*command, *overrides], cwd=repository, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    file = tmp_path / "printed.yaml"
    file.write_text(done.stdout)
    assert load_config(file) == load_config("demo", overrides)
    assert json.dumps(yaml.safe_load(done.stdout)), "plain values only"


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe\x00", "run: ü".encode("latin-1"), b"[" * 5000, b"{[a]: 1}", b"a: 2026-99-99"],
)
def test_a_file_that_is_no_yaml_is_one_message(tmp_path, content):
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"mine\.yaml: (cannot be read as text|not valid YAML)"):
        load_config(tmp_path / "mine.yaml")
