"""Picking sums of codes from rough scores, against float64."""

from dataclasses import replace

import pytest
import torch

from b2t_kernels import beam_candidates, blocked_beam, blocked_tables, reference
from b2t_kernels.blocked_tables import Tables


def problem(N=300, Q=3, K=64, D=32, seed=3):
    generator = torch.Generator().manual_seed(seed)
    books = torch.randn(Q, K, D, generator=generator) * 0.6 ** torch.arange(Q)[:, None, None]
    return torch.randn(N, D, generator=generator), books


def sums_of(x, books, width):
    """Sums of codes of the layers before the last, as a search keeps them, and the last book."""
    *earlier, book = (blocked_beam._book(each, None) for each in books)
    sums = beam_candidates.Sums.empty(x)
    paths = torch.randint(books.shape[1], (len(x), width, len(books) - 1))
    left = (x[:, None].double() - sum(books[q].double()[paths[..., q]] for q in range(2))).float()
    anchors = -0.5 * left.square().sum(2)
    sums = replace(sums, books=tuple(earlier), paths=paths, anchors=anchors)
    off = (anchors + 0.5 * sums.residuals().view(left.shape).double().square().sum(2)).abs()
    return replace(sums, bound=off.amax(1).float() * 1.001), book


def by_tables(sums, book, wanted):
    """With tables of this layer alone."""
    return blocked_tables.by_tables(sums, book, wanted, Tables(range(2, 3), book.made))


@pytest.mark.parametrize("scored", [by_tables, blocked_beam._by_products])
@pytest.mark.parametrize("case", ["plain", "offset", "outlier", "far", "near"])
def test_no_score_is_off_by_more_than_its_bound(scored, case, monkeypatch):
    monkeypatch.setattr(blocked_tables, "PASSING_ELEMENTS", 8 * 64 * 20)
    monkeypatch.setattr(blocked_tables, "FRAME_ELEMENTS", 64 * 120)
    x, books = problem()
    if case == "offset":
        x, books = x + 300, books + torch.tensor([300.0, 0.0, 7.0])[:, None, None]
    elif case == "outlier":
        books[1:, 5] *= 1e3
    elif case == "far":
        x = 1e4 * x
    elif case == "near":
        books[-1] *= 1e-4
    sums, book = sums_of(x, books, 8)
    start = 0
    for part in scored(sums, book, 8):
        n = len(part.anchors)
        groups = torch.arange(part.maxima.numel())
        found = part.scores(groups).view(n, 8, -1).double() + part.anchors.double()[..., None]
        left = sums.part(slice(start, start + n)).residuals().view(n, 8, -1)
        assert torch.equal(part.residuals(torch.arange(8 * n)).view(n, 8, -1), left)
        true = -0.5 * (left[:, :, None].double() - books[-1].double()).square().sum(3)
        off = (found - true).abs().amax((1, 2))
        assert (off <= part.bound.double()).all()
        # A bound that says nothing would do, too.
        assert (part.bound < 2e3 * off.max()).all()
        assert torch.equal(part.maxima, part.scores(groups).amax(1).view(n, -1))
        start += n
    assert start == len(x)


def test_candidates_that_float32_cannot_tell_apart_are_ranked_in_float64(monkeypatch):
    x, books = problem(N=60, Q=2, K=96)
    generator = torch.Generator().manual_seed(5)
    books[1] = books[1, :1] * torch.ones(96, 1).index_fill_(0, torch.arange(48), -1.0)
    books[1] += 1e-7 * torch.randn(96, 32, generator=generator)
    ranked, seen = beam_candidates._ranked, []
    monkeypatch.setattr(
        beam_candidates, "_ranked", lambda *a: (seen.append(len(a[2].places)), ranked(*a))[1]
    )
    expected = reference.beam_codes(100 * x, list(books), 4)
    assert torch.equal(blocked_beam.beam_codes(100 * x, list(books), 4), expected)
    # All of a half of the codes, for nearly all frames.
    assert sum(seen) > 40 * len(x)


