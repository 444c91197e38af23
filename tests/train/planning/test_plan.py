"""The plan, against closed forms and against what torch's own allocator hands out."""

import json

import pytest
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from b2t.cli import main
from b2t.config import load_config
from b2t.errors import UserError
from b2t.model import BrainToText
from b2t.quantize.norms import StepNorms
from b2t.train.ds_config import load_ds_config
from b2t.train.engine import parameter_groups
from b2t.train.flops import forward_flops, phase_flops
from b2t.train.phase import components
from b2t.train.planning.machines import LINKS, Assumptions, cluster, gpu_names
from b2t.train.planning.memory import partitions
from b2t.train.planning.pace import pace
from b2t.train.planning.plan import Planner
from b2t.train.planning.trace import Tracer, trace_step
from b2t.train.planning.traffic import Message, bucket_sizes, plan_traffic
from b2t.train.planning.workload import architecture, assumed, meta_model
from b2t.train.step import COUNTED

SMALL = ["model.encoder.depth=1", "model.text_decoder.depth=1", "model.quantizer.codebook_size=64"]
WORKLOAD = assumed(16, 50.0, 4.0, 2.0, 2, 16)


def a_planner(folder, world=2, *overrides, **sections):
    content = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 100_000},
        **sections,
    }
    (folder / "ds.json").write_text(json.dumps(content))
    config = load_config("demo", [*SMALL, *overrides])
    return Planner(config, load_ds_config(folder / "ds.json"), world, WORKLOAD)


@pytest.mark.parametrize(
    ("checkpointed", "reads"), [(0, "latents"), (1, "latents"), (0, "phonemes")]
)
def test_bytes_of_a_traced_step_are_those_of_the_allocator(checkpointed, reads):
    """A plain float32 step on the CPU: torch's profiler sees the same most bytes, within 1 %."""
    config = load_config("demo", [*SMALL, f"model.text_decoder.memory={reads}"])
    phase = config.phases[2]
    planned = meta_model(config, WORKLOAD)
    planned.checkpoint_activations(*[checkpointed] * 3)
    step = trace_step(phase, planned, WORKLOAD, 8, torch.float32)

    model = BrainToText(architecture(config, WORKLOAD))
    model.checkpoint_activations(*[checkpointed] * 3)
    model.quantizer.codebooks.start_random(model.quantizer.num_quantizers, False)
    model.quantizer.revival_enabled = False
    model.freeze([name for name in components(model) if name not in phase.trainable])
    model.train()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    batch = WORKLOAD.batch(8, torch.float32)
    batch.signal.normal_()
    if reads == "phonemes":  # as if each frame were another phoneme than the one before
        model.text_decoder.phonemes.room = model.frame_mask(batch.signal_mask).shape[1]
    norms = StepNorms(counts=dict.fromkeys(COUNTED, 1.0))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        output = model(batch, norms, phase.losses.model_dump())  # held, as the step holds it
        output.loss.backward()
    live, most = 0, 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    assert step.most == pytest.approx(most, rel=0.01)


def test_shares_cover_the_weights_whole_and_padded():
    config = load_config("demo", SMALL)
    model = meta_model(config, WORKLOAD)
    for world in (1, 2, 7):
        found = partitions(model, config.phases[2], config.optim, world)
        trained = sum(p.numel() for p in model.parameters())
        assert found.trained == trained
        assert trained <= world * sum(found.shares) < trained + 2 * world * len(found.shares)
        assert found.owned >= trained / world


def test_who_owns_which_weights_is_counted_one_by_one():
    """Of the flat, padded weights of each group every rank has one stretch."""
    config = load_config("demo", SMALL)
    model = meta_model(config, WORKLOAD)
    for world in (2, 3):
        found = partitions(model, config.phases[2], config.optim, world)
        owned = torch.zeros(world, dtype=torch.int64)
        groups = parameter_groups(model, config.phases[2], config.optim)
        for group, share in zip(groups, found.shares, strict=True):
            numels = [p.numel() for p in group["params"]]
            assert share % 2 == 0 and (share - 2) * world < sum(numels) <= share * world
            whose = torch.arange(sum(numels)) // share
            for number in whose.split(numels):
                owned[number.unique()] += len(number)
        assert found.owned == owned.max()


