from types import SimpleNamespace

import numpy as np
import pytest
import torch

from b2t.monitor.context import StepContext
from b2t.monitor.ema import EMAMonitor, effective_rank
from tests.monitor.checkpointed import checkpointed

L, K, D = 2, 12, 5


def quantizer(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return SimpleNamespace(
        decay=0.9,
        codebooks=SimpleNamespace(
            embed=torch.randn(L, K, D, generator=generator),
            ema_count=torch.rand(L, K, generator=generator),
        ),
        checksum=lambda: torch.zeros((), dtype=torch.int64),
    )


def move(q, number):
    generator = torch.Generator().manual_seed(1000 + number)
    q.codebooks.embed += 0.1 * torch.randn(L, K, D, generator=generator)
    revived = torch.randint(0, 4, (L,), generator=generator).tolist()
    return StepContext(phase="p", update_report=SimpleNamespace(applied=True, revived=revived))


def run(monitor, q, numbers):
    for number in numbers:
        monitor.update(move(q, number))
    return monitor


def test_effective_rank_equals_its_definition_by_singular_values():
    generator = np.random.default_rng(0)
    for shape in ((40, 7), (5, 9)):
        codes = generator.standard_normal((3, *shape)) * np.linspace(0.01, 3, shape[1])
        for book, found in zip(codes, effective_rank(torch.tensor(codes)), strict=True):
            singular = np.linalg.svd(book - book.mean(0), compute_uv=False)
            share = singular[singular > 1e-10] / singular.sum()
            assert found.item() == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-5)


def test_effective_rank_of_a_line_is_one_and_of_a_point_zero():
    line = torch.linspace(-1, 1, 30)[:, None] * torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert effective_rank(line[None]).item() == pytest.approx(1.0, abs=1e-4)
    assert effective_rank(torch.full((1, 30, 4), 7.0)).item() == 0.0
    axes = torch.cat([torch.eye(6), -torch.eye(6)])
    assert effective_rank(axes[None]).item() == pytest.approx(6.0)


def test_metrics_equal_numpy():
    q = quantizer()
    found = run(EMAMonitor(q, every=1), q, [1, 2]).metrics()
    codes, counts = q.codebooks.embed.double().numpy(), q.codebooks.ema_count.double().numpy()
    for layer in range(L):
        relative = counts[layer] / counts[layer].mean()
        assert found[f"ema/cluster_size_mean/{layer}"] == pytest.approx(counts[layer].mean())
        assert found[f"ema/cluster_size_min/{layer}"] == pytest.approx(relative.min())
        assert found[f"ema/cluster_size_std/{layer}"] == pytest.approx(relative.std())
        assert found[f"ema/tiny_clusters/{layer}"] == pytest.approx((relative < 0.1).mean())
        variance = codes[layer].var(0).mean()
        assert found[f"ema/code_variance/{layer}"] == pytest.approx(variance, rel=1e-5)
    assert found["ema/code_variance_min"] == pytest.approx(codes.var(1).mean(1).min(), rel=1e-5)
    assert found["ema/ranks_differ"] == 0.0


@pytest.mark.parametrize(("every", "measured"), [(1, 7), (3, 6), (10, None)])
def test_movement_is_that_of_one_update(every, measured):
    q = quantizer()
    monitor, courses = EMAMonitor(q, every=every), [q.codebooks.embed.clone()]
    for number in range(1, 8):
        monitor.update(move(q, number))
        courses.append(q.codebooks.embed.clone())
    found = monitor.metrics()
    if measured is None:
        assert "ema/movement" not in found
        return
    before, after = courses[measured - 1].double(), courses[measured].double()
    for layer in range(L):
        moved = np.sqrt(((after - before)[layer].numpy() ** 2).sum(-1).mean())
        norm = np.sqrt((before[layer].numpy() ** 2).sum(-1).mean())
        assert found[f"ema/movement/{layer}"] == pytest.approx(moved / norm, rel=1e-6)


def test_revivals_are_means_over_the_window():
    q = quantizer()
    monitor, revived = EMAMonitor(q, window=4), []
    for number in range(1, 10):
        context = move(q, number)
        revived.append(context.update_report.revived)
        monitor.update(context)
    means = np.mean(revived[-4:], axis=0)
    found = monitor.metrics()
    assert [found[f"ema/revived/{layer}"] for layer in range(L)] == means.tolist()
    assert found["ema/revived_per_step"] == means.sum()
    assert found["ema/revived_fraction"] == pytest.approx(means.sum() / (L * K))


def test_steps_that_moved_no_codebook_do_not_count():
    q = quantizer()
    monitor = EMAMonitor(q)
    monitor.update(StepContext(phase="p"))
    report = SimpleNamespace(applied=False, revived=[0, 0])
    monitor.update(StepContext(phase="p", update_report=report))
    assert monitor.metrics() == {} and monitor.updates == 0


def test_warm_follows_the_decay():
    q = quantizer()
    monitor = EMAMonitor(q)
    warm = [run(monitor, q, [number]).metrics()["ema/warm"] for number in range(1, 31)]
    assert warm.index(1.0) + 1 == 29, "0.9 ** 28 is above 0.05, 0.9 ** 29 below"


@pytest.mark.parametrize("stop", range(0, 11))
def test_resume_goes_on_exactly(stop):
    q = quantizer()
    straight = EMAMonitor(q, every=3, window=4)
    run(straight, q, range(1, stop + 1)).metrics()
    again = quantizer()
    first = run(EMAMonitor(again, every=3, window=4), again, range(1, stop + 1))
    second = EMAMonitor(again, every=3, window=4)
    second.load_state_dict(checkpointed(first.state_dict()))
    assert second.metrics() == first.metrics()
    third = EMAMonitor(again, every=3, window=4)
    third.load_state_dict(checkpointed(second.state_dict()))
    assert run(straight, q, range(stop + 1, 12)).metrics() == (
        run(third, again, range(stop + 1, 12)).metrics()
    )


def test_each_reading_measures_the_rank_of_the_next_codebook():
    q = quantizer()
    monitor = run(EMAMonitor(q), q, [1])
    monitor.metrics()
    known = effective_rank(q.codebooks.embed).tolist()
    for number, turn in ((2, 0), (3, 1), (4, 0)):
        run(monitor, q, [number])
        known[turn] = effective_rank(q.codebooks.embed)[turn].item()
        for _ in range(2):  # reading again without an update changes nothing
            found = monitor.metrics()
            assert [found[f"ema/effective_rank/{layer}"] for layer in range(L)] == known
