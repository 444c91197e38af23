"""What draws and beams in Triton must do, as kernel_checks.py says it of the search.

Run by test_kernel_interpreter.py and test_kernel_gpu.py in processes of their own.
"""

import pytest
import torch

from b2t_kernels import beam, blocked_beam, draw, gumbel, prepare, reference, tuning
from tests.kernels.apart import unlike
from tests.kernels.kernel_checks import DEVICE, drawn, rows_and_codes, seeded


@pytest.fixture(autouse=True)
def _on_the_device():
    with torch.device(DEVICE):
        yield


def draws(x, codebook, tau, keys):
    codes = prepare.prepare(codebook)
    return draw.sample_code(x, codebook, torch.tensor(tau), *keys, codes)


def keys_of(N, K):
    return gumbel.mix(torch.arange(N) - 7), gumbel.mix(-torch.arange(K) - 1)


@pytest.mark.parametrize(
    ("N", "K", "D", "offset"), [(63, 130, 63, 100.0), (70, 600, 20, 0.0), (5, 70, 300, 0.0)]
)
def test_draws_are_those_of_the_same_noise_in_float64(N, K, D, offset, monkeypatch):
    x, codebook = rows_and_codes(N, K, D, offset=offset)
    x[3], codebook[K // 2] = torch.nan, torch.inf
    keys, tau, seen = keys_of(N, K), float(D) ** 0.5, []
    logits = -reference.squared_distances(torch.where(x.isfinite(), x, 0), codebook) / tau
    best = (logits + gumbel.noise(*keys)).topk(2)
    clear = (best.values[:, 0] - best.values[:, 1] > 0.05) & reference.valid_rows(x)
    assert clear.double().mean() > 0.5
    for multiprocessors in (1, 500):
        monkeypatch.setattr(tuning, "multiprocessors", lambda device, n=multiprocessors: n)
        indices, counts = draws(x, codebook, tau, keys)
        wanted = best.indices[clear, 0]
        assert torch.equal(indices[clear], wanted), unlike(indices[clear], wanted)
        assert indices[3] == -1
        assert torch.equal(counts, torch.bincount(indices[indices >= 0], minlength=K))
        seen.append(indices)
    assert torch.equal(*seen), "a draw must not depend on how the codes are split"
    alone = draws(x[1:2], codebook, tau, (keys[0][1:2], keys[1]))[0]
    assert alone == seen[0][1], "nor on the rows beside it"


def test_draws_follow_the_soft_assignment():
    """Pearson's χ² of 2000 draws of one row against softmax probabilities in float64."""
    x, codebook = rows_and_codes(1, 24, 8)
    probabilities = (-reference.squared_distances(x, codebook)[0] / 6.0).softmax(0)
    assert probabilities.max() > 0.15
    _, counts = draws(x.expand(2000, -1), codebook, 6.0, keys_of(2000, 24))
    expected = 2000 * probabilities
    likely = expected > 5
    squares = ((counts - expected).square() / expected)[likely].sum()
    freedom = int(likely.sum()) - 1
    # A thousandth of the χ² distribution lies beyond, by Wilson and Hilferty's approximation.
    assert freedom > 10
    assert squares < freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert counts.sum() == 2000


def check_beam(x, books, width):
    found = beam.beam_codes(x, books, [prepare.prepare(book) for book in books], width)
    expected = reference.beam_codes(x, books, width)
    distances = [
        (x.double() - reference_sum(books, codes)).square().sum(dim=1)
        for codes in (found, expected)
    ]
    assert torch.equal(found, expected), f"squared distances {distances}"


def reference_sum(books, codes):
    return sum(book.double()[codes[:, q]] for q, book in enumerate(books))


def layers_of(N, Q, K, D):
    x, books = rows_and_codes(N, Q * K, D)
    return x, [0.6**q * book for q, book in enumerate(books.view(Q, K, D))]


@pytest.mark.parametrize(
    ("N", "Q", "K", "D", "width"), [(2, 3, 200, 40, 8), (2, 2, 70, 300, 3), (2, 2, 3, 5, 8)]
)
def test_beams_keep_the_nearest_sums(N, Q, K, D, width):
    check_beam(*layers_of(N, Q, K, D), width)


def test_beams_leave_out_codes_that_repeat_or_are_not_finite(monkeypatch):
    monkeypatch.setattr("b2t_kernels.rows.SCRATCH_BYTES", 1)
    monkeypatch.setattr(beam, "SCRATCH_BYTES", 1 << 13)
    x, books = layers_of(4, 2, 90, 20)
    books[0][40:80], books[0][5], books[1][0] = books[0][:40].clone(), torch.nan, -torch.inf
    books[0][60] *= 30
    check_beam(x, books, 6)


def test_beams_look_into_a_slot_that_hides_winners(monkeypatch):
    """Four of the nearest codes are runs of one slot in different tiles."""
    monkeypatch.setattr(beam, "FRAME_SLOTS", 8)
    x, books = layers_of(1, 1, 448, 16)
    book = books[0]
    for step, tile in enumerate((2, 4, 6), 1):
        book[8 + 64 * tile + 3] = book[11] * (1 + 1e-4 * step)
    x[:] = book[11] + 1e-2 * x
    indices = reference.squared_distances(x, book).topk(4, largest=False).indices
    assert (indices % 64 == 11).all()
    # The nearest sum begins with the fourth of them, which every other one would crowd out.
    second = book / 1e4
    second[7] = x[0] - book[indices[0, 3]]
    assert reference.beam_codes(x, [book, second], 4).tolist() == [[int(indices[0, 3]), 7]]
    check_beam(x, [book, second], 4)


def test_beams_break_ties_as_blocked_torch_does():
    """Whole numbers: every distance is exact, and many sums are equal."""
    generator = seeded(0)
    x = drawn(torch.randint, -9, 10, (5, 3), generator=generator).float()
    book = drawn(torch.randint, -6, 7, (12, 3), generator=generator).float()
    books = [book, book]
    found = beam.beam_codes(x, books, [prepare.prepare(book) for book in books], 5)
    assert torch.equal(found, blocked_beam.beam_codes(x, books, 5))


def test_repeated_codes_are_found_without_looking():
    _, codes = rows_and_codes(1, 50, 4)
    codes[30:40], codes[7], codes[45] = codes[:10].clone(), 0.0, -0.0
    assert beam.repeated(codes).nonzero()[:, 0].tolist() == [*range(30, 37), 38, 39, 45]
