"""Checks before the first step, and the dry batch that must leave no trace."""

import errno
import os
import re
import shutil
import threading
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from b2t.config import load_config
from b2t.errors import UserError
from b2t.records import require_writable
from b2t.train import startup
from b2t.train.admission import require_same_checkpoint
from b2t.train.build import build
from b2t.train.callbacks import Callback
from b2t.train.checkpoint import Checkpoint
from b2t.train.dry_batch import DryBatch, out_of_memory
from b2t.train.memory import estimate_memory
from b2t.train.ranks import Ranks
from b2t.train.trainer import Trainer
from tests.train.small_runs import SMALL, zero2

Usage = namedtuple("Usage", "total used free")

SETTINGS = """
    codebook_start.after_steps=2 evaluation.every=3 phases.0.steps=5 phases.1.steps=2
    phases.2.steps=2 checkpoint.every=3 log.every=1
""".split()  # noqa: SIM905


@pytest.fixture
def ds_file(tmp_path):
    return zero2(tmp_path, 4, 2)


class Losses(Callback):
    """Keeps every logged number that does not measure time."""

    def __init__(self):
        self.records = []

    def on_log(self, trainer, record):
        self.records.append({k: v for k, v in record.items() if not re.match("time|through", k)})

    on_eval = on_log


def trainer_for(data, run, ds_file, ranks, *overrides):
    places = [f"data.path={data}", f"run.dir={run}"]
    config = load_config("demo", [*places, *SMALL, *SETTINGS, *overrides])
    torch.manual_seed(len(overrides))  # results must not depend on what was drawn before
    return Trainer(config, ds_file, build(config), ranks, [Losses()])


def dry(trainer):
    return DryBatch(trainer.config, trainer.materials, trainer.ds_file, trainer.ranks)


def checked(trainer):
    materials, number = trainer.materials, trainer.progress.phase
    startup.check_start(trainer.config, number, materials, trainer.ds_file, trainer.ranks)


def fitted(*arguments):
    trainer = trainer_for(*arguments)
    trainer.store.folder.mkdir(parents=True)
    checked(trainer)
    trainer.fit()
    return trainer


def assert_bitwise(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_training_is_bitwise_the_same_with_and_without(tiny_trials, tmp_path, ds_file, one_rank):
    runs = [
        fitted(tiny_trials, tmp_path / name, ds_file, one_rank, f"stability.dry_batch={name}")
        for name in ("true", "false")
    ]
    assert_bitwise(runs[0].masters, runs[1].masters)
    assert_bitwise(*(dict(run.model.named_buffers()) for run in runs))
    assert runs[0].callbacks[0].records == runs[1].callbacks[0].records


def test_a_dry_batch_computes_and_leaves_no_trace(tiny_trials, tmp_path, ds_file, one_rank):
    trainer = trainer_for(tiny_trials, tmp_path, ds_file, one_rank)
    model = trainer.model
    shapes, gradients = [], []
    hooks = [
        model.encoder.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape)),
        list(model.signal_decoder.parameters())[-1].register_hook(
            lambda g: gradients.append(g.norm())
        ),
    ]
    before = {n: t.clone() for n, t in model.state_dict().items()}
    wanted = {n: p.requires_grad for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    dry(trainer).try_phases(trainer.config.phases[::-1])  # the last one freezes
    for hook in hooks:
        hook.remove()
    assert_bitwise(model.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == wanted
    assert all(p.grad is None for p in model.parameters())
    assert not model.quantizer.initialized
    lengths = sorted(trainer.plan.lengths)[-4:]
    assert len(shapes) >= 3 and all(shape[0] == 4 for shape in shapes)
    assert all(shape[1] >= lengths[-1] for shape in shapes), "the longest trial is in the batch"
    assert len(gradients) == 3 and all(norm > 0 for norm in gradients), "one backward per phase"


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_dry_batch_runs_in_the_precision_of_the_engine(
    tiny_trials, tmp_path, ds_file, one_rank, precision
):
    import dataclasses

    trainer = trainer_for(
        tiny_trials, tmp_path, dataclasses.replace(ds_file, precision=precision), one_rank
    )
    seen = set()
    weight = next(trainer.model.signal_decoder.parameters())
    trainer.model.encoder.register_forward_pre_hook(lambda m, args: seen.add(weight.dtype))
    dry(trainer).try_phases(trainer.config.phases[:1])
    assert seen == {{"fp16": torch.float16, "bf16": torch.bfloat16}[precision]}
    assert weight.dtype == torch.float32


def test_out_of_memory_says_where_and_what_to_do(
    tiny_trials, tmp_path, ds_file, one_rank, monkeypatch
):
    trainer = trainer_for(tiny_trials, tmp_path, ds_file, one_rank)

    def fail(*arguments, **keywords):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(type(trainer.model), "forward", fail)
    with pytest.raises(UserError) as caught:
        checked(trainer)
    text = str(caught.value)
    assert "phase tokenizer with the 4 longest trials" in text and "Tried to allocate 9 GiB" in text
    assert "train_micro_batch_size_per_gpu (now 4)" in text and str(ds_file.path) in text
    assert all(p.grad is None for p in trainer.model.parameters())


def test_other_errors_are_not_called_out_of_memory():
    assert not out_of_memory(RuntimeError("shapes do not match"))
    assert out_of_memory(
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes")
    )


def test_room_for_less_than_one_checkpoint_is_refused(monkeypatch, tmp_path):
    warned = []
    monkeypatch.setattr(startup.log, "warning", lambda text, *args: warned.append(text % args))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 2 * 2**30))
    with pytest.raises(UserError, match=r"2\.00 GiB free, a checkpoint takes up to 2\.50 GiB"):
        startup.require_disk(tmp_path, 5 * 2**29, 3)
    startup.require_disk(tmp_path, 2**29, 3)
    assert not warned
    startup.require_disk(tmp_path, 2**30, 3)
    assert "up to 3 are on disk at once" in warned[0]


