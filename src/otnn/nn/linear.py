"""Dense layers: a semi-orthogonal one, and heads whose rows, or whole weights, have norm 1."""

import torch
from torch import Tensor, nn

from otnn.checks import floating, whole
from otnn.errors import InputError
from otnn.manifold import Frobenius, Manifold, Stiefel, UnitRows
from otnn.nn.init import checked_init


class _ManifoldLinear(nn.Linear):
    """`torch.nn.Linear` whose weight is sampled on, and kept on, a manifold."""

    manifold: Manifold

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        in_features, out_features = whole("in_features", in_features), whole("out_features", out_features)
        if in_features < 1 or out_features < 1:
            raise InputError(f"expected at least one feature on each side, got {in_features} and {out_features}")
        super().__init__(in_features, out_features, bias, device, floating(dtype))
        self.manifolds: dict[str, Manifold] = {"weight": self.manifold}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weight from the manifold's uniform law and set the bias to 0."""
        self.weight.copy_(self.manifold.sample(self.out_features, self.in_features, dtype=self.weight.dtype))
        if self.bias is not None:
            self.bias.zero_()


class OrthoLinear(_ManifoldLinear):
    """Drop-in for `torch.nn.Linear` with a semi-orthogonal weight: every singular value is 1.

    The weight itself lives on the Stiefel manifold: `otnn.manifold.keep_on_manifold` retracts it after each optimizer
    step, and the forward pass is that of an ordinary dense layer.

    Shapes: (batch, in_features) to (batch, out_features).

    Args:
        in_features: of the input.
        out_features: of the output.
        bias: learn a bias.
        init: "orthogonal" draws the weight uniformly; "identity" starts as the identity, cut or filled with zeros.

    Raises:
        InputError: a side without features, or an unknown initialisation.

    Example:
        >>> layer = OrthoLinear(8, 3)
        >>> bool(torch.allclose(layer.weight @ layer.weight.T, torch.eye(3), atol=1e-6))
        True
        >>> OrthoLinear(3, 2, init="identity")(torch.tensor([[5.0, 6.0, 7.0]])).tolist()
        [[5.0, 6.0]]
    """

    manifold = Stiefel()

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        init: str = "orthogonal",
    ) -> None:
        self.init = checked_init(init)
        super().__init__(in_features, out_features, bias, device, dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weight uniformly, or start as the identity (`init`); set the bias to 0."""
        super().reset_parameters()
        if self.init == "identity":
            nn.init.eye_(self.weight)


class UnitNormLinear(_ManifoldLinear):
    """Drop-in for `torch.nn.Linear` whose rows have Euclidean norm 1: each output is 1-Lipschitz by itself.

    As a head it leaves every class its own direction: no orthogonality between classes is asked for, and the
    certificate divides by the true distance of the rows (theory, section 4).

    Shapes: (batch, in_features) to (batch, out_features).

    Raises:
        InputError: a side without features.

    Example:
        >>> head = UnitNormLinear(16, 10)
        >>> bool(torch.allclose(head.weight.norm(dim=1), torch.ones(10)))
        True
    """

    manifold = UnitRows()


class FrobeniusLinear(_ManifoldLinear):
    """Drop-in for `torch.nn.Linear` whose weight has Frobenius norm 1.

    That norm bounds the spectral norm, so all outputs together are 1-Lipschitz. The squares of the rows' norms add up
    to 1, so k scores are some sqrt(k) times smaller than those of `UnitNormLinear`, and a margin of the loss has to be.
    The certificate divides by the true distance of the rows.

    Shapes: (batch, in_features) to (batch, out_features).

    Raises:
        InputError: a side without features.

    Example:
        >>> head = FrobeniusLinear(16, 10)
        >>> bool(torch.allclose(head.weight.norm(), torch.tensor(1.0)))
        True
    """

    manifold = Frobenius()


class Centering(nn.Module):
    """Subtract a fixed mean from the input, channel by channel: Lipschitz constant 1.

    Dividing by a standard deviation as well would raise the constant to 1 / std, so the default input layer only
    centres.

    Shapes: (batch, channels, ...) to the same.

    Example:
        >>> Centering(torch.tensor([0.25]))(torch.ones(1, 1, 2))
        tensor([[[0.7500, 0.7500]]])
    """

    mean: Tensor

    def __init__(self, mean: Tensor) -> None:
        super().__init__()
        if not isinstance(mean, Tensor):
            raise InputError(f"mean: expected a tensor, got {type(mean).__name__}; convert it with torch.as_tensor()")
        if mean.ndim != 1 or not torch.isfinite(mean).all():
            raise InputError(f"mean: expected one finite number per channel, got shape {tuple(mean.shape)}")
        self.register_buffer("mean", mean.detach().clone())

    def forward(self, inputs: Tensor) -> Tensor:
        """Return inputs - mean.

        Raises:
            InputError: another number of channels, which would repeat one of them.
        """
        if inputs.ndim < 2 or inputs.shape[1] != len(self.mean):
            raise InputError(f"expected (batch, {len(self.mean)} channels, ...), got {tuple(inputs.shape)}")
        return inputs - self.mean.view(-1, *[1] * (inputs.ndim - 2))

    def extra_repr(self) -> str:
        """Tell the number of channels."""
        return f"channels={len(self.mean)}"
