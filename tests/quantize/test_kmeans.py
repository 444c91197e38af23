import logging

import pytest
import torch

from b2t.errors import UserError
from b2t.quantize import ResidualVQ
from b2t.quantize.frame_hash import frame_hash
from b2t.quantize.kmeans import FrameReservoir, _lloyd, kmeans, seed_centers
from b2t.quantize.start import NoFiniteFrames


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def clusters(K=64, per=20, D=8, spread=0.05, seed=0):
    centres = 3 * torch.randn(K, D, generator=generator(seed))
    noise = spread * torch.randn(K, per, D, generator=generator(seed + 1))
    return (centres[:, None] + noise).flatten(0, 1), centres


def plain_seeds(x, K, random):
    """One seed at a time with probability ∝ D², as published."""
    chosen = [int(torch.randint(len(x), (1,), generator=random))]
    for _ in range(K - 1):
        distance = (x[:, None] - x[chosen][None]).square().sum(-1).amin(1)
        chosen.append(int(torch.multinomial(distance, 1, generator=random)))
    return chosen


def test_seeds_are_drawn_from_the_distribution_of_plain_kmeans_plus_plus():
    """Frequencies of each frame among six seeds, block proposals against one at a time."""
    x = torch.tensor([[0.0], [0.1], [1.0], [1.1], [4.0], [9.0], [9.5], [9.7], [2.5], [6.5]])
    runs = 1500
    ours, plain = torch.zeros(10), torch.zeros(10)
    for seed in range(runs):
        for index in seed_centers(x, 6, generator(seed), lambda _: None).tolist():
            ours[index] += 1
        for index in plain_seeds(x, 6, generator(seed + runs)):
            plain[index] += 1
    expected = (ours + plain) / 2
    chi2 = ((ours - expected).square() / expected.clamp(min=1)).sum() * 2
    # 99.9 % quantile of χ² with nine degrees of freedom; seeds without replacement vary less.
    assert chi2 < 27.9


def test_large_blocks_of_proposals_seed_as_well_as_one_at_a_time():
    """The last of 600 seeds are proposed 128 at a time; the potential must not suffer."""
    x = torch.randn(3000, 4, generator=generator())

    def potential(seeds):
        return float(torch.cdist(x, x[seeds]).amin(1).square().mean())

    ours = [potential(seed_centers(x, 600, generator(s), lambda _: None)) for s in range(3)]
    plain = []
    for s in range(3):
        random, chosen = generator(s + 9), [s]
        distance = (x - x[s]).square().sum(1)
        for _ in range(599):
            chosen.append(int(torch.multinomial(distance, 1, generator=random)))
            distance = torch.minimum(distance, (x - x[chosen[-1]]).square().sum(1))
        plain.append(potential(torch.tensor(chosen)))
    assert abs(sum(ours) / sum(plain) - 1) < 0.03


def test_seeds_are_distinct_and_stop_where_the_frames_do():
    x = torch.randn(5, 3, generator=generator()).repeat(7, 1) + 100
    seeds = seed_centers(x, 20, generator(), lambda _: None)
    assert len(seeds) == 5 and x[seeds].unique(dim=0).shape[0] == 5


@pytest.mark.parametrize("offset", [0.0, 100.0, 1e4])
def test_every_cluster_gets_its_code(offset):
    x, centres = clusters()
    codes, seeded = kmeans(x + offset, 64, 10, generator())
    assert seeded == 64
    nearest = torch.cdist(centres + offset, codes).amin(1)
    assert (nearest < 0.2).float().mean() > 0.9


def test_lloyd_ends_no_worse_than_faiss():
    faiss = pytest.importorskip("faiss")
    x = torch.randn(2000, 8, generator=generator())
    codes, _ = kmeans(x, 64, 15, generator())
    peer = faiss.Kmeans(8, 64, niter=15, seed=1, verbose=False)
    peer.train(x.numpy())
    inertia = torch.cdist(x, codes).amin(1).square().mean()
    theirs = torch.cdist(x, torch.from_numpy(peer.centroids)).amin(1).square().mean()
    assert inertia < 1.02 * theirs


def test_a_code_that_lost_its_frames_takes_the_worst_served_one():
    x = torch.tensor([[0.0], [0.2], [0.4], [7.0]])
    moved = _lloyd(x, torch.tensor([[0.1], [100.0]]))
    assert moved.flatten().tolist() == pytest.approx([1.9, 7.0])


def test_the_reservoir_keeps_the_same_frames_in_any_order():
    x = torch.randn(500, 3, generator=generator())
    kept = []
    for order in (torch.arange(500), torch.randperm(500, generator=generator(4))):
        reservoir = FrameReservoir(50)
        for part in x[order].split(37):
            reservoir.add(part, frame_hash(part, 3, 0))
        assert reservoir.offered == 500
        kept.append(reservoir.kept()[0])
    assert torch.equal(*kept) and kept[0].shape == (50, 3)