def test_parts_follow_from_precision_overlap_and_who_owns_what(tmp_path):
    zero = {"stage": 2, "reduce_bucket_size": 100_000}
    plain, overlapping, half = (
        a_planner(tmp_path, 2, **sections)
        for sections in (
            {"zero_optimization": zero},
            {"zero_optimization": {**zero, "overlap_comm": True}},
            {"zero_optimization": zero, "bf16": {"enabled": True}},
        )
    )
    phase = plain.config.phases[2]
    overlapping._traced = plain._traced
    parts = partitions(plain.model, phase, plain.config.optim, 2)
    weights = sum(p.numel() for p in plain.model.parameters())
    first, second, third = (planner.memory(phase) for planner in (plain, overlapping, half))
    assert first.gradients == 4 * parts.owned and third.gradients == 2 * parts.owned
    assert first.host == third.host == 4 * weights
    assert second.training - first.training == 4 * 100_000
    assert third.weights == pytest.approx(first.weights / 2, rel=1e-6)
    books = plain.model.quantizer.codebooks
    sent = 4 * books.embed.numel() + 8 * books.ema_count.numel()
    alone = a_planner(tmp_path, 1, zero_optimization=zero)
    alone._traced = plain._traced
    assert first.updating - alone.memory(phase).updating == sent


def test_memory_of_the_optimizer_falls_with_ranks_and_that_of_codebooks_does_not(tmp_path):
    one, four = (a_planner(tmp_path, world) for world in (1, 4))
    phase = one.config.phases[2]
    four._traced = one._traced
    alone, shared = one.memory(phase), four.memory(phase)
    assert shared.optimizer == pytest.approx(alone.optimizer / 4, rel=0.01)
    assert alone.optimizer == 12 * sum(partitions(one.model, phase, one.config.optim, 1).shares)
    assert shared.weights == pytest.approx(alone.weights, rel=0.01)
    assert shared.codebooks == alone.codebooks


@pytest.mark.parametrize("stage", [1, 2])
def test_averaged_weights_take_a_share_of_their_own(tmp_path, stage):
    zero = {"zero_optimization": {"stage": stage}}
    plain, averaged = (
        a_planner(tmp_path, 2, *override, **zero) for override in ([], ["optim.weight_ema=0.99"])
    )
    averaged._traced = plain._traced
    phase = plain.config.phases[2]
    share = sum(partitions(plain.model, phase, plain.config.optim, 2).shares)
    assert averaged.memory(phase).peak - plain.memory(phase).peak == 4 * share


def test_a_frozen_encoder_keeps_no_activations(tmp_path):
    planner = a_planner(tmp_path)
    frozen = planner.config.phases[1]
    trained = frozen.model_copy(
        update={"name": "trained", "trainable": [*frozen.trainable, "encoder"]}
    )
    kept = [planner.step(phase, 2, WORKLOAD.bins).kept for phase in (frozen, trained)]
    block = 2 * 40 * 128 * 4  # one tensor of one block: B·P·D float32
    assert kept[1] - kept[0] > 8 * block


def test_the_largest_micro_batch_fits_and_one_more_does_not(tmp_path):
    planner = a_planner(tmp_path)
    phase = planner.config.phases[2]
    assert planner.largest_micro_batch(phase, planner.memory(phase, 5).peak + 1) == 5
    assert planner.largest_micro_batch(phase, planner.memory(phase, 1).peak - 1) == 0


def test_buckets_fill_as_gradients_come_and_one_too_large_goes_alone():
    assert bucket_sizes([30, 40, 50, 200, 10], 100) == [70, 50, 200, 10]
    assert bucket_sizes([200], 100) == [200]


def test_all_gradients_are_sent_once_for_each_micro_batch_under_zero_2_alone(tmp_path):
    for stage, times in ((1, 1), (2, 2)):
        planner = a_planner(tmp_path, zero_optimization={"stage": stage})
        phase = planner.config.phases[2]
        step = planner.step(phase, 2, WORKLOAD.bins)
        messages = plan_traffic(
            planner.model, phase, planner.config.optim, planner.ds_file, 2, step
        )
        sent = sum(m.total for m in messages if m.purpose == "gradients")
        numels = dict(planner.model.named_parameters())
        assert sent == times * 4 * sum(numels[name].numel() for name, _ in step.gradients)


