"""Directed rounding: the few scalar operations from which every bound is composed, each rounded towards infinity.

Python's floats round to nearest, so one step with `nextafter` after an operation gives a bound of its exact result.
Tensor operations in float64 are covered by `gamma(n)`: a sum of n products, in any order and with or without fused
operations, is off by at most gamma(n) times the sum of the absolute products (Higham 2002, section 3.1).
"""

import math

import torch
from torch import Tensor

# Unit roundoffs, and what an operation may lose to underflow where denormal numbers are flushed to zero.
UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
UNDERFLOW = {torch.float32: 2.0**-126, torch.float64: 2.0**-1022}


def up(value: float) -> float:
    """The next number towards infinity: a bound of the exact result of one operation."""
    return math.nextafter(value, math.inf)


def down(value: float) -> float:
    """The next number towards minus infinity."""
    return math.nextafter(value, -math.inf)


def add_up(*terms: float) -> float:
    """Bound a sum of any numbers."""
    try:
        return up(math.fsum(terms)) if all(map(math.isfinite, terms)) else math.inf
    except OverflowError:
        return math.inf


def mul_up(*factors: float) -> float:
    """Bound a product of non-negative numbers.

    Example:
        >>> mul_up(0.1, 0.2) > 0.02 > mul_up()
        False
        >>> mul_up(3.0, 0.0, math.inf), mul_up()
        (0.0, 1.0)
    """
    if 0.0 in factors:
        return 0.0
    product = 1.0
    for factor in factors:
        product = factor if product == 1.0 else product if factor == 1.0 else up(product * factor)
    return product


def div_up(numerator: float, denominator: float) -> float:
    """Bound a quotient of a non-negative and a positive number."""
    return 0.0 if numerator == 0 else up(numerator / denominator)


def sqrt_up(value: float) -> float:
    """Bound a square root; negative values count as 0, NaN as infinity."""
    if math.isnan(value):
        return math.inf
    return up(math.sqrt(value)) if value > 0 else 0.0


def hypot_up(first: float, second: float) -> float:
    """Bound the root of the sum of two squares, whatever their scale."""
    return up(up(math.hypot(first, second))) if first and second else max(abs(first), abs(second))


def gamma(operations: int, dtype: torch.dtype = torch.float64) -> float:
    """Bound n u / (1 - n u), u the unit roundoff of the dtype; infinite where n u >= 1."""
    product = operations * UNIT[dtype]
    return div_up(product, down(1 - product)) if product < 1 else math.inf


def norm_up(tensor: Tensor) -> float:
    """Bound the Euclidean norm of all entries of a float64 tensor, whatever their scale."""
    largest = float(tensor.abs().max()) if tensor.numel() else 0.0
    if largest == 0 or not math.isfinite(largest):
        return largest
    scale = power_of_two(largest)
    total = float((tensor / scale).square().sum())
    # entries below 2^-537 of the largest have squares that vanish: each loses at most the smallest normal number
    return mul_up(scale, sqrt_up(add_up(mul_up(total, up(1 + gamma(tensor.numel() + 1))), tensor.numel() * 2.0**-1022)))


def power_of_two(value: float) -> float:
    """The power of two in (value / 2, value], within the range whose inverse is a number: dividing by it is exact.

    Example:
        >>> power_of_two(5.0), power_of_two(0.3), power_of_two(0.0)
        (4.0, 0.25, 1.0)
    """
    if value == 0:
        return 1.0
    return math.ldexp(1.0, min(1000, max(-1000, math.frexp(value)[1] - 1)))
