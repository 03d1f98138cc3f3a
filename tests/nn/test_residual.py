"""Residual blocks against their formulas, their bounds on both sides, and what they refuse."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from otnn.errors import InputError
from otnn.lipschitz import bound, export, plain_structure
from otnn.manifold import constrained_parameters, keep_on_manifold, retract_parameters
from otnn.nn import ConcatResidual, ConvexResidual, MaxMin, OrthoConv2d, OrthoLinear
from otnn.nn.residual import ChannelsFrom, ChannelsJoin, ConvexMix
from tests.operators import layer_matrix, norm


def linear(*shape: int, scale: float = 1.0, seed: int = 0) -> nn.Linear:
    """A layer of one random matrix, of the given norm."""
    layer = nn.Linear(shape[1], shape[0], dtype=torch.float64)
    weight = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        layer.weight.copy_(scale * weight / norm(weight))
    return layer


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_a_convex_mix_is_one(alpha: float) -> None:
    branch = nn.Sequential(linear(4, 4), MaxMin())
    block, x = ConvexResidual(branch, alpha), torch.randn(5, 4, dtype=torch.float64)
    assert block.mix.alpha.dtype == torch.float64
    assert (block(x) - ((1 - alpha) * x + alpha * branch(x))).abs().max() < 1e-15


def test_a_concatenation_is_one() -> None:
    branch, x = nn.Sequential(linear(4, 3), MaxMin()), torch.randn(2, 5, dtype=torch.float64)
    assert torch.equal(ConcatResidual(branch, kept=2)(x), torch.cat([x[:, :2], branch(x[:, 2:])], dim=1))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(alpha=st.floats(0, 1), size=st.floats(0, 3), seed=st.integers(0, 100))
def test_bounds_on_both_sides(alpha: float, size: float, seed: int) -> None:
    """Against the norms of the matrices; equality where the branch is a multiple of the identity, of norm `size`."""
    random, multiple = linear(4, 4, scale=size, seed=seed), linear(4, 4)
    with torch.no_grad():
        multiple.weight.copy_(size * torch.eye(4, dtype=torch.float64))
    composed = (1 - alpha) + alpha * size
    for branch in (random, multiple):
        found = bound(ConvexResidual(branch, alpha)).constant
        true = norm(layer_matrix(ConvexResidual(branch, alpha), (4,)))
        assert true <= found * (1 + 1e-14)
        assert found == pytest.approx(composed, rel=1e-9)
        # a vector of every direction: the bound is one of the block, not of one vector
        wider = ConcatResidual(branch, kept=2)
        true = norm(layer_matrix(wider, (6,)))
        assert true <= bound(wider).constant * (1 + 1e-14)
        assert bound(wider).constant == pytest.approx(max(1, size), rel=1e-9)
        assert true == pytest.approx(max(1, size), rel=1e-9)  # attained
    assert norm(layer_matrix(ConvexResidual(multiple, alpha), (4,))) == pytest.approx(composed, abs=1e-14)


def test_blocks_nest_and_stand_in_chains() -> None:
    inner = ConvexResidual(linear(4, 4, scale=3.0), 0.5)  # 2
    outer = ConcatResidual(nn.Sequential(linear(4, 4, scale=0.5), inner), kept=1)  # max(1, 1)
    net = nn.Sequential(linear(5, 6, scale=2.0), ConvexResidual(nn.Sequential(outer, linear(5, 5, scale=4.0)), 0.25))
    expected = 2 * (0.75 + 0.25 * 4)
    assert bound(net).constant == pytest.approx(expected, rel=1e-9)
    assert norm(layer_matrix(net, (6,))) <= expected
    names = [name for name, _ in bound(net).layers]
    assert names == ["0", "1.branch.0.rest", "1.branch.0.branch.0", "1.branch.0.branch.1.branch", "1.branch.1"]


def test_a_branch_without_a_bound_is_named() -> None:
    net = nn.Sequential(linear(4, 4), ConvexResidual(nn.Sequential(nn.GRU(4, 4))))
    with pytest.raises(InputError, match=r"^1\.branch\.0: no Lipschitz bound is known for GRU"):
        bound(net)


def test_alpha_off_its_manifold_counts_as_it_is() -> None:
    for alpha, expected in ((1.5, 0.5 + 1.5), (-0.25, 1.25 + 0.25)):
        block = ConvexResidual(linear(4, 4))
        with torch.no_grad():
            block.mix.alpha.fill_(alpha)
        assert bound(block).constant == pytest.approx(expected, rel=1e-9)
        assert norm(layer_matrix(block, (4,))) <= bound(block).constant


def test_alpha_learns_from_the_ends_and_stays_in_the_interval() -> None:
    """Towards a target that is the branch, and back to the inputs: alpha goes to 1 and to 0, whole."""
    branch, x = linear(4, 4), torch.randn(20, 4, dtype=torch.float64)
    block = ConvexResidual(branch.requires_grad_(False), 0.0)
    optimizer = torch.optim.SGD([block.mix.alpha], 0.3)
    keep_on_manifold(optimizer, block)
    for target, end in ((branch(x), 1.0), (x, 0.0), (branch(x), 1.0)):
        for _ in range(60):
            optimizer.zero_grad()
            (block(x) - target).square().sum(dim=1).mean().backward()
            optimizer.step()
            assert 0 <= block.mix.alpha <= 1
        assert block.mix.alpha.item() == pytest.approx(end, abs=1e-3)
    fixed = ConvexResidual(branch, 0.3, learned=False)
    assert list(constrained_parameters(fixed)) == []
    assert "mix.alpha" in fixed.state_dict()


def network() -> nn.Sequential:
    branch = nn.Sequential(OrthoConv2d(4, 4, 3, padding=1), MaxMin(), OrthoConv2d(4, 4, 3, padding=1))
    return nn.Sequential(
        OrthoConv2d(1, 4, 3, padding=1),
        ConvexResidual(branch, 0.3),
        ConcatResidual(nn.Sequential(OrthoConv2d(2, 2, 3, padding=1), MaxMin()), kept=2),
        nn.Flatten(),
        OrthoLinear(64, 8),
    )


def test_export_proves_at_most_one_through_the_blocks() -> None:
    net = network()
    with torch.no_grad():
        for _, parameter, _ in constrained_parameters(net):
            parameter.add_(1e-7 * torch.randn_like(parameter))
        net[1].mix.alpha.fill_(1 + 1e-5)
    exported = export(net)
    assert bound(net).constant > 1
    assert bound(exported).constant <= 1
    assert exported[1].mix.alpha == 1
    kinds = {type(layer) for layer in exported.modules()}
    assert nn.Conv2d in kinds
    assert OrthoConv2d not in kinds
    x = torch.rand(3, 1, 4, 4)
    retract_parameters(net)
    assert (exported(x) - net(x)).abs().max() < 1e-6
    structure = plain_structure(network())
    structure.load_state_dict(exported.state_dict())
    assert torch.equal(structure(x), exported(x))


class Misused(ConcatResidual):
    """The branch sees all channels, so the distances of both parts add up."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.join(inputs, self.branch(inputs))  # type: ignore[no-any-return]