def test_one_rank_sends_nothing(tmp_path):
    planner = a_planner(tmp_path, 1)
    phase = planner.config.phases[2]
    step = planner.step(phase, 2, WORKLOAD.bins)
    assert plan_traffic(planner.model, phase, planner.config.optim, planner.ds_file, 1, step) == []


def test_a_ring_sends_its_closed_form():
    assert Message("", "all_reduce", 1000, 2).wire(4) == 2 * 3 / 4 * 2000
    assert Message("", "all_gather", 1000).wire(4) == 3 / 4 * 1000


def test_operations_agree_with_those_that_utilization_goes_by():
    """Two ways of counting: operators as they run, and factors on the forward of each component."""
    config = load_config("demo", SMALL)
    step = trace_step(config.phases[2], meta_model(config, WORKLOAD), WORKLOAD, 1, torch.float32)
    model = BrainToText(architecture(config, WORKLOAD))
    batch = WORKLOAD.batch(1, torch.float32)
    frames = int(model.frame_mask(batch.signal_mask).sum())
    forward = forward_flops(model, batch)
    known = phase_flops(config, config.phases[2], forward, frames, 1).per_frame * frames
    search = forward["quantizer"]  # backward of the soft usage goes over all scores twice more
    traced = sum(step.forward.flops) + sum(step.backward.flops)
    assert traced - 2 * search == pytest.approx(known, rel=0.1)


def test_what_depends_on_data_is_refused():
    with FakeTensorMode(), Tracer(iter([])), pytest.raises(UserError, match="int64 of the data"):
        torch.ones(3, dtype=torch.int64).sum().item()


def test_every_gpu_has_a_peak_and_names_are_checked():
    for name in gpu_names():
        assert cluster(name, "pcie4", "hdr", 8, Assumptions()).flops > 0
    with pytest.raises(UserError, match=r"--link 'tape'.*nvlink4"):
        cluster("T4", "tape", "hdr", 8, Assumptions())


def test_the_slowest_link_carries_a_ring_over_hosts():
    hosts = cluster("T4", "pcie4", "1gbe", 4, Assumptions(link_efficiency=1.0))
    assert hosts.rate(4) == LINKS["pcie4"] * 1e9
    assert hosts.rate(5) == LINKS["1gbe"] * 1e9


def test_a_step_takes_longer_on_a_slower_network_and_says_so(tmp_path):
    planner = a_planner(tmp_path, 16)
    phase = planner.config.phases[2]
    step = planner.step(phase, 2, WORKLOAD.bins)
    messages = plan_traffic(planner.model, phase, planner.config.optim, planner.ds_file, 16, step)
    machines = [
        cluster("H200", "nvlink4", network, 8, Assumptions()) for network in ("ndr", "1gbe")
    ]
    times = [pace(step, planner.ds_file, messages, machine, 16, 0) for machine in machines]
    assert times[0].seconds < times[1].seconds
    assert times[1].bottleneck == "communication"


def test_the_command_prints_what_json_holds(tmp_path, capsys):
    ds_file = a_planner(tmp_path, fp16={"enabled": True}).ds_file.path
    config = tmp_path / "one.yaml"
    phase = {"name": "joint", "steps": 100, "lr": 1e-3}
    tree = load_config("demo", SMALL).model_dump(mode="json", include={"model", "data"})
    config.write_text(yaml.safe_dump({**tree, "phases": [phase]}))
    arguments = [
        "plan", f"--config={config}", f"--deepspeed_config={ds_file}", "--gpu-memory=1.25",
        "--price=2", "--channels=16", "--longest=2", "--typical=2", "--sessions=2",
    ]  # fmt: skip
    assert main([*arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] and plan["largest_micro_batch"] >= 2
    assert plan["cost"] == pytest.approx(2 * 2 * plan["hours"])
    assert [s["gpus"] for s in plan["scaling"] if s["kind"] == "weak"] == [2, 8, 64, 512]
    strong = {s["gpus"]: s for s in plan["scaling"] if s["kind"] == "strong"}
    assert (strong[8]["micro_batch"], strong[8]["accumulation"]) == (1, 1)
    assert strong[64]["impossible"] == "8 trials"
    with pytest.raises(SystemExit):
        main([*arguments, "--gpus=0"])
    assert main([*arguments, "--reserve=30"]) == 2
    assert "leaves nothing of 1.25 GB" in capsys.readouterr().err
