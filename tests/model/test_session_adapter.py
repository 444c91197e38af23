import pytest
import torch

from b2t.model.options import AdapterOptions
from b2t.model.session_adapter import SessionAdapter


def test_starts_as_the_identity():
    adapter = SessionAdapter(5, 3)
    signal = torch.randn(4, 7, 5)
    assert torch.equal(adapter(signal, torch.tensor([0, 1, 2, -1])), signal)


def test_each_session_has_its_own_map_and_an_unseen_one_the_mean():
    adapter = SessionAdapter(5, 3)
    torch.nn.init.normal_(adapter.weight)
    torch.nn.init.normal_(adapter.bias)
    signal = torch.randn(4, 7, 5)
    out = adapter(signal, torch.tensor([2, -1, 0, 2]))
    for row, session in ((0, 2), (2, 0), (3, 2)):
        expected = signal[row] @ adapter.weight[session] + adapter.bias[session]
        torch.testing.assert_close(out[row], expected)
    maps = [signal[1] @ adapter.weight[s] + adapter.bias[s] for s in range(3)]
    torch.testing.assert_close(out[1], torch.stack(maps).mean(0))


def test_gradient_reaches_only_the_sessions_of_the_batch():
    adapter = SessionAdapter(4, 3)
    adapter(torch.randn(2, 6, 4), torch.tensor([1, 1])).square().sum().backward()
    assert adapter.weight.grad[1].abs().sum() > 0
    assert adapter.weight.grad[[0, 2]].abs().sum() == 0
    assert adapter.bias.grad[[0, 2]].abs().sum() == 0


def test_softsign_bounds_and_dropout_only_acts_in_training():
    adapter = SessionAdapter(4, 1, AdapterOptions(softsign=True, dropout=0.5))
    signal = 100 * torch.randn(2, 50, 4)
    session = torch.zeros(2, dtype=torch.int64)
    out = adapter.eval()(signal, session)
    torch.testing.assert_close(out, signal / (1 + signal.abs()))
    dropped = adapter.train()(signal, session)
    assert 0.3 < float((dropped == 0).float().mean()) < 0.7


def test_no_sessions_is_one_shared_map():
    adapter = SessionAdapter(4, 0)
    signal = torch.randn(1, 3, 4)
    assert torch.equal(adapter(signal, torch.tensor([-1])), signal)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    adapter = SessionAdapter(4, 2).to(dtype)
    signal = torch.randn(2, 3, 4, dtype=dtype)
    out = adapter(signal, torch.tensor([0, -1]))
    assert out.dtype == dtype
    torch.testing.assert_close(out, signal)
