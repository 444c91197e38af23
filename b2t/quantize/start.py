"""The codebooks' start: gather latents of all ranks, then k-means++ layer by layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from tqdm import tqdm

from b2t.errors import UserError
from b2t.log import logger
from b2t.quantize.codebook import Codebooks
from b2t.quantize.distributed import (
    all_gather_rows,
    all_reduce_sum,
    broadcast_from_first,
    rank,
    world_size,
)
from b2t.quantize.frame_hash import signed64
from b2t.quantize.frames import FrameSpace, frame_numbers
from b2t.quantize.kmeans import FrameReservoir, canonical, kmeans
from b2t.quantize.layers import Layers
from b2t.quantize.statistics import InitReport

Frames = Tensor | tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]
"""Latents [B, P, dim], alone or with their mask [B, P] or None and, where known, ids [B, P]."""


class NoFiniteFrames(UserError):  # noqa: N818  # reads as what happened
    """No rank has a latent frame that is finite, so that no codebook can start.

    Attributes:
        batches: whoever brings the latents may put here what they were made of.
    """

    batches: Sequence[Any] = ()


def valid_frames(
    space: FrameSpace, frames: Tensor | Iterable[Frames], books: Codebooks
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (frames [n, D] that count, their random numbers [n], how many held NaN []).

    Args:
        space: the quantizer's way into the width of its codes.
        frames: latents as they come; one tensor is one batch of them.
        books: for device and seed.
    """
    device, seed = books.embed.device, int(books.seed)
    for given in [frames] if isinstance(frames, Tensor) else frames:
        x, mask, *ids = (given, None) if isinstance(given, Tensor) else given
        valid, latents, bad = space.valid_latents(
            x.to(device), None if mask is None else mask.to(device)
        )
        known = ids[0].to(device) if ids else None
        yield latents, frame_numbers(latents, valid, known, seed, 0), bad


