"""Phonemes as what the text decoder reads: spoken sounds instead of latent frames.

A sentence is some hundred frames but a few dozen phonemes, and its spelling can be learnt from
phonemes alone: of any text, without a recording of a brain.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from b2t.model.phoneme_head import NUM_CLASSES
from b2t.model.transformer import Transformer

BLANK = 0


class PhonemeMemory(nn.Module):
    """Embed phonemes, or what is heard in each frame, and let them see each other.

    Args:
        dim: width of the result.
        depth: transformer blocks, with rotary positions.
        heads: attention heads.
        dropout: dropout in attention output and feed-forward layers.
        errors: errors per phoneme that training adds, see `with_errors`; what the phoneme head
            says of trials that it was trained on has fewer than it makes on others.
        frames: read the posteriors of every frame instead of one mean for each phoneme.

    Attributes:
        room: places for heard phonemes; None, the usual, counts those of the longest trial.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        dropout: float,
        errors: float,
        frames: bool = False,
    ) -> None:
        super().__init__()
        self.errors = errors
        self.frames = frames
        self.room: int | None = None
        self.embed = nn.Linear(NUM_CLASSES, dim)
        self.transformer = Transformer(dim, depth, heads, 2.0, dropout)

    def of_logits(self, logits: Tensor, frame_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Read what the phoneme head says of signals.

        Args:
            logits: [B, P, 41].
            frame_mask: [B, P] bool, True = real.

        Returns:
            [B, N, dim] and its mask [B, N]; N is P where frames are read.
        """
        if not self.frames:
            return self(*soft_phonemes(logits, frame_mask, self.room))
        return self(logits.float().softmax(-1) * frame_mask[..., None], frame_mask)

    def of_labels(self, phonemes: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Read labels [B, N] int64 of so many phonemes [B], as if they had been heard."""
        said, mask = labelled_phonemes(phonemes, lengths)
        return self(*(as_frames(said, mask) if self.frames else (said, mask)))

    def forward(self, phonemes: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Read soft phonemes [B, N, 41] under a mask [B, N] → [B, N', dim] and [B, N']."""
        if self.training and self.errors:
            phonemes, mask = with_errors(phonemes, mask, self.errors)
        embedded = self.embed(phonemes.to(self.embed.weight.dtype))
        return self.transformer(embedded, mask), mask


def soft_phonemes(
    logits: Tensor, frame_mask: Tensor, room: int | None = None
) -> tuple[Tensor, Tensor]:
    """Collapse CTC logits as greedy decoding does, keeping how sure each phoneme is.

    A run of frames with one best class becomes one phoneme, the mean of its posteriors; runs of
    the blank are dropped. One host synchronisation, for the longest row, unless ``room`` is given.

    Args:
        logits: [B, P, 41].
        frame_mask: [B, P] bool, True = real; real frames follow each other.
        room: N; None is as many as the longest row has. P is enough for any row.

    Returns:
        Posteriors [B, N, 41] float32, zero under the mask, and the mask [B, N] bool; N ≥ 1.
    """
    posteriors = logits.float().softmax(-1)
    best = logits.argmax(-1)
    before = F.pad(best[:, :-1], (1, 0), value=-1)
    first = frame_mask & ~F.pad(frame_mask[:, :-1], (1, 0))
    begins = frame_mask & (best != BLANK) & ((best != before) | first)
    number = begins.cumsum(1) - 1
    count = number[:, -1] + 1
    room = max(int(count.max()), 1) if room is None else room
    places = torch.arange(room, device=logits.device)
    spoken = frame_mask & (best != BLANK)
    # A product instead of scattered sums: the same on every device and run.
    belongs = ((number[..., None] == places) & spoken[..., None]).float()
    sums = belongs.transpose(1, 2) @ posteriors
    mask = places < count[:, None]
    return sums / belongs.sum(1)[..., None].clamp(min=1.0), mask


def labelled_phonemes(phonemes: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Labels [B, N] int64 of so many phonemes [B] as certain ones: [B, N, 41] and [B, N]."""
    if phonemes.shape[1] == 0:
        phonemes = phonemes.new_zeros((len(phonemes), 1))
    mask = torch.arange(phonemes.shape[1], device=phonemes.device) < lengths[:, None]
    return F.one_hot(phonemes * mask, NUM_CLASSES).float() * mask[..., None], mask


def as_frames(phonemes: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Lay phonemes on frames as a CTC head does: one or two for each, at times a blank behind it.

    Args:
        phonemes: [B, N, 41].
        mask: [B, N] bool, True = real.

    Returns:
        Posteriors [B, P, 41] and their mask [B, P], P = 3 N; between 1 and 3 frames a phoneme.
    """
    rows, length, classes = phonemes.shape
    twice, silent, sure, rest = torch.rand(4, rows, length, device=phonemes.device).unbind(0)
    blank = F.one_hot(phonemes.new_full((), BLANK, dtype=torch.int64), classes).to(phonemes.dtype)

    def mixed(share: Tensor) -> Tensor:
        share = share[..., None].to(phonemes.dtype)
        return share * phonemes + (1 - share) * blank

    slots = torch.stack((mixed(0.5 + sure / 2), mixed(0.5 + rest / 2), mixed(rest / 5)), dim=2)
    used = torch.stack((mask, mask & (twice < 0.25), mask & (silent < 0.35)), dim=2)
    return _together(slots.flatten(1, 2), used.flatten(1, 2))


def _together(slots: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """Move the used ones of slots [B, S, 41] to the front, in their order, and zero the others."""
    order = (~used).to(torch.uint8).argsort(dim=1, stable=True)
    used = used.gather(1, order)
    slots = slots.gather(1, order[..., None].expand_as(slots))
    return slots * used[..., None], used


def with_errors(phonemes: Tensor, mask: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """Mishear phonemes.

    Half of the errors mix one with another, a quarter drop one, a quarter add one.

    Args:
        phonemes: [B, N, 41].
        mask: [B, N] bool, True = real.
        rate: errors per phoneme.

    Returns:
        Phonemes [B, N', 41] and their mask [B, N'], with room for the additions.
    """
    rows, length, classes = phonemes.shape
    device = phonemes.device
    draw, share, add = torch.rand(3, rows, length, device=device).unbind(0)
    others = torch.randint(1, classes, (2, rows, length), device=device)
    replaced, added = F.one_hot(others, classes).to(phonemes.dtype).unbind(0)
    replace = ((draw < rate / 2) * share)[..., None].to(phonemes.dtype)
    phonemes = (1 - replace) * phonemes + replace * replaced
    keep = mask & (draw < 1 - rate / 4)
    # Every phoneme has a place behind it for one that was not said; kept places move together.
    slots = torch.stack((phonemes, added), dim=2).flatten(1, 2)
    used = torch.stack((keep, mask & (add < rate / 4)), dim=2).flatten(1, 2)
    order = (~used).to(torch.uint8).argsort(dim=1, stable=True)
    order = order[:, : length + math.ceil(rate * length / 2) + 2]
    used = used.gather(1, order)
    slots = slots.gather(1, order[..., None].expand(-1, -1, classes))
    return slots * used[..., None], used
