"""The public operators on CPU against float64 brute force, closed forms and autograd."""

import logging

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import b2t_kernels
from b2t_kernels import cuda, reference

SHAPES = [(1, 1, 1), (63, 130, 63), (130, 63, 1), (1000, 130, 130), (5, 1000, 63), (2100, 1, 3)]


def rows_and_codes(N, K, D, *, offset=0.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=generator) + offset
    codebook = torch.randn(K, D, generator=generator) + offset
    return x.to(dtype), codebook


@pytest.mark.parametrize("precision", ["fast", "exact"])
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_search_equals_float64_brute_force(shape, offset, precision):
    x, codebook = rows_and_codes(*shape, offset=offset)
    mask = torch.arange(shape[0]) % 3 != 1
    indices, counts = b2t_kernels.nearest_code(x, codebook, mask, precision=precision)
    expected, expected_counts = reference.nearest_code(x, codebook, mask)
    if precision == "exact":
        assert torch.equal(indices, expected)
        assert torch.equal(counts, expected_counts)
    else:
        assert (indices == expected).double().mean() > 0.998
        distances = reference.squared_distances(x, codebook)[mask]
        regret = distances.gather(1, indices[mask, None])[:, 0] - distances.amin(dim=1)
        assert regret.max() < 1e-5 * shape[2]
    assert counts.sum() == mask.sum()


@pytest.mark.parametrize("precision", ["fast", "exact"])
@pytest.mark.parametrize("K", [7, 64, 1025])
def test_ties_go_to_the_lowest_index(K, precision):
    x, codebook = rows_and_codes(301, K, 33)
    order = torch.randperm(2 * K, generator=torch.Generator().manual_seed(1))
    doubled = torch.cat([codebook, codebook])[order]
    indices, _ = b2t_kernels.nearest_code(x, doubled, precision=precision)
    assert torch.equal(indices, reference.nearest_code(x, doubled)[0])
    constant = codebook[:1].expand(K, -1).contiguous()
    indices, counts = b2t_kernels.nearest_code(x, constant, precision=precision)
    assert (indices == 0).all()
    assert counts[0] == 301


def test_equidistant_codes_tie_exactly():
    codebook = torch.eye(64)[torch.randperm(64, generator=torch.Generator().manual_seed(2))]
    indices, _ = b2t_kernels.nearest_code(torch.zeros(9, 64), codebook, precision="exact")
    assert (indices == 0).all()


def test_exact_settles_what_float32_cannot():
    codebook = torch.full((2, 8), 1000.0)
    codebook[0, 0] += 3e-2
    codebook[1, 0] -= 1e-2
    x = torch.full((4, 8), 1000.0)
    x[:, 1] += torch.tensor([0.0, 1e3, -1e3, 5e5])
    indices, _ = b2t_kernels.nearest_code(x, codebook, precision="exact")
    assert torch.equal(indices, reference.nearest_code(x, codebook)[0])


@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_rows_and_codes_that_are_not_finite(precision):
    x, codebook = rows_and_codes(70, 130, 17)
    x[3, 4], x[5, 0], x[69, 16] = torch.nan, torch.inf, -torch.inf
    codebook[0, 2], codebook[129] = torch.nan, torch.inf
    indices, counts = b2t_kernels.nearest_code(x, codebook, precision=precision)
    assert torch.equal(indices, reference.nearest_code(x, codebook)[0])
    assert (indices[[3, 5, 69]] == -1).all()
    assert counts.sum() == 67
    assert counts[0] == counts[129] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_and_strides(dtype):
    x, codebook = rows_and_codes(63, 65, 20, dtype=dtype)
    strided = x.repeat(1, 2).T.contiguous().T[:, :20]
    indices, _ = b2t_kernels.nearest_code(strided, codebook.T.contiguous().T, precision="exact")
    assert torch.equal(indices, reference.nearest_code(x, codebook)[0])


