"""Run by test_kernel_interpreter.py in processes of their own with TRITON_INTERPRET=1."""

import pytest
import torch

from b2t_kernels import cuda, nearest, prepare, reference, rvq, sums, tuning, usage


def rows_and_codes(N, K, D, *, offset=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=generator) + offset
    return x, torch.randn(K, D, generator=generator) + offset


def regret(x, codebook, indices, kept):
    """How much farther than the nearest code the chosen ones are, relative to the distance."""
    distances = reference.squared_distances(x[kept], codebook)
    least = distances.amin(dim=1)
    return (distances.gather(1, indices[kept, None])[:, 0] - least) / least.clamp(min=1e-9)


def check_search(x, codebook, mask, exact, expected=None):
    indices, counts = nearest.nearest_code(x, codebook, mask, exact)
    valid = reference.valid_rows(x, mask)
    wanted, _ = reference.nearest_code(x, codebook, mask) if expected is None else expected
    assert (indices[~valid] == -1).all()
    if exact:
        assert torch.equal(indices, wanted)
    else:
        assert regret(x, codebook, indices, valid).max() < 4e-3
    assert torch.equal(counts, torch.bincount(indices[valid], minlength=codebook.shape[0]))


def test_interpreter_is_on():
    assert tuning.interpreted(nearest.nearest_kernel)


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
    generator = torch.Generator().manual_seed(1)
    half = torch.randint(-2, 3, (50, 6), generator=generator).float()
    order = torch.randperm(200, generator=generator)
    codebook = torch.cat([half, -half, half, -half])[order]
    x = torch.randint(-2, 3, (16, 6), generator=generator).float()
    indices, _ = nearest.nearest_code(x, codebook, None, exact)
    distances = reference.squared_distances(x, codebook)
    tied = (distances == distances.amin(dim=1, keepdim=True)).sum(dim=1)
    assert tied.min() > 1
    assert torch.equal(indices, reference.nearest_code(x, codebook)[0])


@pytest.mark.parametrize("exact", [False, True])
def test_search_identical_codes(exact):
    x, codebook = rows_and_codes(3, 1, 6)
    indices, counts = nearest.nearest_code(x, codebook.expand(70, -1).contiguous(), None, exact)
    assert indices.tolist() == [0, 0, 0]
    assert counts.tolist() == [3] + [0] * 69


@pytest.mark.parametrize("exact", [False, True])
def test_search_rows_and_codes_that_are_not_finite(exact):
    x, codebook = rows_and_codes(64, 100, 20)
    x[1, 3], x[2, 0], x[63, 19] = torch.nan, torch.inf, -torch.inf
    codebook[0, 2], codebook[12], codebook[99] = torch.nan, -torch.inf, torch.inf
    check_search(x, codebook, None, exact)
    indices, counts = nearest.nearest_code(x, codebook, None, exact)
    assert (indices == -1).nonzero()[:, 0].tolist() == [1, 2, 63]
    assert not counts[[0, 12, 99]].any()


def test_exact_settles_close_calls():
    """Codes closer to one another than fp16 can tell apart, in one run and in many."""
    x, centre = rows_and_codes(12, 1, 16, offset=3.0)
    noise = rows_and_codes(1, 300, 16, seed=2)[1]
    codebook = centre + 1e-4 * noise
    codebook[5] = centre + 4.0
    check_search(x, codebook, None, True)
    indices, _ = nearest.nearest_code(x, codebook, None, False)
    wanted, _ = reference.nearest_code(x, codebook)
    assert not torch.equal(indices, wanted), "fast is already exact here: the case proves nothing"


def test_search_outlying_rows_and_codes():
    x, codebook = rows_and_codes(64, 90, 16)
    x[3] *= 1e6
    x[4] *= 1e20
    codebook[8] *= 1e4
    wide = torch.where(torch.arange(64)[:, None] == 4, x / 1e10, x)
    expected = reference.nearest_code(wide, codebook)
    indices, _ = nearest.nearest_code(x, codebook, None, False)
    assert (indices == expected[0]).double().mean() > 0.95
    assert indices[3] == expected[0][3]


def test_rows_of_half_precision():
    x, codebook = rows_and_codes(64, 70, 24)
    for dtype in (torch.float16, torch.bfloat16):
        check_search(x.to(dtype), codebook, None, True)


