"""WandB offline: what it wrote is read back from its files."""

import json
import struct
from types import SimpleNamespace

import pytest
import torch

from b2t.config import Config
from b2t.evaluate.results import Prediction
from b2t.monitor.alerts import Alert
from b2t.monitor.context import StepContext
from b2t.monitor.monitors import Monitors
from b2t.monitor.reconstruction import ReconstructionMonitor
from b2t.monitor.rvq import RVQMonitor
from b2t.quantize import ResidualVQ
from b2t.train.best import Best
from b2t.train.progress import Progress
from b2t.train.wandb_run import Wandb


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.fixture
def monitors():
    """Monitors that have seen two steps of 3 layers × 8 codes."""
    torch.manual_seed(0)
    quantizer = ResidualVQ(4, 8, 3, kmeans_init=False, seed=0)
    found = Monitors(
        {"quantizer": RVQMonitor(quantizer, 5), "reconstruction": ReconstructionMonitor(50.0)}, ()
    )
    for _ in (1, 2):
        target = torch.randn(2, 90, 6)
        mask = torch.ones(2, 90, dtype=torch.bool)
        mask[0, 60:] = False
        found.update(
            StepContext(
                phase="p",
                counts=torch.randint(0, 9, (3, 8)),
                update_report=SimpleNamespace(applied=True, revived=[0, 0, 0]),
                reconstruction=target + 0.1,
                target=target,
                signal_mask=mask,
            )
        )
    return found


def trainer_in(folder):
    config = Config()
    config.run.dir = folder
    progress = Progress(step=40, best=Best(best=1.25, best_step=30))
    return SimpleNamespace(
        config=config,
        ds_file=SimpleNamespace(raw={"train_micro_batch_size_per_gpu": 8}),
        materials=SimpleNamespace(info=SimpleNamespace(simulated=True)),
        progress=progress,
        phase=config.phases[2],
        store=SimpleNamespace(folder=folder / "checkpoints"),
        outcome="finished",
    )


def chunks(content):
    """Payloads of WandB's file: a header, then a LevelDB log in blocks of 32 KiB."""
    position, parts = 7, b""
    while position < len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def records(folder):
    """All records of all offline runs in a folder, oldest run first."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # as at the end of a process: what is still on its way to the file arrives
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    return [
        wandb_internal_pb2.Record.FromString(chunk)
        for file in files
        for chunk in chunks(file.read_bytes())
    ]


def key(item):
    return item.key or "/".join(item.nested_key)


def history(folder):
    rows = [r.history.item for r in records(folder) if r.WhichOneof("record_type") == "history"]
    return [{key(i): json.loads(i.value_json) for i in items} for items in rows]


def test_a_run_and_its_resume(tmp_path, monitors):
    trainer = trainer_in(tmp_path)
    trainer.config.log.wandb.tags = ["small", "test"]
    first = Wandb(trainer.config.log, tmp_path, monitors)
    first.on_start(trainer)
    first.on_log(trainer, {"loss/total": 2.5, "reconstruction/snr_db": float("nan")})
    first.on_eval(trainer, {"val/loss": 1.25})
    first.on_eval(trainer, {"val/wer": 0.5})
    first.on_decode(
        trainer,
        [
            Prediction("s/0/1", "s", 1.5, "yes we can", "yes I can", "no"),
            Prediction("s/0/2", "s"),
        ],
    )
    first.on_alert(trainer, Alert("warning", "too low", "raise it", {"x": 1.0}))
    first.on_phase_end(trainer, trainer.phase)
    state = json.loads(json.dumps(first.state_dict()))
    first.on_end(trainer)

    again = Wandb(trainer.config.log, tmp_path)
    again.load_state_dict(state)
    again.on_start(trainer)
    trainer.progress.step = 60
    again.on_log(trainer, {"loss/total": 2.0})
    again.on_end(trainer)

    found = records(tmp_path)
    runs = [r.run for r in found if r.WhichOneof("record_type") == "run"]
    assert {run.run_id for run in runs} == {state["run_id"]}
    assert list(runs[0].tags) == ["small", "test"]
    config = {c.key: json.loads(c.value_json) for c in runs[0].config.update}
    assert config["b2t"]["phases"][2]["steps"] == 20_000
    assert config["simulated_data"] is True
    assert config["units"]["memory/*_gib"] == "GiB"

    rows = history(tmp_path)
    assert [(row["step"], row["loss/total"]) for row in rows if "loss/total" in row] == [
        (40, 2.5),
        (60, 2.0),
    ]
    pictures = [name for row in rows for name in row if name.startswith("figures/")]
    assert sorted({name.split("/")[1] for name in pictures}) == [
        "layer_correlation",
        "reconstruction",
        "usage",
    ]
    assert len([row for row in rows if any("figures/usage" in n for n in row)]) == 1

    summary = {}
    for record in found:
        for item in record.summary.update:
            summary[key(item)] = json.loads(item.value_json)
    assert summary["best/value"] == 1.25 and summary["best/step"] == 30
    assert summary["best/folder"].endswith("checkpoints/best")
    assert [r.alert.title for r in found if r.WhichOneof("record_type") == "alert"] == ["too low"]
    metrics = {r.metric.name or r.metric.glob_name: r.metric for r in found if r.metric.ByteSize()}
    assert metrics["val/loss"].summary.min and metrics["val/snr_db"].summary.max
    assert metrics["*"].step_metric == "step"


def test_pictures_and_tables_are_files(tmp_path, monitors):
    from PIL import Image

    trainer = trainer_in(tmp_path)
    run = Wandb(trainer.config.log, tmp_path, monitors)
    run.on_start(trainer)
    run.on_eval(trainer, {"val/loss": 1.0})
    run.on_decode(trainer, [Prediction("s/0/1", "s", 1.5, "yes we can", "yes I can", "no")])
    run.on_decode(trainer, [Prediction("s/0/1", "s")])
    run.on_end(trainer)
    (media,) = tmp_path.glob("wandb/offline-run-*/files/media")
    pictures = list(media.glob("images/**/*.png"))
    assert len(pictures) == 3
    assert all(Image.open(p).width > 300 for p in pictures)
    (table,) = media.glob("table/**/*.json")
    content = json.loads(table.read_text("utf-8"))
    assert content["columns"] == ["phase", "step", "row", "reference", "hypothesis"]
    assert content["data"] == [["joint", 40, "s/0/1", "yes we can", "yes I can"]]


def test_without_a_quantizer_only_the_signal_is_drawn(tmp_path, monitors):
    del monitors.monitors["quantizer"]
    trainer = trainer_in(tmp_path)
    run = Wandb(trainer.config.log, tmp_path, monitors)
    run.on_start(trainer)
    run.on_eval(trainer, {"val/loss": 1.0})
    run.on_end(trainer)
    (picture,) = tmp_path.glob("wandb/offline-run-*/files/media/images/**/*.png")
    assert "reconstruction" in picture.name
