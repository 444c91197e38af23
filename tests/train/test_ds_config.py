import json
import re

import pytest

from b2t.errors import UserError
from b2t.train.ds_config import load_ds_config

VALID = {
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 2},
}


@pytest.fixture
def write(tmp_path):
    def _write(content):
        file = tmp_path / "ds.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return file

    return _write


SHIPPED = [
    "zero2_fp16", "zero2_bf16", "zero2_cpu", "zero2_offload", "zero3_fp16", "zero3_cpu",
]  # fmt: skip


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_pass(repository, name):
    ds_file = load_ds_config(repository / "ds_configs" / f"{name}.json")
    expected = {"bf16": "bf16", "cpu": "fp32"}.get(name.split("_")[1], "fp16")
    assert ds_file.precision == expected and ds_file.zero_stage == int(name[4])
    assert ds_file.offload == (name == "zero2_offload")
    assert ds_file.clipping == 1.0


def test_no_other_file_is_shipped_unchecked(repository):
    names = {file.stem for file in (repository / "ds_configs").iterdir()}
    assert names == set(SHIPPED)


def test_summary(write):
    ds_file = load_ds_config(write({**VALID, "bf16": {"enabled": True}}))
    assert (ds_file.micro_batch, ds_file.accumulation, ds_file.precision) == (8, 4, "bf16")
    assert [ds_file.global_batch(world) for world in (1, 2, 4)] == [32, 64, 128]
    assert ds_file.raw == {**VALID, "bf16": {"enabled": True}}


@pytest.mark.parametrize(
    ("key", "suggested"),
    [
        ("gradient_cliping", "gradient_clipping"),
        ("fp17", "fp16"),
        ("bfloat16", "bf16"),
        ("zero_optimisation", "zero_optimization"),
        ("train_micro_batch_size_per_gpus", "train_micro_batch_size_per_gpu"),
        ("gradient_acumulation_steps", "gradient_accumulation_steps"),
        ("wall_clock_brakedown", "wall_clock_breakdown"),
    ],
)
def test_misspelt_top_level_keys(write, key, suggested):
    with pytest.raises(UserError) as caught:
        load_ds_config(write({**VALID, key: 1}))
    assert f"{key}: unknown key" in str(caught.value)
    assert f"did you mean {suggested!r}?" in str(caught.value)


@pytest.mark.parametrize(
    ("section", "key", "suggested"),
    [
        ("zero_optimization", "stag", "stage"),
        ("zero_optimization", "overlap_com", "overlap_comm"),
        ("zero_optimization", "reduce_bucketsize", "reduce_bucket_size"),
        ("fp16", "loss_scale_windw", "loss_scale_window"),
        ("fp16", "enable", "enabled"),
        ("bf16", "enabeld", "enabled"),
    ],
)
def test_misspelt_nested_keys(write, section, key, suggested):
    content = {**VALID, section: {**VALID.get(section, {}), key: 1}}
    with pytest.raises(UserError) as caught:
        load_ds_config(write(content))
    assert f"{section}.{key}: unknown key; did you mean {suggested!r}?" in str(caught.value)


def test_a_misspelt_key_two_levels_down(write):
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memry": True}}
    with pytest.raises(UserError, match=r"zero_optimization\.offload_optimizer\.pin_memry"):
        load_ds_config(write({**VALID, "zero_optimization": zero}))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("train_batch_size", 64, "micro-batch × accumulation × ranks"),
        ("optimizer", {"type": "AdamW"}, "optim."),
        ("scheduler", {"type": "WarmupLR"}, "warmup_steps"),
        ("wandb", {"enabled": True}, "log.wandb"),
    ],
)
def test_keys_owned_elsewhere(write, key, value, says):
    with pytest.raises(UserError, match=rf"{key}: leave it out.*{re.escape(says)}"):
        load_ds_config(write({**VALID, key: value}))


@pytest.mark.parametrize(
    ("number", "says"),
    [("Infinity", "Infinity is no number in JSON; .*1e9"), ("1e999", "found inf, expected a num")],
)
def test_clipping_has_an_end(write, number, says):
    text = json.dumps(VALID).replace('"gradient_clipping": 1.0', f'"gradient_clipping": {number}')
    with pytest.raises(UserError, match=says):
        load_ds_config(write(text))


