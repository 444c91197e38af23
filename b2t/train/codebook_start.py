"""The start of the codebooks: latents of training trials, the same for any number of ranks."""

import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from b2t.config import Config
from b2t.data.batches import Batch, TrialRows, collate
from b2t.log import logger
from b2t.model.brain_to_text import BrainToText
from b2t.monitor.alerts import Alert
from b2t.quantize.frame_hash import frame_ids
from b2t.quantize.start import NoFiniteFrames
from b2t.train.build import Materials
from b2t.train.diagnosis import diagnose, not_started_alert
from b2t.train.progress import Progress
from b2t.train.ranks import Ranks
from b2t.train.stopping import StopRequests

_KEPT = 16
"""Trials of each rank that are kept for a diagnosis."""


def start_codebooks(
    model: BrainToText,
    dtype: torch.dtype,
    materials: Materials,
    config: Config,
    ranks: Ranks,
    lengths: np.ndarray,
    stops: StopRequests,
) -> None:
    """Start the quantizer by k-means++ on latents of training trials. Collective.

    Args:
        model: whose quantizer has not started; left in training mode.
        dtype: of the engine's weights.
        materials: training trials and their augmentation.
        config: the seed, how many frames per code, whether to show progress.
        ranks: each encodes its share of the trials.
        lengths: time bins of each training trial, [rows].
        stops: requests to stop; a start that was cut off goes on with the next layer.

    Raises:
        Interrupted: on all ranks, where one was asked to stop.
        NoFiniteFrames: on all ranks; with the first trials of this one.
    """
    quantizer, section = model.quantizer, config.codebook_start
    assert quantizer is not None
    wanted = section.frames_per_code * quantizer.codebook_size
    trials = enough_trials(lengths // config.model.encoder.patch_stride, wanted, config.run.seed)
    model.eval()
    used: list[Batch] = []
    mine = trials[ranks.rank :: ranks.world]
    most = most_frames(lengths[trials], config.model.encoder.patch_stride, ranks.world)
    try:
        report = quantizer.initialize(
            stops.until_heard(_latents(model, dtype, materials, config, ranks, mine, used)),
            progress=ranks.is_main and config.log.progress and sys.stderr.isatty(),
            frames_per_code=(most * ranks.world + 0.5) / quantizer.codebook_size,
            between=stops.agree,
        )
    except NoFiniteFrames as problem:
        problem.batches = used
        raise
    finally:
        model.train()
    if report.nonfinite:
        logger(__name__).warning(
            "%s latent frames held NaN or infinity and were left out", f"{report.nonfinite:,}"
        )
    logger(__name__).info(
        "codebooks started by k-means++ on %s frames in %.1f s; codes found per layer: %s",
        f"{report.frames:,}",
        report.seconds,
        ", ".join(f"{found} of {quantizer.codebook_size}" for found in report.seeded),
    )


def why_not_started(
    model: BrainToText, problem: NoFiniteFrames, progress: Progress, ranks: Ranks
) -> Alert:
    """Diagnose codebooks that no latent frame can start. Collective."""
    finding = diagnose(
        model,
        problem.batches,
        lambda _, batch: model.latents(batch.signal, batch.signal_mask, batch.session),
        (),
        (),
        ranks,
    )
    return not_started_alert(finding, progress, str(problem))


def enough_trials(frames: np.ndarray, wanted: float, seed: int) -> np.ndarray:
    """Return trials in random order that hold at least ``wanted`` of their ``frames`` [rows]."""
    order = np.random.default_rng([seed, 0xC0DE]).permutation(len(frames))
    return order[: int(np.searchsorted(np.cumsum(frames[order]), wanted)) + 1]


def most_frames(lengths: np.ndarray, stride: int, world: int) -> int:
    """Return how many latent frames the rank brings, at most, that brings most.

    So many are taken of each: with few trials for many ranks a smaller share would cut what one
    brings, and the start would depend on how ranks share the trials.

    Args:
        lengths: time bins of the trials that are shared out in turn, [rows].
        stride: time bins from one latent frame to the next.
        world: number of ranks.
    """
    frames = lengths // stride + 1
    return max(int(frames[rank::world].sum()) for rank in range(world))


@torch.no_grad()
def _latents(
    model: BrainToText,
    dtype: torch.dtype,
    materials: Materials,
    config: Config,
    ranks: Ranks,
    trials: np.ndarray,
    used: list[Batch],
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield latents [1, P, D], masks [1, P] and identities [1, P] of the frames of trials.

    Trials are encoded one by one, so that their latents do not depend on what they are batched
    with, and the codebooks not on the number of ranks. ``used`` receives the first few.
    """
    rows = TrialRows(
        materials.train,
        None,
        materials.info.sessions,
        materials.augment,
        seed=config.run.seed,
        phase=len(config.phases),
    )
    for row in trials:
        batch = collate([rows.example(0, int(row))]).to(ranks.device, dtype)
        if len(used) < _KEPT:
            used.append(batch)
        latents, mask = model.latents(batch.signal, batch.signal_mask, batch.session)
        yield latents, mask, frame_ids(batch.row_ids, latents.shape[1])
