"""What an applied optimizer step does to the codebooks: averages, codes, revival."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from b2t.quantize.codebook import Codebooks
from b2t.quantize.options import QuantizerOptions
from b2t.quantize.pending import PendingStats
from b2t.quantize.revival import revive_layer
from b2t.quantize.statistics import FramePool, UpdateReport


def pool_size(options: QuantizerOptions) -> int:
    """Frames that a revival draws new codes from."""
    return max(256, int(options.revival_max_share * options.codebook_size))


def revives_next(books: Codebooks, options: QuantizerOptions) -> bool:
    """Whether the coming update is one that revives; equal on all ranks."""
    return (
        options.revival is not None
        and float(books.progress) + 1e-6 < options.revival_until
        and (int(books.updates) + 1) % options.revival_every == 0
    )


@torch.no_grad()
def update_codebooks(
    books: Codebooks,
    options: QuantizerOptions,
    pending: PendingStats,
    *,
    revive: bool,
    group: ProcessGroup | None = None,
) -> UpdateReport:
    """Move averages and codes, then revive; the state is the same on all ranks afterwards.

    Args:
        books: changed in place.
        options: of the quantizer.
        pending: statistics on their way, of a forward in training mode.
        revive: whether this update revives (see `revives_next`).
        group: ranks of the global batch.
    """
    pool, stats = pending.local.pool, pending.wait()
    cosine = options.use_cosine_sim
    books.pull()
    counts = stats.counts.sum(0, keepdim=True) if options.shared_codebook else stats.counts
    sums = stats.sums if options.update_rule == "ema" else None
    books.move_averages(counts, sums, options.averaging_decay, options.eps, cosine)
    books.move_scales(stats, options.averaging_decay, cosine)
    if sums is None and cosine:
        books.embed.copy_(F.normalize(books.embed, dim=-1))
        books.push()
    revived = [0] * options.num_quantizers
    if revive:
        revived = _revive(books, options, pool, group)
    books.updates += 1
    return UpdateReport(True, stats.frames, revived, stats.nonfinite, stats.counts)


def _revive(
    books: Codebooks,
    options: QuantizerOptions,
    pool: FramePool | None,
    group: ProcessGroup | None,
) -> list[int]:
    layers = list(range(options.num_quantizers))
    revived = [0] * len(layers)
    floor = options.revival_threshold * books.ema_count.mean(1, keepdim=True)
    # The averages are equal on all ranks, so all of them take the same way here.
    if options.revival is None or not bool((books.ema_count < floor).any()):
        return revived
    pool = (pool or _no_pool(books, options)).gathered(group)
    for layer in range(books.embed.shape[0]):
        revived[layer] = revive_layer(
            books,
            layer,
            pool,
            pool_layers=layers if options.shared_codebook else [layer],
            mode=options.revival,
            threshold=options.revival_threshold,
            max_share=options.revival_max_share,
            cosine=options.use_cosine_sim,
        )
    if any(revived):
        books.push()
    return revived


def _no_pool(books: Codebooks, options: QuantizerOptions) -> FramePool:
    Q, D = options.num_quantizers, books.embed.shape[2]
    nothing: Tensor = torch.zeros(0, dtype=torch.int64, device=books.embed.device)
    return FramePool(
        nothing,
        books.embed.new_zeros(Q, 0, D),
        nothing.new_zeros(Q, 0),
        pool_size(options),
    )
