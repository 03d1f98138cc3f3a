"""Settings and inputs that a layer cannot have: one sentence each."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from otnn.errors import InputError
from otnn.nn import (
    BatchCentering,
    Centering,
    ConcatResidual,
    ConvexResidual,
    GroupSort,
    Householder,
    MaxMin,
    OrthoConv2d,
    OrthoLinear,
    ScaledAdaptiveAvgPool2d,
    ScaledAvgPool2d,
    UnitNormLinear,
)

WHOLE = "expected a whole number, got"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GroupSort("a"), f"group_size: {WHOLE} 'a'"),
        (lambda: GroupSort(2.0), f"group_size: {WHOLE} 2.0"),
        (lambda: MaxMin(1.5), f"dim: {WHOLE} 1.5"),
        (lambda: Householder(8.0), f"channels: {WHOLE} 8.0"),
        (lambda: BatchCentering(2.5), f"num_features: {WHOLE} 2.5"),
        (lambda: ScaledAvgPool2d(2.0), f"kernel_size: {WHOLE} 2.0"),
        (lambda: ScaledAdaptiveAvgPool2d(2.0), f"output_size: {WHOLE} 2.0"),
        (lambda: ConvexResidual(nn.Identity(), alpha="a"), r"alpha: expected a share in \[0, 1\], got 'a'"),
        (lambda: ConvexResidual(nn.Identity(), alpha=torch.nan), r"alpha: expected a share in \[0, 1\], got nan"),
        (lambda: ConcatResidual(nn.Identity(), kept=1.5), f"kept: {WHOLE} 1.5"),
        (lambda: Centering([0.5]), "mean: expected a tensor, got list; convert it"),
        (lambda: OrthoConv2d(4, 8, 3, dtype=torch.complex64), "dtype: expected a floating-point type .*complex64"),
        (lambda: OrthoLinear(4, 4, dtype=torch.int32), "dtype: expected a floating-point type .*int32"),
        (lambda: UnitNormLinear(4, 4, dtype=torch.bool), "dtype: expected a floating-point type .*bool"),
        (lambda: Householder(4, dtype=torch.int64), "dtype: expected a floating-point type .*int64"),
    ],
)
def test_settings_of_another_kind_are_refused(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("layer", [ScaledAvgPool2d(2), ScaledAdaptiveAvgPool2d(1)])
def test_averages_of_whole_numbers_are_refused(layer: nn.Module) -> None:
    with pytest.raises(InputError, match=r"expected floating-point numbers, got torch.int64, .*; use .float\(\)"):
        layer(torch.tensor([[[[0, 1], [1, 1]]]]))


def test_pairs_need_their_dimension() -> None:
    for layer, inputs in ((Householder(8), torch.randn(8)), (Householder(8, dim=5), torch.randn(2, 8))):
        with pytest.raises(InputError, match="numbers are sorted along dimension"):
            layer(inputs)
