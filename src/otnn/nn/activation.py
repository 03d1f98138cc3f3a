"""Activations that keep the norm of the gradient: sorts of groups of channels, the absolute value, and reflections."""

import torch
from torch import Tensor, nn

from otnn.checks import floating, whole
from otnn.errors import InputError
from otnn.nn.sorting import sort_parts

# Up to this size of a group comparators are faster than `torch.sort`.
_NETWORK = 8


def maxmin(inputs: Tensor, dim: int = 1) -> Tensor:
    """Sort the pairs (i, i + n/2) of a dimension: maxima fill its first half, minima its second.

    GroupSort with groups of two (Anil, Lucas and Grosse 2019): it permutes coordinates, so its Jacobian is a
    permutation, the norm of every gradient is kept, and the Lipschitz constant is 1. At a tie the first is the maximum.

    Args:
        inputs: any tensor whose size n along `dim` is even.
        dim: the dimension that is paired.

    Raises:
        InputError: an odd number of channels.

    Example:
        >>> maxmin(torch.tensor([[1.0, 5.0, 3.0, 4.0]]))
        tensor([[3., 5., 1., 4.]])
    """
    if _size(inputs, dim) % 2:
        raise InputError(f"MaxMin sorts pairs: expected an even size along dimension {dim}, got {inputs.shape[dim]}")
    return sort_parts(inputs, 2, dim)


def group_sort(inputs: Tensor, group_size: int, dim: int = 1) -> Tensor:
    """Sort the groups of a dimension of size n, the largest first (Anil, Lucas and Grosse 2019).

    With k = `group_size` and m = n / k, the numbers j, j + m, ..., j + (k - 1) m form group j < m, and stay its places:
    the first m outputs are the maxima of the groups, the last m their minima. `maxmin` is k = 2. The Jacobian is a
    permutation, so the Lipschitz constant is 1 and the norm of every gradient is kept; at a tie it is one of those that
    sort.

    Args:
        inputs: any tensor whose size along `dim` is a multiple of `group_size`.
        group_size: k >= 1.
        dim: the dimension that is sorted.

    Raises:
        InputError: a size that groups do not divide.

    Example:
        >>> group_sort(torch.tensor([[1.0, 5.0, 3.0, 4.0, 2.0, 6.0]]), 3)
        tensor([[3., 6., 2., 5., 1., 4.]])
    """
    size = _size(inputs, dim)
    if group_size < 1 or size % group_size:
        raise InputError(
            f"GroupSort sorts groups of {group_size}: expected a size along dimension {dim} that is a multiple of it, "
            f"got {size}"
        )
    if group_size == 1:
        return inputs.clone()  # a result of its own, as of every other layer
    if group_size <= _NETWORK:
        return sort_parts(inputs, group_size, dim)
    dim %= inputs.ndim
    values: Tensor = inputs.unflatten(dim, (group_size, -1)).sort(dim, descending=True).values
    return values.flatten(dim, dim + 1)


def _size(inputs: Tensor, dim: int) -> int:
    if not -inputs.ndim <= dim < inputs.ndim:
        raise InputError(
            f"numbers are sorted along dimension {dim} of a batch: got a tensor of shape {tuple(inputs.shape)}; "
            "inputs.unsqueeze(0) makes a batch of one"
        )
    return inputs.shape[dim]


class _Sorting(nn.Module):
    """A sort along one dimension.

    Args:
        dim: the dimension that is sorted; 1 is the channels of images and the features of rows.
    """

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = whole("dim", dim)


class MaxMin(_Sorting):
    """`maxmin` as a module.

    Args:
        dim: the dimension that is paired; 1 is the channels of images and the features of rows.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the sorted pairs, in the shape of the inputs."""
        return maxmin(inputs, self.dim)


