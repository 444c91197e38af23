"""What a launcher, or a batch script in its place, says of the ranks in the environment."""

import os

from b2t.errors import UserError

_LEAST = {
    "RANK": 0,
    "LOCAL_RANK": 0,
    "WORLD_SIZE": 1,
    "LOCAL_WORLD_SIZE": 1,
    "LOCAL_SIZE": 1,
    "MASTER_PORT": 1,
    "B2T_THREADS": 1,
}
"""Variables that are whole numbers, and the least of each."""

_TOGETHER = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What goes with RANK."""

_REMEDY = (
    "deepspeed, torchrun and accelerate launch set it: leave it to them, or correct the script "
    "that does"
)


def check_numbers() -> None:
    """Look at the numbers that are there.

    Raises:
        UserError: one of them is none, or a rank lies beyond the number of ranks.
    """
    found = {}
    for name, least in _LEAST.items():
        text = os.environ.get(name)
        if text is None:
            continue
        if not (text.isascii() and text.isdigit() and int(text) >= least):
            raise UserError(
                f"the environment says {name}={text}: expected a whole number from {least}; "
                f"{_REMEDY}"
            )
        found[name] = int(text)
    if "RANK" in found and found["RANK"] >= found.get("WORLD_SIZE", found["RANK"] + 1):
        raise UserError(
            f"the environment says RANK={found['RANK']} of WORLD_SIZE={found['WORLD_SIZE']}: "
            f"ranks count from 0; {_REMEDY}"
        )


def check_complete() -> None:
    """Look for what a rank needs to find the others.

    Raises:
        UserError: some of it is missing.
    """
    missing = [name for name in _TOGETHER if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"the environment says RANK={os.environ['RANK']}, but not {', '.join(missing)}: "
            f"{_REMEDY}; without RANK one rank trains alone"
        )
