"""Residual blocks that are 1-Lipschitz where their branch is: a convex mix, and channels that pass by.

Each consists of its branch and of small modules without further layers, so that `otnn.lipschitz` traces the branch
like any other part of a network and needs rules for those modules only.
"""

import torch
from torch import Tensor, nn

from otnn.checks import share, whole
from otnn.errors import InputError
from otnn.manifold import Interval, Manifold


class ConvexMix(nn.Module):
    """(1 - alpha) x + alpha y of two tensors of one shape, with alpha in [0, 1]: how `ConvexResidual` ends.

    Args:
        alpha: the share of y.
        learned: learn alpha on the manifold [0, 1]: its gradient is y - x everywhere, also at 0 and at 1, where that of
            a sigmoid vanishes.

    Raises:
        InputError: a share outside of [0, 1].
    """

    alpha: Tensor

    def __init__(
        self,
        alpha: float = 0.5,
        learned: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        start = torch.tensor(share("alpha", alpha), device=device, dtype=dtype or torch.get_default_dtype())
        self.manifolds: dict[str, Manifold] = {}
        if learned:
            self.alpha = nn.Parameter(start)
            self.manifolds["alpha"] = Interval(1)
        else:
            self.register_buffer("alpha", start)

    def forward(self, inputs: Tensor, changed: Tensor) -> Tensor:
        """Return the mix.

        Raises:
            InputError: two shapes, which would copy numbers.
        """
        if inputs.shape != changed.shape:
            raise InputError(
                f"expected a branch that keeps the shape {tuple(inputs.shape)}, got {tuple(changed.shape)} from it"
            )
        if torch.compiler.is_exporting():  # in operations that other runtimes know, with alpha as it is stored
            return inputs + self.alpha * (changed - inputs)
        dtype = torch.promote_types(inputs.dtype, changed.dtype)  # under autocast some layers give half precision
        return torch.lerp(inputs.to(dtype), changed.to(dtype), self.alpha)

    def extra_repr(self) -> str:
        """Tell whether alpha is learned."""
        return f"learned={bool(self.manifolds)}"


class ConvexResidual(nn.Module):
    """Residual block (1 - alpha) x + alpha h(x) with alpha in [0, 1]: Lipschitz constant (1 - alpha) + alpha L.

    L is that of the branch h, so the block is 1-Lipschitz where the branch is. The ordinary sum x + h(x) has 1 + L.

    Shapes: (batch, ...) to the same.

    Args:
        branch: h, keeps the shape.
        alpha: the share of the branch at the start.
        learned: learn alpha; `keep_on_manifold` keeps it in [0, 1].

    Raises:
        InputError: a share outside of [0, 1]; when called, a branch that changes the shape.

    Example:
        >>> from otnn.lipschitz import bound
        >>> from otnn.nn import MaxMin, OrthoLinear
        >>> block = ConvexResidual(torch.nn.Sequential(OrthoLinear(4, 4), MaxMin()), alpha=0.25)
        >>> bound(block).constant < 1.00001
        True
        >>> bool(torch.allclose(block(torch.ones(1, 4)), 0.75 + 0.25 * block.branch(torch.ones(1, 4))))
        True
    """

    def __init__(self, branch: nn.Module, alpha: float = 0.5, learned: bool = True) -> None:
        super().__init__()
        self.branch = branch
        like = next((p for p in branch.parameters() if p.is_floating_point()), torch.empty(0))
        self.mix = ConvexMix(alpha, learned, like.device, like.dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the mix of the inputs and of what the branch makes of them."""
        mixed: Tensor = self.mix(inputs, self.branch(inputs))
        return mixed


class ChannelsFrom(nn.Module):
    """The channels from number `first` on: what the branch of `ConcatResidual` sees.

    Args:
        first: at least 1.

    Raises:
        InputError: a number below 1.
    """

    def __init__(self, first: int) -> None:
        super().__init__()
        if whole("kept", first) < 1:
            raise InputError(f"kept: expected at least one channel that passes by, got {first}; use the branch alone")
        self.first = first

    def forward(self, inputs: Tensor) -> Tensor:
        """Return inputs[:, first:].

        Raises:
            InputError: no channel is left.
        """
        if inputs.ndim < 2 or inputs.shape[1] <= self.first:
            raise InputError(f"expected (batch, more than {self.first} channels, ...), got {tuple(inputs.shape)}")
        return inputs[:, self.first :]

    def extra_repr(self) -> str:
        """Tell the number."""
        return f"first={self.first}"


class ChannelsJoin(nn.Module):
    """The first channels of one tensor, then all of another one: how `ConcatResidual` ends.

    Args:
        first: channels taken of the first tensor.
    """

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first

    def forward(self, inputs: Tensor, changed: Tensor) -> Tensor:
        """Return both, one behind the other.

        Raises:
            InputError: shapes that differ otherwise than in the channels.
        """
        if inputs.shape[:1] + inputs.shape[2:] != changed.shape[:1] + changed.shape[2:]:
            raise InputError(
                f"expected a branch that changes the channels of {tuple(inputs.shape)} only, got {tuple(changed.shape)}"
            )
        return torch.cat([inputs[:, : self.first], changed], dim=1)

    def extra_repr(self) -> str:
        """Tell the number."""
        return f"first={self.first}"


class ConcatResidual(nn.Module):
    """Residual block [x1, h(x2)]: the first channels pass by the branch h, which sees the others.

    A block-diagonal map: its Lipschitz constant is max(1, L), L that of the branch, and with an orthogonal branch it is
    orthogonal.

    Shapes: (batch, channels, ...) to (batch, kept + channels of the branch, ...).

    Args:
        branch: h, keeps all dimensions but the channels.
        kept: channels that pass by, at least 1.

    Raises:
        InputError: no channel to pass by; when called, none left for the branch, or a branch that changes other
            dimensions.

    Example:
        >>> from otnn.nn import OrthoLinear
        >>> block = ConcatResidual(OrthoLinear(2, 2, bias=False), kept=2)
        >>> x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
        >>> block(x)[:, :2], bool(torch.allclose(block(x).norm(), x.norm()))
        (tensor([[1., 2.]], grad_fn=<SliceBackward0>), True)
    """

    def __init__(self, branch: nn.Module, kept: int) -> None:
        super().__init__()
        self.rest = ChannelsFrom(kept)
        self.branch = branch
        self.join = ChannelsJoin(kept)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the channels that passed by, and those of the branch."""
        joined: Tensor = self.join(inputs, self.branch(self.rest(inputs)))
        return joined