def test_squares_beyond_float32():
    x, books = problem(N=50)
    expected = blocked_beam.beam_codes(x, list(books), 5)
    scale = 2.0**66  # exact
    assert torch.equal(blocked_beam.beam_codes(scale * x, list(scale * books), 5), expected)


def test_a_code_beyond_float32_squares_beside_others():
    x, books = problem(N=50, Q=2, K=12, D=1)
    books[0, 5], x[::7] = 3e19, 1.9e19
    found = blocked_beam.beam_codes(x, list(books), 3)
    assert torch.equal(found, reference.beam_codes(x, list(books), 3))
    assert (found[::7, 0] == 5).all()


def test_frames_and_codes_at_one_point():
    book = torch.tensor([[torch.nan, 0.0], [0.0, 0.0]])
    assert blocked_beam.beam_codes(torch.zeros(3, 2), [book], 4).tolist() == [[1]] * 3


def test_a_frame_of_more_candidates_than_are_seen_is_not_sure():
    places = torch.arange(12)
    found = beam_candidates._Candidates(torch.zeros_like(places), places, places.float())
    counts, bound = torch.tensor([12]), torch.tensor([0.1])
    table, *flags = beam_candidates._sorted(found, counts, bound, 2, 20)
    assert (table.places[0, :2].tolist(), table.scores[0, :2].tolist()) == ([11, 10], [11, 10])
    assert [flag.tolist() for flag in flags] == [[False], [False]]
    _, *flags = beam_candidates._sorted(found, counts, bound, 2, 8)
    assert [flag.tolist() for flag in flags] == [[False], [True]]


@pytest.mark.parametrize(("gap", "doubts"), [(0.19, True), (0.21, False)])
def test_scores_within_two_bounds_are_not_sure(gap, doubts):
    scores = torch.tensor([1.0, 1.0 + gap, 4.0])
    found = beam_candidates._Candidates(torch.zeros(3, dtype=torch.int64), torch.arange(3), scores)
    counts, bound = torch.tensor([3]), torch.tensor([0.1])
    assert beam_candidates._sorted(found, counts, bound, 2, 20)[1].tolist() == [doubts]
    # What may be the nearest is within two bounds of what is reached.
    maxima = torch.tensor([[4.0 - gap, 4.0, 0.0, 0.0]])
    scored = beam_candidates.Scored(maxima, None, torch.zeros(1, 1), bound, None)
    floor, groups, _ = beam_candidates._groups(scored, 1, 20)
    assert groups.tolist() == ([0, 1] if doubts else [1])
    assert float(floor) == pytest.approx(3.8)


def test_lengths_of_residuals_are_within_their_bound():
    x, books = problem(Q=4)
    x, books = x + 20, books + torch.tensor([20.0, 0.0, 3.0, 0.0])[:, None, None]
    sums = beam_candidates.Sums.empty(x)
    with blocked_tables.Kept([blocked_beam._book(each, None) for each in books]) as kept:
        for book in (blocked_beam._book(each, None) for each in books):
            sums = sums.continued(blocked_beam._continue(sums, book, 8, kept), book)
            left = sums.residuals().view(len(x), 8, -1).double()
            off = (sums.anchors + 0.5 * left.square().sum(2)).abs().amax(1)
            assert (off <= sums.bound).all()
            assert (sums.bound < 1e-2 * sums.anchors.abs().amin(1)).all()


@pytest.mark.parametrize("K", [1, 3, 40, 200])
@pytest.mark.parametrize("width", [1, 3, 8, 30])
def test_any_number_of_codes_and_of_sums(K, width):
    x, books = problem(N=40, K=K, D=5)
    books[1, K // 2] = torch.nan if K > 1 else 0.0
    expected = reference.beam_codes(x, list(books), width)
    assert torch.equal(blocked_beam.beam_codes(x, list(books), width), expected)


def test_places_that_are_not_zero():
    generator = torch.Generator().manual_seed(0)
    for numel in (8, 63, 64, 1000, 4096):
        some = torch.rand(numel, generator=generator) < 0.05
        assert torch.equal(beam_candidates._nonzero(some), some.nonzero()[:, 0])
