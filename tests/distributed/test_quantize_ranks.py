"""Two gloo ranks against one process that sees the frames of both."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from b2t.data.batches import Batch
from b2t.model import BrainToText, BrainToTextConfig
from b2t.quantize import ResidualVQ, StepNorms

pytestmark = pytest.mark.distributed

STEPS = 12


def latents(seed, B=6, P=20, D=6):
    """One step's frames [B, P, D] and mask; the middle of the rows goes to rank 1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, P, D, generator=generator)
    mask = torch.rand(B, P, generator=generator) > 0.3
    mask[4:] &= torch.rand(2, P, generator=generator) > 0.6
    return x, mask


def share(tensor, rank, world):
    """Rank 0 gets four rows of six, rank 1 two."""
    return tensor if world == 1 else tensor[:4] if rank == 0 else tensor[4:]


def build(**options):
    options = {"codebook_size": 16, "num_quantizers": 3, "revival_every": 3, **options}
    return ResidualVQ(6, **{"decay": 0.6, "revival_threshold": 0.5, "seed": 5, **options})


def start(quantizer, rank, world, batches=6):
    pairs = [tuple(share(t, rank, world) for t in latents(100 + i)) for i in range(batches)]
    return quantizer.initialize(pairs, progress=False, frames_per_code=1e9)


def train(quantizer, rank, world, first=0, steps=STEPS):
    revived, codes = [], []
    for step in range(first, first + steps):
        x, mask = (share(t, rank, world) for t in latents(step))
        out = quantizer(x + 0.3 * step, mask)
        report = quantizer.update(out.stats)
        revived.append(report.revived)
        codes.append(report.counts)
    return torch.tensor(revived), torch.stack(codes)


def state(quantizer):
    return {name: value.clone() for name, value in quantizer.state_dict().items()}


def trained(rank, world, **options):
    quantizer = build(**options)
    report = start(quantizer, rank, world)
    started = state(quantizer)
    revived, counts = train(quantizer, rank, world)
    return {
        "started": started,
        "frames": report.frames,
        "state": state(quantizer),
        "checksum": quantizer.checksum(),
        "revived": revived,
        "counts": counts,
    }


def losses_and_gradients(rank, world, micro_batches=1, **options):
    """Losses, and gradients as data-parallel training averages them, for all six rows."""
    quantizer = build(**options, kmeans_init=False)
    x, mask = latents(3)
    frames = mask.sum() / (world * micro_batches)
    mine = [share(t, rank, world) for t in (x, mask)]
    parts = list(zip(*(t.chunk(micro_batches) for t in mine), strict=True))
    usage = None
    if micro_batches > 1:
        usage = sum(quantizer.soft_usage(*part) for part in parts).all_reduce()
    norms = StepNorms({"frames": frames}, usage, micro_batches)
    losses = dict.fromkeys(("commitment", "diversity", "perplexity", "codebook"), 0.0)
    grads = []
    for part_x, part_mask in parts:
        part_x = part_x.clone().requires_grad_()
        out = quantizer(part_x, part_mask, norms=norms)
        loss = sum(out.losses.values()) / (micro_batches * world)
        loss.backward()
        grads.append(part_x.grad)
        for name, value in out.losses.items():
            losses[name] += value.detach() / micro_batches
    return {
        "losses": losses,
        "grad": torch.cat(grads),
        "weight": None if quantizer.codebooks.weight is None else quantizer.codebooks.weight.grad,
    }


