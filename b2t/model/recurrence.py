"""Encoder body of gated recurrent layers: the field's decoder, in b2t's trainer."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Recurrence(nn.Module):
    """Gated recurrent layers, forward or both ways, each row read over its real frames alone.

    Source: the decoder of Card et al. 2024 (NEJM) and of the Brain-to-Text '25 baseline, which has
    five forward layers and a learnt first state.

    Args:
        dim: latent width D.
        depth: layers.
        bidirectional: read both ways, D/2 units each.
        dropout: between layers.

    Attributes:
        checkpoint_every: recompute the activations of every n-th layer in backward; 0 keeps all.
    """

    def __init__(self, dim: int, depth: int, bidirectional: bool, dropout: float) -> None:
        super().__init__()
        if bidirectional and dim % 2:
            raise ValueError(f"dim {dim} must be even to be read both ways")
        self.checkpoint_every = 0
        self.ways = 2 if bidirectional else 1
        units = dim // self.ways
        self.layers = nn.ModuleList(
            nn.GRU(dim, units, batch_first=True) for _ in range(depth * self.ways)
        )
        self.first_state = nn.Parameter(torch.empty(depth * self.ways, 1, units))
        nn.init.xavier_uniform_(self.first_state)
        for name, weight in self.layers.named_parameters():
            if "weight_hh" in name:
                nn.init.orthogonal_(weight)
            elif "weight_ih" in name:
                nn.init.xavier_uniform_(weight)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Refine real frames and zero the others.

        Args:
            x: frames [B, P, D].
            mask: [B, P] bool, True = real. What stands under False changes nothing else.

        Returns:
            [B, P, D], zero under the mask.
        """
        # Real frames first, so that no state passes through others.
        ahead = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
        restore = ahead.argsort(dim=1)
        x = _take(x, ahead)
        lengths = mask.sum(1, keepdim=True)
        place = torch.arange(x.shape[1], device=x.device)[None]
        # Turns the real frames around and leaves the others where they are; its own inverse.
        turn = torch.where(place < lengths, lengths - 1 - place, place)
        for first in range(0, len(self.layers), self.ways):
            every, index = self.checkpoint_every, first // self.ways
            if self.training and every and index % every == 0:
                x = checkpoint(self._layer, x, turn, first, use_reentrant=False)
            else:
                x = self._layer(x, turn, first)
            if first + self.ways < len(self.layers):
                x = self.dropout(x)
        return self.norm(_take(x, restore)).masked_fill(~mask[..., None], 0.0)

    def start(self) -> list[Tensor]:
        """Return the state before the first frame of a stack that reads forward, per layer."""
        return [state[None].contiguous() for state in self.first_state]

    def advance(self, x: Tensor, state: list[Tensor]) -> Tensor:
        """Refine frames x [1, n, D] that follow those in `state`, which takes them in."""
        for index, layer in enumerate(self.layers):
            x, state[index] = layer(x, state[index].to(x.dtype))
        return self.norm(x)

    def _layer(self, x: Tensor, turn: Tensor, first: int) -> Tensor:
        read = [self._read(x, first)]
        if self.ways == 2:
            read.append(_take(self._read(_take(x, turn), first + 1), turn))
        return torch.cat(read, dim=-1)

    def _read(self, x: Tensor, index: int) -> Tensor:
        state = self.first_state[index].expand(x.shape[0], -1)[None].contiguous()
        # cuDNN goes backward in training mode alone, also through a frozen encoder; these layers
        # have no dropout that would tell.
        layer = self.layers[index].train(torch.is_grad_enabled())
        return layer(x, state.to(x.dtype))[0]


def _take(x: Tensor, order: Tensor) -> Tensor:
    """Frames of x [B, P, D] in the order [B, P] of each row."""
    return x[torch.arange(len(x), device=x.device)[:, None], order]
