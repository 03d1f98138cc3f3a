"""Normalisation without division: what batch and layer normalisation leave of themselves at Lipschitz constant 1."""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from otnn.checks import whole
from otnn.errors import InputError


class BatchCentering(nn.Module):
    """`torch.nn.BatchNorm` without its division: subtract the mean of each channel, and add a learned bias.

    In `train()` mode the mean is that of the batch, over all processes under torch.distributed, and enters a running
    mean; in `eval()` mode it is the running mean, nothing changes, and the Lipschitz constant is 1. Batch n enters with
    the weight max(momentum, 1 / n): the running mean is that of all batches so far, until it becomes an exponential
    one, and no start is left in it.

    Shapes: (batch, num_features, ...) to the same.

    Args:
        num_features: channels C.
        momentum: weight of the newest batch, in (0, 1]; None for the mean of all batches.
        bias: learn a bias.

    Raises:
        InputError: numbers out of range.

    Example:
        >>> layer = BatchCentering(1)
        >>> layer(torch.tensor([[1.0], [3.0]])).flatten().tolist()
        [-1.0, 1.0]
        >>> layer.eval()(torch.tensor([[2.5]]))
        tensor([[0.5000]], grad_fn=<AddBackward0>)
    """

    running_mean: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        momentum: float | None = 0.1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_features(num_features)
        if momentum is not None and not 0 < momentum <= 1:
            raise InputError(f"momentum: expected a weight in (0, 1], or None for the mean of all, got {momentum}")
        self.num_features, self.momentum = num_features, momentum
        self.bias = _bias(num_features, bias, device, dtype)
        self.register_buffer("running_mean", torch.zeros(num_features, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.zeros((), device=device, dtype=torch.long))

    def reset_parameters(self) -> None:
        """Forget the batches, and set the bias to 0."""
        self.running_mean.zero_()
        self.num_batches_tracked.zero_()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return inputs - mean + bias.

        Raises:
            InputError: another number of channels, or an empty batch in `train()` mode.
            FloatingPointError: a mean that is NaN or infinite in `train()` mode; the running mean stays as it was.
                Under `torch.compile` the mean is left out without a word.
        """
        _check_channels(inputs, self.num_features)
        mean = self._batch_mean(inputs) if self.training else self.running_mean
        return _with_bias(inputs - _over_channels(mean, inputs), self.bias)

    def _batch_mean(self, inputs: Tensor) -> Tensor:
        numbers = inputs.numel() // self.num_features
        dtype = torch.promote_types(inputs.dtype, self.running_mean.dtype)  # a sum of half precision soon overflows
        total = inputs.sum(dim=[dim for dim in range(inputs.ndim) if dim != 1], dtype=dtype)
        if dist.is_available() and dist.is_initialized():
            count = torch.tensor(float(numbers), device=inputs.device)
            dist.all_reduce(count)
            total, numbers = _all_reduce(total), int(count)
        if numbers == 0:
            raise InputError("expected at least one sample to take the mean of, got none; call .eval() or skip it")
        mean: Tensor = total / numbers
        self._update(mean.detach())
        return mean

    @torch.no_grad()
    def _update(self, mean: Tensor) -> None:
        finite = torch.isfinite(mean).all()
        if torch.compiler.is_compiling():  # a graph does not stop at a number; the step that follows does
            mean = torch.where(finite, mean, self.running_mean)
        elif not finite:
            raise FloatingPointError(
                "the mean of a batch became NaN or infinite, and was left out of the running mean; "
                "check the images, or lower the learning rate"
            )
        self.num_batches_tracked += finite
        weight = 1 / self.num_batches_tracked.clamp(min=1).to(self.running_mean.dtype)
        if self.momentum is not None:
            weight = weight.clamp(min=self.momentum)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)

    def extra_repr(self) -> str:
        """Tell the numbers."""
        return f"{self.num_features}, momentum={self.momentum}, bias={self.bias is not None}"


class LayerCentering(nn.Module):
    """`torch.nn.LayerNorm` without its division: subtract each sample's own mean, and add a learned bias.

    Subtracting the mean is an orthogonal projection, so the Lipschitz constant is 1, in `train()` mode too.

    Shapes: (batch, num_features, ...) to the same.

    Args:
        num_features: channels C.
        over: "channels" for the mean over the channels at each place, "sample" for that over all values of a sample.
        bias: learn a bias for each channel.

    Raises:
        InputError: numbers or names out of range; one channel, of whose mean nothing would be left.

    Example:
        >>> LayerCentering(3, bias=False)(torch.tensor([[1.0, 2.0, 6.0]]))
        tensor([[-2., -1.,  3.]])
    """

    def __init__(
        self,
        num_features: int,
        over: Literal["channels", "sample"] = "channels",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_features(num_features)
        if over not in ("channels", "sample"):
            raise InputError(f'over: expected "channels" or "sample", got {over!r}')
        if over == "channels" and num_features == 1:
            raise InputError('one channel less its own mean is 0: expected num_features >= 2, or over="sample"')
        self.num_features, self.over = num_features, over
        self.bias = _bias(num_features, bias, device, dtype)

    def reset_parameters(self) -> None:
        """Set the bias to 0."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return inputs - mean + bias.

        Raises:
            InputError: another number of channels.
        """
        _check_channels(inputs, self.num_features)
        dims = [1] if self.over == "channels" else list(range(1, inputs.ndim))
        return _with_bias(inputs - inputs.mean(dim=dims, keepdim=True), self.bias)

    def extra_repr(self) -> str:
        """Tell the numbers."""
        return f"{self.num_features}, over={self.over}, bias={self.bias is not None}"


class _AllReduce(torch.autograd.Function):
    """The sum over all processes. Its gradient is their sum, too: every process's loss depends on every share."""

    @staticmethod
    def forward(ctx: Any, total: Tensor) -> Tensor:
        result = total.clone()
        dist.all_reduce(result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _all_reduce(gradient)


_all_reduce: Callable[[Tensor], Tensor] = _AllReduce.apply


def _check_features(num_features: int) -> None:
    if whole("num_features", num_features) < 1:
        raise InputError(f"num_features: expected at least one channel, got {num_features}")


def _check_channels(inputs: Tensor, channels: int) -> None:
    if inputs.ndim < 2 or inputs.shape[1] != channels:
        raise InputError(f"expected (batch, {channels} channels, ...), got {tuple(inputs.shape)}")


def _bias(
    channels: int, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Parameter | None:
    return nn.Parameter(torch.zeros(channels, device=device, dtype=dtype)) if bias else None


def _with_bias(centred: Tensor, bias: Tensor | None) -> Tensor:
    return centred if bias is None else centred + _over_channels(bias, centred)


def _over_channels(values: Tensor, inputs: Tensor) -> Tensor:
    """One number per channel, in a shape that is added to a batch."""
    return values.view(-1, *[1] * (inputs.ndim - 2))
