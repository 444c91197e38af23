"""Does the quantizer collapse? One small autoencoder under many quantizers, on recordings.

Each run trains the same autoencoder with another quantizer (a condition) and is written as one line
of a JSONL file; what the file already holds is not run again, so the study can be run in pieces:

    python scripts/collapse_study.py --data feis --sizes 8x256 --conditions full naive vqp none
    python scripts/collapse_study.py --report            # table and figure to docs/

Settings are searched on a validation part of the training epochs (``--search ours``, ``--search
vqp``; ``--on validation`` for any condition). Without it, runs train on all training epochs and are
measured on held-out ones. Times are processor time of one thread.

Conditions: full, the recipe; no-X, one of its features off; with-X, an option that it does not use;
fast-decay, running averages at 0.95; more-commitment, at 0.25; late-revival, of codes under 0.1 ×
uniform use; naive, a codebook loss on uniform codes within ±1/K (van den Oord et al. 2017, as
commonly written), naive-normal, running averages with decay 0.99 on codes as nn.Embedding draws
them, and naive-ema, the same on uniform codes of Kaiming's bound, all three straight through and
nothing else; vqp, vector-quantize-pytorch at its defaults, and vqp-best, at the best of its search;
faiss, residual k-means on the finished latents of none; none, no quantizer.
"""

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "scripts")]

from b2t.data.simulate import SimulationConfig, Simulator, plan_blocks  # noqa: E402
from b2t.monitor.ema import effective_rank  # noqa: E402
from b2t.quantize import ResidualVQ  # noqa: E402

CROP = 16  # frames in a training crop
LATENT, WIDTH = 64, 128
CLIP = 0.1  # gradient norm of encoder and of decoder
HELD_SHIFTS = 4  # positions of the patch grid at which an epoch is measured


# ---- recordings


@dataclass
class Recording:
    """Segments of a recording, split once and for all, in units of the training part's deviation.

    Args:
        fit: [S, T, C] float32, to train on in a search.
        validation: [S, T, C], to choose settings on.
        held: [S, T, C], measured in final runs only.
        patch: bins per patch.
    """

    fit: Tensor
    validation: Tensor
    held: Tensor
    patch: int

    @property
    def train(self) -> Tensor:
        """All segments that are not held out."""
        return torch.cat([self.fit, self.validation])