@pytest.mark.parametrize(
    "text",
    [
        '{"gradient_clipping": 1.0, "gradient_clipping": 5.0}',
        '{"zero_optimization": {"stage": 2, "stage": 3}}',
    ],
)
def test_duplicate_keys(write, text):
    with pytest.raises(UserError, match="appears twice"):
        load_ds_config(write(text))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"train_micro_batch_size_per_gpu": "8"}, "train_micro_batch_size_per_gpu: found '8'"),
        ({"train_micro_batch_size_per_gpu": 0}, "found 0, expected a whole number from 1"),
        ({"train_micro_batch_size_per_gpu": True}, "found True"),
        (
            {"zero_optimization": {"stage": 2, "allgather_bucket_size": 0}},
            "zero_optimization.allgather_bucket_size: found 0",
        ),
        ({"train_micro_batch_size_per_gpu": "auto"}, "found 'auto'"),
        ({"gradient_accumulation_steps": 1.5}, "gradient_accumulation_steps: found 1.5"),
        ({"gradient_accumulation_steps": None}, "gradient_accumulation_steps: found None"),
        ({"gradient_clipping": 0}, "gradient_clipping: found 0"),
        ({"gradient_clipping": "1.0"}, "gradient_clipping: found '1.0'"),
        ({"gradient_clipping": None}, "gradient_clipping: found None"),
        ({"gradient_clipping": float("nan")}, "NaN is no number in JSON"),
        ({"zero_optimization": True}, "zero_optimization: found True"),
        ({"zero_optimization": {"stage": "two"}}, "zero_optimization.stage"),
        ({"zero_optimization": {"stage": 7}}, "zero_optimization.stage"),
        ({"zero_optimization": {"stage": 0}}, "stage: found 0, expected 1, 2 or 3"),
        ({"zero_optimization": {}}, "stage: found 0, expected 1, 2 or 3"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.offload_optimizer: not supported with stage 3; leave it out, or use",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
            "zero_optimization.offload_param: not supported with stage 3",
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
            "zero_optimization.zero_hpz_partition_size: found 2; ",
        ),
        ({"fp16": True}, "fp16: found True, expected a JSON object"),
        ({"fp16": {"enabled": "perhaps"}}, "fp16.enabled"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "both enabled"),
        ({"fp16": {"enabled": True, "min_loss_scale": 0}}, "fp16.min_loss_scale must be > 0"),
        ({"csv_monitor": True}, "csv_monitor: found True, expected a JSON object"),
        ({"csv_monitor": {"nonsense": 3}}, "nonsense"),
        ({"comms_logger": [1]}, "comms_logger: found [1], expected a JSON object"),
        ({"comms_logger": {"nonsense": 3}}, "nonsense"),
        ({"communication_data_type": "fp12"}, "communication_data_type: found 'fp12', expected fp"),
        ({"communication_data_type": 16}, "communication_data_type: found 16"),
        ({"data_types": {"grad_accum_dtype": "fp99"}}, "data_types.grad_accum_dtype: found 'fp99'"),
        ({"steps_per_print": "ten"}, "steps_per_print: found 'ten', expected a whole number"),
        ({"steps_per_print": 0}, "steps_per_print: found 0"),
        ({"gradient_predivide_factor": 0}, "gradient_predivide_factor: found 0, expected a number"),
        ({"gradient_predivide_factor": "x"}, "gradient_predivide_factor: found 'x'"),
        ({"prescale_gradients": "perhaps"}, "prescale_gradients: found 'perhaps', expected true"),
        ({"wall_clock_breakdown": [1]}, "wall_clock_breakdown: found [1]"),
        ({"activation_checkpointing": "x"}, "activation_checkpointing: found 'x'"),
        ({"flops_profiler": [1]}, "flops_profiler: found [1]"),
        ({"compile": {"nonsense": 3}}, "nonsense"),
        ({"log_level": "loud"}, "loud"),
        ({"gradient_allreduce_op": "xor"}, "gradient_allreduce_op"),
    ],
)
def test_wrong_values(write, change, says):
    file = write({**VALID, **change})
    with pytest.raises(UserError) as caught:
        load_ds_config(file)
    assert says in str(caught.value) and str(file) in str(caught.value)


@pytest.mark.parametrize("key", VALID)
def test_missing_keys(write, key):
    with pytest.raises(UserError, match=key):
        load_ds_config(write({name: value for name, value in VALID.items() if name != key}))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '{"a": 1,}'])
def test_not_a_json_object(write, text):
    with pytest.raises(UserError, match="JSON"):
        load_ds_config(write(text))


def test_missing_file(tmp_path):
    with pytest.raises(
        UserError, match=r"none.json: no such file\. Shipped with b2t: zero2_bf16, "
    ):
        load_ds_config(tmp_path / "none.json")
    with pytest.raises(UserError, match=r"did you mean zero2_fp16\?"):
        load_ds_config("ds_configs/zero2_f16.json")


def test_shipped_files_go_by_name_from_anywhere_and_after_files_of_the_user(
    repository, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in SHIPPED:
        assert load_ds_config(name).path.resolve() == repository / "ds_configs" / f"{name}.json"
    (tmp_path / "zero2_cpu").write_text(json.dumps({**VALID, "gradient_clipping": 3.0}))
    assert load_ds_config("zero2_cpu").clipping == 3.0


def test_a_folder_and_binary_content_are_clear_errors(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_ds_config(tmp_path)
    file = tmp_path / "binary.json"
    for content in (b"\xff\xfe\x00\x01", b'{"a":' * 5000):
        file.write_bytes(content)
        with pytest.raises(UserError, match="not a valid JSON file"):
            load_ds_config(file)


def test_monitors_of_deepspeed(write, monkeypatch):
    assert load_ds_config(write({**VALID, "csv_monitor": {"enabled": True}})).raw["csv_monitor"][
        "enabled"
    ]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        load_ds_config(write({**VALID, "tensorboard": {"enabled": True}}))
    load_ds_config(write({**VALID, "tensorboard": {"enabled": False}}))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    load_ds_config(write({**VALID, "tensorboard": {"enabled": True}}))
