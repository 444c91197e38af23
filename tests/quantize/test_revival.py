import pytest
import torch

from b2t.quantize import ResidualVQ
from b2t.quantize.frame_hash import frame_ids
from b2t.quantize.revival import dead_codes, parents_of, revive_layer
from b2t.quantize.statistics import FramePool


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def clusters(K=64, D=16, seed=0):
    return 4 * torch.randn(K, D, generator=generator(seed))


def batch_of(centres, per=16, seed=0):
    noise = 0.3 * torch.randn(*centres.shape[:1], per, centres.shape[1], generator=generator(seed))
    return (centres[:, None] + noise).flatten(0, 1)[None]


def collapsed(centres, mode, **options):
    """One code wins every frame, the others are far away."""
    options = {"codebook_size": 64, "num_quantizers": 1, "decay": 0.5, **options}
    quantizer = ResidualVQ(centres.shape[1], revival=mode, kmeans_init=False, **options)
    far = 1e3 * torch.arange(1, 64)[:, None].expand(63, 16)
    quantizer.codebooks.embed.copy_(torch.cat([torch.zeros(1, 16), far]))
    quantizer.codebooks.ema_sum.copy_(quantizer.codebooks.embed)
    return quantizer


@pytest.mark.parametrize("mode", ["split", "frames"])
def test_a_collapsed_codebook_comes_back_to_64_codes_on_64_clusters(mode):
    centres = clusters()
    quantizer = collapsed(centres, mode)
    before = quantizer(batch_of(centres)).codes.unique().numel()
    total = 0
    for step in range(300):
        total += quantizer.update(quantizer(batch_of(centres, seed=step), losses=()).stats).revived[
            0
        ]
    x = batch_of(centres, seed=1000)
    used = quantizer.eval()(x).codes.unique().numel()
    naive = collapsed(centres, None)
    for step in range(20):
        naive.update(naive(batch_of(centres, seed=step), losses=()).stats)
    assert before == 1 and used == 64 and total >= 63
    assert naive(x).codes.unique().numel() == 1


def one_revival(mode, **options):
    centres = clusters()
    options = {"revival_every": 1, "revival_max_share": 0.1, "decay": 0.0, **options}
    quantizer = collapsed(centres, mode, **options)
    x = batch_of(centres)
    out = quantizer(x, losses=())
    twin = collapsed(centres, None, decay=0.0)
    twin.update(out.stats)
    report = quantizer.update(out.stats)
    changed = (quantizer.codebooks.ema_count != twin.codebooks.ema_count)[0].nonzero()[:, 0]
    return quantizer, twin, out, report, changed


@pytest.mark.parametrize("mode", ["split", "frames"])
def test_count_and_sum_go_with_the_code(mode):
    quantizer, _, _, report, changed = one_revival(mode)
    books = quantizer.codebooks
    assert report.revived == [6] and len(changed) >= 6
    rebuilt = books.ema_sum[0, changed] / books.ema_count[0, changed, None]
    torch.testing.assert_close(rebuilt, books.embed[0, changed], rtol=1e-4, atol=1e-5)
    assert (books.ema_count[0, changed] > 0.1 * books.ema_count[0].mean()).all()


@pytest.mark.parametrize("mode", ["split", "frames"])
def test_a_revived_code_is_not_overwritten_by_the_next_average(mode):
    quantizer, _, _, _, changed = one_revival(mode)
    before = quantizer.codebooks.embed[0, changed].clone()
    far = torch.full((1, 3, 16), 1e3)  # frames that belong to one code alone
    quantizer.revival_enabled = False
    quantizer.update(quantizer(far, losses=()).stats)
    moved = (quantizer.codebooks.embed[0, changed] - before).norm(dim=1) / before.norm(dim=1)
    assert (moved < 1e-3).sum() >= len(changed) - 1


