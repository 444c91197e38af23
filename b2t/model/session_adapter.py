"""Per-session affine map of the channels."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from b2t.model.options import AdapterOptions


class SessionAdapter(nn.Module):
    """Give every session its own affine map of the C channels, the identity at the start.

    A session that was not trained on (index −1) uses the mean of the maps of all sessions. With
    `softsign` and `dropout` this is the day layer of Card et al. 2024 (doi 10.1056/NEJMoa2314132).

    Args:
        channels: C.
        sessions: number of trained sessions S; 0 is one shared map.
        options: softsign and dropout of the result; None: the defaults.

    Attributes:
        weight: parameter [S, C, C]; the result is x @ weight + bias.
        bias: parameter [S, C].
    """

    def __init__(self, channels: int, sessions: int, options: AdapterOptions | None = None) -> None:
        super().__init__()
        options = options or AdapterOptions()
        self.softsign = options.softsign
        self.dropout = nn.Dropout(options.dropout)
        self.weight = nn.Parameter(torch.eye(channels).repeat(max(sessions, 1), 1, 1))
        self.bias = nn.Parameter(torch.zeros(max(sessions, 1), channels))

    def forward(self, signal: Tensor, session: Tensor) -> Tensor:
        """Map a batch.

        Args:
            signal: [B, T, C].
            session: [B] int64, −1 = unseen.

        Returns:
            [B, T, C].
        """
        known = session.clamp(min=0)
        unseen = session < 0
        weight = torch.where(unseen[:, None, None], self.weight.mean(0), self.weight[known])
        bias = torch.where(unseen[:, None], self.bias.mean(0), self.bias[known])
        adapted = torch.baddbmm(bias[:, None, :], signal, weight)
        return self.dropout(F.softsign(adapted) if self.softsign else adapted)
