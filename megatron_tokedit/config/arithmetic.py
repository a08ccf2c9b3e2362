"""What to suggest when a size does not divide another."""

from __future__ import annotations


def near_multiples(value: int, unit: int) -> str:
    """``try 24 or 32``: the multiples of ``unit`` around ``value``."""
    lower = value // unit * unit
    return f"try {lower} or {lower + unit}" if lower else f"try {unit}"


def divisors(value: int) -> str:
    """``sizes that do: 1, 2, 4``, at most the first eight."""
    divisors = [size for size in range(1, min(value, 128) + 1) if value % size == 0][:8]
    return f"sizes that do: {', '.join(map(str, divisors))}"
