"""Beam search against exhaustive search, faiss and the nearest codes."""

import gc
import itertools
import logging

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import b2t_kernels
from b2t.errors import UserError
from b2t.quantize import ResidualVQ, StepNorms
from b2t.quantize.beam import beam_search
from b2t.quantize.layers import Layers
from b2t_kernels import blocked_beam, blocked_tables, cuda, reference
from b2t_kernels.blocked_codes import CentredCodes


def layers_of(books, gain=None, cosine=False):
    Q = books.shape[0]
    return Layers(
        books,
        gain=torch.ones(Q) if gain is None else gain,
        distance=torch.ones(Q),
        quantizers=Q,
        temperature=1.0,
        cosine=cosine,
        backend="kernels",
    )


def random_problem(N, Q, K, D, seed=0, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=generator) + offset
    sizes = 0.6 ** torch.arange(Q)
    books = torch.randn(Q, K, D, generator=generator) * sizes[:, None, None]
    books[0] += offset
    return x, books


def left_over(x, books, codes):
    """‖x − Σ codes‖² in float64, [N]."""
    total = sum(books[q].double()[codes[:, q]] for q in range(codes.shape[1]))
    return (x.double() - total).square().sum(1)


def exhaustive(x, books):
    """The nearest of all K^Q sums, in float64."""
    Q, K, _ = books.shape
    every = torch.tensor(list(itertools.product(range(K), repeat=Q)))
    errors = torch.stack([left_over(x, books, row.expand(len(x), Q)) for row in every], 1)
    return every[errors.argmin(1)]


def by_faiss(x, books, width):
    """Codes of faiss's residual quantizer over the same codebooks."""
    Q, K, D = books.shape
    bits = int(np.log2(K))
    quantizer = faiss.ResidualQuantizer(D, Q, bits)
    faiss.copy_array_to_vector(books.numpy().ravel(), quantizer.codebooks)
    quantizer.is_trained, quantizer.max_beam_size, quantizer.use_beam_LUT = True, width, 0
    packed = quantizer.compute_codes(x.numpy())
    unpacked = np.unpackbits(packed, axis=1, bitorder="little")[:, : Q * bits]
    return torch.from_numpy(unpacked.reshape(len(x), Q, bits) @ (1 << np.arange(bits)))


@pytest.mark.parametrize(("Q", "K"), [(2, 7), (3, 4), (1, 5)])
def test_a_wide_beam_finds_the_best_sum_there_is(Q, K):
    x, books = random_problem(200, Q, K, 5)
    assert torch.equal(
        beam_search(layers_of(books), x, Q, K ** max(1, Q - 1)), exhaustive(x, books)
    )


@pytest.mark.parametrize("width", [1, 2, 5])
def test_agrees_with_faiss(width):
    x, books = random_problem(500, 4, 32, 16)
    assert torch.equal(beam_search(layers_of(books), x, 4, width), by_faiss(x, books, width))


