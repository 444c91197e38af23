import pytest
import torch
from torch import nn

from b2t.config import Config
from b2t.errors import UserError
from b2t.model.configuration import BrainToTextConfig
from b2t.model.convolution import Convolution
from b2t.model.encoder import Encoder
from b2t.model.options import EncoderOptions
from b2t.model.recurrence import Recurrence

KINDS = [
    {"kind": "conv", "kernel_size": 5},
    {"kind": "gru"},
    {"kind": "gru", "bidirectional": True},
]


def build(**options):
    torch.manual_seed(0)
    small = {"patch_size": 6, "patch_stride": 4, "dim": 16, "depth": 2, "dropout": 0.0}
    return Encoder(3, EncoderOptions(**small, **options)).double().eval()


@pytest.mark.parametrize("kind", KINDS)
def test_padding_neighbours_and_masked_bins_change_nothing(kind):
    """Three trials alone, and in one batch with garbage behind and in front of them."""
    encoder = build(**kind)
    generator = torch.Generator().manual_seed(1)
    trials = [torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (30, 9, 1)]
    batch = torch.randn(4, 50, 3, generator=generator, dtype=torch.float64) * 100
    mask = torch.zeros(4, 50, dtype=torch.bool)
    starts = (0, 8, 12)
    for row, (trial, start) in enumerate(zip(trials, starts, strict=True)):
        batch[row, start : start + len(trial)], mask[row, start : start + len(trial)] = trial, True
    together, frames = encoder(batch, mask)
    assert not together[~frames].any() and bool(torch.isfinite(together).all())
    for row, (trial, start) in enumerate(zip(trials, starts, strict=True)):
        moved = torch.cat((torch.zeros(start, 3, dtype=torch.float64), trial))[None]
        real = torch.ones(1, moved.shape[1], dtype=torch.bool)
        real[:, :start] = False
        alone, there = encoder(moved, real)
        torch.testing.assert_close(together[row][frames[row]], alone[there])


def test_a_row_without_real_bins_stays_finite_and_has_a_gradient():
    for kind in KINDS:
        encoder = build(**kind).train()
        signal = torch.zeros(1, 20, 3, dtype=torch.float64)
        encoder(signal, torch.zeros(1, 20, dtype=torch.bool))[0].sum().backward()
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in encoder.parameters())


@pytest.mark.parametrize("both", [False, True])
def test_the_recurrence_is_that_of_torch(both):
    """Against nn.GRU of as many layers over packed rows."""
    torch.manual_seed(0)
    ours = Recurrence(8, 3, both, 0.0).double().eval()
    theirs = nn.GRU(8, 4 if both else 8, 3, batch_first=True, bidirectional=both).double()
    ways = 2 if both else 1
    for index, layer in enumerate(ours.layers):
        suffix = f"_l{index // ways}" + ("_reverse" if index % ways else "")
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            getattr(theirs, name + suffix).data.copy_(getattr(layer, f"{name}_l0"))
    x = torch.randn(3, 7, 8, dtype=torch.float64)
    lengths = torch.tensor([7, 4, 1])
    mask = torch.arange(7)[None] < lengths[:, None]
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
    state = ours.first_state.expand(-1, 3, -1).contiguous()
    expected = nn.utils.rnn.pad_packed_sequence(theirs(packed, state)[0], batch_first=True)[0]
    torch.testing.assert_close(ours(x, mask), ours.norm(expected).masked_fill(~mask[..., None], 0))


def test_a_forward_recurrence_does_not_look_ahead():
    body = Recurrence(8, 2, False, 0.0).double().eval()
    x, mask = torch.randn(1, 9, 8, dtype=torch.float64), torch.ones(1, 9, dtype=torch.bool)
    later = x.clone()
    later[:, 6:] += 1
    torch.testing.assert_close(body(x, mask)[:, :6], body(later, mask)[:, :6])


def test_a_convolution_sees_its_kernel_and_no_further():
    """Two blocks of five frames reach four frames each way."""
    body = Convolution(8, 2, 5, 2.0, 0.0).double().eval()
    x, mask = torch.randn(1, 20, 8, dtype=torch.float64), torch.ones(1, 20, dtype=torch.bool)
    changed = x.clone()
    changed[:, 10] = torch.randn(8, dtype=torch.float64)
    differs = (body(x, mask) != body(changed, mask)).any(-1)[0].nonzero().flatten().tolist()
    assert differs == list(range(6, 15))


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_activations_give_the_same_gradients(kind):
    gradients = []
    for every in (0, 1):
        encoder = build(**kind).train()
        encoder.body.checkpoint_every = every
        signal = torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(2)).double()
        encoder(signal, torch.ones(2, 30, dtype=torch.bool))[0].square().sum().backward()
        gradients.append([p.grad for p in encoder.parameters()])
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, recomputed)


@pytest.mark.parametrize(
    ("encoder", "told"),
    [
        ({"kind": "conv", "kernel_size": 4}, "odd"),
        ({"kind": "gru", "bidirectional": True, "dim": 15}, "even"),
        ({"kind": "lstm"}, "lstm|transformer"),
    ],
)
def test_settings_that_cannot_be_are_refused(encoder, told):
    with pytest.raises((ValueError, UserError), match=told):
        Config.model_validate({"model": {"encoder": encoder}})
    with pytest.raises((ValueError, UserError), match=told):
        BrainToTextConfig(encoder={"dim": 16, **encoder})
