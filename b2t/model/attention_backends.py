"""Which of torch's attentions a process may take on a GPU."""

import torch


def without_plans_per_length() -> None:
    """Leave cuDNN's attention out, which torch prefers on H100.

    It plans anew for every shape, and padded batches keep bringing new lengths: seconds a step for
    a model whose step takes milliseconds. Nor has it a deterministic backward.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
