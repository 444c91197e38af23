"""Numbers on the command line, within bounds that make sense; argparse names the option."""

import argparse
import math


def seed(text: str) -> int:
    """Read the seed of a random generator, a whole number from 0."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, found {text}")
    return value


def seconds(text: str) -> float:
    """Read a time above 0, at most a day."""
    value = float(text)
    if not 0 < value <= 86_400:
        raise argparse.ArgumentTypeError(f"expected seconds above 0, at most 86400, found {text}")
    return value


def finite(text: str) -> float:
    """Read a number that is neither NaN nor infinite."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, found {text}")
    return value