class Crossed(nn.Module):
    """The branch sees other channels of other numbers than those that pass by."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rest, self.join = linear(4, 4), ChannelsFrom(2), ChannelsJoin(2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.join(inputs, self.rest(self.first(inputs)))  # type: ignore[no-any-return]


class Overlapping(nn.Module):
    """The branch sees a channel that passes by."""

    def __init__(self) -> None:
        super().__init__()
        self.rest, self.join = ChannelsFrom(1), ChannelsJoin(2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.join(inputs, self.rest(inputs))  # type: ignore[no-any-return]


def test_a_join_of_parts_that_move_together_is_refused() -> None:
    for net in (Misused(linear(4, 4), kept=2), Crossed(), Overlapping()):
        with pytest.raises(InputError, match="expected a branch of the channels that do not pass by only"):
            bound(net)
        assert norm(layer_matrix(net, (4,))) > 1.1  # max(1, 1) would have been wrong


def test_what_changes_a_block_is_refused() -> None:
    class Doubled(ConvexMix):
        def forward(self, inputs: Tensor, changed: Tensor) -> Tensor:
            return 2 * super().forward(inputs, changed)

    block = ConvexResidual(linear(4, 4))
    block.mix = Doubled()
    with pytest.raises(InputError, match="makes Doubled another map than ConvexMix"):
        bound(block)
    hooked = ConvexResidual(linear(4, 4))
    hooked.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(InputError, match="a forward hook or its own call may change what it computes"):
        bound(hooked)
    overwrites = ConcatResidual(nn.ReLU(inplace=True), kept=2)  # would also change the inputs of the block
    with pytest.raises(InputError, match="set inplace=False"):
        bound(overwrites)
    with pytest.raises(InputError, match="ConvexMix takes the results of two layers"):
        bound(ConvexMix())


REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: ConvexResidual(nn.Identity(), 1.5), r"alpha: expected a share in \[0, 1\], got 1.5"),
    (lambda: ConvexResidual(nn.Identity(), math.nan), r"alpha: expected a share in \[0, 1\], got nan"),
    (lambda: ConvexResidual(linear(1, 4))(torch.zeros(2, 4).double()), r"keeps the shape \(2, 4\), got \(2, 1\)"),
    (lambda: ConcatResidual(nn.Identity(), kept=0), "kept: expected at least one channel that passes by, got 0"),
    (lambda: ConcatResidual(nn.Identity(), kept=3)(torch.zeros(2, 3)), "more than 3 channels"),
    (lambda: ConcatResidual(nn.MaxPool2d(2), kept=1)(torch.zeros(2, 3, 4, 4)), "changes the channels of"),
]


@pytest.mark.parametrize(("call", "words"), REFUSED)
def test_what_does_not_fit_is_refused(call: Callable[[], object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()
