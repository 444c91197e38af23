"""The cases and the methods of scripts/bench_kernels.py: data, and what finds the codes in it."""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))

import b2t_kernels
from b2t_kernels import gumbel, reference

CHECKED_ROWS = 1024
UNFUSED_ELEMENTS = 1 << 30

Method = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """Sizes, and how rows lie about the codes.

    kind: ``clustered``, rows near their codes; ``layer-q``, what q layers left of normal rows;
    ``collapsed``, all codes within a thousandth of one another; ``outlier``, one code 30 times as
    long; ``masked``, a third of the rows.
    """

    kind: str
    N: int
    K: int
    D: int

    @property
    def name(self) -> str:
        """The kind and N × K × D."""
        return f"{self.kind} {self.N} × {self.K} × {self.D}"


FLAGSHIP = {
    "cpu": Case("clustered", 8192, 8192, 256),
    "cuda": Case("clustered", 65_536, 8192, 256),
}
SMALL = Case("clustered", 1500, 1024, 64)
OTHERS = {
    "cpu": [Case("clustered", 8192, 1024, 128), Case("clustered", 8192, 256, 256)],
    "cuda": [
        Case("clustered", 1500, 8192, 64),
        Case("clustered", 65_536, 1024, 128),
        Case("clustered", 65_536, 256, 64),
        Case("layer-1", 65_536, 8192, 256),
        Case("clustered", 65_536, 256, 1024),
    ],
}
KINDS = ("layer-0", "layer-3", "layer-7", "collapsed", "outlier", "masked")
OTHER_KINDS = ("layer-1", "layer-2", "layer-4", "layer-5", "layer-6")


def cases(device: str, quick: bool, tiny: bool, small: bool = False) -> Iterator[Case]:
    """What is timed, the most important first."""
    if small:
        yield SMALL
        return
    if tiny:
        yield Case("clustered", 256, 64, 16)
        yield Case("outlier", 256, 64, 16)
        return
    yield FLAGSHIP[device]
    if quick:
        return
    yield SMALL
    yield from (replace(SMALL, kind=kind) for kind in KINDS)
    yield from OTHERS[device]
    yield from (replace(SMALL, kind=kind) for kind in OTHER_KINDS)


@dataclass(frozen=True)
class Data:
    """x [N, D] in half precision on a GPU, codebook [K, D] float32, mask [N] or None."""

    x: Tensor
    codebook: Tensor
    mask: Tensor | None


