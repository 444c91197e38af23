import pytest
import torch

from b2t.quantize import ResidualVQ
from b2t.quantize.options import default_decay


def frames(N=400, D=6, seed=0, offset=0.0):
    return torch.randn(1, N, D, generator=torch.Generator().manual_seed(seed)) + offset


def started(x, **options):
    options = {"codebook_size": 16, "num_quantizers": 2, "revival": None, **options}
    quantizer = ResidualVQ(x.shape[-1], **options)
    quantizer.initialize([(x, None)], progress=False, frames_per_code=1e9)
    return quantizer


def test_running_averages_follow_their_closed_form():
    """n_t = γᵗ·n₀ + (1−γ)·Σ γ^(t−i)·N_i, the same for sums, and code = sum/count."""
    x = frames()
    quantizer = started(x, decay=0.8, eps=0.0, num_quantizers=1)
    books = quantizer.codebooks
    total = 330  # frames of the first update, to which the start's counts are matched
    scale = total / books.ema_count.double().sum()
    count, summed = books.ema_count[0].double() * scale, books.ema_sum[0].double() * scale
    for step in range(1, 6):
        batch = frames(300 + 30 * step, seed=step)
        assigned = quantizer(batch).codes[0, :, 0]
        one_hot = torch.nn.functional.one_hot(assigned, 16).double()
        count = 0.8 * count + 0.2 * one_hot.sum(0)
        summed = 0.8 * summed + 0.2 * one_hot.T @ batch[0].double()
        quantizer.update(quantizer(batch).stats)
        torch.testing.assert_close(books.ema_count[0].double(), count, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(books.ema_sum[0].double(), summed, rtol=1e-5, atol=1e-5)
        code = summed / count[:, None]
        torch.testing.assert_close(books.embed[0].double(), code, rtol=1e-4, atol=1e-5)


def test_a_step_without_frames_leaves_all_averages_alone():
    x = frames()
    quantizer = started(x, decay=0.8)
    books = quantizer.codebooks
    quantizer.update(quantizer(x).stats)
    before = [state.clone() for state in (books.ema_count, books.ema_sum, books.embed)]
    nothing = torch.zeros(1, x.shape[1], dtype=torch.bool)
    quantizer.update(quantizer(x, nothing).stats)
    for state, earlier in zip((books.ema_count, books.ema_sum, books.embed), before, strict=True):
        assert torch.equal(state, earlier)


def test_averages_agree_with_vector_quantize_pytorch():
    vqp = pytest.importorskip("vector_quantize_pytorch")
    x = frames()
    ours = started(x, decay=0.9, num_quantizers=1)
    books = ours.codebooks
    books.unscaled.fill_(False)  # the peer does not match the number of frames
    peer = vqp.ResidualVQ(
        dim=6, codebook_size=16, num_quantizers=1, decay=0.9, threshold_ema_dead_code=0
    )
    theirs = peer.layers[0]._codebook
    theirs.embed.copy_(books.embed)
    theirs.embed_avg.copy_(books.ema_sum)
    theirs.cluster_size.copy_(books.ema_count)
    for step in range(4):
        batch = frames(seed=step)
        peer(batch)
        ours.update(ours(batch).stats)
        torch.testing.assert_close(books.ema_count, theirs.cluster_size)
        torch.testing.assert_close(books.embed, theirs.embed, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("options", [{}, {"shared_codebook": True}])
def test_the_first_update_on_the_starts_own_frames_moves_nothing(offset, options):
    x = frames(offset=offset)
    quantizer = started(x, kmeans_iters=60, **options)
    before = quantizer.codebooks.embed.clone()
    quantizer.update(quantizer(x).stats)
    moved = (quantizer.codebooks.embed - before).norm(dim=-1).max()
    # Shared codes are fitted to residuals of an earlier fit, so they are centroids only nearly.
    assert moved < (0.05 if options else 1e-4 * max(1.0, offset / 10))


def test_an_update_without_new_evidence_keeps_the_norms():
    """The start's sums are code × count: half of the frames again cannot shrink the codes."""
    x = frames()
    quantizer = started(x)
    before = quantizer.codebooks.embed.norm(dim=-1).mean()
    quantizer.update(quantizer(x[:, ::2]).stats)
    after = quantizer.codebooks.embed.norm(dim=-1).mean()
    assert abs(after - before) < 0.02 * before


def test_a_code_without_frames_stays_where_it_is_at_any_offset():
    x = frames(offset=100.0)
    quantizer = started(x, decay=0.5, num_quantizers=1)
    books = quantizer.codebooks
    books.embed[0, 3] = 1e4
    books.ema_sum[0, 3] = 1e4 * books.ema_count[0, 3]
    for _ in range(60):
        quantizer.update(quantizer(x).stats)
    assert books.ema_count[0, 3] < 1e-9
    torch.testing.assert_close(books.embed[0, 3], torch.full((6,), 1e4), rtol=1e-4, atol=0)


def test_more_frames_than_half_precision_can_count():
    x = frames(200_000, 2) * 1e-3 + torch.tensor([1.0, -1.0])
    quantizer = ResidualVQ(2, 2, 1, decay=0.0, kmeans_init=False, revival=None)
    quantizer.codebooks.embed.copy_(torch.tensor([[[1.0, -1.0], [50.0, 50.0]]]))
    report = quantizer.update(quantizer(x, losses=()).stats)
    assert report.counts.tolist() == [[200_000, 0]]
    assert quantizer.codebooks.ema_count[0, 0] == 200_000
    torch.testing.assert_close(
        quantizer.codebooks.embed[0, 0].double(), x.double().mean((0, 1)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rule", ["ema", "gradient"])
def test_casting_the_model_never_casts_the_codebooks(dtype, rule):
    x = frames()
    quantizer = started(x, codebook_dim=4, update_rule=rule)
    model = torch.nn.ModuleDict({"quantizer": quantizer})
    before = {name: value.clone() for name, value in quantizer.codebooks.state_dict().items()}
    model.to(dtype)
    assert quantizer.project_in.weight.dtype == dtype
    for name, value in quantizer.codebooks.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name]), name
    out = quantizer(x.to(dtype))
    assert out.quantized.dtype == dtype and out.stats.sums.dtype == torch.float32
    assert torch.equal(quantizer.decode(out.codes, dtype), out.quantized)
    quantizer.update(out.stats)


def test_small_steps_do_not_stall_in_half_precision():
    """A decay of 0.999 moves the codes by less than half a bfloat16 step at a time, yet moves."""
    x = frames(offset=3.0)
    quantizer = started(x, decay=0.999, num_quantizers=1).bfloat16()
    before = quantizer.codebooks.embed.mean()
    for _ in range(100):
        quantizer.update(quantizer((x + 0.1).bfloat16(), losses=()).stats)
    moved = quantizer.codebooks.embed.mean() - before
    assert 0.05 < moved / (0.1 * (1 - 0.999**100)) < 2.0


def test_codebooks_cast_behind_our_back_are_refused():
    quantizer = started(frames())
    quantizer.codebooks.embed = quantizer.codebooks.embed.half()
    with pytest.raises(RuntimeError, match="must stay float32"):
        quantizer(frames())


def test_clocks_stay_on_the_host_and_everything_else_moves():
    quantizer = ResidualVQ(6, 16, 2).to("meta")
    state = quantizer.codebooks.state_dict()
    assert {name for name, value in state.items() if value.device.type == "cpu"} == {
        "seed",
        "updates",
        "initialized",
        "temperature",
        "progress",
    }
    with torch.device("meta"):
        empty = ResidualVQ(6, 16, 2)
    empty.to_empty(device="cpu")
    empty.load_state_dict(started(frames()).state_dict())
    assert empty.initialized


def test_the_default_decay_follows_the_number_of_codes():
    assert [default_decay(K) for K in (64, 256, 1024, 8192)] == [0.95, 0.98, 0.98, 0.98]
