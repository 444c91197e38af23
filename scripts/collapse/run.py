"""One run: train the autoencoder with a quantizer, then measure."""

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from b2t.monitor.ema import effective_rank
from collapse.autoencoder import AUTOENCODERS
from collapse.conditions import Plan
from collapse.quantizers import NoQuantizer, Offline, Ours, Peer
from collapse.recordings import Recording

CROP = 16  # frames in a training crop
CLIP = 0.1  # gradient norm of encoder and of decoder
HELD_SHIFTS = 4  # positions of the patch grid at which an epoch is measured
MEASURED = 24  # segments of unseen subjects that are measured, at one position; beams are slow


class Run:
    """Train one autoencoder with one quantizer and measure it."""

    def __init__(self, plan: Plan, recording: Recording) -> None:
        torch.manual_seed(plan.seed)
        self.plan = plan
        self.train = recording.train if plan.on == "held" else recording.fit
        self.test = recording.held if plan.on == "held" else recording.validation
        self.generator = torch.Generator().manual_seed(plan.seed)
        self.model = AUTOENCODERS[plan.autoencoder](self.train.shape[2], recording.patch)
        self.quantizer: Any = self._quantizer()
        self.quantizer_s = self.total_s = 0.0
        self.revived = 0

    def _quantizer(self) -> NoQuantizer:
        if self.plan.kind == "ours":
            return Ours(self.plan.shape, self.plan.options, self.plan.seed)
        if self.plan.kind == "peer":
            return Peer(self.plan.shape, self.plan.options)
        return NoQuantizer()

    def crops(self, frames: int, generator: torch.Generator | None = None) -> Tensor:
        """Training signal [B, T, C]: about ``frames`` frames, from anywhere in the segments.

        Batches are drawn by the run's generator; what is drawn by another leaves them alone.
        """
        generator = generator or self.generator
        bins = min(CROP, self.train.shape[1] // self.model.patch) * self.model.patch
        count = max(1, frames * self.model.patch // bins)
        rows = torch.randint(self.train.shape[0], (count, 1), generator=generator)
        last = self.train.shape[1] - bins + 1
        start = torch.randint(last, (count, 1), generator=generator)
        return self.train[rows, start + torch.arange(bins)]

    def __call__(self) -> dict[str, float | list[float]]:
        """Train, then measure."""
        self.fit()
        if self.plan.kind == "faiss":
            self.quantizer = Offline(
                self._latents(),
                self.plan.shape,
                self.plan.seed,
                self.plan.options["eval_beam_size"],
            )
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
        starts_at = round(steps * self.quantizer.pass_through)
        for step in range(steps):
            if step == starts_at and not self.quantizer.quantizing:
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
        # From a generator of their own: all quantizers of a seed train on the same batches.
        own = torch.Generator().manual_seed(self.plan.seed)
        with torch.no_grad():
            self.quantizer.start(iter(lambda: self.model.encode(self.crops(4096, own)), None))

    @torch.no_grad()
    def measure(self) -> dict[str, float | list[float]]:
        """SNR on test and training segments, and the use of the codes."""
        self.model.eval()
        self.quantizer.eval()
        layers, codes = self.plan.shape
        measured, shifts = self.test, HELD_SHIFTS
        if self.plan.subjects:
            measured, shifts = self.test[:: -(-len(self.test) // MEASURED)], 1
        test = Tally(layers, codes)
        for signal in self._grids(measured, shifts):
            test.add(signal, *self._reconstruct(signal))
        trained = Tally(layers, codes)
        every = max(1, len(self.train) // len(measured))
        for signal in self._grids(self.train[::every], shifts=1):
            trained.add(signal, *self._reconstruct(signal))
        steps = self.plan.steps
        result = test.result() | {"snr_train_db": trained.pooled_snr()}
        result["snr_latents_db"] = self._unquantized(measured, shifts)
        if codes >= 4096 and test.counts is not None:
            result |= self._train_window().usage()
        result["ms_step"] = 1e3 * self.total_s / steps
        result["ms_quantizer"] = 1e3 * self.quantizer_s / steps
        result["revived_per_step"] = self.revived / steps
        return result

    def _reconstruct(self, signal: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        quantized, codes, _ = self.quantizer(self.model.encode(signal))
        return self.model.decode(quantized), quantized, codes

    def _unquantized(self, segments: Tensor, shifts: int) -> float:
        """Pooled SNR (dB) of the finished model, its latents decoded as they are."""
        tally = Tally(*self.plan.shape)
        for signal in self._grids(segments, shifts):
            latents = self.model.encode(signal)
            tally.add(signal, self.model.decode(latents), latents, None)
        return tally.pooled_snr()

    def _grids(self, segments: Tensor, shifts: int) -> Iterator[Tensor]:
        """Every segment at several positions of the patch grid, in batches."""
        patch = self.model.patch
        for shift in range(0, patch, max(1, patch // shifts)):
            bins = (segments.shape[1] - shift) // patch * patch
            yield from segments[:, shift : shift + bins].split(8)

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
