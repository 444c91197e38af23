"""The residual walk: each layer assigns a code to what the layers before it left over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import b2t_kernels
from b2t.quantize import search


class Walk(NamedTuple):
    """Result of a walk of N frames through the first layers of Q.

    Args:
        codes: [N, Q] int64, −1 in layers not walked.
        errors: [N, D], sum over layers of the residual that each leaves.
        counts: [Q, K] int64.
        squared_error: [Q], Σ‖residual left‖² of each layer.
        code_error: [Q], the same between what the search compared (unit vectors under cosine).
        projection: [Q], Σ residual · code (cosine similarity only).
        sums: [L, K, D], what the search saw summed by code, or None.
        residuals: [Q, R, D], residuals before each layer of the frames asked for, or None.
        layers: how many were walked.
        usages: what was found of the soft assignments of each layer, where asked for, or None.
    """

    codes: Tensor
    errors: Tensor
    counts: Tensor
    squared_error: Tensor
    code_error: Tensor
    projection: Tensor
    sums: Tensor | None
    residuals: Tensor | None
    layers: int
    usages: list[b2t_kernels.SearchedUsage] | None = None


@dataclass(frozen=True)
class Layers:
    """The codebooks as one forward pass sees them.

    Args:
        books: [L, K, D] float32, L = Q or 1 where the layers share one; may carry a gradient.
        gain: [L] length of the codes under cosine similarity.
        distance: [L] running mean squared distance of a frame to its code.
        quantizers: Q.
        temperature: τ, dimensionless.
        cosine: compare directions.
        backend: see `b2t.quantize.search`.
        joint: sums are those of what all layers together leave, see `walk`.
    """

    books: Tensor
    gain: Tensor
    distance: Tensor
    quantizers: int
    temperature: float
    cosine: bool
    backend: str
    joint: bool = False

    def index(self, q: int) -> int:
        """Codebook of layer ``q``."""
        return q if self.books.shape[0] > 1 else 0

    def seen(self, residual: Tensor) -> Tensor:
        """A residual [N, D] as the search sees it."""
        return F.normalize(residual, dim=-1) if self.cosine else residual

    def gain_of(self, q: int) -> Tensor | None:
        """Length [] of the codes of layer ``q``, where they are unit vectors."""
        return self.gain[self.index(q)] if self.cosine else None

    def chosen(self, codes: Tensor, q: int) -> Tensor:
        """What layer ``q`` adds for ``codes`` [N]: [N, D], without gradient; nothing for −1."""
        one = slice(self.index(q), self.index(q) + 1)
        gain = self.gain[one] if self.cosine else None
        return b2t_kernels.sum_codes(self.books[one].detach(), codes[:, None], gain)

    @cached_property
    def prepared(self) -> list[Sequence[Tensor]]:
        """The codebooks as the kernels take them: made once for all calls of this pass.

        For passes only, during which no codebook changes.
        """
        if self.backend == "reference":
            return [()] * self.books.shape[0]
        return list(b2t_kernels.prepare_codes(self.books))

    def vectors(self, q: int) -> Tensor:
        """What the codes of layer ``q`` add: [K, D], without gradient."""
        layer = self.index(q)
        book = self.books[layer].detach()
        return book * self.gain[layer] if self.cosine else book

    def assign(
        self,
        residual: Tensor,
        q: int,
        hashes: Tensor | None = None,
        prepared: Sequence[Tensor] = (),
    ) -> tuple[Tensor, Tensor]:
        """Codes [N] and counts [K] of layer ``q``; drawn with ``hashes`` if given, else nearest.

        ``prepared`` is the layer's entry of `prepared`, where no code has changed since.
        """
        book = self.books[self.index(q)].detach()
        if hashes is None:
            return search.nearest(self.seen(residual), book, self.backend, prepared)
        return search.sample(
            self.seen(residual), book, self.width(q), hashes, q, self.backend, prepared
        )

    def searched_usage(self, residual: Tensor, q: int) -> b2t_kernels.SearchedUsage:
        """Nearest codes of layer ``q`` and its soft assignments, from the same distances."""
        book, prepared = self.books[self.index(q)].detach(), self.prepared[self.index(q)]
        return search.nearest_and_usage(self.seen(residual), book, self.width(q), prepared)

    @cached_property
    def widths(self) -> Tensor:
        """τ times the mean squared distance of each codebook: [L], never read by the host.

        For passes only, as `prepared`.
        """
        books = self.books.detach()
        # Between unit vectors ‖r̂−ĉ‖² = 2 − 2·cos, and the gain is the mean of |r|·cos ≤ cos.
        mean = 2.0 - 2.0 * self.gain.clamp(max=0.999) if self.cosine else self.distance
        # A codebook that never saw a frame has its own spread for a scale, and one that fits its
        # frames perfectly keeps a finite width.
        spread = 2.0 * books.var(dim=1, correction=0).sum(dim=1)
        floor = torch.where(mean > 0, 1e-6 * spread, spread).clamp(min=1e-20)
        return torch.maximum(mean, floor) * self.temperature

    def width(self, q: int) -> Tensor:
        """That of layer ``q``: []."""
        return self.widths[self.index(q)]

    @torch.no_grad()
    def walk(
        self,
        latents: Tensor,
        layers: int | None = None,
        hashes: Tensor | None = None,
        sums: bool = False,
        keep: Tensor | None = None,
        codes: Tensor | None = None,
        soft: bool = False,
    ) -> Walk:
        """Walk ``latents`` [N, D] through the first ``layers`` layers (all by default).

        Args:
            latents: finite float32.
            layers: how many.
            hashes: [N], draw codes with them instead of taking the nearest.
            sums: also sum by code what codes should move to: the residual that each layer saw, or
                (`joint`) the code plus what the last layer leaves of the frame.
            keep: [R] rows whose residuals are wanted.
            codes: [N, layers], found elsewhere, to follow instead of searching.
            soft: `soft_sums` will be called: find both in one pass where nearest codes are taken.
        """
        Q, K = self.quantizers, self.books.shape[1]
        layers = Q if layers is None else layers
        given, chosen, numbers, left = codes, [], [], []
        code_error, projection = latents.new_zeros(2, Q).unbind()
        totals = torch.zeros_like(self.books.detach()) if sums else None
        kept = None if keep is None else latents.new_zeros(Q, keep.shape[0], latents.shape[1])
        residual = latents.clone()
        errors = residual if layers == 1 else torch.zeros_like(latents)
        fused = soft and given is None and hashes is None and self.backend == "kernels"
        usages: list[b2t_kernels.SearchedUsage] | None = [] if fused else None
        for q in range(layers):
            if kept is not None:
                kept[q] = residual[keep]
            index, number = self._codes_of(residual, q, given, hashes, usages)
            chosen.append(index)
            numbers.append(number)
            if totals is not None and not self.joint:
                seen = self.seen(residual)
                found = search.code_sums(seen, index, K, self.backend, number)
                totals[self.index(q)].add_(found)
            if self.cosine:
                unit = self.books[self.index(q)].detach()[index]
                projection[q] = (residual * unit).sum()
                code_error[q] = (self.seen(residual) - unit).square().sum()
            left.append(b2t_kernels.leave(
                residual, self.books[self.index(q)].detach(), index, self.gain_of(q),
                errors if layers > 1 else None,
            ))  # fmt: skip
        codes = _together(chosen, Q, -1, axis=1)
        counts, squared = _together(numbers, Q, 0), _together(left, Q, 0)
        if not self.cosine:
            code_error = squared
        if totals is not None and self.joint:
            self._add_joint_sums(totals, residual, codes[:, :layers], counts)
        return Walk(
            codes, errors, counts, squared, code_error, projection, totals, kept, layers,
            usages,
        )  # fmt: skip

    def _codes_of(
        self,
        residual: Tensor,
        q: int,
        given: Tensor | None,
        hashes: Tensor | None,
        usages: list[b2t_kernels.SearchedUsage] | None,
    ) -> tuple[Tensor, Tensor]:
        """Codes [N] and counts [K] of layer ``q``: given, drawn, or the nearest.

        The soft assignments found with the nearest are appended to ``usages``, if that is a list.
        """
        if given is not None:
            # Not bincount, which reads the largest from the device.
            ones = torch.ones_like(given[:, q])
            counts = ones.new_zeros(self.books.shape[1]).index_add_(0, given[:, q], ones)
            return given[:, q], counts
        if usages is None:
            return self.assign(residual, q, hashes, self.prepared[self.index(q)])
        usages.append(self.searched_usage(residual, q))
        return usages[q].indices, usages[q].counts

    def _add_joint_sums(self, totals: Tensor, left: Tensor, codes: Tensor, counts: Tensor) -> None:
        """Add Σ (code + what is ``left`` [N, D] of its frame) of each code to ``totals``."""
        K = self.books.shape[1]
        for q in range(codes.shape[1]):
            layer = self.index(q)
            totals[layer] += search.code_sums(left, codes[:, q], K, self.backend, counts[q])
            totals[layer] += counts[q, :, None] * self.books[layer].detach()

    def sum_codes(self, codes: Tensor) -> Tensor:
        """Σ of the chosen codes [N, D], added in the order of the layers; −1 adds nothing."""
        gain = self.gain if self.cosine else None
        return b2t_kernels.sum_codes(self.books.detach(), codes, gain)

    def soft_sums(self, latents: Tensor, walk: Walk) -> Tensor:
        """Soft assignments of each layer summed over the frames of ``walk``: [Q, K].

        Differentiable in ``latents`` [N, D] and the codebooks; the codes chosen before a layer are
        constants. Layers not walked are zero.
        """
        sums = []
        residual = latents
        for q in range(walk.layers):
            layer = self.index(q)
            if q > 0:
                residual = residual - self.chosen(walk.codes[:, q - 1], q - 1)
            book, width, prepared = self.books[layer], self.width(q), self.prepared[layer]
            seen = self.seen(residual)
            if walk.usages is not None:
                found = walk.usages[q]
                sums.append(b2t_kernels.known_usage(seen, book, width, found, prepared))
            else:
                sums.append(search.soft_usage(seen, book, width, self.backend, prepared))
        sums += [torch.zeros_like(sums[0])] * (self.quantizers - walk.layers)
        return torch.stack(sums)


def _together(parts: list[Tensor], layers: int, empty: int, axis: int = 0) -> Tensor:
    """What each walked layer found beside one another, ``empty`` for those not walked."""
    missing = [torch.full_like(parts[0], empty)] * (layers - len(parts))
    return torch.stack([*parts, *missing], axis)
