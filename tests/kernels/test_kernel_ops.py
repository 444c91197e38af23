"""The public operators on CPU against float64 brute force, closed forms and autograd."""

import logging

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import b2t_kernels
from b2t_kernels import blocked, cuda, reference, tuning

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


@pytest.mark.parametrize("precision", ["fast", "exact"])
@pytest.mark.parametrize("size", [1e20, 1e-25])
def test_float32_squares_that_overflow_or_vanish(size, precision):
    x, codebook = rows_and_codes(12, 300, 16)
    codebook[5] = torch.nan
    codebook[7] *= 1e4
    indices, counts = b2t_kernels.nearest_code(size * x, size * codebook, precision=precision)
    expected = reference.nearest_code(size * x, size * codebook)
    if precision == "exact" or size > 1:
        assert torch.equal(indices, expected[0])
        assert torch.equal(counts, expected[1])
    indices, _ = b2t_kernels.nearest_code(x, torch.full_like(codebook, torch.inf))
    assert (indices == -1).all()


@pytest.mark.parametrize("method", ["sorted", "atomic"])
def test_sums_leave_out_indices_that_are_no_code(method):
    x, _ = rows_and_codes(40, 1, 8)
    indices = torch.arange(40) % 8 - 2
    found = b2t_kernels.code_sums(x, indices, 4, method=method)
    expected = reference.code_sums(x, indices.where(indices < 4, -1), 4)
    torch.testing.assert_close(found[0].double(), expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("prepares", [False, True])
def test_search_and_usage_in_one_pass(prepares):
    """The same codes, counts, usage and gradients as the two operators apart."""
    x, codebook = rows_and_codes(700, 300, 24, offset=3.0)
    codebook[200] = codebook[100]
    mask, tau = torch.arange(700) % 5 != 2, torch.tensor(9.0)
    x[3, 2] = torch.nan
    prepared = b2t_kernels.prepare_codes(codebook[None])[0] if prepares else ()
    found = b2t_kernels.search_usage(x, codebook, tau, mask, "exact", prepared)
    expected = reference.nearest_code(x, codebook, mask)
    assert torch.equal(found.indices, expected[0])
    assert torch.equal(found.counts, expected[1])
    weights = torch.randn(300, generator=torch.Generator().manual_seed(6))
    results = []
    for known in (True, False):
        inputs = (x.clone().requires_grad_(), codebook.clone().requires_grad_())
        if known:
            usage = b2t_kernels.known_usage(*inputs, tau, found, prepared)
        else:
            usage = b2t_kernels.code_usage(*inputs, tau, mask, "sum")
        results.append((usage.detach(), *torch.autograd.grad(usage @ weights, inputs)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_usage_computes_only_the_gradients_that_are_needed(monkeypatch):
    x, codebook = rows_and_codes(50, 20, 4)
    wanted = []
    backward = blocked.usage_backward
    monkeypatch.setattr(
        blocked, "usage_backward", lambda *a: (wanted.append(a[-1]), backward(*a))[1]
    )
    rows, codes = x.clone().requires_grad_(), codebook.clone().requires_grad_()
    for inputs in ((rows, codebook), (x, codes), (rows, codes)):
        usage = b2t_kernels.code_usage(*inputs, 2.0)
        usage.square().sum().backward()
    assert wanted == [(True, False), (False, True), (True, True)]
    torch.testing.assert_close(
        rows.grad / 2,
        torch.autograd.grad(b2t_kernels.code_usage(rows, codebook, 2.0).square().sum(), rows)[0],
    )


def test_usage_is_as_accurate_as_exp_in_float32():
    """The softmax of torch that is used instead is no farther from float64."""
    x, codebook = rows_and_codes(500, 1000, 64)
    tau = torch.tensor(3.0)
    found = b2t_kernels.code_usage(x, codebook, tau, reduction="sum").double()
    distances = reference.squared_distances(x, codebook)
    truth = (-distances / 3.0).softmax(dim=1).sum(dim=0)
    mean = codebook.mean(dim=0)
    centred = codebook - mean
    logits = ((x - mean) @ centred.T - 0.5 * centred.square().sum(dim=1)) * (2 / tau)
    plain = (logits - logits.logsumexp(dim=1, keepdim=True)).exp().sum(dim=0).double()
    assert (found - truth).norm() <= 1.2 * (plain - truth).norm()


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


def test_sums_take_the_counts_of_the_search():
    x, codebook = rows_and_codes(300, 20, 6)
    x[5] = torch.nan
    indices, counts = b2t_kernels.nearest_code(x, codebook)
    x[5] = 0.0
    expected = b2t_kernels.code_sums(x, indices, 20)
    found = b2t_kernels.code_sums(x, indices, 20, counts=counts)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    with pytest.raises(ValueError, match="and a mask"):
        b2t_kernels.code_sums(x, indices, 20, indices > 0, counts=counts)


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
    prepared = b2t_kernels.prepare_codes(codebook[None])[0]
    yield ops.nearest_code, (x, codebook, mask, True, prepared)
    yield ops.nearest_code, (x.bfloat16(), codebook, None, False, [])
    yield ops.code_sums, (x, indices, 5, mask, None, False)
    grads = (x.clone().requires_grad_(), codebook.clone().requires_grad_())
    yield ops.usage_forward, (*grads, tau, mask, None, prepared)
    yield ops.usage_forward, (*grads, tau, mask, True, [])
    lse = ops.usage_forward(x, codebook, tau, mask, None, [])[1]
    yield ops.usage_backward, (torch.ones(5), x, codebook, tau, lse, True, False, prepared)


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
        (lambda x, c: b2t_kernels.prepare_codes(c), r"\[Q, K, D\]"),
        (lambda x, c: b2t_kernels.nearest_code(x, c.to("meta")), "cpu but codebook on meta"),
        (lambda x, c: b2t_kernels.code_sums(x, torch.zeros(4).long().to("meta"), 5), "indices on"),
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


def test_a_device_with_too_little_shared_memory_is_named(monkeypatch, caplog):
    """Tiles are tried from the preferred one on; where none fits, blocked torch answers."""
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(tuning, "_unfit", {})
    cuda._say_once.cache_clear()
    tried = []

    def launched(config):
        tried.append(config)
        raise tuning.OutOfResources(200_000, 65_536, "shared memory")

    class Kernel:
        def __init__(self):
            self.__name__ = "scan_kernel"

    space = tuning.scan_space(90, 256)
    assert (
        tuning.launch(Kernel(), space, (8,), lambda config: config, torch.device("cpu")) == space[0]
    )
    x, codebook = rows_and_codes(20, 9, 4)
    monkeypatch.setattr(
        cuda.nearest,
        "nearest_code",
        lambda *_: tuning.launch(Kernel(), space, (8,), launched, torch.device("cpu")),
    )
    monkeypatch.setattr(cuda, "_prepared", lambda *_: None)
    for _ in range(2):
        indices, _ = cuda.nearest_code(x, codebook, None, True)
        assert torch.equal(indices, reference.nearest_code(x, codebook)[0])
    assert tried == list(space), "what did not fit is not tried again"
    assert len(caplog.records) == 1
    assert "no tile of scan_kernel fits the device" in caplog.records[0].message


def test_what_is_measured_is_kept_for_its_own_case(monkeypatch):
    """The fastest that fits is chosen for sizes and flags together, and timed on request only."""
    times, timed = {64: 2.0, 128: 1.0}, []

    def milliseconds(run, candidate):
        timed.append(candidate)
        run(candidate)
        return times[candidate.kwargs["BLOCK_N"]]

    def run(candidate):
        if candidate.kwargs["BLOCK_N"] == 32:
            raise tuning.OutOfResources(200_000, 65_536, "shared memory")
        return candidate.kwargs["BLOCK_N"]

    class Kernel:
        __name__ = "some_kernel"

    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    monkeypatch.setattr(tuning, "_chosen", {})
    space = tuple(tuning.config(4, 2, BLOCK_N=n) for n in (64, 32, 128))

    def launch(*sizes):
        kernel = Kernel()
        kernel.__name__ = "some_kernel"
        return tuning.launch(kernel, space, sizes, run, torch.device("cuda", 0))

    assert launch(2000, 64, False) == 64 and not timed
    with tuning.measuring():
        assert launch(2000, 64, False) == 128
        assert len(timed) == 3
        times[128] = 3.0
        assert launch(2000, 64, True) == 64, "another flag is another case"
        assert launch(1800, 64, False) == 128, "lengths of one bucket share a choice"
    assert launch(2000, 64, False) == 128 and launch(2000, 128, False) == 64
    assert len(timed) == 6


@pytest.mark.parametrize(
    ("limit", "family"), [(101_376, 86), (166_912, 80), (232_448, 90), (65_536, 86)]
)
def test_tables_are_chosen_by_shared_memory(monkeypatch, limit, family):
    monkeypatch.setattr(tuning, "shared_memory", lambda device: limit)
    assert tuning.family(torch.device("cpu")) == family


def test_rocm_runs_blocked_torch(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in cuda.obstacle(torch.zeros(2, 2))