@settings(max_examples=40, deadline=None)
@given(
    N=st.integers(0, 40),
    Q=st.integers(1, 4),
    K=st.integers(1, 40),
    D=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_a_beam_of_one_takes_the_nearest_codes(N, Q, K, D, seed):
    x, books = random_problem(N, Q, K, D, seed)
    layers = layers_of(books)
    assert torch.equal(beam_search(layers, x, Q, 1), layers.walk(x).codes)


@settings(max_examples=30, deadline=None)
@given(N=st.integers(2, 70), width=st.integers(2, 9), seed=st.integers(0, 99))
def test_a_frame_does_not_depend_on_those_beside_it(N, width, seed):
    x, books = random_problem(N, 3, 24, 6, seed)
    layers = layers_of(books)
    together = beam_search(layers, x, 3, width)
    alone = torch.cat([beam_search(layers, row[None], 3, width) for row in x])
    assert torch.equal(together, alone)


def test_agrees_with_the_naive_reference():
    x, books = random_problem(60, 3, 40, 8, offset=20.0)
    books[1, 20:] = books[1, :20]
    books[2, 3] = torch.nan
    expected = reference.beam_codes(x, list(books), 6)
    assert torch.equal(beam_search(layers_of(books), x, 3, 6), expected)


def test_a_beam_too_wide_for_the_kernels_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    caplog.set_level(logging.WARNING)
    cuda._say_once.cache_clear()
    x, books = random_problem(10, 2, 40, 8)
    for _ in range(3):
        codes = cuda.beam_codes(x, list(books), 17)
    assert torch.equal(codes, reference.beam_codes(x, list(books), 17))
    assert ["a beam of 17 exceeds" in record.message for record in caplog.records] == [True]


def test_blocks_of_any_size_give_the_same(monkeypatch):
    x, books = random_problem(300, 3, 64, 8)
    whole = beam_search(layers_of(books), x, 3, 4)
    monkeypatch.setitem(blocked_beam._BLOCK_ELEMENTS, "cpu", 4 * 64 * 7)
    assert torch.equal(beam_search(layers_of(books), x, 3, 4), whole)
    monkeypatch.setitem(blocked_beam._KEPT_ELEMENTS, "cpu", 4 * 8 * 50)
    assert torch.equal(beam_search(layers_of(books), x, 3, 4), whole)


def near_sums(size):
    """Frames at sums of codes of which those of the later layers are of another size."""
    generator = torch.Generator().manual_seed(1)
    books = torch.randn(3, 64, 32, generator=generator)
    books[1:] *= size
    codes = torch.randint(64, (3, 400), generator=generator)
    return sum(book[chosen] for book, chosen in zip(books, codes, strict=True)), books


@pytest.mark.parametrize("case", ["plain", "offset", "outlier", "shared", "tiny"])
def test_products_from_tables_give_the_float64_answer(case, monkeypatch):
    x, books = near_sums(1e-7) if case == "tiny" else random_problem(400, 3, 64, 32, 7)
    if case == "offset":
        x, books = x + 50, books + torch.tensor([50.0, 0.0, 3.0])[:, None, None]
    elif case == "outlier":
        books[1, 3] *= 1e3
    elif case == "shared":
        books = books[:1].expand(3, -1, -1)
    expected = reference.beam_codes(x, list(books), 8)
    used = []
    by_tables = blocked_beam.by_tables
    monkeypatch.setattr(
        blocked_beam, "by_tables", lambda *a: (used.append(len(a[0].books)), by_tables(*a))[1]
    )
    found = beam_search(layers_of(books), x, 3, 8)
    assert used == [1, 2]
    # Sums of codes that were swapped are equal, but for the rounding of a residual.
    excess = left_over(x, books, found) - left_over(x, books, expected)
    assert excess.abs().max() < 1e-5
    assert case == "shared" or torch.equal(found, expected)


def test_tables_are_kept_with_what_was_prepared(monkeypatch):
    x, books = random_problem(400, 3, 64, 32, 7)
    expected = b2t_kernels.beam_codes(x, list(books), 8)
    products, addmm = [], torch.addmm
    monkeypatch.setattr(
        blocked_tables.torch,
        "addmm",
        lambda *a, **k: (products.append(len(a[1])), addmm(*a, **k))[1],
    )

    def tables_made(prepared, x=x, books=books, expected=expected):
        products.clear()
        found = b2t_kernels.beam_codes(x, list(books), 8, prepared)
        assert torch.equal(found, expected)
        return products.count(64)

    prepared = b2t_kernels.prepare_codes(books)
    assert [tables_made(prepared) for _ in range(3)] == [3, 0, 0]
    # Others, of which one is the same: nothing is taken for what it is not.
    moved = books.clone()
    moved[0] *= 1.5
    other = [b2t_kernels.prepare_codes(moved)[0], *prepared[1:]]
    answer = b2t_kernels.beam_codes(x, list(moved), 8)
    assert [tables_made(other, books=moved, expected=answer) for _ in range(2)] == [3, 0]
    two = b2t_kernels.beam_codes(x, list(books[:2]), 8)
    assert tables_made(prepared[:2], books=books[:2], expected=two) == 1
    assert tables_made(prepared) == 3
    # Fewer frames, and more than were products of before.
    assert tables_made(prepared, x=x[:50], expected=expected[:50]) == 0
    monkeypatch.setattr(blocked_tables, "FRAME_ELEMENTS", 64 * 90)
    again = b2t_kernels.prepare_codes(books)
    assert [tables_made(again) for _ in range(2)] == [3, 0]


def test_two_searches_at_once_never_share_tables():
    x, books = random_problem(400, 3, 64, 32, 7)
    expected = b2t_kernels.beam_codes(x, list(books), 8)
    prepared = b2t_kernels.prepare_codes(books)
    b2t_kernels.beam_codes(x, list(books), 8, prepared)
    ours = [
        blocked_beam._book(book, CentredCodes(*given))
        for book, given in zip(books, prepared, strict=True)
    ]
    with blocked_tables.Kept(ours) as one:
        taken = one.tables(tuple(ours[:1]), ours[1])
        assert taken._codes, "not those of the search before"
        taken.rows[: taken.frames] = 1e6
        assert torch.equal(b2t_kernels.beam_codes(x, list(books), 8, prepared), expected)
        assert (taken.rows[: taken.frames] == 1e6).all()
    assert torch.equal(b2t_kernels.beam_codes(x, list(books), 8, prepared), expected)


def test_tables_go_with_what_was_prepared():
    x, books = random_problem(400, 3, 64, 32, 7)
    shared = b2t_kernels.prepare_codes(books[:1]) * 3
    gc.collect()
    before = len(blocked_tables._KEPT)
    b2t_kernels.beam_codes(x, [books[0]] * 3, 8, shared)
    b2t_kernels.beam_codes(x, list(books), 8)
    assert len(blocked_tables._KEPT) == before + 1
    del shared
    assert len(blocked_tables._KEPT) == before


def test_rows_of_tables_that_are_gone_are_used_again():
    x, books = random_problem(400, 3, 64, 32, 7)
    expected = b2t_kernels.beam_codes(x, list(books), 8)
    gc.collect()
    (rows,) = blocked_tables._SPARE
    rows.fill_(torch.nan)
    assert torch.equal(b2t_kernels.beam_codes(x, list(books), 8), expected)
    assert blocked_tables._SPARE[0] is rows
    other, more = random_problem(400, 3, 128, 32, 7)
    found = b2t_kernels.beam_codes(other, list(more), 8)
    assert torch.equal(found, reference.beam_codes(other, list(more), 8))
    assert blocked_tables._SPARE[0].shape[1] == 128


def test_tables_too_large_to_be_kept_are_made_for_each_layer(monkeypatch):
    x, books = random_problem(400, 4, 64, 32, 7)
    expected = reference.beam_codes(x, list(books), 8)
    monkeypatch.setattr(blocked_tables, "FRAME_ELEMENTS", 64 * 100)
    monkeypatch.setattr(blocked_tables, "TABLE_ELEMENTS", 64 * 100 + 5 * 64 * 64)
    prepared = b2t_kernels.prepare_codes(books)
    assert torch.equal(b2t_kernels.beam_codes(x, list(books), 8, prepared), expected)
    assert prepared[-1][0] not in blocked_tables._KEPT


def test_layers_of_different_sizes():
    x, books = random_problem(400, 3, 256, 32, 7)
    books = [books[0, :64], books[1], books[2, :192]]
    expected = reference.beam_codes(x, books, 8)
    assert torch.equal(b2t_kernels.beam_codes(x, books, 8), expected)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that an operator makes."""

    size = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        made = function(*arguments, **(keywords or {}))
        for tensor in made if isinstance(made, tuple) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor._base is None:
                self.size = max(self.size, tensor.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize(("N", "K", "D"), [(100_000, 8, 64), (2000, 4096, 16), (3000, 64, 256)])
def test_no_block_outgrows_its_bound(N, K, D):
    x, books = random_problem(N, 2, K, D)
    with Largest() as largest:
        beam_search(layers_of(books), x, 2, 8)
    result_and_input = max(N * 2 * 8, N * D * 4)
    assert largest.size <= max(1.1 * 4 * (1 << 21), result_and_input)


def test_a_common_offset_changes_nothing():
    x, books = random_problem(400, 3, 32, 8)
    x, books = (x * 1024).round() / 1024, (books * 1024).round() / 1024  # exact with the offset
    moved = books.clone()
    moved[0] += 128
    expected = beam_search(layers_of(books), x, 3, 4)
    assert torch.equal(beam_search(layers_of(moved), x + 128, 3, 4), expected)


def test_near_ties_are_settled_in_float64():
    x, books = random_problem(400, 1, 16, 8)
    pairs = torch.cat([books, books + 3e-6 * torch.randn(books.shape)], 1)
    x = 300 * x
    assert torch.equal(beam_search(layers_of(pairs), x, 1, 1), exhaustive(x, pairs))


def test_equal_codes_go_by_their_index():
    x, books = random_problem(100, 2, 6, 4)
    books[:, 3:] = books[:, :3]
    once = beam_search(layers_of(books[:, :3]), x, 2, 4)
    assert torch.equal(beam_search(layers_of(books), x, 2, 4), once)


def test_of_equal_sums_the_one_with_the_nearer_first_code():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-9, 10, (500, 3), generator=generator).float()
    book = torch.randint(-6, 7, (12, 3), generator=generator).float()
    codes = beam_search(layers_of(book.expand(2, -1, -1)), x, 2, 12)
    first, second = ((x - book[codes[:, q]]).square().sum(1) for q in (0, 1))
    assert (first <= second).all()


def test_codes_that_are_not_finite_are_never_chosen():
    x, books = random_problem(100, 2, 6, 4)
    expected = beam_search(layers_of(books[:, :4]), x, 2, 4)
    books[:, 4], books[:, 5] = torch.nan, torch.inf
    assert torch.equal(beam_search(layers_of(books), x, 2, 4), expected)


def test_wider_beams_come_nearer():
    x, books = random_problem(2000, 6, 64, 16)
    errors = [left_over(x, books, beam_search(layers_of(books), x, 6, w)) for w in (1, 2, 4, 8)]
    means = [float(error.mean()) for error in errors]
    assert means == sorted(means, reverse=True)
    assert means[-1] < 0.93 * means[0]


def test_cosine_codes_are_scaled_by_their_gain():
    x, books = random_problem(300, 2, 8, 4)
    books = torch.nn.functional.normalize(books, dim=-1)
    gain = torch.tensor([0.9, 0.4])
    found = beam_search(layers_of(books, gain, cosine=True), x, 2, 8)
    assert torch.equal(found, exhaustive(x, books * gain[:, None, None]))


def started(**options):
    torch.manual_seed(0)
    quantizer = ResidualVQ(8, 16, 3, kmeans_init=False, **options)
    quantizer.codebooks.embed.mul_(0.5 ** torch.arange(3)[:, None, None])
    return quantizer


def test_training_and_evaluation_have_their_own_width():
    x = torch.randn(4, 50, 8)
    books = started().codebooks.embed
    expected = {w: beam_search(layers_of(books), x.flatten(0, 1), 3, w).view(4, 50, 3)
                for w in (1, 2, 6)}  # fmt: skip
    quantizer = started(beam_size=2, eval_beam_size=6)
    assert torch.equal(quantizer.train()(x).codes, expected[2])
    assert torch.equal(quantizer.encode(x), expected[6])  # as in evaluation, in any mode
    assert torch.equal(quantizer.eval()(x).codes, expected[6])
    assert torch.equal(started(beam_size=2).eval()(x).codes, expected[2])
    assert torch.equal(started(eval_beam_size=6).train()(x).codes, expected[1])


def test_statistics_follow_the_codes_of_the_beam():
    x = torch.randn(2, 60, 8)
    mask = torch.rand(2, 60) > 0.3
    x[0, 0], mask[0, 0] = torch.nan, True
    quantizer = started(beam_size=4).train()
    books, out = quantizer.codebooks.embed.double(), quantizer(x, mask)
    real = mask.clone()
    real[0, 0] = False
    assert (out.codes[~real] == -1).all()
    residual, codes = x[real].double(), out.codes[real]
    for q in range(3):
        assert torch.equal(out.stats.counts[q], torch.bincount(codes[:, q], minlength=16))
        sums = torch.zeros(16, 8, dtype=torch.float64).index_add_(0, codes[:, q], residual)
        torch.testing.assert_close(out.stats.sums[q].double(), sums, rtol=1e-5, atol=1e-5)
        residual = residual - books[q][codes[:, q]]
        torch.testing.assert_close(
            out.stats.squared_error[q].double(), residual.square().sum(), rtol=1e-5, atol=0.0
        )
    assert int(out.stats.nonfinite) == 1
    torch.testing.assert_close(quantizer.decode(out.codes), out.quantized, rtol=0, atol=0)


def test_soft_usage_is_that_of_the_forward():
    x = torch.randn(3, 40, 8)
    quantizer = started(beam_size=4).train()
    usage = quantizer.soft_usage(x)
    alone = quantizer(x, losses=("diversity",)).losses["diversity"]
    given = quantizer(x, losses=("diversity",), norms=StepNorms(usage=usage)).losses["diversity"]
    torch.testing.assert_close(given, alone)


def test_dropped_layers_are_not_searched():
    quantizer = started(beam_size=3, quantize_dropout=True).train()
    x = torch.randn(1, 30, 8)
    seen = set()
    for update in range(12):
        quantizer.codebooks.updates.fill_(update)
        codes = quantizer(x).codes[0]
        layers = int((codes[0] >= 0).sum())
        seen.add(layers)
        expected = beam_search(layers_of(quantizer.codebooks.embed), x[0], layers, 3)
        assert torch.equal(codes[:, :layers], expected)
        assert (codes[:, layers:] == -1).all()
    assert seen == {1, 2, 3}


def test_no_frames():
    assert started(beam_size=4).train()(torch.zeros(0, 5, 8)).codes.shape == (0, 5, 3)
    masked = torch.zeros(2, 5, dtype=torch.bool)
    assert (started(beam_size=4).train()(torch.randn(2, 5, 8), masked).codes == -1).all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"beam_size": 0}, "beam_size is 0: .*greater than or equal to 1"),
        ({"eval_beam_size": 0}, "eval_beam_size is 0: .*greater than or equal to 1"),
        ({"beam_size": 2, "stochastic_sample_codes": True}, "a beam draws nothing"),
    ],
)
def test_options_that_make_no_sense(options, says):
    with pytest.raises(UserError, match=says):
        ResidualVQ(8, 16, 3, **options)
