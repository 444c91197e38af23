"""What the Triton kernels must do, on a GPU, or interpreted on a CPU where TRITON_INTERPRET is set.

Run by test_kernel_interpreter.py and test_kernel_gpu.py in processes of their own.
"""

import os

import pytest
import torch
import triton

from b2t_kernels import (
    cuda,
    gumbel,
    launching,
    nearest,
    prepare,
    reference,
    residual,
    scan,
    sums,
    tuning,
    usage,
)
from tests.kernels.apart import assert_near, unlike

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") else "cuda"


@pytest.fixture(autouse=True)
def _on_the_device():
    with torch.device(DEVICE):
        yield


def seeded(seed):
    """Draws on the CPU: the same numbers wherever they are used."""
    return torch.Generator("cpu").manual_seed(seed)


def drawn(how, *arguments, generator):
    """What ``how``, of torch, draws with a generator of the CPU, on the device."""
    return how(*arguments, generator=generator, device="cpu").to(DEVICE)


def rows_and_codes(N, K, D, *, offset=0.0, seed=0):
    generator = seeded(seed)
    x = drawn(torch.randn, N, D, generator=generator) + offset
    return x, drawn(torch.randn, K, D, generator=generator) + offset


def regret(x, codebook, indices, kept):
    """How much farther than the nearest code the chosen ones are, relative to the distance."""
    distances = reference.squared_distances(x[kept], codebook)
    least = distances.amin(dim=1)
    return (distances.gather(1, indices[kept, None])[:, 0] - least) / least.clamp(min=1e-9)


def search(x, codebook, mask, exact):
    return nearest.nearest_code(x, codebook, mask, exact, prepare.prepare(codebook))


def soft(x, codebook, tau, mask, **wanted):
    return usage.usage_forward(x, codebook, tau, mask, prepare.prepare(codebook), **wanted)


def soft_gradients(grad, x, codebook, tau, lse, wanted=(True, True)):
    codes = prepare.prepare(codebook)
    return usage.usage_backward(grad, x, codebook, tau, lse, codes, wanted)


def check_search(x, codebook, mask, exact, expected=None):
    indices, counts = search(x, codebook, mask, exact)
    valid = reference.valid_rows(x, mask)
    wanted, _ = reference.nearest_code(x, codebook, mask) if expected is None else expected
    assert (indices[~valid] == -1).all()
    if exact:
        assert torch.equal(indices, wanted), unlike(indices, wanted)
    else:
        assert regret(x, codebook, indices, valid).max() < 4e-3
    assert torch.equal(counts, torch.bincount(indices[valid], minlength=codebook.shape[0]))


def test_interpreter_is_on_where_it_is_asked_for():
    assert (DEVICE == "cuda") == isinstance(scan.scan_kernel, triton.JITFunction)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("N", "K", "D", "offset"),
    [(1, 1, 1, 0.0), (63, 130, 63, 100.0), (130, 1000, 130, 0.0), (1, 63, 1000, 0.0)],
)
def test_search_shapes(N, K, D, offset, exact):
    x, codebook = rows_and_codes(N, K, D, offset=offset)
    mask = torch.arange(N) % 4 != 1
    check_search(x, codebook, mask, exact)


@pytest.mark.parametrize("exact", [False, True])
def test_search_ties_go_to_the_lowest_index(exact):
    """Small integers around a mean of zero: every score is exact, and many are equal."""
    generator = seeded(1)
    half = drawn(torch.randint, -2, 3, (50, 6), generator=generator).float()
    order = drawn(torch.randperm, 200, generator=generator)
    codebook = torch.cat([half, -half, half, -half])[order]
    x = drawn(torch.randint, -2, 3, (16, 6), generator=generator).float()
    indices, _ = search(x, codebook, None, exact)
    distances = reference.squared_distances(x, codebook)
    tied = (distances == distances.amin(dim=1, keepdim=True)).sum(dim=1)
    assert tied.min() > 1
    assert torch.equal(indices, reference.nearest_code(x, codebook)[0])


@pytest.mark.parametrize("exact", [False, True])
def test_search_identical_codes(exact):
    x, codebook = rows_and_codes(3, 1, 6)
    indices, counts = search(x, codebook.expand(70, -1).contiguous(), None, exact)
    assert indices.tolist() == [0, 0, 0]
    assert counts.tolist() == [3] + [0] * 69


