"""Which frames of a padded batch count, and the way back to its layout."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from b2t.quantize.frame_hash import frame_hash, identity_hash


class ValidFrames(NamedTuple):
    """The N of B·P frames that are real and finite.

    Args:
        rows: [N] int64, their places in the flattened batch.
        shape: leading axes of the batch, (B, P).
    """

    rows: Tensor
    shape: tuple[int, ...]

    @property
    def whole(self) -> bool:
        """Whether every frame of the batch counts."""
        return self.rows.shape[0] == self._places

    @property
    def _places(self) -> int:
        return torch.Size(self.shape).numel()

    def taken(self, flat: Tensor) -> Tensor:
        """Those frames of ``flat`` [B·P, …]: [N, …]."""
        return flat if self.whole else flat.index_select(0, self.rows)

    def scattered(self, values: Tensor, fill: float) -> Tensor:
        """``values`` [N, W] laid out as [B, P, W], ``fill`` at the frames that do not count."""
        shape = (*self.shape, values.shape[1])
        if self.whole:
            return values.view(shape)
        flat = values.new_full((self._places, values.shape[1]), fill)
        return flat.index_copy(0, self.rows, values).view(shape)

    def mask(self, device: torch.device) -> Tensor:
        """True at the frames that count: [B, P, 1] bool."""
        real = torch.zeros(self._places, dtype=torch.bool, device=device)
        real[self.rows] = True
        return real.view(*self.shape, 1)


def finite_rows(x: Tensor) -> Tensor:
    """Rows of ``x`` [N, D] without NaN or infinity, [N] bool, without a temporary of its size."""
    x = x.detach()
    # A row with NaN has NaN for both, which is above and below nothing.
    return (x.amin(1) > -torch.inf) & (x.amax(1) < torch.inf)


def frame_numbers(
    latents: Tensor, frames: ValidFrames, ids: Tensor | None, seed: int, step: int
) -> Tensor:
    """Random number of each frame, [N] int64: of what it is, else of its values.

    Args:
        latents: [N, D].
        frames: where they stand.
        ids: [B, P] int64, what each frame is (`b2t.quantize.frame_hash.frame_ids`), or None.
        seed: of the quantizer.
        step: updates so far.
    """
    if ids is None:
        return frame_hash(latents.detach(), seed, step)
    return identity_hash(frames.taken(ids.reshape(-1)), seed, step)


def require_codes(codes: Tensor, quantizers: int, codebook_size: int) -> None:
    """Refuse codes [B, P, q] that no quantizer of these sizes gives.

    Raises:
        ValueError: codes outside [−1, K) or more than Q layers.
    """
    if codes.shape[-1] > quantizers:
        raise ValueError(f"{codes.shape[-1]} layers of codes, at most {quantizers}")
    if codes.numel() and not (int(codes.min()) >= -1 and int(codes.max()) < codebook_size):
        raise ValueError(
            f"codes span {int(codes.min())} to {int(codes.max())}, expected −1 to "
            f"{codebook_size - 1}"
        )


class FrameSpace(nn.Module):
    """The way from latents in a batch's layout to the frames that are quantized, and back.

    Args:
        dim: width of the latents.
        codebook_dim: width D of a code; other than ``dim`` adds a projection on either side.
        unit: frames are normalized to unit length.
    """

    def __init__(self, dim: int, codebook_dim: int, *, unit: bool) -> None:
        super().__init__()
        self.dim, self.codebook_dim, self.unit = dim, codebook_dim, unit
        projects = codebook_dim != dim
        self.project_in = nn.Linear(dim, codebook_dim) if projects else nn.Identity()
        self.project_out = nn.Linear(codebook_dim, dim) if projects else nn.Identity()

    def valid_latents(
        self, x: Tensor, mask: Tensor | None, count: int | None = None, finite: bool = False
    ) -> tuple[ValidFrames, Tensor, Tensor]:
        """Frames that count, their latents [N, D] float32, how many real ones held NaN.

        Args:
            x: [B, P, dim] (any leading axes).
            mask: [B, P] bool, True = real; None is all real.
            count: how many are real, where the caller knows; without a mask everybody does. The
                host then reads from the device once, that all of them are finite, and not where
                they stand as well.
            finite: the caller knows that all real frames are finite: nothing is read.

        Raises:
            ValueError: shapes that do not fit, or a mask whose count ``finite`` needs.
        """
        if x.shape[-1] != self.dim:
            raise ValueError(f"latents have width {x.shape[-1]}, the quantizer expects {self.dim}")
        flat, shape = x.reshape(-1, self.dim), tuple(x.shape[:-1])
        if mask is not None and mask.shape != x.shape[:-1]:
            raise ValueError(f"mask {tuple(mask.shape)} does not fit x {tuple(x.shape)}")
        rows: Tensor | None
        if mask is None:
            real = torch.ones(len(flat), dtype=torch.bool, device=x.device)
            rows = torch.arange(len(flat), device=x.device)
        else:
            real = mask.reshape(-1).bool()
            rows = None if count is None else torch.nonzero_static(real, size=count)[:, 0]
        if finite and rows is None:
            raise ValueError("finite frames under a mask: say how many there are (count)")
        if rows is not None:
            frames = ValidFrames(rows, shape)
            latents = self._project(frames.taken(flat))
            # A projection passes on what is not finite: even no weight times infinity is NaN.
            if finite or bool(finite_rows(latents).all()):
                return frames, latents, torch.zeros((), dtype=torch.int64, device=x.device)
        keep = finite_rows(flat)
        frames = ValidFrames((keep & real).nonzero()[:, 0], shape)
        latents = self._project(frames.taken(flat))
        if isinstance(self.project_in, nn.Linear):
            kept = finite_rows(latents)
            if not bool(kept.all()):
                frames, latents = frames._replace(rows=frames.rows[kept]), latents[kept]
        return frames, latents, real.sum() - frames.rows.shape[0]

    def _project(self, flat: Tensor) -> Tensor:
        if isinstance(self.project_in, nn.Linear):
            flat = self.project_in(flat.to(self.project_in.weight.dtype))
        latents = flat.float()
        return F.normalize(latents, dim=-1) if self.unit else latents

    def laid_out(self, z: Tensor, frames: ValidFrames, dtype: torch.dtype) -> Tensor:
        """Project [N, D] back and lay it out as [B, P, dim], zero where no frame counts."""
        return self.project_back(frames.scattered(z, 0.0), frames, dtype)

    def project_back(self, z: Tensor, frames: ValidFrames, dtype: torch.dtype) -> Tensor:
        """Project [B, P, D] back to [B, P, dim], zero where no frame counts."""
        if not isinstance(self.project_out, nn.Linear):
            return z.to(dtype)
        out = self.project_out(z.to(self.project_out.weight.dtype)).to(dtype)
        return torch.where(frames.mask(z.device), out, 0.0)