def test_no_rows_and_all_masked():
    x, codebook = rows_and_codes(4, 5, 3)
    for rows, mask in [(x[:0], None), (x, torch.zeros(4, dtype=torch.bool))]:
        indices, counts = b2t_kernels.nearest_code(rows, codebook, mask)
        assert (indices == -1).all()
        assert torch.equal(counts, torch.zeros(5, dtype=torch.int64))
        usage = b2t_kernels.code_usage(rows, codebook, 1.0, mask)
        assert torch.equal(usage, torch.zeros(5))
        sums, counts = b2t_kernels.code_sums(rows, indices, 5, mask)
        assert not sums.any()
        assert not counts.any()
        _, _, quantized = b2t_kernels.rvq_encode(rows, codebook[None], mask)
        assert quantized.shape == rows.shape
        assert not quantized.any()


@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_residual_layers_equal_the_reference(precision):
    x, _ = rows_and_codes(130, 1, 33)
    codebooks = torch.stack([rows_and_codes(1, 63, 33, seed=q)[1] / 2**q for q in range(4)])
    mask = torch.rand(130, generator=torch.Generator().manual_seed(3)) < 0.8
    x[0, 0] = torch.nan
    found = b2t_kernels.rvq_encode(x, codebooks, mask, precision)
    expected = reference.rvq_encode(x, codebooks, mask)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[2], expected[2])


@pytest.mark.parametrize("method", ["sorted", "atomic"])
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_equal_one_hot_product(shape, method):
    N, K, D = shape
    x, _ = rows_and_codes(N, K, D)
    indices = torch.randint(-1, K, (N,), generator=torch.Generator().manual_seed(4))
    mask = torch.arange(N) % 4 != 0
    sums, counts = b2t_kernels.code_sums(x, indices, K, mask, method)
    expected, expected_counts = reference.code_sums(x, indices, K, mask)
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(counts, expected_counts)


def test_sums_are_the_same_bits_with_masked_rows_dropped():
    x, codebook = rows_and_codes(500, 20, 8)
    indices, _ = b2t_kernels.nearest_code(x, codebook)
    mask = torch.rand(500, generator=torch.Generator().manual_seed(5)) < 0.5
    masked = b2t_kernels.code_sums(x, indices, 20, mask)
    dropped = b2t_kernels.code_sums(x[mask], indices[mask], 20)
    assert torch.equal(masked[0], dropped[0])
    assert torch.equal(masked[1], dropped[1])


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_usage_and_gradients_equal_autograd_of_the_reference(shape, offset):
    x, codebook = rows_and_codes(*shape, offset=offset)
    x, codebook = x[:200], codebook.requires_grad_()
    mask = torch.arange(x.shape[0]) % 5 != 2
    weights = torch.randn(shape[1], generator=torch.Generator().manual_seed(6))
    x.requires_grad_()
    usage = b2t_kernels.code_usage(x, codebook, 2.5, mask)
    found = torch.autograd.grad(usage @ weights, (x, codebook))
    wide = [t.detach().double().requires_grad_() for t in (x, codebook)]
    expected_usage = reference.code_usage(*wide, 2.5, mask)
    expected = torch.autograd.grad(expected_usage @ weights.double(), wide)
    torch.testing.assert_close(usage.double(), expected_usage, rtol=1e-3, atol=1e-6)
    for ours, theirs in zip(found, expected, strict=True):
        tolerance = 1e-4 * float(theirs.abs().max()) + 1e-7
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=tolerance)
    assert not found[0][~mask].any()


def test_usage_gradcheck_and_sum_reduction():
    x, codebook = rows_and_codes(7, 5, 3, dtype=torch.float64)
    codebook = codebook.double()
    inputs = (x.requires_grad_(), codebook.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: b2t_kernels.code_usage(a, b, 0.7), inputs)
    total = b2t_kernels.code_usage(*inputs, 0.7, reduction="sum")
    torch.testing.assert_close(total.sum(), torch.tensor(7.0, dtype=torch.float64))


def test_usage_ignores_rows_that_are_not_finite():
    x, codebook = rows_and_codes(20, 9, 4)
    x[7, 1] = torch.nan
    x.requires_grad_()
    usage = b2t_kernels.code_usage(x, codebook, 1.0)
    kept = torch.arange(20) != 7
    torch.testing.assert_close(usage, b2t_kernels.code_usage(x[kept], codebook, 1.0))
    usage.square().sum().backward()
    assert x.grad.isfinite().all()
    assert not x.grad[7].any()