@pytest.mark.parametrize("exact", [False, True])
def test_search_rows_and_codes_that_are_not_finite(exact):
    x, codebook = rows_and_codes(64, 100, 20)
    x[1, 3], x[2, 0], x[63, 19] = torch.nan, torch.inf, -torch.inf
    codebook[0, 2], codebook[12], codebook[99] = torch.nan, -torch.inf, torch.inf
    check_search(x, codebook, None, exact)
    indices, counts = search(x, codebook, None, exact)
    assert (indices == -1).nonzero()[:, 0].tolist() == [1, 2, 63]
    assert not counts[[0, 12, 99]].any()


def test_exact_settles_close_calls():
    """Codes closer to one another than fp16 can tell apart, in one run and in many."""
    x, centre = rows_and_codes(12, 1, 16, offset=3.0)
    noise = rows_and_codes(1, 300, 16, seed=2)[1]
    codebook = centre + 1e-5 * noise
    codebook[5] = centre + 4000.0
    check_search(x, codebook, None, True)
    indices, _ = search(x, codebook, None, False)
    wanted, _ = reference.nearest_code(x, codebook)
    assert not torch.equal(indices, wanted), "fast is already exact here: the case proves nothing"


def test_search_outlying_rows_and_codes():
    x, codebook = rows_and_codes(64, 90, 16)
    x[3] *= 1e6
    x[4] *= 1e20
    codebook[8] *= 1e4
    wide = torch.where(torch.arange(64)[:, None] == 4, x / 1e10, x)
    expected = reference.nearest_code(wide, codebook)
    indices, _ = search(x, codebook, None, False)
    assert (indices == expected[0]).double().mean() > 0.95
    assert indices[3] == expected[0][3]


def test_rows_of_half_precision():
    x, codebook = rows_and_codes(64, 70, 24)
    for dtype in (torch.float16, torch.bfloat16):
        check_search(x.to(dtype), codebook, None, True)


def test_no_rows():
    x, codebook = rows_and_codes(0, 5, 3)
    indices, counts = search(x, codebook, None, False)
    assert indices.shape == (0,)
    assert not counts.any()


def test_outputs_are_written_and_nothing_else(monkeypatch):
    """Every buffer lies between guards and starts as NaN (or −7), as uninitialised memory may."""
    guarded = []

    def poisoned(*size, dtype=torch.float32, device=None):
        shape = size[0] if isinstance(size[0], tuple) else size
        count = torch.Size(shape).numel()
        poison = torch.nan if dtype.is_floating_point else -7
        room = torch.full((count + 128,), poison, dtype=dtype)
        guarded.append((room, count, poison))
        return room[64 : 64 + count].view(shape)

    monkeypatch.setattr(launching, "ADDRESSES", False)
    monkeypatch.setattr(torch, "empty", poisoned)
    x, codebook = rows_and_codes(63, 70, 20)
    indices, _ = search(x, codebook, None, False)
    tau = torch.tensor(3.0)
    total, found = soft(x, codebook, tau, None)
    lse = found.lse
    gradients = soft_gradients(torch.linspace(-1, 1, 70), x, codebook, tau, lse)
    summed, _ = sums.code_sums(x, indices, 70, None, None, False)
    monkeypatch.setattr(sums, "FEW_ROWS", 0)
    ordered, _ = sums.code_sums(x, indices, 70, None, None, False)
    monkeypatch.undo()
    assert torch.equal(indices, reference.nearest_code(x, codebook)[0])
    for result in (total, lse, *gradients, summed, ordered):
        assert result.isfinite().all()
    assert len(guarded) > 10
    for room, count, poison in guarded:
        for guard in (room[:64], room[64 + count :]):
            intact = guard.isnan() if poison != poison else guard == poison
            assert intact.all()


