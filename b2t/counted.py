"""Counts in messages: 1 trial, 2 trials."""


def counted(number: int, unit: str) -> str:
    """Return a number and its unit in English, whose plural ends in s: `1,200 trials`."""
    return f"{number:,} {unit}" if number == 1 else f"{number:,} {unit}s"
