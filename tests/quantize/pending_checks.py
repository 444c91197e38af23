"""What goes from rank to rank: how often, how many bytes, and that whole numbers stay whole."""

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from b2t.quantize import ResidualVQ
from b2t.quantize.distributed import all_reduce_sum, message_sizes
from b2t.quantize.pending import sent_bytes


@pytest.fixture
def many_ranks():
    """A process group of 64 ranks whose collectives return at once and change nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=64)
    yield
    dist.destroy_process_group()


class Sent(TorchDispatchMode):
    """Bytes of the collectives that reach torch.distributed."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = torch.utils._pytree.tree_leaves(args[0])
            self.sizes.append(sum(t.numel() * t.element_size() for t in tensors))
        return func(*args, **(kwargs or {}))


def updates(layers, micro_batches, **options):
    """Bytes of the collectives of one update."""
    quantizer = ResidualVQ(
        6, codebook_size=32, num_quantizers=layers, kmeans_init=False, revival=None, **options
    )
    stats = sum(quantizer(torch.randn(2, 9, 6)).stats for _ in range(micro_batches))
    with Sent() as sent:
        quantizer.update(stats)
    assert sent.sizes == sent_bytes(stats, quantizer.options, 64)
    return sent.sizes


@pytest.mark.parametrize("layers", [1, 5])
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_an_update_is_one_collective_whatever_the_layers_and_micro_batches(
    many_ranks, layers, micro_batches
):
    K, D = 32, 6
    # Sums, counts; error, projection, frames of each layer; frames that are not finite.
    assert updates(layers, micro_batches) == [layers * (4 * K * D + 8 * K + 4 + 4 + 8) + 8]


def test_half_width_sends_half_the_sums_and_the_gradient_rule_none(many_ranks):
    K, D, layers = 32, 6, 2
    rest = layers * (8 * K + 16) + 8
    assert updates(layers, 1, half_width_sums=True) == [rest, *[2 * layers * K * D] * 2]
    assert updates(layers, 1, update_rule="gradient") == [rest]


def test_soft_usage_is_one_collective(many_ranks):
    usage = ResidualVQ(6, 32, 3, kmeans_init=False).soft_usage(torch.randn(2, 9, 6))
    with Sent() as sent:
        usage.all_reduce()
    assert sent.sizes == [4 * 3 * 32 + 8 * 3]


def test_what_is_packed_comes_back_bit_for_bit(many_ranks):
    """The fake group adds nothing: what comes back is what went."""
    counts = torch.tensor([[0, 1, 4095, 4096], [2**24 + 1, 2**35 - 1, 7, 2**20]])
    given = [counts, torch.randn(3, 5), torch.tensor(9), torch.randn(2).double()]
    assert message_sizes(given) == [8 * 8 + 4 * 15 + 8, 16]
    for before, after in zip(given, all_reduce_sum(given), strict=True):
        assert after.dtype == before.dtype
        assert torch.equal(before, after)


def test_statistics_travel_while_the_caller_goes_on(many_ranks):
    quantizer = ResidualVQ(6, 32, 2, kmeans_init=False, revival=None)
    stats = quantizer(torch.randn(2, 9, 6)).stats
    with Sent() as sent:
        pending = quantizer.begin_update(stats)
        begun = len(sent.sizes)
        assert int(quantizer.codebooks.updates) == 0
        assert quantizer.update(pending).applied
    assert begun == len(sent.sizes) == 1