@pytest.mark.parametrize(
    ("N", "K", "D", "offset"), [(130, 63, 20, 100.0), (63, 130, 63, 0.0), (5, 1, 1, 0.0)]
)
def test_usage_and_its_gradients(N, K, D, offset):
    x, codebook = rows_and_codes(N, K, D, offset=offset)
    mask = torch.arange(N) % 5 != 2
    x[0, 0] = torch.nan
    tau = torch.tensor(6.0)
    valid = reference.valid_rows(x, mask)
    total, (_, _, lse, frames) = soft(x, codebook, tau, mask)
    wide = [torch.where(x.isfinite(), x, 0).double(), codebook.double()]
    for tensor in wide:
        tensor.requires_grad_()
    expected = reference.code_usage(*wide, 6.0, valid) * valid.sum()
    assert frames == valid.sum()
    torch.testing.assert_close(total.double(), expected.detach(), rtol=4e-3, atol=1e-4)
    weights = 1e-6 * drawn(torch.randn, K, generator=seeded(3))
    found = soft_gradients(weights, x, codebook, tau, lse)
    wanted = torch.autograd.grad(expected @ weights.double(), wide)
    for ours, theirs in zip(found, wanted, strict=True):
        assert_near(ours, theirs, 4e-3, 1e-12)
    assert not found[0][~valid].any()


@pytest.fixture(params=["gathered", "sorted", "atomic"])
def atomic(request, monkeypatch):
    """Whether sums are atomic; if not, whether many rows are sorted or few gathered."""
    if request.param == "sorted":
        monkeypatch.setattr(sums, "FEW_ROWS", 0)
    return request.param == "atomic"


def test_sums(atomic):
    x, _ = rows_and_codes(300, 1, 100)
    x = x.half()
    indices = drawn(torch.randint, -1, 40, (300,), generator=seeded(4))
    mask = torch.arange(300) % 7 != 3
    found, counts = sums.code_sums(x, indices, 40, mask, None, atomic)
    expected, expected_counts = reference.code_sums(x, indices, 40, mask)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(counts, expected_counts)


def test_prepared_codes_are_a_permutation_with_the_stated_scale():
    _, codebook = rows_and_codes(1, 130, 20, offset=50.0)
    made = prepare.prepare(codebook)
    scale = prepare.scale_of(made)
    assert scale == 2 ** torch.log2(scale).round()
    moved = (codebook - made.mean[0, :20]) * scale
    assert 128 <= moved.abs().max() < 256
    place = prepare.physical_place(130, codebook.device)
    assert place.unique().numel() == 130
    torch.testing.assert_close(made.codes[place, :20].float(), moved, rtol=1e-3, atol=1e-3)
    norms = made.codes.float().square().sum(dim=1)
    torch.testing.assert_close(made.bias[place], -0.5 * norms[place])
    padding = torch.ones(made.codes.shape[0], dtype=torch.bool)
    padding[place] = False
    assert (made.bias[padding] == -torch.inf).all()
    assert not made.codes[padding].any()


def test_what_a_cuda_tensor_runs(monkeypatch):
    """The dispatch of ``cuda``, as if there were a GPU: all arguments find their place."""
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    x, codebook = rows_and_codes(64, 20, 16)
    x, mask, tau = x.half(), torch.arange(64) % 3 > 0, torch.tensor(4.0)
    indices, counts = cuda.nearest_code(x, codebook, mask, True)
    assert torch.equal(indices, reference.nearest_code(x, codebook, mask)[0])
    summed, number = cuda.code_sums(x, indices, 20, mask, None, False)
    assert torch.equal(number, counts)
    expected = reference.code_sums(x, indices, 20, mask)[0]
    torch.testing.assert_close(summed.double(), expected, rtol=1e-4, atol=1e-4)
    total, lse, frames, again, _ = cuda.usage_forward(x, codebook, tau, mask, True)
    assert torch.equal(again, indices)
    assert frames == mask.sum()
    torch.testing.assert_close(total.sum(), mask.sum().float(), rtol=1e-3, atol=0)
    given = cuda.prepare_codes(codebook[None])[0]
    gradients = cuda.usage_backward(torch.linspace(0, 1, 20), x, codebook, tau, lse, given=given)
    drawn, drawn_counts = cuda.sample_code(
        x, codebook, tau, gumbel.mix(torch.arange(64)), gumbel.mix(-torch.arange(20)), given
    )
    assert torch.equal(drawn_counts, torch.bincount(drawn, minlength=20))
    paths = cuda.beam_codes(x[:2], [codebook] * 2, 2, [given] * 2)
    assert torch.equal(paths, reference.beam_codes(x[:2], [codebook] * 2, 2))
    assert gradients[0].dtype == torch.float16
    assert gradients[1].dtype == torch.float32
    assert not gradients[0][~mask].any()