def frozen_quantizer(rank, world, micro_batches):
    """What an encoder learns from the regularisers of codebooks that its phase has frozen."""
    torch.manual_seed(0)
    quantizer = {"codebook_size": 8, "num_quantizers": 2, "kmeans_init": False}
    model = BrainToText(
        BrainToTextConfig(
            channels=6,
            sessions=["a"],
            encoder={
                "patch_size": 1, "patch_stride": 1, "dim": 8, "depth": 1, "heads": 2, "dropout": 0,
            },
            quantizer=quantizer,
            signal_decoder={"depth": 1, "heads": 2},
            text_decoder={"enabled": False},
        )
    )  # fmt: skip
    model.freeze(["quantizer"])
    model.train()
    signal, mask = (share(t, rank, world) for t in latents(3))
    batches = [
        as_batch(s, m)
        for s, m in zip(*(t.chunk(micro_batches) for t in (signal, mask)), strict=True)
    ]
    usage = None
    if micro_batches > 1:
        with torch.no_grad():
            pairs = [model.latents(b.signal, b.signal_mask, b.session) for b in batches]
            usage = sum(model.quantizer.soft_usage(*pair) for pair in pairs).all_reduce()
    values = []
    for batch in batches:
        norms = StepNorms(usage=usage, micro_batches=micro_batches)
        out = model(batch, norms, {"diversity": 1.0, "perplexity": 1.0})
        (out.loss / micro_batches / world).backward()
        values.append([out.losses[name].detach() for name in ("diversity", "perplexity")])
    return torch.tensor(values), model.encoder.embed.weight.grad.clone()


def as_batch(signal, mask):
    rows, nothing = len(signal), torch.zeros(len(signal), dtype=torch.int64)
    return Batch(
        signal=signal,
        target=signal,
        signal_mask=mask,
        session=nothing,
        tokens=torch.full((rows, 1), -100),
        phonemes=nothing[:, None],
        phoneme_lengths=nothing,
        rows=[f"a/0/{row}" for row in range(rows)],
        texts=[None] * rows,
    )


def one_rank_masked(rank, world):
    quantizer = build(revival_every=1, kmeans_init=False)
    for step in range(3):
        x, mask = latents(step)
        if world == 2 and rank == 1:
            mask = torch.zeros_like(mask)
        quantizer.update(quantizer(x, mask).stats)
    return quantizer.checksum(), quantizer.codebooks.embed.clone()


def one_rank_without_frames_at_the_start(rank, world):
    quantizer = build()
    x, mask = latents(0)
    if rank == 1:
        mask = torch.zeros_like(mask)
    quantizer.initialize([(x, mask)], progress=False)
    return quantizer.codebooks.embed.clone()


def sums_in_half(rank, world):
    """State after one update whose sums travelled in float32, and in bfloat16; |sums| of a rank."""
    states = []
    for half in (False, True):
        quantizer = build(kmeans_init=False, revival=None, half_width_sums=half)
        stats = quantizer(*(share(t, rank, world) for t in latents(3))).stats
        quantizer.update(quantizer.begin_update(stats))
        states.append(state(quantizer))
    return {"full": states[0], "half": states[1], "magnitude": stats.sums.abs()}


def everything(rank, world):
    built_before = None if dist.is_initialized() else build()
    return {
        "ema": trained(rank, world),
        "frames": trained(rank, world, revival="frames"),
        "shared": trained(rank, world, shared_codebook=True),
        "gradient": trained(rank, world, update_rule="gradient"),
        "dropout": trained(rank, world, quantize_dropout=True, stochastic_sample_codes=True),
        "losses": losses_and_gradients(rank, world),
        "losses_gradient_rule": losses_and_gradients(rank, world, update_rule="gradient"),
        "losses_micro": losses_and_gradients(rank, world, micro_batches=2),
        "frozen": frozen_quantizer(rank, world, micro_batches=1),
        "frozen_micro": frozen_quantizer(rank, world, micro_batches=2),
        "masked": one_rank_masked(rank, world),
        "no_frames": one_rank_without_frames_at_the_start(rank, world),
        "sums_in_half": sums_in_half(rank, world),
        "built_before": built_before,
    }


def rank_main(rank, world, folder):
    torch.set_num_threads(1)
    early = build()  # before the process group exists
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    result = everything(rank, world)
    start(early, rank, world)
    train(early, rank, world)
    result["early"] = early.checksum()
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(rank_main, args=(2, str(folder)), nprocs=2)
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]
    return ranks, everything(0, 1)


MODES = ["ema", "frames", "shared", "gradient", "dropout"]


