"""Two ranks, then one, two and four: one run. And a rank that keeps the others waiting."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.ports import free_port

pytestmark = pytest.mark.distributed

DRIVER = Path(__file__).with_name("trainer_driver.py")
SMALL = """
    model.encoder.dim=16 model.encoder.depth=1 model.encoder.heads=2 model.encoder.dropout=0
    model.signal_decoder.depth=1 model.signal_decoder.heads=2 model.phoneme_head.dropout=0
    model.text_decoder.dim=16 model.text_decoder.depth=1 model.text_decoder.heads=2
    model.text_decoder.ffn_dim=16 model.text_decoder.tokenizer=byte model.text_decoder.dropout=0
    model.quantizer.codebook_size=8 model.quantizer.num_quantizers=2
    codebook_start.after_steps=2 codebook_start.frames_per_code=2 evaluation.every=100
    evaluation.decode_trials=0 phases.0.steps=9 phases.1.steps=2 phases.2.steps=2
    checkpoint.every=100 checkpoint.keep=9 log.every=1 log.progress=false log.report=false
    optim.weight_ema=0.9 monitor.enabled=false
""".split()  # noqa: SIM905
STOPPED = 75


@pytest.fixture
def ds_path(ds_file, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(ds_file(train_micro_batch_size_per_gpu=4)))
    return tmp_path / "ds.json"


def start(world, orders, *arguments):
    port = free_port()
    processes = []
    for rank in range(world):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "B2T_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }
        command = [sys.executable, str(DRIVER), json.dumps(orders), *map(str, arguments)]
        processes.append(
            subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return processes


def finish(processes, status):
    texts = [process.communicate(timeout=400)[0] for process in processes]
    found = [process.returncode for process in processes]
    assert found == [status] * len(processes), "\n".join(texts)[-4000:]
    return texts[0]


def arguments(data, run, ds_path):
    return ["--config", "demo", "--deepspeed_config", ds_path, f"data.path={data}",
            f"run.dir={run}", *SMALL]  # fmt: skip


def losses(run):
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return {r["step"]: r["loss/total"] for r in records if "loss/total" in r}


def weights(run, step):
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "weights.safetensors")


def test_two_ranks_then_one_then_two_then_four(tiny_trials, tmp_path, ds_path):
    whole, changing = tmp_path / "whole", tmp_path / "changing"
    finish(start(2, {}, *arguments(tiny_trials, whole, ds_path)), 0)
    again = arguments(tiny_trials, changing, ds_path)
    finish(start(2, {"stop": 2}, *again), STOPPED)
    text = finish(start(1, {"stop": 6}, *again), STOPPED)
    assert "the global batch stays 8 = 4 × 2 accumulated × 1" in text
    text = finish(start(2, {"stop": 10}, *again), STOPPED)
    assert "the global batch stays" not in text, "two ranks share it as the file says"
    text = finish(start(4, {}, *again), 0)
    assert "the global batch stays 8 = 2 × 1 accumulated × 4" in text

    ours, theirs = losses(changing), losses(whole)
    assert ours.keys() == theirs.keys() == set(range(1, 14))
    assert all(ours[step] == theirs[step] for step in range(1, 4)), "until the first change"
    assert ours == pytest.approx(theirs, rel=2e-4), "and within rounding after it"
    last = weights(changing, 13), weights(whole, 13)
    # A key's bias has no gradient but rounding, which Adam makes as large as any other.
    for name in (n for n in last[0] if not n.endswith("k_proj.bias")):
        torch.testing.assert_close(last[0][name], last[1][name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_number_of_ranks_that_does_not_divide_is_refused(tiny_trials, tmp_path, ds_path):
    again = arguments(tiny_trials, tmp_path / "run", ds_path)
    finish(start(1, {"stop": 1}, *again), STOPPED)
    text = finish(start(3, {}, *again), 2)
    assert "global batch 4 on 1 ranks, which 3 ranks cannot share equally" in text


def test_a_rank_that_hangs_is_waited_for_only_so_long(tiny_trials, tmp_path, ds_path):
    timeout = 25
    processes = start(
        2,
        {"sleep": 3, "rank": 1},
        *arguments(tiny_trials, tmp_path / "run", ds_path),
        f"stability.collective_timeout_s={timeout}",
    )
    try:
        text, _ = processes[0].communicate(timeout=300)
        assert processes[0].returncode == 4, text
        assert processes[1].poll() is None, "it still sleeps"
    finally:
        processes[1].kill()
        processes[1].communicate()
    message = next(line for line in text.splitlines() if "error:" in line)
    assert "rank 0 on" in message and "opening step 4 of phase tokenizer" in message
    assert f"waited {timeout} s for the other ranks (sum of" in message
    assert "Traceback" not in text


def test_a_rank_that_nobody_joins_waits_only_so_long(tmp_path, ds_path):
    processes = start(
        2, {}, *arguments(tmp_path, tmp_path / "run", ds_path), "stability.collective_timeout_s=4"
    )
    processes[1].kill()
    processes[1].communicate()
    text, _ = processes[0].communicate(timeout=300)
    assert processes[0].returncode == 4, text
    assert "waited 4 s for the other ranks to join at 127.0.0.1:" in text
    assert "Traceback" not in text