def make_data(case: Case, device: str) -> Data:
    """The same rows and codes every time."""
    generator = torch.Generator().manual_seed(case.N + case.K + case.D)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    codebook = normal(case.K, case.D)
    x = codebook[torch.randint(case.K, (case.N,), generator=generator)]
    x = x + 0.7 * normal(case.N, case.D)
    mask = None
    if case.kind.startswith("layer-"):
        x, codebook = _left_over(normal(case.N, case.D), normal(case.K, case.D), case.kind)
    elif case.kind == "collapsed":
        codebook = codebook[:1] + 1e-3 * codebook
    elif case.kind == "outlier":
        codebook[case.K // 3] *= 30
    elif case.kind == "masked":
        mask = (torch.rand(case.N, generator=generator) < 2 / 3).to(device)
    dtype = torch.float16 if device == "cuda" else torch.float32
    return Data(x.to(device, dtype), codebook.to(device), mask)


def _left_over(x: Tensor, frames: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Rows and frames of the same kind after some layers whose codes are such frames."""
    for _ in range(int(kind.removeprefix("layer-"))):
        codes = 0.6 * frames.roll(1, dims=0)
        x = x - codes[b2t_kernels.nearest_code(x, codes)[0]]
        frames = frames - codes[b2t_kernels.nearest_code(frames, codes)[0]]
    return x, 0.6 * frames


def check_search(data: Data, case: Case) -> list[str]:
    """What is wrong with fast and exact beside float64; fast may take a code barely farther."""
    wrong = []
    x, mask = data.x[:CHECKED_ROWS], None if data.mask is None else data.mask[:CHECKED_ROWS]
    kept = reference.valid_rows(x, mask)
    parts = [
        torch.cdist(part, data.codebook.double(), compute_mode="donot_use_mm_for_euclid_dist")
        for part in x.double().split(128)
    ]
    least, truth = torch.cat(parts).min(dim=1)
    for precision in ("fast", "exact"):
        indices, counts = b2t_kernels.nearest_code(
            data.x, data.codebook, data.mask, precision=precision
        )
        known = indices[indices >= 0]
        if not torch.equal(counts, torch.bincount(known, minlength=case.K)):
            wrong.append(f"{case.name} {precision}: counts do not fit the indices")
        chosen = torch.cat(parts).gather(1, indices[:CHECKED_ROWS, None].clamp(min=0))[:, 0]
        excess = ((chosen - least) / least.clamp(min=1e-9))[kept].max()
        if excess > (1e-12 if precision == "exact" else 5e-3):
            wrong.append(f"{case.name} {precision}: a distance is {float(excess):.2e} too large")
        if precision == "exact" and not torch.equal(indices[:CHECKED_ROWS][kept], truth[kept]):
            wrong.append(f"{case.name} exact: indices differ from float64")
    return wrong


def optional(name: str, missing: list[str]) -> Any:
    """The module, or None and a note in ``missing``."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if name not in missing:
            missing.append(name)
            print(f"left out: {name} ({error})", file=sys.stderr)
        return None


def _blocked(x: Tensor, codebook: Tensor, bias: Tensor) -> Tensor:
    step = max(512, (1 << 26) // codebook.shape[0]) if x.is_cuda else 512
    parts = [torch.addmm(bias, part, codebook.T).argmax(dim=1) for part in x.split(step)]
    return torch.bincount(torch.cat(parts), minlength=codebook.shape[0])


def _unfused(x: Tensor, codebook: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias, x, codebook.T).argmax(dim=1)


def search_methods(data: Data, missing: list[str]) -> dict[str, Method]:
    """Everything that finds the nearest codes; the first is what others are compared with."""
    x, codebook, mask = data.x, data.codebook, data.mask
    K = codebook.shape[0]
    same = codebook.to(x.dtype)
    bias = (-0.5 * codebook.square().sum(dim=1)).to(x.dtype)
    prepared = b2t_kernels.prepare_codes(codebook[None])[0]
    methods: dict[str, Method] = {
        "ours fast": lambda: b2t_kernels.nearest_code(x, codebook, mask),
        "ours exact": lambda: b2t_kernels.nearest_code(x, codebook, mask, "exact"),
        "ours exact, prepared": lambda: b2t_kernels.nearest_code(
            x, codebook, mask, "exact", prepared
        ),
        "matrix product": lambda: [part @ same.T for part in x.split(1 << 16)],
        "addmm + argmax, blocked": lambda: _blocked(x, same, bias),
    }
    if x.shape[0] * K <= UNFUSED_ELEMENTS:
        methods |= _whole_matrix_methods(x, codebook, same, bias, missing)
    faiss = optional("faiss", missing)
    if faiss is not None:
        methods |= _faiss_methods(faiss, x, codebook)
    flash = optional("flash_kmeans.assign_euclid_triton", missing) if x.is_cuda else None
    if flash is not None:
        methods["flash-kmeans"] = _flash_method(flash, x, same)
    return methods


def _whole_matrix_methods(
    x: Tensor, codebook: Tensor, same: Tensor, bias: Tensor, missing: list[str]
) -> dict[str, Method]:
    # cdist has no half-precision kernel on a GPU: it gets the type it needs.
    wide, codes, K = x.float(), codebook.float(), codebook.shape[0]
    methods: dict[str, Method] = {
        "unfused torch, float32 (cdist + argmin)": lambda: torch.bincount(
            torch.cdist(wide, codes).argmin(dim=1), minlength=K
        ),
        "unfused torch, same type (addmm + argmax)": lambda: torch.bincount(
            _unfused(x, same, bias), minlength=K
        ),
    }
    if x.is_cuda:
        compiled = torch.compile(_unfused)
        methods["torch.compile (addmm + argmax)"] = lambda: compiled(x, same, bias)
    peer = optional("vector_quantize_pytorch", missing)
    if peer is not None:
        quantizer = peer.VectorQuantize(dim=x.shape[1], codebook_size=K).to(x.device).eval()
        quantizer._codebook.embed.data.copy_(codes[None])
        methods["vector-quantize-pytorch (eval)"] = lambda: quantizer(wide[None])
    return methods


def _faiss_methods(faiss: Any, x: Tensor, codebook: Tensor) -> dict[str, Method]:
    rows, D = x.float().cpu().numpy(), codebook.shape[1]
    index = faiss.IndexFlatL2(D)
    index.add(codebook.cpu().numpy())
    if not x.is_cuda:
        return {"faiss IndexFlatL2": lambda: index.search(rows, 1)}
    if not hasattr(faiss, "StandardGpuResources"):
        return {}
    moved = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    return {"faiss GpuIndexFlatL2, from the host": lambda: moved.search(rows, 1)}


def _flash_method(flash: Any, x: Tensor, codebook: Tensor) -> Method:
    assign = flash.euclid_assign_triton
    extra = {}
    if "x_sq" in inspect.signature(assign).parameters:
        extra["x_sq"] = x.float().square().sum(dim=1)[None]
    return lambda: assign(x[None], codebook[None], **extra)


def usage_methods(data: Data, wants_codes: bool) -> dict[str, Method]:
    """Soft assignment forward and backward, of rows alone or of the codebook too."""
    rows = data.x.clone().requires_grad_()
    codes = data.codebook.to(data.x.dtype).clone().requires_grad_(wants_codes)
    master = data.codebook.clone().requires_grad_(wants_codes)
    scale = float(data.x.shape[1])

    def ours() -> None:
        usage = b2t_kernels.code_usage(rows, master, scale, data.mask)
        torch.autograd.grad(usage.square().sum(), (rows, master)[: 1 + wants_codes])

    def naive() -> None:
        logits = 2 * rows @ codes.T - codes.square().sum(dim=1)
        usage = (logits.float() / scale).softmax(dim=1).mean(dim=0)
        torch.autograd.grad(usage.square().sum(), (rows, codes)[: 1 + wants_codes])

    return {"ours": ours, "unfused torch": naive}


def sums_methods(data: Data) -> dict[str, Method]:
    """Sums of rows by code."""
    x, K = data.x, data.codebook.shape[0]
    indices, _ = b2t_kernels.nearest_code(x, data.codebook)
    wide = x.float()
    empty = torch.zeros(K, x.shape[1], device=x.device)
    return {
        "ours sorted": lambda: b2t_kernels.code_sums(x, indices, K),
        "ours atomic": lambda: b2t_kernels.code_sums(x, indices, K, method="atomic"),
        "index_add": lambda: empty.index_add(0, indices, wide),
    }


def beam_methods(data: Data, layers: int = 4, width: int = 8) -> dict[str, Method]:
    """The nearest code of each layer in turn, and a beam over the same layers."""
    x = data.x.float() if data.mask is None else data.x.float()[data.mask]
    books = [0.6**q * data.codebook for q in range(layers)]
    prepared = b2t_kernels.prepare_codes(torch.stack(books))

    def one() -> None:
        left = x.clone()
        for book, entry in zip(books, prepared, strict=True):
            codes, _ = b2t_kernels.nearest_code(left, book, None, "exact", entry)
            b2t_kernels.leave(left, book, codes)

    def fresh() -> None:
        b2t_kernels.beam_codes(x, books, width, b2t_kernels.prepare_codes(torch.stack(books)))

    return {
        "one code": one,
        f"beam of {width}": lambda: b2t_kernels.beam_codes(x, books, width, prepared),
        f"beam of {width}, codes prepared anew": fresh,
    }


def draw_methods(data: Data) -> dict[str, Method]:
    """The nearest code, and one drawn from the soft assignment."""
    x, codebook = data.x, data.codebook
    rows = torch.arange(x.shape[0], device=x.device)
    codes = torch.arange(codebook.shape[0], device=x.device)
    keys = gumbel.mix(rows), gumbel.mix(-codes - 1)
    scale = torch.tensor(float(x.shape[1]), device=x.device)
    prepared = b2t_kernels.prepare_codes(codebook[None])[0]
    return {
        "nearest": lambda: b2t_kernels.nearest_code(x, codebook, None, "exact", prepared),
        "drawn": lambda: b2t_kernels.sample_code(x, codebook, scale, *keys, prepared),
    }


def quantizer_methods(case: Case, device: str, missing: list[str]) -> dict[str, Method]:
    """Forward, backward and codebook update of four residual layers, the quantizer's whole step.

    Two of ours revive nothing and are told that frames are finite: they read nothing from the
    device, so that a CUDA graph holds the whole step.
    """
    from b2t.quantize import ResidualVQ

    x = make_data(case, device).x.float()[None].requires_grad_()
    options = {"dim": case.D, "codebook_size": case.K, "num_quantizers": 4}
    known = {"finite": True}
    variants: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "commitment": ({}, {"losses": ("commitment",)}),
        "all losses": ({}, {}),
        "commitment, nothing read": ({"revival": None}, {"losses": ("commitment",), **known}),
        "all losses, nothing read": ({"revival": None}, known),
    }
    methods: dict[str, Method] = {}
    for name, (choices, chosen) in variants.items():
        ours = ResidualVQ(**options, **choices, kmeans_init=False).to(device).train()

        def step(ours: ResidualVQ = ours, chosen: dict[str, Any] = chosen) -> None:
            out = ours(x, **chosen)
            total = torch.stack(list(out.losses.values())).sum() + out.quantized.sum()
            torch.autograd.grad(total, x)
            ours.update(out.stats)

        methods[f"b2t, {name}"] = step
    peer = optional("vector_quantize_pytorch", missing)
    if peer is not None:
        theirs = peer.ResidualVQ(**options).to(device).train()

        def peer_step() -> None:
            quantized, _, loss = theirs(x)
            torch.autograd.grad(loss.sum() + quantized.sum(), x)

        methods["vector-quantize-pytorch"] = peer_step
    return methods
