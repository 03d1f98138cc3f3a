"""The nine methods of gradients that captum has: captum's own code, with defaults that make sense.

Every function takes a `Scorer` and the samples that it was built on, and returns signed maps.
"""

import math
import warnings
from typing import Any

import captum.attr
import torch
from torch import Tensor, nn

from otnn.errors import InputError
from otnn.explain.applicability import check_only_relu, find_layer
from otnn.explain.bridge import Scoring, by_parts, check_count, part_of, whole_baseline
from otnn.explain.guards import draw_seed
from otnn.explain.scores import Scorer
from otnn.memory import MEMORY_BUDGET


def saliency(scorer: Scorer, inputs: Tensor, *, memory_budget: float = MEMORY_BUDGET) -> Tensor:
    """Gradient of the score (Simonyan, Vedaldi and Zisserman 2014), signed: captum's default is its absolute value."""
    method = captum.attr.Saliency(Scoring(scorer, inputs, total=True))

    def part(x: Tensor, index: Tensor, _: int) -> Tensor:
        return method.attribute(x.requires_grad_(), abs=False, additional_forward_args=(index,))  # type: ignore[no-any-return]

    return by_parts(part, scorer, inputs, memory_budget)


def gradient_input(scorer: Scorer, inputs: Tensor, *, memory_budget: float = MEMORY_BUDGET) -> Tensor:
    """Gradient times input (Shrikumar, Greenside and Kundaje 2017)."""
    method = captum.attr.InputXGradient(Scoring(scorer, inputs, total=True))

    def part(x: Tensor, index: Tensor, _: int) -> Tensor:
        return method.attribute(x.requires_grad_(), additional_forward_args=(index,))  # type: ignore[no-any-return]

    return by_parts(part, scorer, inputs, memory_budget)


def integrated_gradients(
    scorer: Scorer,
    inputs: Tensor,
    *,
    steps: int = 50,
    baseline: Tensor | float = 0.0,
    memory_budget: float = MEMORY_BUDGET,
) -> Tensor:
    """(x - b) times the mean gradient between b and x (Sundararajan, Taly and Yan 2017), by Gauss-Legendre steps.

    Args:
        scorer: what is explained.
        inputs: (n, ...) samples.
        steps: gradients per sample, >= 1.
        baseline: b, a number or a tensor that broadcasts to the inputs.
        memory_budget: bytes of one pass.
    """
    check_count("steps", steps, 1)
    start = whole_baseline(baseline, inputs)
    method = captum.attr.IntegratedGradients(Scoring(scorer, inputs, total=True))

    def part(x: Tensor, index: Tensor, size: int) -> Tensor:
        chunk = size // len(x) * len(x) if size < steps * len(x) else None
        return method.attribute(  # type: ignore[no-any-return]
            x, part_of(start, index), additional_forward_args=(index,), n_steps=steps, internal_batch_size=chunk
        )

    return by_parts(part, scorer, inputs, memory_budget)


class _NoiseTunnel(captum.attr.NoiseTunnel):  # type: ignore[misc]
    """captum's, with noise that is the same for every sample and in chunks of any size.

    The level of each sample is a share of its own range. Noisy samples are handed on in float64, so that the gradients
    come back and are summed in it: in float32 the one-pass variance of VarGrad cancels.
    """

    def __init__(self, scoring: Scoring, generator: torch.Generator) -> None:
        super().__init__(captum.attr.Saliency(scoring))
        self.generator = generator

    def _add_noise_to_inputs(self, count: int, inputs: tuple[Tensor, ...], stdevs: float) -> tuple[Tensor, ...]:
        (x,) = inputs
        # one draw at a time, since the numbers of one large draw depend on its size
        noise = torch.stack([self._draw(x) for _ in range(count)])
        low, high = x.flatten(1).aminmax(dim=1)
        level = (stdevs * (high - low)).view(-1, *[1] * x.ndim)
        noisy = x.unsqueeze(1) + level * noise
        return (noisy.flatten(0, 1).double().requires_grad_(),)

    def _draw(self, x: Tensor) -> Tensor:
        return torch.randn(x.shape[1:], generator=self.generator, dtype=x.dtype, device=x.device)


def smoothgrad(
    scorer: Scorer,
    inputs: Tensor,
    *,
    samples: int = 50,
    sigma: float = 0.2,
    generator: torch.Generator | None = None,
    memory_budget: float = MEMORY_BUDGET,
) -> Tensor:
    """Mean of the signed gradient under Gaussian noise (Smilkov et al. 2017).

    Args:
        scorer: what is explained.
        inputs: (n, ...) samples.
        samples: gradients per sample, >= 1.
        sigma: standard deviation of the noise as a share of the range (max - min) of each sample, >= 0.
        generator: source of the noise; a fixed seed without it.
        memory_budget: bytes of one pass.
    """
    return _noise("smoothgrad", scorer, inputs, samples, sigma, generator, memory_budget)