@pytest.mark.parametrize("mode", MODES)
def test_both_ranks_hold_the_same_state(results, mode):
    (first, second), _ = results
    assert first[mode]["checksum"] == second[mode]["checksum"]
    for name, value in first[mode]["state"].items():
        assert torch.equal(value, second[mode]["state"][name]), name


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_seed_like_one(results, mode):
    (first, _), single = results
    assert first[mode]["frames"] == single[mode]["frames"]
    for name, value in single[mode]["started"].items():
        assert torch.equal(value, first[mode]["started"][name]), name


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_learn_and_revive_like_one(results, mode):
    (first, _), single = results
    if mode != "dropout":
        assert single[mode]["revived"].sum() > 0
    assert torch.equal(first[mode]["revived"], single[mode]["revived"])
    assert torch.equal(first[mode]["counts"], single[mode]["counts"])
    for name, value in single[mode]["state"].items():
        torch.testing.assert_close(first[mode]["state"][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["losses", "losses_gradient_rule"])
def test_losses_and_gradients_of_two_ranks_are_those_of_one(results, case):
    ranks, single = results
    for name in ("diversity", "perplexity"):
        for rank in ranks:
            torch.testing.assert_close(rank[case]["losses"][name], single[case]["losses"][name])
    for name in ("commitment", "codebook"):
        mean = sum(rank[case]["losses"][name] for rank in ranks) / 2
        torch.testing.assert_close(mean, single[case]["losses"][name])
    grad = torch.cat([rank[case]["grad"] for rank in ranks])
    torch.testing.assert_close(grad, single[case]["grad"], rtol=1e-4, atol=1e-7)
    if case == "losses_gradient_rule":
        weight = sum(rank[case]["weight"] for rank in ranks)
        torch.testing.assert_close(weight, single[case]["weight"], rtol=1e-4, atol=1e-6)


def test_micro_batches_on_two_ranks_are_those_of_one_batch(results):
    ranks, single = results
    for name in ("diversity", "perplexity"):
        for rank in ranks:
            found = rank["losses_micro"]["losses"][name]
            torch.testing.assert_close(found, single["losses"]["losses"][name])
    grad = torch.cat([rank["losses_micro"]["grad"] for rank in ranks])
    torch.testing.assert_close(grad, single["losses"]["grad"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("case", ["frozen", "frozen_micro"])
def test_an_encoder_before_frozen_codebooks_learns_on_two_ranks_as_on_one(results, case):
    ranks, single = results
    values, gradient = single["frozen"]
    assert gradient.abs().max() > 1e-4
    for rank in ranks:
        torch.testing.assert_close(rank[case][0], values.expand_as(rank[case][0]))
    found = sum(rank[case][1] for rank in ranks)
    torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-7)


def test_a_rank_with_every_frame_masked_takes_part(results):
    ranks, single = results
    assert ranks[0]["masked"][0] == ranks[1]["masked"][0]
    torch.testing.assert_close(ranks[0]["masked"][1], single["masked"][1], rtol=1e-5, atol=1e-6)
    assert torch.equal(ranks[0]["no_frames"], single["no_frames"])
    assert torch.equal(ranks[1]["no_frames"], single["no_frames"])


def test_a_quantizer_built_before_the_process_group_is_synchronized(results):
    (first, second), _ = results
    assert first["early"] == second["early"] == first["ema"]["checksum"]


def test_two_ranks_state_goes_on_in_one(results):
    (first, _), _ = results
    one, again = build(), build()
    for quantizer in (one, again):
        quantizer.load_state_dict(first["ema"]["state"])
    assert one.initialized and int(one.codebooks.updates) == STEPS
    train(one, 0, 1, first=STEPS, steps=3)
    train(again, 0, 1, first=STEPS, steps=3)
    assert one.checksum() == again.checksum()


def test_half_width_sums_err_within_their_bound_and_are_the_same_on_both_ranks(results):
    first, second = (rank["sums_in_half"] for rank in results[0])
    alone = results[1]["sums_in_half"]
    for name, value in first["half"].items():
        assert torch.equal(value, second["half"][name]), name
    full, half = first["full"], first["half"]
    assert torch.equal(full["codebooks.ema_count"], half["codebooks.ema_count"])
    decay = 0.6
    added = first["magnitude"] + second["magnitude"]
    bound = (1 - decay) * 2**-7 * (1 + 2**-9) * added
    error = (full["codebooks.ema_sum"] - half["codebooks.ema_sum"]).abs()
    assert (error <= bound + 1e-6).all()
    assert error.max() > 1e-4
    assert torch.equal(alone["full"]["codebooks.ema_sum"], alone["half"]["codebooks.ema_sum"])