def split(segments: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fit, validation and held part: three, one and one fifth of ``order``'s units."""
    fifth = len(order) // 5
    parts = order[2 * fifth :], order[fifth : 2 * fifth], order[:fifth]
    return tuple(segments[np.sort(part)] for part in parts)  # type: ignore[return-value]


def standardize(parts: tuple[np.ndarray, ...]) -> list[Tensor]:
    """Segments [S, T, C] without their own mean, over the first part's deviation, clipped at 8."""
    parts = tuple(part - part.mean(1, keepdims=True) for part in parts)
    scale = parts[0].std((0, 1))
    return [torch.from_numpy(np.clip(p / scale, -8, 8).astype(np.float32)) for p in parts]


def join(subjects: list[list[Tensor]], patch: int) -> Recording:
    """One recording of several subjects' parts."""
    return Recording(*(torch.cat(parts) for parts in zip(*subjects, strict=True)), patch=patch)


def feis(folder: Path) -> Recording:
    """FEIS: one-second epochs of 14 channels at 256 Hz, split by epoch."""
    import pandas as pd

    subjects = []
    for path in sorted((folder / "feis").glob("*.zip")):
        table = pd.read_csv(path)
        epochs = table.groupby("Epoch", sort=True)
        channels = list(table.columns[2:16])
        segments = np.stack([epoch[channels].to_numpy(np.float64) for _, epoch in epochs])
        order = np.random.default_rng(0).permutation(len(segments))
        subjects.append(standardize(split(segments, order)))
    return join(subjects, patch=8)


def p300_mat(folder: Path) -> Recording:
    """P300 speller: 8 channels at 250 Hz, one-second segments, split by blocks of ten seconds."""
    from scipy.io import loadmat

    subjects = []
    for path in sorted((folder / "p300_mat").glob("*.mat")):
        signal = loadmat(path)["y"].astype(np.float64)
        blocks = signal[: len(signal) // 2500 * 2500].reshape(-1, 10, 250, signal.shape[1])
        order = np.random.default_rng(0).permutation(len(blocks))
        parts = split(blocks, order)
        subjects.append(standardize(tuple(part.reshape(-1, 250, part.shape[3]) for part in parts)))
    return join(subjects, patch=16)


def simulated(_: Path) -> Recording:
    """`b2t simulate` in memory: 16 electrodes (32 features of 20 ms bins), split by trial."""
    config = SimulationConfig(sessions=1, trials=(240, 80, 80), electrodes=16, select_from=256)
    simulator, parts = Simulator(config), {"train": [], "val": [], "test": []}
    for block in plan_blocks(config):
        for trial in simulator.record(block).features():
            whole = trial[: len(trial) // 96 * 96].reshape(-1, 96, trial.shape[1])
            parts[block.split].append(whole.astype(np.float64))
    return join([standardize(tuple(np.concatenate(p) for p in parts.values()))], patch=4)


DATA: dict[str, Callable[[Path], Recording]] = {
    "feis": feis,
    "p300_mat": p300_mat,
    "simulated": simulated,
}


# ---- autoencoder


class Block(nn.Module):
    """Neighbouring frames, then a feed-forward layer, each behind a layer norm: [B, P, D]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.mix = nn.Conv1d(dim, dim, 3, padding=1, groups=dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Refine."""
        x = x + self.mix(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp(self.norms[1](x))


class Autoencoder(nn.Module):
    """Patches to latents [B, P, LATENT] and back."""

    def __init__(self, channels: int, patch: int, depth: int = 1) -> None:
        super().__init__()
        self.patch, width = patch, patch * channels

        def stack() -> list[nn.Module]:
            return [Block(WIDTH) for _ in range(depth)]

        self.encoder = nn.Sequential(
            nn.Linear(width, WIDTH), *stack(), nn.Linear(WIDTH, LATENT), nn.LayerNorm(LATENT)
        )
        self.decoder = nn.Sequential(nn.Linear(LATENT, WIDTH), *stack(), nn.Linear(WIDTH, width))

    def encode(self, signal: Tensor) -> Tensor:
        """Signal [B, T, C] → latents [B, T / patch, LATENT]."""
        return self.encoder(signal.unflatten(1, (-1, self.patch)).flatten(2))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, P, LATENT] → patches [B, P, patch · C]."""
        return self.decoder(latents)


# ---- quantizers: one interface for ours, the peer's and none


class NoQuantizer(nn.Module):
    """Latents as they are."""

    started = True

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None, Tensor | float]:
        """Quantized latents, codes [B, P, Q] or None, weighted auxiliary loss."""
        return z, None, 0.0

    def update(self, progress: float) -> int:
        """After an optimizer step; the number of revived codes."""
        return 0


class Ours(NoQuantizer):
    """`b2t.quantize.ResidualVQ` with the weights of its losses and a start without quantizing."""

    def __init__(self, size: tuple[int, int], options: dict[str, Any], seed: int) -> None:
        super().__init__()
        options = dict(options)
        self.weights = {
            name: options.pop(name) for name in ("commitment", "diversity", "perplexity")
        }
        self.pass_through = options.pop("pass_through")
        self.frames_per_code = options.pop("frames_per_code")
        narrow, normal = (options.pop(f"{name}_start", False) for name in ("narrow", "normal"))
        self.vq = ResidualVQ(LATENT, size[1], size[0], seed=seed, **options)
        books = self.vq.codebooks
        if narrow:
            books.embed.uniform_(-1 / size[1], 1 / size[1])
        if normal:
            books.embed.normal_()
            books.ema_sum.copy_(books.embed)
        books.push()
        self.stats: Any = None
        self.quantizing = self.pass_through == 0 and self.vq.initialized

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None, Tensor | float]:
        """See `NoQuantizer`."""
        if not self.quantizing:
            return z, None, 0.0
        wanted = [name for name, weight in self.weights.items() if weight > 0]
        out = self.vq(z, losses=wanted if self.training else ())
        self.stats = out.stats
        loss = sum(self.weights.get(name, 1.0) * term for name, term in out.losses.items())
        return out.quantized, out.codes, loss

    def update(self, progress: float) -> int:
        """See `NoQuantizer`."""
        self.vq.set_progress(progress)
        return sum(self.vq.update(self.stats).revived) if self.quantizing else 0

    def start(self, latents: Iterator[Tensor]) -> None:
        """Start the codebooks (k-means++ unless switched off) and quantize from here on."""
        if not self.vq.initialized:
            pairs = ((z, None) for z in latents)
            self.vq.initialize(pairs, progress=False, frames_per_code=self.frames_per_code)
        self.quantizing = True


class Peer(NoQuantizer):
    """vector-quantize-pytorch's ResidualVQ, its loss summed over layers as in its examples."""

    def __init__(self, size: tuple[int, int], options: dict[str, Any]) -> None:
        super().__init__()
        from vector_quantize_pytorch import ResidualVQ as PeerVQ

        self.vq = PeerVQ(dim=LATENT, num_quantizers=size[0], codebook_size=size[1], **options)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None, Tensor | float]:
        """See `NoQuantizer`."""
        quantized, codes, losses = self.vq(z)
        return quantized, codes, losses.sum()


class Offline(NoQuantizer):
    """Residual k-means (faiss) fitted once to the latents of a finished autoencoder."""

    def __init__(self, latents: Tensor, size: tuple[int, int], seed: int) -> None:
        super().__init__()
        import faiss

        residual, books = latents, []
        for layer in range(size[0]):
            fit = faiss.Kmeans(
                LATENT,
                size[1],
                niter=25,
                seed=seed * 100 + layer + 1,
                max_points_per_centroid=10**6,
            )
            fit.train(residual.numpy())
            books.append(torch.from_numpy(fit.centroids.copy()))
            residual = residual - books[-1][nearest(residual, books[-1])]
        self.books = books

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None, Tensor | float]:
        """See `NoQuantizer`."""
        residual, codes = z.reshape(-1, LATENT), []
        for book in self.books:
            codes.append(nearest(residual, book))
            residual = residual - book[codes[-1]]
        return z - residual.view_as(z), torch.stack(codes, -1).view(*z.shape[:-1], -1), 0.0


def nearest(x: Tensor, book: Tensor) -> Tensor:
    """Nearest code [N] of x [N, D] in book [K, D]."""
    bias = book.square().sum(1)
    return torch.cat([torch.addmm(bias, r, book.T, alpha=-2).argmin(1) for r in x.split(4096)])


# ---- conditions


# Where the search began.
BEFORE: dict[str, Any] = {
    "pass_through": 0.03,
    "frames_per_code": 16,
    "commitment": 0.25,
    "diversity": 0.0,
    "perplexity": 0.0,
    "decay": 0.97,
}

# Best mean of the three SNRs on validation epochs; a decay of 0.98 is the quantizer's default.
RECIPE: dict[str, Any] = BEFORE | {"commitment": 0.1, "decay": 0.98}

_REGULARIZERS = {"diversity": 0.1, "perplexity": 0.05}

# Each switches one feature of the recipe off (no-) or on (with-).
ABLATIONS: dict[str, dict[str, Any]] = {
    "no-kmeans": {"kmeans_init": False},
    "no-lloyd": {"kmeans_iters": 0},
    "no-pass-through": {"pass_through": 0.0},
    "no-revival": {"revival": None},
    "no-revival-end": {"revival_until": 1.01},
    "no-rotation": {"rotation_trick": False},
    "no-ema": {"update_rule": "gradient"},
    "no-commitment": {"commitment": 0.0},
    "fast-decay": {"decay": 0.95},
    "more-commitment": {"commitment": 0.25},
    "late-revival": {"revival_threshold": 0.1},
    "with-regularizers": _REGULARIZERS,
    "with-diversity": {"diversity": 0.1},
    "with-constant-temperature": _REGULARIZERS | {"temperature": 1.0, "temperature_end": 1.0},
    "with-frame-revival": {"revival": "frames"},
    "with-sampling": {"stochastic_sample_codes": True, "temperature": 0.5, "temperature_end": 0.02},
    "with-cosine": {"use_cosine_sim": True},
    "with-dropout": {"quantize_dropout": True},
    "with-shared": {"shared_codebook": True},
}

NAIVE: dict[str, Any] = {
    "pass_through": 0.0,
    "frames_per_code": 0,
    "commitment": 0.25,
    "diversity": 0.0,
    "perplexity": 0.0,
    "kmeans_init": False,
    "revival": None,
    "rotation_trick": False,
}

# Best mean of the three SNRs on validation epochs.
PEER_BEST: dict[str, Any] = {
    "kmeans_init": True,
    "decay": 0.98,
    "commitment_weight": 0.05,
    "rotation_trick": False,
}

# As many settings each, chosen among on validation epochs.
_SLOW = {"decay": 0.98, "revival_until": 0.7, "revival_threshold": 0.1}
_BASE = {"decay": 0.98, "commitment": 0.1}
_ANEW = _BASE | _REGULARIZERS
SEARCH_OURS: list[dict[str, Any]] = [
    _SLOW,
    _SLOW | {"commitment": 0.5},
    _SLOW | {"commitment": 0.1},
    _SLOW | {"decay": 0.95},
    {"revival_threshold": 0.2},
    {"revival_threshold": 0.2, "revival_every": 10},
    {"revival_threshold": 0.1},
    {"decay": 0.98},
    {"commitment": 0.1},
    {"decay": 0.98, "commitment": 0.1},
    {"decay": 0.98, "commitment": 0.05},
    {"decay": 0.98, "commitment": 0.1, "revival_until": 0.7},
    _ANEW | {"revival_threshold": 0.1},
    _ANEW,
    _BASE | {"eval_beam_size": 8},
    _BASE | {"eval_beam_size": 16},
    _BASE | {"beam_size": 4, "eval_beam_size": 16},
    _BASE | {"beam_size": 8, "eval_beam_size": 16},
    _BASE | {"beam_size": 8, "eval_beam_size": 16, "revival_threshold": 0.2},
    _BASE | {"beam_size": 8, "eval_beam_size": 16, "revival_threshold": 0.1},
    _BASE | {"beam_size": 8, "eval_beam_size": 16, "commitment": 0.05},
]
_STARTED = {"kmeans_init": True, "decay": 0.95}
_STRAIGHT = _STARTED | {"commitment_weight": 0.1, "rotation_trick": False}
SEARCH_PEER: list[dict[str, Any]] = [
    {"kmeans_init": True},
    {"kmeans_init": True, "threshold_ema_dead_code": 2},
    _STARTED | {"rotation_trick": False},
    _STARTED | {"commitment_weight": 0.25},
    _STARTED | {"commitment_weight": 0.1},
    _STRAIGHT,
    _STARTED | {"commitment_weight": 0.25, "threshold_ema_dead_code": 0.2},
    _STRAIGHT | {"commitment_weight": 0.05},
    _STRAIGHT | {"decay": 0.98},
    _STRAIGHT | {"decay": 0.98, "commitment_weight": 0.05},
    _STRAIGHT | {"decay": 0.9},
    _STRAIGHT | {"threshold_ema_dead_code": 0.1},
    PEER_BEST | {"commitment_weight": 0.02},
    PEER_BEST | {"threshold_ema_dead_code": 0.1},
    # Its beam search in training fails after its k-means start.
    PEER_BEST | {"beam_size": 1, "eval_beam_size": 8},
    PEER_BEST | {"beam_size": 1, "eval_beam_size": 16},
    PEER_BEST | {"beam_size": 1, "eval_beam_size": 16, "threshold_ema_dead_code": 0.1},
    PEER_BEST | {"beam_size": 1, "eval_beam_size": 16, "commitment_weight": 0.02},
    PEER_BEST | {"beam_size": 1, "eval_beam_size": 16, "commitment_weight": 0.1},
    PEER_BEST | {"kmeans_init": False, "beam_size": 8, "eval_beam_size": 16},
    PEER_BEST
    | {
        "kmeans_init": False,
        "beam_size": 8,
        "eval_beam_size": 16,
        "threshold_ema_dead_code": 0.1,
    },
]


# A start from 16 frames a code and 10 Lloyd steps would take longer than the training here.
BY_CODES: dict[int, dict[str, Any]] = {8192: {"frames_per_code": 4, "kmeans_iters": 4}}


def options_of(condition: str) -> tuple[str, dict[str, Any]]:
    """Kind of quantizer (ours, peer, faiss, none) and its options."""
    if condition in ("none", "faiss"):
        return condition, {}
    if condition == "vqp":
        return "peer", {}
    if condition == "vqp-best":
        return "peer", PEER_BEST
    if condition == "naive":
        gradient = {"update_rule": "gradient", "codebook_gradient_scale": 1.0}
        return "ours", NAIVE | gradient | {"narrow_start": True}
    if condition == "naive-normal":
        return "ours", NAIVE | {"decay": 0.99, "normal_start": True}
    if condition == "naive-ema":
        return "ours", NAIVE | {"decay": 0.99}
    if condition == "full":
        return "ours", RECIPE
    return "ours", RECIPE | ABLATIONS[condition]


NAIVES = ("naive", "naive-normal", "naive-ema")
CONDITIONS = ("full", *ABLATIONS, *NAIVES, "vqp", "vqp-best", "faiss", "none")


# ---- one run


@dataclass(frozen=True)
class Plan:
    """One run.

    Args:
        data: name of the recording.
        size: quantizers × codes, as 8x256.
        condition: name of the condition.
        seed: of weights, batches and quantizer.
        on: ``held`` or ``validation``.
        steps: optimizer steps.
        frames: frames in a step.
        kind: see `options_of`.
        options: of the quantizer.
    """

    data: str
    size: str
    condition: str
    seed: int
    on: str
    steps: int
    frames: int
    kind: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """Quantizers and codes."""
        layers, codes = self.size.split("x")
        return int(layers), int(codes)

    @property
    def key(self) -> str:
        """What tells this run from others."""
        return json.dumps(asdict(self), sort_keys=True)


class Run:
    """Train one autoencoder with one quantizer and measure it."""

    def __init__(self, plan: Plan, recording: Recording) -> None:
        torch.manual_seed(plan.seed)
        self.plan = plan
        self.train = recording.train if plan.on == "held" else recording.fit
        self.test = recording.held if plan.on == "held" else recording.validation
        self.generator = torch.Generator().manual_seed(plan.seed)
        self.model = Autoencoder(self.train.shape[2], recording.patch)
        self.quantizer: Any = self._quantizer()
        self.quantizer_s = self.total_s = 0.0
        self.revived = 0

    def _quantizer(self) -> NoQuantizer:
        if self.plan.kind == "ours":
            return Ours(self.plan.shape, self.plan.options, self.plan.seed)
        if self.plan.kind == "peer":
            return Peer(self.plan.shape, self.plan.options)
        return NoQuantizer()

    def crops(self, frames: int) -> Tensor:
        """Training signal [B, T, C]: about ``frames`` frames, from anywhere in the segments."""
        bins = min(CROP, self.train.shape[1] // self.model.patch) * self.model.patch
        count = max(1, frames * self.model.patch // bins)
        rows = torch.randint(self.train.shape[0], (count, 1), generator=self.generator)
        last = self.train.shape[1] - bins + 1
        start = torch.randint(last, (count, 1), generator=self.generator)
        return self.train[rows, start + torch.arange(bins)]

    def __call__(self) -> dict[str, float | list[float]]:
        """Train, then measure."""
        self.fit()
        if self.plan.kind == "faiss":
            self.quantizer = Offline(self._latents(), self.plan.shape, self.plan.seed)
        return self.measure()

    def fit(self) -> None:
        """AdamW with warm-up and cosine decay."""
        steps = self.plan.steps
        parameters = [*self.model.parameters(), *self.quantizer.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=1e-4)
        warm = max(1, steps // 20)

        def rate(step: int) -> float:
            decay = 0.5 * (1 + math.cos(math.pi * step / steps))
            return min(1.0, (step + 1) / warm) * (0.02 + 0.98 * decay)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        starts_at = round(steps * getattr(self.quantizer, "pass_through", 0.0))
        for step in range(steps):
            if isinstance(self.quantizer, Ours) and step == starts_at:
                self._start()
            began = time.process_time()
            self._step(optimizer, step / steps)
            schedule.step()
            self.total_s += time.process_time() - began

    def _step(self, optimizer: torch.optim.Optimizer, progress: float) -> None:
        signal = self.crops(self.plan.frames)
        z = self.model.encode(signal)
        began = time.process_time()
        quantized, _, loss = self.quantizer(z)
        spent = time.process_time() - began
        target = signal.unflatten(1, (-1, self.model.patch)).flatten(2)
        loss = F.mse_loss(self.model.decode(quantized), target) + loss
        optimizer.zero_grad()
        loss.backward()
        # Quantizers differ in the size of the gradient they hand to the encoder (the peer's is Q
        # times larger); clipped together, that alone would decide how far steps are evened out.
        for part in (self.model.encoder, self.model.decoder):
            nn.utils.clip_grad_norm_(part.parameters(), CLIP)
        optimizer.step()
        began = time.process_time()
        self.revived += self.quantizer.update(progress)
        self.quantizer_s += spent + time.process_time() - began

    @torch.no_grad()
    def _latents(self) -> Tensor:
        """Latents of training crops: twenty for each code."""
        self.model.eval()
        parts, wanted = [], 20 * self.plan.shape[1]
        while sum(map(len, parts)) < wanted:
            parts.append(self.model.encode(self.crops(4096)).flatten(0, 1))
        return torch.cat(parts)[:wanted]

    def _start(self) -> None:
        with torch.no_grad():
            self.quantizer.start(iter(lambda: self.model.encode(self.crops(4096)), None))

    # ---- measures

    @torch.no_grad()
    def measure(self) -> dict[str, float | list[float]]:
        """SNR on test and training segments, and the use of the codes."""
        self.model.eval()
        self.quantizer.eval()
        layers, codes = self.plan.shape
        test = Tally(layers, codes)
        for signal in self._grids(self.test):
            test.add(signal, *self._reconstruct(signal))
        trained = Tally(layers, codes)
        for signal in self._grids(self.train[:: len(self.train) // len(self.test)], shifts=1):
            trained.add(signal, *self._reconstruct(signal))
        steps = self.plan.steps
        result = test.result() | {"snr_train_db": trained.pooled_snr()}
        if codes >= 4096 and test.counts is not None:
            result |= self._train_window().usage()
        result["ms_step"] = 1e3 * self.total_s / steps
        result["ms_quantizer"] = 1e3 * self.quantizer_s / steps
        result["revived_per_step"] = self.revived / steps
        return result

    def _reconstruct(self, signal: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        quantized, codes, _ = self.quantizer(self.model.encode(signal))
        return self.model.decode(quantized), quantized, codes

    def _grids(self, segments: Tensor, shifts: int = HELD_SHIFTS) -> Iterator[Tensor]:
        """Every segment at several positions of the patch grid, in batches."""
        patch = self.model.patch
        for shift in range(0, patch, max(1, patch // shifts)):
            bins = (segments.shape[1] - shift) // patch * patch
            yield from segments[:, shift : shift + bins].split(64)

    def _train_window(self) -> "Tally":
        """Codes of at least 20·K training frames."""
        tally = Tally(*self.plan.shape)
        while tally.frames < 20 * self.plan.shape[1]:
            codes = self.quantizer(self.model.encode(self.crops(4096)))[1]
            tally.count(codes)
        return tally


class Tally:
    """Sums over measured segments."""

    def __init__(self, layers: int, codes: int) -> None:
        self.shape = layers, codes
        self.counts: Tensor | None = None
        self.frames = 0
        self.signal: list[Tensor] = []
        self.error: list[Tensor] = []
        self.cosine: list[Tensor] = []
        self.latents: list[Tensor] = []

    def count(self, codes: Tensor) -> None:
        """Count codes [B, P, Q]."""
        layers, size = self.shape
        flat = codes.reshape(-1, layers)
        found = torch.stack([torch.bincount(c, minlength=size) for c in flat.unbind(1)])
        self.counts = found if self.counts is None else self.counts + found
        self.frames += flat.shape[0]

    def add(self, signal: Tensor, output: Tensor, latents: Tensor, codes: Tensor | None) -> None:
        """Add a batch: signal [B, T, C], reconstructed patches [B, P, patch · C]."""
        target = signal.reshape(output.shape)
        self.signal.append(target.square().sum(-1).flatten())
        self.error.append((target - output).square().sum(-1).flatten())
        self.cosine.append(F.cosine_similarity(target, output, dim=-1).flatten())
        self.latents.append(latents.flatten(0, 1))
        if codes is not None:
            self.count(codes)

    def pooled_snr(self) -> float:
        """Power of the signal over power of the error, in dB."""
        return float(10 * torch.log10(torch.cat(self.signal).sum() / torch.cat(self.error).sum()))

    def usage(self) -> dict[str, float | list[float]]:
        """Of each layer: share of codes used; exp(entropy) / K; codes never used."""
        assert self.counts is not None
        p = self.counts.double() / self.counts.sum(1, keepdim=True)
        perplexity = torch.exp(-torch.special.xlogy(p, p).sum(1)) / self.shape[1]
        used = (self.counts > 0).double().mean(1)
        return {
            "utilization": used.tolist(),
            "perplexity_of_k": perplexity.tolist(),
            "dead": float((self.counts == 0).sum()),
            "usage_frames": float(self.frames),
        }

    def result(self) -> dict[str, float | list[float]]:
        """Everything."""
        signal, error = torch.cat(self.signal), torch.cat(self.error)
        patches = 10 * torch.log10(signal.clamp(min=1e-12) / error.clamp(min=1e-12))
        result: dict[str, float | list[float]] = {
            "snr_pooled_db": self.pooled_snr(),
            "snr_median_db": float(patches.median()),
            "cosine": float(torch.cat(self.cosine).mean()),
            "effective_rank": float(effective_rank(torch.cat(self.latents)[None])),
        }
        return result | (self.usage() if self.counts is not None else {})


# ---- command line


# Steps and frames in a step for each number of codes: under a minute of one core for most.
BUDGET = {256: (800, 512), 1024: (600, 1024), 8192: (300, 2048)}


def plans(args: argparse.Namespace) -> Iterator[Plan]:
    """The runs asked for, seeds outermost, so that every condition has one early."""
    for seed in range(args.seeds):
        for data in args.data:
            for size in args.sizes:
                for name in searched(args.search) if args.search else args.conditions:
                    plan = plan_of(data, size, name, seed, args.on)
                    yield replace(
                        plan, steps=args.steps or plan.steps, frames=args.frames or plan.frames
                    )


def plan_of(data: str, size: str, condition: str, seed: int, on: str) -> Plan:
    """The run of a condition, or of a searched setting, as defined now."""
    codes = int(size.split("x")[1])
    steps, frames = BUDGET.get(codes, BUDGET[1024])
    settings = searched("ours") | searched("vqp")
    kind, options = settings.get(condition) or options_of(condition)
    if kind == "ours":
        options = options | BY_CODES.get(codes, {})
    return Plan(data, size, condition, seed, on, steps, frames, kind, options)


def searched(search: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Kind and options of the settings of a search, by name."""
    ours = search == "ours"
    return {
        f"{search} " + " ".join(f"{k}={v}" for k, v in change.items()): (
            ("ours", BEFORE | change) if ours else ("peer", change)
        )
        for change in (SEARCH_OURS if ours else SEARCH_PEER)
    }


def as_defined_now(line: dict[str, Any]) -> bool:
    """Whether a finished run is one that this file would make today."""
    plan = line["plan"]
    names = ("data", "size", "condition", "seed", "on")
    try:
        now = plan_of(*(plan[name] for name in names))
    except KeyError:  # a condition of the past
        return False
    return json.loads(now.key) == plan


def load_lines(path: Path) -> list[dict[str, Any]]:
    """Finished runs."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def perform(args: argparse.Namespace) -> None:
    """Run what is not in the file yet."""
    done = {json.dumps(line["plan"], sort_keys=True) for line in load_lines(args.out)}
    recordings: dict[str, Recording] = {}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for plan in plans(args):
        if plan.key in done:
            continue
        if plan.data not in recordings:
            recordings[plan.data] = DATA[plan.data](args.folder)
        result = Run(plan, recordings[plan.data])()
        with args.out.open("a") as file:
            file.write(json.dumps({"plan": asdict(plan), "result": result}) + "\n")
        print(line_of(plan, result), flush=True)


def line_of(plan: Plan, result: dict[str, Any]) -> str:
    """One run in one line."""
    text = f"{plan.data} {plan.size} {plan.on} seed {plan.seed} {plan.condition:<28}"
    if "utilization" in result:
        worst, mean = min(result["perplexity_of_k"]), float(np.mean(result["perplexity_of_k"]))
        text += f" used ≥ {100 * min(result['utilization']):5.1f} %  perplexity/K {mean:.3f}"
        text += f" (worst {worst:.3f})"
    text += (
        "  SNR pooled {snr_pooled_db:.2f} median {snr_median_db:.2f} train {snr_train_db:.2f} dB"
    )
    text += "  {ms_step:.0f} ms/step ({ms_quantizer:.0f})  revived {revived_per_step:.2f}"
    return text.format(**result)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", choices=DATA, default=["feis"])
    parser.add_argument("--sizes", nargs="+", default=["8x256"], metavar="QxK")
    parser.add_argument(
        "--conditions", nargs="+", choices=CONDITIONS, default=list(CONDITIONS), metavar="NAME"
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 … N−1")
    parser.add_argument("--on", choices=("held", "validation"), default="held")
    parser.add_argument("--search", choices=("ours", "vqp"), help="the settings to choose among")
    parser.add_argument("--steps", type=int, help="instead of the size's own number")
    parser.add_argument("--frames", type=int, help="frames in a step, likewise")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "collapse" / "runs.jsonl")
    parser.add_argument("--report", action="store_true", help="write docs/ and run nothing")
    args = parser.parse_args(arguments)
    if args.search:
        args.on = "validation"
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(args.threads)
    if args.report:
        from collapse_report import write_report

        write_report([line for line in load_lines(args.out) if as_defined_now(line)], ROOT / "docs")
    else:
        perform(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