def initialize(x, mask=None, batches=1, **options):
    options = {"codebook_size": 16, "num_quantizers": 3, **options}
    quantizer = ResidualVQ(x.shape[-1], **options)
    masks = [None] * batches if mask is None else mask.chunk(batches)
    pairs = list(zip(x.chunk(batches), masks, strict=True))
    return quantizer, quantizer.initialize(pairs, progress=False)


def test_the_start_gathers_over_as_many_batches_as_it_takes():
    x = torch.randn(40, 10, 4, generator=generator())
    drawn = []

    def batches():
        for part in x.split(1):
            drawn.append(part)
            yield part, None

    quantizer = ResidualVQ(4, 16, 2)
    report = quantizer.initialize(batches(), progress=False, frames_per_code=8)
    assert len(drawn) == 13 and report.frames == 128  # 10 frames each, 8 × 16 wanted
    assert quantizer.initialized and report.seeded == [16, 16]


def test_later_layers_start_on_what_earlier_ones_leave():
    x = torch.randn(1, 256, 6, generator=generator())
    quantizer, report = initialize(x, num_quantizers=4)
    assert report.squared_error == sorted(report.squared_error, reverse=True)
    out = quantizer.eval()(x)
    residual = x[0]
    for q in range(4):
        assert len(out.codes[0, :, q].unique()) == 16
        residual = residual - quantizer.codebooks.embed[q][out.codes[0, :, q]]
        measured = residual.square().sum(1).mean()
        torch.testing.assert_close(torch.tensor(report.squared_error[q]), measured)


def test_the_start_depends_on_the_frames_and_not_on_their_batches():
    x = torch.randn(12, 20, 4, generator=generator())
    mask = torch.rand(12, 20, generator=generator(1)) > 0.3
    a, _ = initialize(x, mask)
    b, _ = initialize(x.flip(0), mask.flip(0), batches=4)
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name


def test_masked_and_broken_frames_never_seed():
    x = torch.randn(4, 50, 4, generator=generator())
    mask = torch.rand(4, 50, generator=generator(1)) > 0.3
    clean, _ = initialize(x, mask)
    spoilt = torch.where(mask[..., None], x, torch.tensor(1e4))
    spoilt[0, mask[0].nonzero()[0], 1] = float("nan")
    mask_clean = mask.clone()
    mask_clean[0, mask[0].nonzero()[0]] = False
    same, _ = initialize(x, mask_clean)
    found, report = initialize(spoilt, mask)
    assert report.nonfinite == 1 and report.frames == int(mask.sum()) - 1
    assert torch.equal(found.codebooks.embed, same.codebooks.embed)
    assert not torch.equal(found.codebooks.embed, clean.codebooks.embed)


@pytest.mark.parametrize("N", [1, 2, 15, 16, 17, 31])
def test_fewer_frames_than_codes_start_all_layers_and_are_said(N, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("b2t"), "propagate", True)
    x = torch.randn(1, N, 4, generator=generator())
    with caplog.at_level(logging.WARNING, logger="b2t"):
        quantizer, report = initialize(x)
    assert f"{N} frames are too few for 16 codes" in caplog.text
    fewest, most = min(report.seeded), max(report.seeded)
    assert (f"{fewest} to {most}" if fewest < most else f"have {most}") in caplog.text
    assert report.seeded[0] == max(1, N // 2)
    assert torch.isfinite(quantizer.codebooks.embed).all()
    if N > 1:  # the copies are jittered
        assert quantizer.codebooks.embed[0].unique(dim=0).shape[0] == 16
    assert float(quantizer.codebooks.ema_count.sum()) == 3 * N
    out = quantizer(x)
    assert (out.codes >= 0).all()
    if N > 2:  # a later layer still has something to do
        assert report.squared_error[0] > 0 and len(out.codes[..., 1].unique()) > 1


def test_no_valid_frame_at_all_is_an_error():
    with pytest.raises(NoFiniteFrames, match="NaN or infinity in all 9 latent frames"):
        initialize(torch.full((1, 9, 4), float("nan")))
    quantizer, _ = initialize(torch.zeros(1, 1, 4))
    quantizer.codebooks.initialized.fill_(0)
    masked = (torch.zeros(1, 9, 4), torch.zeros(1, 9, dtype=torch.bool))
    with pytest.raises(UserError, match="not masked; check the lengths") as caught:
        quantizer.initialize([masked], progress=False)
    assert not isinstance(caught.value, NoFiniteFrames)


def test_an_interrupted_start_goes_on_with_the_next_layer():
    x = torch.randn(1, 400, 4, generator=generator())
    whole, _ = initialize(x)
    half, _ = initialize(x)
    half.codebooks.initialized.fill_(1)
    half.codebooks.embed[1:] = 0
    assert not half.initialized and half(x).stats.empty
    half.initialize([(x, None)], progress=False)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, half.state_dict()[name]), name
    with pytest.raises(RuntimeError, match="already started"):
        half.initialize([(x, None)])


def test_progress_is_shown(capsys):
    x = torch.randn(1, 400, 4, generator=generator())
    ResidualVQ(4, 16, 2).initialize([(x, None)], progress=True)
    shown = capsys.readouterr().err
    assert "frames for k-means++" in shown and "k-means++:" in shown