def test_split_conserves_the_use_and_parts_a_cluster_in_two():
    quantizer, twin, _, _, changed = one_revival("split", revival_max_share=0.02)
    books = quantizer.codebooks
    assert len(changed) == 2
    assert books.ema_count[0, changed].tolist() == [512.0, 512.0]
    assert books.ema_count.sum() == twin.codebooks.ema_count.sum() == 1024
    x = batch_of(clusters(), per=64, seed=5)
    shares = quantizer.eval()(x).stats.counts[0, changed] / 4096
    assert shares.sum() == 1 and (shares > 0.3).all()


def test_a_child_starts_a_tenth_of_a_deviation_from_its_parent_towards_a_frame():
    quantizer, _, _, _, changed = one_revival("split", revival_max_share=0.02)
    frames = batch_of(clusters())[0]
    step = quantizer.codebooks.embed[0, changed[1]] - quantizer.codebooks.embed[0, changed[0]]
    deviation = frames.square().mean().sqrt()  # of a coordinate, from the one code at zero
    torch.testing.assert_close(step.norm(), 0.1 * deviation, rtol=1e-4, atol=0)
    towards = torch.cosine_similarity(step[None], frames - quantizer.codebooks.embed[0, changed[0]])
    assert towards.max() > 0.9999 and (towards > 0.9999).sum() == 1


def test_without_frames_at_hand_layers_split_in_directions_of_their_own():
    quantizer = collapsed(clusters(), "split", num_quantizers=2)
    books = quantizer.codebooks
    books.ema_count.copy_(torch.tensor([64.0] + 63 * [0.0]).expand(2, 64))
    books.distance_scale.fill_(1.0)
    pool = FramePool(torch.zeros(0), torch.zeros(2, 0, 16), torch.zeros(2, 0, dtype=torch.int64), 1)
    for layer in range(2):
        options = {"mode": "split", "threshold": 0.1, "max_share": 0.02, "cosine": False}
        assert revive_layer(books, layer, pool, pool_layers=[layer], **options) == 1
    first, second = (books.embed[layer, 1] - books.embed[layer, 0] for layer in range(2))
    assert abs(torch.cosine_similarity(first, second, dim=0)) < 0.9
    torch.testing.assert_close(first.norm(), second.norm())


def test_frames_mode_places_codes_on_residuals_of_the_batch():
    quantizer, twin, out, _, _ = one_revival("frames")
    moved = (quantizer.codebooks.embed != twin.codebooks.embed)[0].any(1).nonzero()[:, 0]
    codes, frames = quantizer.codebooks.embed[0, moved], batch_of(clusters())[0]
    assert len(moved) == 6 and (codes[:, None] == frames[None]).all(-1).any(1).all()
    assert out.stats.pool.residuals.shape[1] == 256


def test_dead_is_relative_to_uniform_use_and_limited():
    count = torch.tensor([100.0, 90.0, 0.0, 3.0, 0.5, 110.0])
    assert dead_codes(count, 0.1, 1.0).tolist() == [2, 4, 3]
    assert torch.equal(dead_codes(1000 * count, 0.1, 1.0), dead_codes(count, 0.1, 1.0))
    assert dead_codes(count, 0.1, 0.34).tolist() == [2, 4]
    assert dead_codes(count, 0.1, 0.01).tolist() == [2]
    assert dead_codes(count, 0.0, 1.0).tolist() == []


def test_the_most_crowded_code_is_split_first_and_none_below_the_floor():
    assert parents_of(torch.tensor([8.0, 100.0, 40.0]), 4, floor=0.0) == [1, 1, 2, 1]
    assert parents_of(torch.tensor([8.0, 100.0, 40.0]), 9, floor=19.0) == [1, 1, 2, 1, 1]


def test_revival_runs_only_when_it_should():
    def revived(steps=10, **switches):
        quantizer = collapsed(clusters(), "split")
        for name, value in switches.items():
            owner = quantizer.options if name == "revival" else quantizer
            quantizer.set_progress(value) if name == "progress" else setattr(owner, name, value)
        x = batch_of(clusters())
        return [quantizer.update(quantizer(x, losses=()).stats).revived[0] for _ in range(steps)]

    assert [step for step, n in enumerate(revived(), 1) if n] == [5, 10]
    assert not any(revived(revival_enabled=False))
    assert not any(revived(progress=0.9)) and any(revived(progress=0.89))
    assert not any(revived(revival=None))