def doubtful_rows(x, codebook, monkeypatch):
    """How many rows of an exact search are settled apart, and how many codes that compares."""
    seen = []
    monkeypatch.setattr(launching, "ADDRESSES", False)
    monkeypatch.setattr(nearest, "refine_kernel", Recorder(nearest.refine_kernel, seen))
    check_search(x, codebook, None, True)
    monkeypatch.undo()
    length, listed, share = seen[0]
    listed = listed.view(x.shape[0], -1)[: int(length[0])]
    runs, whole = (listed >= 0).sum(), (listed == -2).sum()
    return int(length[0]), int(8 * runs + share // 8 * whole)


class Recorder:
    """Stands for a kernel and notes the queue that it is given."""

    def __init__(self, kernel, seen):
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.seen.append((arguments[6], arguments[7].clone(), arguments[11]))
            self.kernel[grid](*arguments, **options)

        return launch


def test_exact_rescans_hidden_slots_alone(monkeypatch):
    """Two near codes in one slot of different tiles: an eighth of the codes, not all."""
    x, codebook = rows_and_codes(24, 4096, 16)
    codebook[8 + 64 * 3 + 3] = codebook[8 + 3] * (1 + 1e-6)  # few enough tiles on for one split
    x[:12] = codebook[11] + 1e-3 * x[:12]
    rows, compared = doubtful_rows(x, codebook, monkeypatch)
    assert 12 <= rows <= 18
    assert compared <= 12 * (4096 // 8 + 64) + 64 * 6


@pytest.mark.parametrize("factor", [10.0, 30.0])
def test_exact_bears_a_code_far_out(factor, monkeypatch):
    """One code much longer than the others makes few more rows doubtful, and none wrong."""
    x, codebook = rows_and_codes(400, 512, 64)
    before, _ = doubtful_rows(x, codebook, monkeypatch)
    codebook[100] *= factor
    after, _ = doubtful_rows(x, codebook, monkeypatch)
    assert before < 60
    assert after <= 1.5 * before + 4


@pytest.mark.parametrize("size", [1e20, 1e-25])
def test_exact_where_float32_squares_overflow_or_vanish(size):
    x, codebook = rows_and_codes(12, 300, 16)
    check_search(size * x, size * codebook, None, True)
    codebook[7] *= 1e4
    check_search(size * x, size * codebook, None, True)


def test_few_rows_split_the_codes(monkeypatch):
    """Any number of splits gives the same indices, counts and soft assignments."""
    x, codebook = rows_and_codes(70, 2000, 24)
    tau, results = torch.tensor(5.0), []
    for multiprocessors in (1, 5, 500):
        monkeypatch.setattr(tuning, "multiprocessors", lambda device, n=multiprocessors: n)
        check_search(x, codebook, None, True)
        indices, _ = search(x, codebook, None, False)
        total, found = soft(x, codebook, tau, None, search=True, exact=True)
        gradients = soft_gradients(torch.linspace(-1, 1, 2000), x, codebook, tau, found.lse)
        results.append((indices, found.indices, total, found.lse, *gradients))
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0]), unlike(other[0], results[0][0])
        assert torch.equal(other[1], results[0][1]), unlike(other[1], results[0][1])
        for ours, theirs in zip(other[2:], results[0][2:], strict=True):
            # Float32 sums in another order; small elements are differences of large ones.
            assert_near(ours, theirs, 5e-5)


def test_long_inputs_come_in_parts(monkeypatch):
    x, codebook = rows_and_codes(300, 90, 24)
    mask, tau = torch.arange(300) % 7 != 0, torch.tensor(5.0)
    whole = soft(x, codebook, tau, mask, search=True, exact=True)
    pulled = soft_gradients(torch.linspace(-1, 1, 90), x, codebook, tau, whole[1].lse)
    monkeypatch.setattr("b2t_kernels.rows.SCRATCH_BYTES", 1 << 14)
    parts = soft(x, codebook, tau, mask, search=True, exact=True)
    torch.testing.assert_close(parts, whole)
    again = soft_gradients(torch.linspace(-1, 1, 90), x, codebook, tau, whole[1].lse)
    for ours, theirs in zip(again, pulled, strict=True):
        assert_near(ours, theirs, 5e-5)
    check_search(x, codebook, mask, True)