def squaregrad(
    scorer: Scorer,
    inputs: Tensor,
    *,
    samples: int = 50,
    sigma: float = 0.2,
    generator: torch.Generator | None = None,
    memory_budget: float = MEMORY_BUDGET,
) -> Tensor:
    """Mean of the squared gradient under noise (Hooker et al. 2019); arguments as `smoothgrad`."""
    return _noise("smoothgrad_sq", scorer, inputs, samples, sigma, generator, memory_budget)


def vargrad(
    scorer: Scorer,
    inputs: Tensor,
    *,
    samples: int = 50,
    sigma: float = 0.2,
    generator: torch.Generator | None = None,
    memory_budget: float = MEMORY_BUDGET,
) -> Tensor:
    """Variance of the gradient under noise (Adebayo et al. 2018); arguments as `smoothgrad`."""
    return _noise("vargrad", scorer, inputs, samples, sigma, generator, memory_budget).clamp(min=0)


def _noise(
    kind: str,
    scorer: Scorer,
    inputs: Tensor,
    samples: int,
    sigma: float,
    generator: torch.Generator | None,
    memory_budget: float,
) -> Tensor:
    check_count("samples", samples, 1)
    if not isinstance(sigma, int | float) or not 0 <= sigma < math.inf:
        raise InputError(f"sigma: expected a share of the range of the inputs, >= 0, got {sigma!r}")
    scoring, seed = Scoring(scorer, inputs, total=True), draw_seed(generator)

    def part(x: Tensor, index: Tensor, size: int) -> Tensor:
        method = _NoiseTunnel(scoring, torch.Generator(x.device).manual_seed(seed))
        return method.attribute(  # type: ignore[no-any-return]
            x,
            nt_type=kind,
            nt_samples=samples,
            nt_samples_batch_size=max(1, min(samples, size // len(x))),
            stdevs=float(sigma),
            abs=False,
            additional_forward_args=(index,),
        )

    return by_parts(part, scorer, inputs, memory_budget).to(inputs.dtype)


def gradcam(
    scorer: Scorer,
    inputs: Tensor,
    *,
    layer: nn.Module | str | None = None,
    relu: bool = False,
    memory_budget: float = MEMORY_BUDGET,
) -> Tensor:
    """Channels of a convolution weighted by their mean gradients (Selvaraju et al. 2017), at the size of the input.

    The activations of 1-Lipschitz networks are signed, so that the positive part may be all zero: it is kept whole.

    Args:
        scorer: what is explained.
        inputs: (n, channels, height, width) or (n, channels, length).
        layer: a module of the model or its name; by default the last that keeps places, usually the activation after
            the last convolution.
        relu: return the positive part, as the paper does.
        memory_budget: bytes of one pass.

    Returns:
        (n, 1, height, width) or (n, 1, length), by linear interpolation.
    """
    chosen = find_layer(scorer.model, inputs, layer)
    method = captum.attr.LayerGradCam(Scoring(scorer, inputs, total=True), chosen)
    mode = "bilinear" if inputs.ndim == 4 else "linear"

    def part(x: Tensor, index: Tensor, _: int) -> Tensor:
        try:
            cells = method.attribute(x, additional_forward_args=(index,), relu_attributions=relu)
        except AssertionError as error:
            raise InputError(f"layer: the model does not run this {type(chosen).__name__}") from error
        if not isinstance(cells, Tensor) or cells.ndim != x.ndim:
            raise InputError(
                f"layer: expected maps (n, channels, ...) from this {type(chosen).__name__}; choose another"
            )
        return captum.attr.LayerAttribution.interpolate(cells, tuple(x.shape[2:]), mode)  # type: ignore[no-any-return]

    return by_parts(part, scorer, inputs, memory_budget)


def guided_backprop(scorer: Scorer, inputs: Tensor, *, memory_budget: float = MEMORY_BUDGET) -> Tensor:
    """Gradient in which every `nn.ReLU` passes on positive parts only (Springenberg et al. 2015); ReLU only."""
    return _modified_relu(captum.attr.GuidedBackprop, "guided_backprop", scorer, inputs, memory_budget)


def deconvolution(scorer: Scorer, inputs: Tensor, *, memory_budget: float = MEMORY_BUDGET) -> Tensor:
    """Gradient in which every `nn.ReLU` rectifies the gradient itself (Zeiler and Fergus 2014); ReLU only."""
    return _modified_relu(captum.attr.Deconvolution, "deconvolution", scorer, inputs, memory_budget)


def _modified_relu(kind: Any, name: str, scorer: Scorer, inputs: Tensor, memory_budget: float) -> Tensor:
    check_only_relu(scorer.model, inputs[:1], name)
    method = kind(Scoring(scorer, inputs, total=True))

    def part(x: Tensor, index: Tensor, _: int) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Setting backward hooks on ReLU")
            return method.attribute(x.requires_grad_(), additional_forward_args=(index,))  # type: ignore[no-any-return]

    return by_parts(part, scorer, inputs, memory_budget)