def test_evaluation_neither_draws_frames_nor_revives():
    quantizer = collapsed(clusters(), "split", revival_every=1).eval()
    out = quantizer(batch_of(clusters()))
    assert out.stats.pool is None and out.stats.sums is None
    with pytest.raises(ValueError, match="training mode"):
        quantizer.update(out.stats)


def test_the_share_of_one_update_is_bounded():
    for share, most in ((0.05, 3), (0.5, 32)):
        options = {"revival_every": 1, "revival_max_share": share, "decay": 0.0}
        quantizer = collapsed(clusters(), "frames", **options)
        assert quantizer.update(quantizer(batch_of(clusters())).stats).revived == [most]


@pytest.mark.parametrize("options", [{"shared_codebook": True}, {"use_cosine_sim": True}])
def test_revival_serves_shared_and_cosine_codebooks(options):
    x = batch_of(clusters(), per=4)
    quantizer = ResidualVQ(16, 64, 2, kmeans_init=False, revival_every=1, decay=0.8, **options)
    for _ in range(60):
        report = quantizer.update(quantizer(x, losses=()).stats)
    assert len(report.revived) == 2
    used = quantizer.eval()(x).codes.unique().numel()
    assert used >= 48 and torch.isfinite(quantizer.codebooks.embed).all()


def test_a_step_without_any_frame_can_still_be_a_revival_step():
    quantizer = collapsed(clusters(), "split", revival_every=1, decay=0.0)
    quantizer.update(quantizer(batch_of(clusters())).stats)
    empty = quantizer(batch_of(clusters()), torch.zeros(1, 1024, dtype=torch.bool))
    quantizer.update(empty.stats)
    assert torch.isfinite(quantizer.codebooks.embed).all()


def rounded_apart(x):
    """The same frames, each value half a unit in the last place away."""
    return torch.nextafter(x, torch.full_like(x, 1e9))


@pytest.mark.parametrize("mode", ["split", "frames"])
def test_with_identities_rounding_changes_nothing_that_is_drawn(mode):
    x = batch_of(clusters())
    ids = frame_ids(torch.tensor([5]), x.shape[1])

    def revived(x, **given):
        quantizer = collapsed(clusters(), mode, revival_every=1, decay=0.0)
        quantizer.update(quantizer(x, losses=(), **given).stats)
        return quantizer.codebooks.embed

    torch.testing.assert_close(revived(rounded_apart(x), ids=ids), revived(x, ids=ids))
    far = (revived(rounded_apart(x)) - revived(x)).abs().amax()
    assert far > 0.01  # drawn by value: other frames


def test_identities_follow_their_frames_through_the_mask():
    x = batch_of(clusters()).view(8, -1, 16)
    ids = frame_ids(torch.arange(8), x.shape[1])
    mask = torch.rand(x.shape[:2], generator=generator(3)) > 0.3
    options = {"revival_every": 1, "decay": 0.0}
    masked, dense = (collapsed(clusters(), "frames", **options) for _ in range(2))
    masked.update(masked(x, mask, losses=(), ids=ids).stats)
    dense.update(dense(x[mask], losses=(), ids=ids[mask]).stats)
    assert torch.equal(masked.codebooks.embed, dense.codebooks.embed)


def test_a_start_with_identities_draws_the_same_frames_after_rounding():
    x = batch_of(clusters(), per=32).view(64, 32, 16)
    ids = frame_ids(torch.arange(64), 32)

    def started(x, *given):
        quantizer = ResidualVQ(16, 32, 2)
        parts = zip(x.split(16), [None] * 4, *(g.split(16) for g in given), strict=True)
        quantizer.initialize(parts, progress=False, frames_per_code=16)
        return quantizer.codebooks.embed

    apart = (started(rounded_apart(x), ids) - started(x, ids)).norm(dim=-1)
    by_value = (started(rounded_apart(x)) - started(x)).norm(dim=-1)
    assert (apart[0] < 1e-3).all() and (by_value[0] > 0.1).any()