class GroupSort(_Sorting):
    """`group_sort` as a module.

    Args:
        group_size: how many numbers are sorted together, at least 2, which is `MaxMin`.
        dim: the dimension that is sorted; 1 is the channels of images and the features of rows.

    Raises:
        InputError: a group that cannot be sorted.

    Example:
        >>> GroupSort(4)(torch.tensor([[1.0, 3.0, 2.0, 4.0]]))
        tensor([[4., 3., 2., 1.]])
    """

    def __init__(self, group_size: int, dim: int = 1) -> None:
        super().__init__(dim)
        if whole("group_size", group_size) < 2:
            raise InputError(f"group_size: expected at least 2 numbers to sort, got {group_size}")
        self.group_size = group_size

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the sorted groups, in the shape of the inputs."""
        return group_sort(inputs, self.group_size, self.dim)

    def extra_repr(self) -> str:
        """Tell the size of the groups."""
        return f"group_size={self.group_size}"


class FullSort(_Sorting):
    """Sort a whole dimension, the largest first: `GroupSort` with one group.

    Args:
        dim: the dimension that is sorted; 1 is the channels of images and the features of rows.

    Example:
        >>> FullSort()(torch.tensor([[1.0, 3.0, 2.0]]))
        tensor([[3., 2., 1.]])
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the sorted numbers, in the shape of the inputs."""
        return group_sort(inputs, max(1, _size(inputs, self.dim)), self.dim)


class Abs(nn.Module):
    """The absolute value: its slope is 1 or -1, except at 0, where torch's is 0.

    Example:
        >>> Abs()(torch.tensor([-2.0, 3.0]))
        tensor([2., 3.])
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """Return |inputs|."""
        return inputs.abs()


def householder(inputs: Tensor, angles: Tensor, dim: int = 1) -> Tensor:
    """Reflect the pairs (i, i + n/2) of a dimension that lie behind a line (Singla, Singla and Feizi 2021).

    With z a pair, t its angle and v = (sin(t/2), -cos(t/2)), the result is z where <v, z> >= 0 and its mirror image
    z - 2 <v, z> v elsewhere, so it is continuous; its Jacobian is the identity or a reflection, so the norm of every
    gradient is kept and the Lipschitz constant is 1. At t = pi/2 it is `maxmin`.

    Args:
        inputs: any tensor whose size n along `dim` is even.
        angles: (n/2,) in radians.
        dim: the dimension that is paired.

    Raises:
        InputError: another number of channels than twice the angles.

    Example:
        >>> at_pi = torch.tensor([torch.pi])  # the absolute value of the first of a pair
        >>> householder(torch.tensor([[-1.0, 5.0]]), at_pi).round(decimals=4)
        tensor([[1., 5.]])
    """
    if _size(inputs, dim) != 2 * len(angles):
        raise InputError(
            f"Householder reflects pairs: expected size {2 * len(angles)} along dimension {dim}, "
            f"got {inputs.shape[dim]}"
        )
    first, second = inputs.chunk(2, dim)
    half = (angles / 2).view(-1, *[1] * (inputs.ndim - dim % inputs.ndim - 1))
    u, v = half.sin(), -half.cos()
    behind = torch.addcmul(first * u, second, v).clamp(max=0)
    return torch.cat([torch.addcmul(first, behind, u, value=-2), torch.addcmul(second, behind, v, value=-2)], dim)


class Householder(nn.Module):
    """`householder` with a learned angle for each pair of channels, which starts as `MaxMin`.

    Args:
        channels: an even size of the dimension that is paired.
        dim: that dimension; 1 is the channels of images and the features of rows.

    Raises:
        InputError: an odd number of channels.

    Example:
        >>> x = torch.randn(2, 4)
        >>> bool(torch.allclose(Householder(4)(x), maxmin(x), atol=1e-6))
        True
    """

    def __init__(
        self, channels: int, dim: int = 1, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if whole("channels", channels) < 2 or channels % 2:
            raise InputError(f"Householder reflects pairs: expected an even number of channels >= 2, got {channels}")
        self.channels, self.dim = channels, whole("dim", dim)
        # an unconstrained angle, not a unit vector: of that Adam's first steps are radial at (1, -1) / sqrt(2)
        self.angle = nn.Parameter(torch.empty(channels // 2, device=device, dtype=floating(dtype)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every angle to that of `MaxMin`."""
        self.angle.fill_(torch.pi / 2)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the reflected pairs, in the shape of the inputs."""
        return householder(inputs, self.angle, self.dim)

    def extra_repr(self) -> str:
        """Tell the number of channels."""
        return f"channels={self.channels}"
