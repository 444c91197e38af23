"""What a trial length costs that a GPU has not met before: attention's plans, and augmentation's.

    python scripts/time_new_lengths.py     # ten seconds, most of them imports

Milliseconds for lengths never met and for the same ones again: attention of a padded batch forward
and backward, with cuDNN's among the choices and without; `Batch.to` of eight trials of 512
channels, with frequency masks and without. On a CPU the second part alone.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from b2t.data.augment import Augment
from b2t.data.batches import Batch, collate
from b2t.data.batches.batch import Example

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def milliseconds(work: Callable[[], object]) -> float:
    """Until the device has done the work."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began)


def attend(length: int) -> None:
    """Attention of eight rows of ``length`` frames and its gradient, in fp16 with a mask."""
    x = torch.randn(8, 4, length, 32, device=DEVICE, dtype=torch.float16, requires_grad=True)
    mask = torch.ones(8, 1, 1, length, dtype=torch.bool, device=DEVICE)
    F.scaled_dot_product_attention(x, x, x, attn_mask=mask).sum().backward()


def batch_of(seed: int, augment: Augment) -> Batch:
    """Eight trials of noise of 300 to 1,500 bins."""
    generator, rows = np.random.default_rng(seed), []
    for place in range(8):
        shape = (int(generator.integers(300, 1500)), 512)
        signal = generator.standard_normal(shape).astype(np.float32)
        draws = augment.draw(shape, 50.0, generator)
        rows.append(
            Example(
                signal, signal, draws.mask(), 0, np.zeros(1, np.int64), np.zeros(0, np.int64),
                f"{seed}/{place}/0", None, None, draws, augment, True,
            )
        )  # fmt: skip
    batch = collate(rows)
    return batch.pin_memory() if DEVICE == "cuda" else batch


def tell(what: str, times: Callable[[], list[float]]) -> None:
    """Print median and greatest of the first and of the second time."""
    for when in ("never met", "met before"):
        found = times()
        print(f"{what:28} {when:10} {statistics.median(found):9.2f} {max(found):9.2f} ms")


def main() -> int:
    print(f"{DEVICE}: median and greatest")
    if DEVICE == "cuda":
        for cudnn in (True, False):
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
            attend(100)
            tell(
                f"attention, cuDNN {'allowed' if cudnn else 'left out'}",
                lambda: [milliseconds(lambda n=n: attend(n)) for n in range(101, 109)],
            )
    for masks in (0, 1):
        augment = Augment(frequency_masks=masks)
        batches = [batch_of(seed, augment) for seed in range(8)]
        batches[0].to(DEVICE)
        tell(
            f"a batch, {masks} frequency masks",
            lambda few=batches[1:]: [milliseconds(lambda b=b: b.to(DEVICE)) for b in few],
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
