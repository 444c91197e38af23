"""Searches that leave codes out by bfloat16 scores, against float64 brute force."""

import pytest
import torch

import b2t_kernels
from b2t_kernels import blocked_codes, blocked_rough, reference


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Also where it does not pay, or where bfloat16 is not faster."""
    monkeypatch.setattr(blocked_rough, "LEAST", (1, 1, 1))
    monkeypatch.setattr(blocked_rough, "supported", lambda: True)
    monkeypatch.setattr(blocked_rough, "ROWS", 500)
    monkeypatch.setattr(blocked_rough, "_ROW_BLOCK", 200)
    monkeypatch.setattr(blocked_rough, "_CODE_BLOCK", 128)
    monkeypatch.setattr(blocked_rough, "MOST_GROUPS", 20)


def problem(case, N=700, K=1100, D=24):
    generator = torch.Generator().manual_seed(11)
    codes, x = torch.randn(2, max(N, K), D, generator=generator)
    codes, x = codes[:K], x[:N]
    if case == "near":
        x = codes[torch.randint(K, (N,), generator=generator)] + 0.2 * x
    elif case == "halfway":
        first, second = torch.randint(K, (2, N), generator=generator)
        x = (codes[first] + codes[second]) / 2
    elif case == "offset":
        x, codes = x + 300, codes + 300
    elif case == "outlier":
        codes[37] *= 1e3
        x[5] *= 1e3
    elif case == "far":
        x = 50 * x
    elif case == "tiny":
        x, codes = 2.0**-36 * x, 2.0**-36 * codes
    elif case == "huge":
        x, codes = 2.0**40 * x, 2.0**40 * codes
    elif case == "repeats":
        codes[600:] = codes[:500]
    elif case == "not finite":
        codes[3], codes[700, 2], x[4], x[9, 3] = torch.nan, torch.inf, torch.nan, -torch.inf
    elif case == "a row beyond":
        x[2], x[3] = 2.0**52 * x[2], 3e38
    return x, codes


CASES = ["plain", "near", "halfway", "offset", "outlier", "far", "tiny", "huge", "repeats"]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("case", [*CASES, "not finite", "a row beyond"])
def test_the_float64_answer(case, exact, monkeypatch):
    x, codes = problem(case)
    mask = torch.arange(len(x)) % 7 != 3
    taken, nearest = [], blocked_rough.RoughCodes.nearest
    monkeypatch.setattr(
        blocked_rough.RoughCodes,
        "nearest",
        lambda *a: (taken.append(nearest(*a)), taken[-1])[1],
    )
    found, counts = b2t_kernels.nearest_code(x, codes, mask, "exact" if exact else "fast")
    expected, of_each = reference.nearest_code(x, codes, mask)
    assert len(taken) == 2 and None not in taken
    if exact:
        assert torch.equal(found, expected)
        assert torch.equal(counts, of_each)
        return
    assert torch.equal(found < 0, expected < 0)
    assert torch.equal(counts, torch.bincount(found[found >= 0], minlength=len(codes)))
    distances = reference.squared_distances(x, codes)[found >= 0]
    chosen = distances.gather(1, found[found >= 0, None])[:, 0]
    # Float32 scores are off by some units of the largest, of rows and codes less the mean.
    slack = 1e-5 * (distances.amin(1) + (codes[37] - codes[0]).square().sum())
    assert (chosen <= distances.amin(1) + slack).all()


@pytest.mark.parametrize("case", CASES)
def test_no_maximum_is_off_by_more_than_its_bound(case):
    x, codes = problem(case)
    prepared = blocked_codes.centre_codes(codes, torch.float32)
    rough, rows = blocked_rough.RoughCodes(prepared), prepared.centre(x)
    maxima, gap = rough._maxima(rows)
    true = rows.double() @ prepared.codes.double().T + prepared.bias.double()
    true = true.view(len(x), -1, 64).amax(2)
    # gap is 2(1 + v)A and more; a score is off by v of what it is rounded from.
    off = (maxima - true).abs() - blocked_rough._RELATIVE / 2 * true.abs()
    assert (off <= (gap / 2)[:, None]).all()
    # One long code makes all of them rough, and then they are not used.
    assert (
        case == "outlier"
        or (gap < 200 * (off + blocked_rough._RELATIVE / 2 * true.abs()).amax(1)).all()
    )


@pytest.mark.parametrize("case", ["plain", "near", "halfway", "repeats"])
def test_the_second_best_is_that_of_all_codes_where_it_is_close(case):
    x, codes = problem(case)
    prepared = blocked_codes.centre_codes(codes, torch.float32)
    rows = prepared.centre(x)
    best = blocked_rough.RoughCodes(prepared).nearest(rows)
    first, second = torch.addmm(prepared.bias, rows, prepared.codes.T).topk(2).values.unbind(1)
    torch.testing.assert_close(best.score, first, rtol=0, atol=1e-4)
    assert (best.second <= second + 1e-4).all()
    close = first - second < 0.05
    torch.testing.assert_close(best.second[close], second[close], rtol=0, atol=1e-4)
    assert close.any() or case == "near"


def test_rounding_of_the_scores_themselves_is_allowed_for():
    """Numbers that bfloat16 holds, with scores that it does not."""
    generator = torch.Generator().manual_seed(2)
    half = torch.randint(-60, 61, (320, 24), generator=generator).float()
    codes, x = torch.cat([half, -half]), torch.randint(-3, 4, (900, 24), generator=generator)
    x = x.float() + codes[torch.randint(640, (900,), generator=generator)].sign() * 40
    prepared = blocked_codes.centre_codes(codes, torch.float32)
    assert float(blocked_rough.RoughCodes(prepared).error) == 0.0
    for precision in ("fast", "exact"):
        found, _ = b2t_kernels.nearest_code(x, codes, None, precision)
        assert torch.equal(found, reference.nearest_code(x, codes)[0])


def test_what_two_float32_scores_may_differ_by_is_left_in_question():
    """Two codes of two groups as far from a row, but for float64: both are scored in float32."""
    x, codes = problem("plain", N=1)
    codes = torch.cat([codes, 2 * x - codes[:1]])
    codes[0] = 0.5 * codes[0] + 0.5 * x
    codes[-1] = 2 * x - codes[0]
    prepared = blocked_codes.centre_codes(codes, torch.float32)
    best = blocked_rough.RoughCodes(prepared).nearest(prepared.centre(x))
    assert float(best.score - best.second) < 1e-4


def test_many_groups_in_question_end_it(monkeypatch):
    taken, nearest = [], blocked_rough.RoughCodes.nearest
    monkeypatch.setattr(
        blocked_rough.RoughCodes, "nearest", lambda *a: (taken.append(1), nearest(*a))[1]
    )
    near, far = problem("near", N=500), problem("plain", N=500)
    mixed = torch.cat([near[0], far[0], near[0][:100]])
    monkeypatch.setattr(blocked_rough, "MOST_GROUPS", 1.2)
    found, counts = b2t_kernels.nearest_code(mixed, near[1], None, "exact")
    expected = reference.nearest_code(mixed, near[1])
    assert torch.equal(found, expected[0])
    assert torch.equal(counts, expected[1])
    assert len(taken) == 2, "the second block ends it"


def test_a_tie_between_groups_goes_to_the_lowest_code():
    codes = torch.zeros(200, 3)
    codes[:, 0] = 10 + torch.arange(200)
    codes[150], codes[70] = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]])
    for precision in ("fast", "exact"):
        found, _ = b2t_kernels.nearest_code(torch.zeros(4, 3), codes, None, precision)
        assert found.tolist() == [70] * 4


def test_where_it_is_used(monkeypatch):
    x, codes = problem("plain")
    prepared = blocked_codes.centre_codes(codes, torch.float32)
    assert blocked_rough.pays(x, prepared)
    assert not blocked_rough.pays(x, blocked_codes.centre_codes(codes.double(), torch.float64))
    assert not blocked_rough.pays(x, blocked_codes.centre_codes(2.0**60 * codes, torch.float32))
    assert not blocked_rough.pays(x, blocked_codes.centre_codes(2.0**-60 * codes, torch.float32))
    for least in ((701, 1, 1), (1, 1153, 1), (1, 1, 25)):
        monkeypatch.setattr(blocked_rough, "LEAST", least)
        assert not blocked_rough.pays(x, prepared)
    monkeypatch.setattr(blocked_rough, "LEAST", (700, 1152, 24))
    assert blocked_rough.pays(x, prepared)
    monkeypatch.setattr(blocked_rough, "supported", lambda: False)
    assert not blocked_rough.pays(x, prepared)