def operator_samples():
    x, codebook = rows_and_codes(12, 5, 4)
    mask = torch.arange(12) < 9
    ops = torch.ops.b2t_kernels
    indices = torch.arange(12) % 5
    tau = torch.tensor(1.0)
    yield ops.nearest_code, (x, codebook, mask, True)
    yield ops.nearest_code, (x.bfloat16(), codebook, None, False)
    yield ops.rvq_encode, (x, codebook.expand(2, -1, -1), mask, False)
    yield ops.code_sums, (x, indices, 5, mask, False)
    grads = (x.clone().requires_grad_(), codebook.clone().requires_grad_())
    yield ops.usage_forward, (*grads, tau, mask)
    lse = ops.usage_forward(x, codebook, tau, mask)[1]
    yield ops.usage_backward, (torch.ones(5), x, codebook, tau, lse)


@pytest.mark.parametrize("case", range(6))
def test_opcheck(case):
    operator, arguments = list(operator_samples())[case]
    torch.library.opcheck(operator, arguments)


def loss(x, codebook, mask):
    indices, counts = b2t_kernels.nearest_code(x, codebook, mask)
    usage = b2t_kernels.code_usage(x, codebook, 1.5, mask)
    return (usage * usage.log()).sum() + 0 * counts.sum() + (x - codebook[indices]).square().mean()


@pytest.mark.parametrize("how", ["compile", "checkpoint"])
def test_under_compile_and_checkpointing(how):
    x, codebook = rows_and_codes(40, 6, 5)
    mask = torch.ones(40, dtype=torch.bool)
    results = []
    for wrapped in (False, True):
        a, b = x.clone().requires_grad_(), codebook.clone().requires_grad_()
        if not wrapped:
            value = loss(a, b, mask)
        elif how == "compile":
            value = torch.compile(loss, backend="aot_eager", fullgraph=True)(a, b, mask)
        else:
            value = checkpoint(loss, a, b, mask, use_reentrant=False)
        value.backward()
        results.append((value.detach(), a.grad, b.grad))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, c: b2t_kernels.nearest_code(x[None], c), "flatten batch and time"),
        (lambda x, c: b2t_kernels.nearest_code(x, c[:, :2]), r"\[5, 2\]"),
        (lambda x, c: b2t_kernels.nearest_code(x, c[:0]), "codebook is empty"),
        (lambda x, c: b2t_kernels.nearest_code(x, c, torch.ones(4)), "expected mask"),
        (lambda x, c: b2t_kernels.nearest_code(x, c, precision="best"), "'fast' or 'exact'"),
        (lambda x, c: b2t_kernels.code_usage(x, c, 1.0, reduction="max"), "'mean' or 'sum'"),
        (lambda x, c: b2t_kernels.code_sums(x, torch.zeros(4), 5), "int64"),
        (lambda x, c: b2t_kernels.rvq_encode(x, c), r"\[Q, K, D\]"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*rows_and_codes(4, 5, 3))


def test_large_search_allocates_only_blocks():
    resource = pytest.importorskip("resource")
    x, codebook = rows_and_codes(20_000, 4096, 8)
    b2t_kernels.nearest_code(x[:3000], codebook)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    b2t_kernels.nearest_code(x, codebook)
    b2t_kernels.code_usage(x, codebook, 1.0)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 100_000, f"{grown} kB; the whole score matrix is 327,680 kB"


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [((7, 5), torch.float32, "capability is 7.5"), ((8, 6), torch.float64, "torch.float64")],
)
def test_what_the_kernels_cannot_take_is_said_once(monkeypatch, caplog, capability, dtype, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    caplog.set_level(logging.WARNING)  # DeepSpeed raises the level of every handler it finds
    cuda._say_once.cache_clear()
    x, codebook = rows_and_codes(20, 9, 4, dtype=dtype)
    for _ in range(3):
        indices, _ = cuda.nearest_code(x, codebook.to(dtype), None, True)
    assert torch.equal(indices, reference.nearest_code(x, codebook)[0])
    messages = [record.message for record in caplog.records]
    assert len(messages) == 1
    assert reason in messages[0]
