import pytest
import torch

from b2t.quantize import ResidualVQ


def latents(B=4, P=25, D=6, seed=0):
    return torch.randn(B, P, D, generator=torch.Generator().manual_seed(seed))


def started(**options):
    options = {"codebook_size": 12, "num_quantizers": 2, "update_rule": "gradient", **options}
    quantizer = ResidualVQ(6, **options)
    if not quantizer.initialized:
        quantizer.initialize([(latents(8, seed=9), None)], progress=False)
    return quantizer


def expected_gradient(quantizer, x):
    """∂/∂c of mean ‖sg(r) − c‖² over frames, layers and width, in float64."""
    books = quantizer.codebooks.embed.double().requires_grad_()
    codes = quantizer.encode(x).flatten(0, 1)
    residual, loss = x.detach().flatten(0, 1).double(), 0.0
    for q in range(quantizer.num_quantizers):
        book = books[0 if quantizer.options.shared_codebook else q]
        if quantizer.options.use_cosine_sim:
            unit = torch.nn.functional.normalize(residual, dim=-1)
            loss = loss + (unit - book[codes[:, q]]).square().mean()
            gain = quantizer.codebooks.gain[q].double()
        else:
            loss, gain = loss + (residual - book[codes[:, q]]).square().mean(), 1.0
        residual = residual - gain * book[codes[:, q]].detach()
    (loss / quantizer.num_quantizers).backward()
    return loss.detach() / quantizer.num_quantizers, books.grad


@pytest.mark.parametrize("options", [{}, {"shared_codebook": True}, {"use_cosine_sim": True}])
def test_the_codebook_loss_pulls_codes_with_ten_times_its_gradient(options):
    quantizer = started(**options)
    x = latents()
    if quantizer.options.use_cosine_sim:
        x = torch.nn.functional.normalize(x, dim=-1)
    x.requires_grad_()
    loss = quantizer(x, losses=()).losses["codebook"]
    loss.backward()
    value, grad = expected_gradient(quantizer, x)
    torch.testing.assert_close(loss.detach().double(), value, rtol=1e-4, atol=1e-6)
    found = quantizer.codebooks.weight.grad.double()
    torch.testing.assert_close(found, 10 * grad, rtol=1e-3, atol=1e-6)
    assert x.grad is None or (x.grad == 0).all()


def test_commitment_moves_the_latents_and_not_the_codes():
    quantizer, x = started(), latents().requires_grad_()
    quantizer(x, losses=("commitment",)).losses["commitment"].backward()
    assert quantizer.codebooks.weight.grad is None and x.grad.abs().sum() > 0


def test_an_optimizer_moves_the_codes_towards_their_frames():
    quantizer = started(revival=None, kmeans_init=False)
    optimizer = torch.optim.SGD([quantizer.codebooks.weight], lr=0.5)
    errors = []
    for _ in range(60):
        out = quantizer(latents(8), losses=())
        optimizer.zero_grad()
        out.losses["codebook"].backward()
        optimizer.step()
        quantizer.update(out.stats)
        assert torch.equal(quantizer.codebooks.embed, quantizer.codebooks.weight)
        errors.append(float(out.losses["codebook"].detach()))
    assert errors[-1] < 0.8 * errors[0]


def test_the_ema_rule_has_no_parameters_to_freeze_or_overwrite():
    quantizer = ResidualVQ(6, 12, 2)
    assert list(quantizer.parameters()) == []


def test_update_leaves_the_codes_to_the_optimizer_but_revives():
    quantizer = started(revival_every=1, decay=0.0)
    before = quantizer.codebooks.embed.clone()
    x = latents(1, 1).expand(4, 25, 6)
    report = quantizer.update(quantizer(x).stats)
    moved = (quantizer.codebooks.embed != before).any(-1)
    assert sum(report.revived) == int(moved.sum()) > 0
    assert torch.equal(quantizer.codebooks.weight, quantizer.codebooks.embed)


class HalfEngine:
    """What a mixed-precision engine does: half parameters, a float32 master, Adam on the master."""

    def __init__(self, parameter, dtype, lr):
        self.parameter = parameter
        self.master = torch.nn.Parameter(parameter.detach().to(dtype).float())
        parameter.data = parameter.data.to(dtype)
        self.optimizer = torch.optim.SGD([self.master], lr=lr)

    def step(self):
        self.master.grad = self.parameter.grad.float()
        self.optimizer.step()
        self.parameter.grad = None
        self.parameter.data.copy_(self.master)

    def read(self, _):
        return self.master.detach()

    def write(self, _, value):
        self.master.data.copy_(value)


def test_codes_stay_float32_under_a_half_precision_engine():
    """Steps too small for bfloat16 add up in the master, and forward sees them."""
    quantizer, reference = started(revival=None), started(revival=None)
    engine = HalfEngine(quantizer.codebooks.weight, torch.bfloat16, lr=1e-4)
    quantizer.attach_master(engine.read, engine.write)
    assert torch.equal(engine.master.data, reference.codebooks.embed)  # nothing was rounded
    optimizer = torch.optim.SGD([reference.codebooks.weight], lr=1e-4)
    for step in range(30):
        x = latents(seed=step)
        for module in (quantizer, reference):
            out = module(x, losses=())
            out.losses["codebook"].backward()
            engine.step() if module is quantizer else optimizer.step()
            reference.zero_grad()
            module.update(out.stats)
    assert torch.equal(quantizer.codebooks.embed, engine.master.data)
    start = started().codebooks.embed
    moved = (reference.codebooks.embed - start).norm()
    apart = (quantizer.codebooks.embed - reference.codebooks.embed).norm()
    assert moved > 0 and apart < 0.02 * moved
    rounded = quantizer.codebooks.weight.detach().float()
    assert (rounded - quantizer.codebooks.embed).norm() > apart


def test_revival_reaches_the_master():
    quantizer = started(revival_every=1, decay=0.0)
    engine = HalfEngine(quantizer.codebooks.weight, torch.bfloat16, lr=0.0)
    quantizer.attach_master(engine.read, engine.write)
    out = quantizer(latents(1, 1).expand(4, 25, 6), losses=())
    out.losses["codebook"].backward()
    engine.step()
    assert sum(quantizer.update(out.stats).revived) > 0
    assert torch.equal(engine.master.data, quantizer.codebooks.embed)


def test_half_precision_without_a_known_master_is_refused():
    quantizer = started()
    quantizer.codebooks.weight.data = quantizer.codebooks.weight.data.half()
    out = quantizer(latents(), losses=())
    with pytest.raises(RuntimeError, match="attach_master"):
        quantizer.update(out.stats)