def parts():
    model = nn.Module()
    model.encoder = nn.Linear(10, 10, bias=False)
    model.signal_decoder = nn.Linear(10, 5, bias=False)
    model.register_buffer("codes", torch.zeros(7))
    return model


@pytest.mark.parametrize(
    ("trainable", "precision", "stage", "offload", "world", "expected"),
    [
        (["encoder", "signal_decoder"], "fp16", 2, False, 2, (300, 150, 900, 28)),
        (["encoder"], "fp16", 1, False, 2, (300, 200, 600, 28)),
        (["encoder", "adapter"], "fp32", 2, False, 1, (600, 400, 1200, 28)),
        (["encoder"], "fp32", 0, False, 1, (600, 400, 800, 28)),
        (["encoder", "signal_decoder"], "bf16", 2, True, 4, (300, 76, 0, 28)),
        (["encoder"], "fp16", 3, False, 2, (150, 100, 600, 28)),
    ],
)
def test_memory_by_hand(trainable, precision, stage, offload, world, expected):
    ds_file = SimpleNamespace(precision=precision, zero_stage=stage, offload=offload)
    phase = SimpleNamespace(trainable=trainable)
    memory = estimate_memory(parts(), phase, ds_file, world)
    found = (memory.weights, memory.gradients, memory.optimizer, memory.buffers)
    assert found == expected and memory.total == sum(expected)


def test_the_size_of_a_checkpoint_is_that_of_the_files(tiny_trials, tmp_path, ds_file, one_rank):
    trainer = fitted(tiny_trials, tmp_path, ds_file, one_rank, "stability.dry_batch=false")
    newest = trainer.store.folder / f"step-{trainer.store.steps()[-1]:08d}"
    written = sum(file.stat().st_size for file in newest.glob("*.safetensors"))
    estimate = startup.checkpoint_bytes(trainer.model)
    assert 0.8 * estimate < written < 1.2 * estimate


class Others(Ranks):
    """A rank whose neighbours answer what a test says."""

    def __init__(self, answers):
        super().__init__(0, 1 + len(answers), 0, torch.device("cpu"))
        self.answers = answers

    def gather(self, value):
        return [value, *self.answers]


def test_ranks_that_run_something_else_are_named(ds_file):
    config = load_config("demo")
    same = startup.identity(config, ds_file)
    startup.require_same_everywhere(Others([("b", same)]), config, ds_file)
    other = startup.identity(load_config("demo", ["optim.eps=0.5"]), ds_file)
    with pytest.raises(UserError, match=r"rank 2 on c: config optim.eps: 0.5, rank 0 has 1e-08"):
        startup.require_same_everywhere(Others([("b", same), ("c", other)]), config, ds_file)
    old = {**same, "b2t sources": "0"}
    with pytest.raises(UserError, match="rank 1 on b: b2t sources: 0, rank 0 has"):
        startup.require_same_everywhere(Others([("b", old)]), config, ds_file)


