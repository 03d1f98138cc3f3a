import math
from fractions import Fraction

import pytest
import torch

from otnn.lipschitz.rounding import add_up, div_up, down, gamma, mul_up, norm_up, power_of_two, sqrt_up, up

SMALLEST, LARGEST = 5e-324, 1.7976931348623157e308


def numbers(seed: int, count: int) -> list[float]:
    """Positive numbers of every size that float64 has, denormal ones too."""
    generator = torch.Generator().manual_seed(seed)
    mantissas = 1 + torch.rand(count, generator=generator, dtype=torch.float64)
    exponents = torch.randint(-1074, 1023, (count,), generator=generator)
    return [math.ldexp(m, int(e)) for m, e in zip(mantissas.tolist(), exponents, strict=True)]


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 0.1, SMALLEST, LARGEST, 2.0**-1022])
def test_the_neighbours_of_a_number(value: float) -> None:
    assert down(value) < value < up(value)
    assert down(up(value)) == value == up(down(value))


def test_a_product_is_rounded_up() -> None:
    for first, second, third in zip(numbers(0, 500), numbers(1, 500), numbers(2, 500), strict=True):
        found = mul_up(first, second, third)
        exact = Fraction(first) * Fraction(second) * Fraction(third)
        assert found == math.inf or Fraction(found) >= exact
        if 1e-300 < first * second < 1e300 and 1e-300 < exact < 1e300:
            assert Fraction(found) <= exact * (1 + Fraction(4, 2**52))
    assert Fraction(mul_up(0.1, 0.2)) >= Fraction(0.1) * Fraction(0.2)


def test_products_with_0_1_and_infinity() -> None:
    assert mul_up() == 1.0
    assert mul_up(1.0, 0.1, 1.0) == 0.1  # by 1 nothing is rounded
    assert mul_up(3.0, 0.0, math.inf) == 0.0
    assert mul_up(SMALLEST, SMALLEST) == SMALLEST  # underflow goes up, not to 0
    assert mul_up(LARGEST, 2.0) == math.inf


def test_a_sum_is_rounded_up() -> None:
    for seed in range(100):
        terms = [value * (-1) ** index for index, value in enumerate(numbers(seed, 9))]
        assert Fraction(add_up(*terms)) > sum(map(Fraction, terms))
    assert Fraction(add_up(1e16, 1.0, -1e16)) >= 1  # cancellation is exact
    assert add_up(1.0, math.inf) == math.inf


@pytest.mark.parametrize("count", [2, 3, 10])
def test_a_sum_that_overflows_is_infinite(count: int) -> None:
    assert add_up(*[LARGEST] * count) == math.inf


def test_a_quotient_and_a_root_are_rounded_up() -> None:
    for first, second in zip(numbers(3, 500), numbers(4, 500), strict=True):
        quotient = div_up(first, second)
        assert quotient == math.inf or Fraction(quotient) >= Fraction(first) / Fraction(second)
        assert Fraction(sqrt_up(first)) ** 2 >= Fraction(first)
        assert sqrt_up(first) <= math.sqrt(first) * (1 + 2.0**-51)
    assert div_up(0.0, 3.0) == 0.0
    assert sqrt_up(0.0) == sqrt_up(-1e-20) == 0.0
    assert sqrt_up(math.inf) == math.inf


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, Fraction(1, 2**24)), (torch.float64, Fraction(1, 2**53))])
def test_gamma(dtype: torch.dtype, unit: Fraction) -> None:
    for operations in (1, 2, 3, 7, 100, 4097, 10**6):
        exact = operations * unit / (1 - operations * unit)
        assert exact <= Fraction(gamma(operations, dtype)) <= exact * (1 + Fraction(1, 2**50))
    assert gamma(0, dtype) == 0.0
    assert gamma(int(1 / unit), dtype) == math.inf
    assert gamma(int(2 / unit), dtype) == math.inf


@pytest.mark.parametrize("scale", [1e-320, 1e-300, 1e-200, 1e-20, 1.0, 1e20, 1e200, 1e307])
def test_the_norm_of_a_tensor_is_rounded_up(scale: float) -> None:
    generator = torch.Generator().manual_seed(5)
    for count in (1, 2, 7, 100):
        tensor = torch.rand(count, generator=generator, dtype=torch.float64) * scale
        found, square = Fraction(norm_up(tensor)), sum(Fraction(value) ** 2 for value in tensor.tolist())
        assert found**2 >= square
        if scale > 1e-310:  # a denormal result has few digits
            assert found**2 <= square * (1 + Fraction(1, 10**12))


def test_the_norm_of_mixed_scales_empty_and_broken_tensors() -> None:
    mixed = torch.tensor([1.0, 1e-160, 1e-200, 5e-324], dtype=torch.float64)
    assert Fraction(norm_up(mixed)) ** 2 >= sum(Fraction(value) ** 2 for value in mixed.tolist())
    assert norm_up(torch.zeros(3, dtype=torch.float64)) == 0.0
    assert norm_up(torch.zeros(0, dtype=torch.float64)) == 0.0
    assert norm_up(torch.tensor([1.0, -math.inf], dtype=torch.float64)) == math.inf
    assert math.isnan(norm_up(torch.tensor([1.0, math.nan], dtype=torch.float64)))


def test_the_power_of_two_below_a_number() -> None:
    for value in numbers(6, 500):
        scale = power_of_two(value)
        assert math.frexp(scale)[0] == 0.5
        assert 1 / scale not in (0.0, math.inf)
        if 2.0**-1000 <= value < 2.0**1001:
            assert scale <= value < 2 * scale
            assert Fraction(value / scale) == Fraction(value) / Fraction(scale)
    assert power_of_two(0.0) == 1.0
