"""Whether a metric rises or falls within a window."""

import torch
from torch import Tensor


def slopes(course: Tensor) -> Tensor:
    """Least-squares slopes of the columns of [n, m] per 1,000 rows: [m] float64, on the CPU.

    NaN below 3 rows. A column with NaN leaves the others alone, which a joint fit would not.
    """
    course = course.cpu().double()
    if len(course) < 3:
        return torch.full((course.shape[1],), torch.nan, dtype=torch.float64)
    time = torch.arange(len(course), dtype=torch.float64)
    time = time - time.mean()
    return 1000 * (time @ course) / (time @ time)