def test_the_hash_of_sources_sees_every_byte_and_name(tmp_path):
    package = SimpleNamespace(__file__=str(tmp_path / "__init__.py"))
    (tmp_path / "__init__.py").write_text("a")
    (tmp_path / "x.py").write_text("b")
    first = startup.hash_sources(package)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "x.pyc").write_text("c")
    assert startup.hash_sources(package) == first
    (tmp_path / "x.py").rename(tmp_path / "y.py")
    renamed = startup.hash_sources(package)
    (tmp_path / "y.py").write_text("c")
    assert len({first, renamed, startup.hash_sources(package)}) == 3


def test_a_run_folder_that_can_be_written_is_left_as_it_was(tmp_path):
    require_writable(tmp_path / "not" / "yet" / "there")
    require_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch, mounted):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=r"cannot be written \(.*file is not a folder\)"):
            require_writable(folder)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"link is not a folder\); choose another run\.dir"):
        require_writable(tmp_path / "link")
    for number in (errno.EROFS, errno.EACCES):

        def refuse(*_, number=number):
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, "mkdir", refuse)
            with pytest.raises(UserError, match=re.escape(os.strerror(number))):
                require_writable(tmp_path / "run")
    with pytest.raises(UserError, match=r"run: cannot be written \(Read-only file system\)"):
        require_writable(mounted("ro,size=64k") / "run")


def test_all_ranks_hear_that_rank_0_cannot_write(tmp_path):
    class Second(Ranks):
        def from_main(self, value):
            assert value is None, "only rank 0 has looked"
            return "run.dir=x: cannot be written"

    with pytest.raises(UserError, match="cannot be written"):
        startup.require_folder(Second(1, 2, 1, torch.device("cpu")), tmp_path)


def test_ranks_that_find_different_checkpoints_are_refused():
    def found(step):
        return Checkpoint({}, {}, {"progress": {"step": step}})

    require_same_checkpoint(Others([("b", None)]), None, "runs/x")
    require_same_checkpoint(Others([("b", 7)]), found(7), "runs/x")
    for other, mine, says in [
        (None, found(7), "step 7, rank 1 on b none"),
        (7, None, "none, rank 1 on b step 7"),
        (4, found(7), "step 7, rank 1 on b step 4"),
    ]:
        with pytest.raises(UserError, match=f"{says}.*all hosts share"):
            require_same_checkpoint(Others([("b", other)]), mine, "runs/x")


class Meeting:
    """Two ranks as threads, that hand each other objects as ranks do."""

    def __init__(self):
        self.barrier = threading.Barrier(2)
        self.box = [None, None]

    def rank(self, number):
        meeting = self

        class Member(Ranks):
            def barrier(self):
                meeting.barrier.wait(10)

            def gather(self, value):
                meeting.box[number] = value
                meeting.barrier.wait(10)
                values = list(meeting.box)
                meeting.barrier.wait(10)
                return values

            def from_main(self, value):
                return self.gather(value)[0]

        return Member(number, 2, 0, torch.device("cpu"))


def shared_by_two(folder):
    """What two ranks say of a run folder, by rank."""
    meeting, said = Meeting(), {}

    def look(number):
        try:
            startup.require_shared_folder(meeting.rank(number), folder, patience_s=0.3)
        except UserError as error:
            said[number] = str(error)

    threads = [threading.Thread(target=look, args=(n,), name=f"rank {n}") for n in (0, 1)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(20)
    return said


def test_a_shared_run_folder_is_left_as_it_was(tmp_path):
    assert shared_by_two(tmp_path / "deep" / "run") == {}
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_that_one_host_does_not_see_is_refused(tmp_path, monkeypatch):
    exists = Path.exists

    def seen(path):
        hidden = path.name.startswith(".b2t-shared") and threading.current_thread().name == "rank 1"
        return exists(path) and not hidden

    monkeypatch.setattr(Path, "exists", seen)
    said = shared_by_two(tmp_path / "run")
    assert said.keys() == {0, 1} and said[0] == said[1]
    assert "rank 1 on" in said[0] and "did not see it within 0.3 s" in said[0]
    assert list(tmp_path.iterdir()) == []