def test_no_rows():
    x, codebook = rows_and_codes(0, 5, 3)
    indices, counts = nearest.nearest_code(x, codebook, None, False)
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

    monkeypatch.setattr(torch, "empty", poisoned)
    x, codebook = rows_and_codes(63, 70, 20)
    indices, _ = nearest.nearest_code(x, codebook, None, False)
    tau = torch.tensor(3.0)
    total, lse, _ = usage.usage_forward(x, codebook, tau, None)
    gradients = usage.usage_backward(torch.linspace(-1, 1, 70), x, codebook, tau, lse)
    summed, _ = sums.code_sums(x, indices, 70, None, False)
    monkeypatch.undo()
    assert torch.equal(indices, reference.nearest_code(x, codebook)[0])
    for result in (total, lse, *gradients, summed):
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
    total, lse, frames = usage.usage_forward(x, codebook, tau, mask)
    wide = [torch.where(x.isfinite(), x, 0).double(), codebook.double()]
    for tensor in wide:
        tensor.requires_grad_()
    expected = reference.code_usage(*wide, 6.0, valid) * valid.sum()
    assert frames == valid.sum()
    torch.testing.assert_close(total.double(), expected.detach(), rtol=4e-3, atol=1e-4)
    weights = 1e-6 * torch.randn(K, generator=torch.Generator().manual_seed(3))
    found = usage.usage_backward(weights, x, codebook, tau, lse)
    wanted = torch.autograd.grad(expected @ weights.double(), wide)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).norm() <= 4e-3 * theirs.norm() + 1e-12
    assert not found[0][~valid].any()


@pytest.mark.parametrize("fused", [True, False])
def test_residual_layers(fused):
    x, _ = rows_and_codes(70, 1, 33)
    codebooks = torch.stack([rows_and_codes(1, 63, 33, seed=q)[1] / 2**q for q in range(3)])
    mask = torch.arange(70) % 6 != 1
    x[0, 0] = torch.nan
    found = rvq.rvq_encode(x, codebooks, mask, False, fused)
    expected = reference.rvq_encode(x, codebooks, mask)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[2], expected[2])


@pytest.mark.parametrize("atomic", [False, True])
def test_sums(atomic):
    x, _ = rows_and_codes(300, 1, 33)
    indices = torch.randint(-1, 40, (300,), generator=torch.Generator().manual_seed(4))
    mask = torch.arange(300) % 7 != 3
    found, counts = sums.code_sums(x, indices, 40, mask, atomic)
    expected, expected_counts = reference.code_sums(x, indices, 40, mask)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(counts, expected_counts)


def test_prepared_codes_are_a_permutation_with_the_stated_scale():
    _, codebook = rows_and_codes(1, 130, 20, offset=50.0)
    made = prepare.prepare(codebook)
    scale = usage.prepared_scale(made.statistics)
    assert scale == 2 ** torch.log2(scale).round()
    moved = (codebook - made.mean[0, :20]) * scale
    assert 128 <= moved.abs().max() < 256
    place = usage.physical_place(130, codebook.device)
    assert place.unique().numel() == 130
    torch.testing.assert_close(made.codes[place, :20].float(), moved, rtol=1e-3, atol=1e-3)
    norms = made.codes.float().square().sum(dim=1)
    torch.testing.assert_close(made.bias[place], -0.5 * norms[place])
    padding = torch.ones(made.codes.shape[0], dtype=torch.bool)
    padding[place] = False
    assert (made.bias[padding] == -torch.inf).all()
    assert not made.codes[padding].any()


def test_what_a_cuda_tensor_runs(monkeypatch):
    """The dispatch of ``cuda``, believing that there is a GPU: every argument finds its place."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    x, codebook = rows_and_codes(64, 20, 16)
    x, mask, tau = x.half(), torch.arange(64) % 3 > 0, torch.tensor(4.0)
    indices, counts = cuda.nearest_code(x, codebook, mask, True)
    assert torch.equal(indices, reference.nearest_code(x, codebook, mask)[0])
    found = cuda.rvq_encode(x, codebook[None], mask, False)
    assert (found[0][:, 0] == indices).float().mean() > 0.95
    summed, number = cuda.code_sums(x, indices, 20, mask, False)
    assert torch.equal(number, counts)
    expected = reference.code_sums(x, indices, 20, mask)[0]
    torch.testing.assert_close(summed.double(), expected, rtol=1e-4, atol=1e-4)
    total, lse, frames = cuda.usage_forward(x, codebook, tau, mask)
    assert frames == mask.sum()
    torch.testing.assert_close(total.sum(), mask.sum().float(), rtol=1e-3, atol=0)
    gradients = cuda.usage_backward(torch.linspace(0, 1, 20), x, codebook, tau, lse)
    assert gradients[0].dtype == torch.float16
    assert gradients[1].dtype == torch.float32
    assert not gradients[0][~mask].any()