def test_only_the_gradients_asked_for(monkeypatch):
    x, codebook = rows_and_codes(70, 63, 20)
    tau, weights = torch.tensor(3.0), torch.linspace(-1, 1, 63)
    lse = soft(x, codebook, tau, None)[1].lse
    both = soft_gradients(weights, x, codebook, tau, lse)
    monkeypatch.setattr(usage, "code_gradient_kernel", None)
    rows, codes = soft_gradients(weights, x, codebook, tau, lse, (True, False))
    assert torch.equal(rows, both[0])
    assert not codes.numel()


def test_sums_leave_out_indices_beyond_the_codes(atomic):
    x, _ = rows_and_codes(40, 1, 8)
    indices = torch.arange(40) % 8 - 2
    found, counts = sums.code_sums(x, indices, 4, None, None, atomic)
    expected, expected_counts = reference.code_sums(x, indices.where(indices < 4, -1), 4)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(counts, expected_counts)


def test_a_row_that_is_not_finite_enters_the_sum_of_its_code_alone(atomic):
    x, _ = rows_and_codes(40, 1, 8)
    indices = torch.arange(40) % 9 - 1
    x[indices == 3], x[indices == -1] = torch.nan, torch.inf
    found, _ = sums.code_sums(x, indices, 8, None, None, atomic)
    assert found.isfinite().all(dim=1).tolist() == [code != 3 for code in range(8)]


def test_sums_of_a_collapsed_codebook_are_cut_in_chunks(monkeypatch):
    """One code with nearly all rows: more programs than codes, and the same sum."""
    monkeypatch.setattr(sums, "FEW_ROWS", 0)
    x, _ = rows_and_codes(3000, 1, 8)
    indices = torch.where(torch.arange(3000) % 50 == 0, torch.arange(3000) % 7, 3)
    found, counts = sums.code_sums(x, indices, 7, None, None, False)
    expected, expected_counts = reference.code_sums(x, indices, 7)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(counts, expected_counts)
    assert counts[3] > 5 * sums.CHUNK
    indices[::9] = -1
    expected, expected_counts = reference.code_sums(x, indices, 7)
    again, _ = sums.code_sums(x, indices, 7, None, None, False)
    found, counts = sums.code_sums(x, indices, 7, None, expected_counts, False)
    assert torch.equal(found, again), "known counts are no other sum"
    assert torch.equal(counts, expected_counts)


@pytest.mark.parametrize("gain", [None, 1.7])
def test_residual_steps_equal_torch(gain):
    x, books = rows_and_codes(37, 3 * 20, 150)
    books = books.view(3, 20, 150)
    codes = drawn(torch.randint, -1, 20, (37, 3), generator=seeded(5))
    gains = None if gain is None else torch.full((3,), gain)
    chosen = torch.stack([books[q][codes[:, q].clamp(min=0)] for q in range(3)], 1).double()
    chosen = chosen.masked_fill((codes < 0)[..., None], 0) * (gain or 1)
    total = residual.sum_codes(books, codes, gains)
    torch.testing.assert_close(total.double(), chosen.sum(1), rtol=1e-6, atol=1e-5)
    last = None if gains is None else gains[2:]
    column = residual.sum_codes(books[2:], codes[:, 2:], last)
    torch.testing.assert_close(column.double(), chosen[:, 2], rtol=1e-6, atol=1e-6)
    left, errors = x.clone(), torch.zeros_like(x)
    for q in range(3):
        one = None if gains is None else gains[q]
        squares = residual.leave(left, books[q], codes[:, q], one, errors)
    wanted = x.double()[:, None] - chosen.cumsum(1)
    torch.testing.assert_close(left.double(), wanted[:, -1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(errors.double(), wanted.sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(squares.double(), wanted[:, -1].square().sum(), rtol=1e-5, atol=0)
