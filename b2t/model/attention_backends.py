"""Which of torch's attentions a process may take on a GPU."""

import torch


def without_plans_per_length() -> None:
    """Leave cuDNN's attention out, which torch prefers on H100.

    It plans anew for every shape, and padded batches keep bringing new lengths: 0.1 to 1.8 s for
    each on an H100, where the others take 0.3 to 0.6 ms. Nor has it a deterministic backward.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