def gather_frames(
    latents: Iterable[tuple[Tensor, Tensor, Tensor]],
    wanted: int,
    books: Codebooks,
    group: ProcessGroup | None,
    show: bool,
) -> tuple[Tensor, int]:
    """Frames [N ≤ wanted, D] of all ranks, the same on each, and how many were left out for NaN.

    Args:
        latents: this rank's (frames [n, D], their hashes [n], number of frames left out []), drawn
            until it has its share.
        wanted: frames over all ranks.
        books: for seed, width and device.
        group: ranks that start together.
        show: a progress bar.

    Raises:
        NoFiniteFrames: every real frame of every rank holds NaN or infinity.
        UserError: every frame of every rank is masked.
    """
    embed = books.embed
    share = -(-wanted // world_size(group))
    reservoir = FrameReservoir(share)
    none = torch.zeros(0, dtype=torch.int64, device=embed.device)
    reservoir.add(embed.new_zeros(0, embed.shape[2]), none)
    nonfinite = torch.zeros((), dtype=torch.int64, device=embed.device)
    with _bar(share, "frames for k-means++", " frames", show and rank(group) == 0) as bar:
        for frames, hashes, bad in latents:
            reservoir.add(frames, hashes)
            nonfinite += bad
            bar.update(min(frames.shape[0], share - bar.n))
            if reservoir.offered >= share:
                break
    gathered, hashes = (all_gather_rows(kept, group) for kept in reservoir.kept())
    (nonfinite,) = all_reduce_sum([nonfinite], group)
    if gathered.shape[0] == 0:
        if int(nonfinite):
            raise NoFiniteFrames(
                f"the codebooks cannot start: NaN or infinity in all {int(nonfinite)} latent frames"
            )
        raise UserError(
            "the codebooks cannot start: no rank brought a latent frame that is not masked; check "
            "the lengths of the trials"
        )
    return canonical(gathered, hashes, wanted)[0], int(nonfinite)


def start_codebooks(
    books: Codebooks,
    layers: Layers,
    x: Tensor,
    iterations: int,
    group: ProcessGroup | None = None,
    show: bool = True,
    between: Callable[[], None] | None = None,
) -> InitReport:
    """Fit all codebooks that have not started to the frames ``x`` [N, D]; equal on all ranks.

    Layer q is fitted to what the finished layers before it leave. Every rank computes, and the
    first rank's result is taken, so that no rounding tells the ranks apart.

    Args:
        books: changed in place; ``books.initialized`` counts finished layers.
        layers: a view of ``books.embed`` itself.
        x: finite frames, the same on all ranks.
        iterations: Lloyd steps.
        group: ranks that start together.
        show: a progress bar.
        between: called before each layer.
    """
    began = time.monotonic()
    report = InitReport(frames=x.shape[0])
    K = books.embed.shape[1]
    shared = books.embed.shape[0] == 1 and layers.quantizers > 1
    between = between or (lambda: None)
    fits = 2 if shared else layers.quantizers - int(books.initialized)
    with _bar(fits * (1 + iterations) * K, "k-means++", " codes", show and rank(group) == 0) as bar:
        if shared:
            between()
            _fit(books, 0, x, layers, iterations, group, bar.update)
            seen = torch.cat([x, *_residuals(x, layers)[:-1]])
            seeded = _fit(books, 0, seen, layers, iterations, group, bar.update)
            report.seeded = [seeded] * layers.quantizers
            books.initialized.fill_(layers.quantizers)
        residual = x.clone()
        for q in range(layers.quantizers):
            if q >= int(books.initialized):
                between()
                seeded = _fit(books, q, residual, layers, iterations, group, bar.update)
                report.seeded.append(seeded)
                books.initialized.fill_(q + 1)
            residual -= layers.chosen(layers.assign(residual, q)[0], q)
            report.squared_error.append(float(residual.square().sum(1).mean()))
    books.push()
    _say_if_short(report, K, group)
    report.seconds = time.monotonic() - began
    return report


def _residuals(x: Tensor, layers: Layers) -> list[Tensor]:
    """What each layer leaves of ``x``."""
    left = []
    for q in range(layers.quantizers):
        x = x - layers.chosen(layers.assign(x, q)[0], q)
        left.append(x)
    return left


def _fit(
    books: Codebooks,
    layer: int,
    residual: Tensor,
    layers: Layers,
    iterations: int,
    group: ProcessGroup | None,
    tick: Callable[[int], object],
) -> int:
    """Fit one codebook; returns how many of its codes are clusters of their own."""
    seed = signed64(int(books.seed) * 104_729 + layer)
    generator = torch.Generator().manual_seed(seed)
    x = layers.seen(residual)
    codes, seeded = kmeans(x, books.embed.shape[1], iterations, generator, tick)
    codes = layers.seen(codes)
    books.embed[layer] = codes
    assigned, counts = layers.assign(residual, layer)
    unit = codes[assigned]
    gain = (residual * unit).sum() / residual.shape[0] if layers.cosine else x.new_ones(())
    error = (residual - gain * unit).square().sum(1).mean()
    broadcast_from_first([codes, counts, gain, error], group)
    books.start_layer(layer, codes, counts, gain, error)
    return seeded


def _say_if_short(report: InitReport, K: int, group: ProcessGroup | None) -> None:
    fewest = min(report.seeded, default=K)
    if fewest < K and rank(group) == 0:
        most = max(report.seeded)
        logger(__name__).warning(
            "codebook start: %s frames are too few for %s codes: layers have %s clusters, and the "
            "other codes are copies until revival. Gather more frames or use fewer codes.",
            f"{report.frames:,}",
            f"{K:,}",
            f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}",
        )


def _bar(total: int, title: str, unit: str, show: bool) -> tqdm:
    return tqdm(total=total, desc=title, unit=unit, unit_scale=True, disable=not show, leave=False)
