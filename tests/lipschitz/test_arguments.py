"""Functions with arguments beside their input: limits, results written elsewhere, the dimensions of a mean."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from otnn.lipschitz import bound
from tests.lipschitz.networks import Forward, Net, linear
from tests.lipschitz.test_refusals import refusal


def written_elsewhere(net: Any, x: Tensor) -> Tensor:
    y = x * 1.0
    torch.abs(10 * x, out=y)
    return y


LIMITS: dict[str, Forward] = {
    "a result": lambda net, x: torch.clamp(net.a(x), min=10 * x),
    "a result by position": lambda net, x: net.a(x).clamp(10 * x),
    "the largest of a result": lambda net, x: net.a(x).clamp(max=10 * x),
    "out": written_elsewhere,
}


@pytest.mark.parametrize("forward", LIMITS.values(), ids=LIMITS)
def test_a_limit_that_moves_with_the_input_is_refused(forward: Forward) -> None:
    text = refusal(Net(forward, a=linear()), (4,))
    assert "has no Lipschitz bound; expected numbers, as in x.clamp(min=0.0, max=1.0), and no out" in text


def test_a_stored_limit_that_copies_numbers_is_refused() -> None:
    class Limited(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("least", torch.zeros(1, 16))

        def forward(self, x: Tensor) -> Tensor:
            return torch.clamp(x, min=self.least)  # type: ignore[arg-type]

    assert "a limit that is a tensor" in refusal(Limited(), (1,))


def test_numbers_as_limits_are_taken() -> None:
    for forward in (
        lambda net, x: net.a(x).clamp(0.0, 1),
        lambda net, x: torch.clamp(input=net.a(x), min=None, max=2.0),
        lambda net, x: torch.abs(net.a(x)),
    ):
        assert bound(Net(forward, a=linear()), (4,)).constant == pytest.approx(bound(linear(), (4,)).constant)


def test_a_mean_names_its_input_or_not() -> None:
    named = Net(lambda net, x: torch.mean(input=x, dim=1), a=linear())
    assert bound(named, (4,)).constant == pytest.approx(0.5)
    assert "expected no dtype" in refusal(Net(lambda net, x: torch.mean(x, dim=1, dtype=torch.half), a=linear()), (4,))
