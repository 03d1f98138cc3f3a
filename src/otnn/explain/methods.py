"""The table of the methods: what each is, which settings it takes, what it costs and where it applies."""

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from torch import Tensor, nn

from otnn.checks import check_images
from otnn.errors import InputError
from otnn.explain import captum_methods, captum_perturbations, forgrad, gradcam_pp, hsic, rise, sobol
from otnn.explain.applicability import NotApplicableError, find_layer
from otnn.explain.masking import cell_grid
from otnn.explain.scores import Scorer
from otnn.memory import MEMORY_BUDGET

Kind = Literal["gradient", "perturbation", "class activation"]
Passes = Callable[[Tensor, Mapping[str, Any]], tuple[int, int]]

_RANKS = {2: "rows (n, features)", 3: "signals (n, channels, length)", 4: "images (n, channels, height, width)"}


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        function: called with a `Scorer`, the inputs, and by keyword settings, `memory_budget` and (where it draws)
            `generator`; returns signed maps in the shape of the inputs, or (n, 1, ...) for all channels together.
        kind: "gradient", "perturbation" or "class activation".
        passes: (inputs, settings) to the forwards and backwards of one sample.
        ranks: numbers of dimensions of the inputs that it takes: 2 rows, 3 signals, 4 images.
        applies: where it applies, in words.
    """

    function: Callable[..., Tensor]
    kind: Kind
    passes: Passes
    ranks: tuple[int, ...] = (2, 3, 4)
    applies: str = "any differentiable model"

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the method takes, with their defaults."""
        return {name: p.default for name, p in self._keywords().items() if name not in ("generator", "memory_budget")}

    @property
    def draws(self) -> bool:
        """Whether the method draws random numbers."""
        return "generator" in self._keywords()

    def _keywords(self) -> Mapping[str, inspect.Parameter]:
        return _keywords(self.function)


@cache
def _keywords(function: Callable[..., Tensor]) -> Mapping[str, inspect.Parameter]:
    parameters = inspect.signature(function).parameters
    return {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}


def _once(_: Tensor, __: Mapping[str, Any]) -> tuple[int, int]:
    return 1, 1


def _steps(_: Tensor, settings: Mapping[str, Any]) -> tuple[int, int]:
    return settings["steps"], settings["steps"]


def _samples(_: Tensor, settings: Mapping[str, Any]) -> tuple[int, int]:
    return settings["samples"], settings["samples"]


def _masks(_: Tensor, settings: Mapping[str, Any]) -> tuple[int, int]:
    return settings["samples"], 0


def _windows(inputs: Tensor, settings: Mapping[str, Any]) -> tuple[int, int]:
    return captum_perturbations.occlusion_windows(inputs, settings["window"], settings["stride"])[2] + 1, 0


def _cells(inputs: Tensor, settings: Mapping[str, Any]) -> tuple[int, int]:
    return settings["samples"] * (math.prod(cell_grid(inputs, settings["grid"])) + 2), 0


def _gradcam_pp(
    scorer: Scorer,
    inputs: Tensor,
    *,
    layer: nn.Module | str | None = None,
    relu: bool = False,
    memory_budget: float = MEMORY_BUDGET,
) -> Tensor:
    chosen = find_layer(scorer.model, inputs, layer)
    return gradcam_pp.gradcam_pp(scorer, inputs, layer=chosen, relu=relu, memory_budget=memory_budget)


def _forgrad(
    scorer: Scorer, inputs: Tensor, *, sigma: float | None = None, memory_budget: float = MEMORY_BUDGET
) -> Tensor:
    return forgrad.forgrad(captum_methods.saliency(scorer, inputs, memory_budget=memory_budget), sigma=sigma)


_RELU = "models whose only activation is nn.ReLU"
_CONVOLUTION = "models with a convolution"
_ANY = "any model"

METHODS: dict[str, Method] = {
    "saliency": Method(captum_methods.saliency, "gradient", _once),
    "gradient_input": Method(captum_methods.gradient_input, "gradient", _once),
    "integrated_gradients": Method(captum_methods.integrated_gradients, "gradient", _steps),
    "smoothgrad": Method(captum_methods.smoothgrad, "gradient", _samples),
    "squaregrad": Method(captum_methods.squaregrad, "gradient", _samples),
    "vargrad": Method(captum_methods.vargrad, "gradient", _samples),
    "gradcam": Method(captum_methods.gradcam, "class activation", _once, (3, 4), _CONVOLUTION),
    "gradcam_pp": Method(_gradcam_pp, "class activation", _once, (3, 4), _CONVOLUTION),
    "guided_backprop": Method(captum_methods.guided_backprop, "gradient", _once, applies=_RELU),
    "deconvolution": Method(captum_methods.deconvolution, "gradient", _once, applies=_RELU),
    "occlusion": Method(captum_perturbations.occlusion, "perturbation", _windows, applies=_ANY),
    "rise": Method(rise.rise, "perturbation", _masks, applies=_ANY),
    "lime": Method(captum_perturbations.lime, "perturbation", _masks, applies=_ANY),
    "kernel_shap": Method(captum_perturbations.kernel_shap, "perturbation", _masks, applies=_ANY),
    "sobol": Method(sobol.sobol, "perturbation", _cells, applies=_ANY),
    "hsic": Method(hsic.hsic, "perturbation", _masks, applies=_ANY),
    "forgrad": Method(_forgrad, "gradient", _once, (3, 4)),
}


def find_method(name: str) -> Method:
    """The entry of a name.

    Raises:
        InputError: an unknown name; the message lists the names.
    """
    if name not in METHODS:
        raise InputError(f"method: expected one of {', '.join(METHODS)}, got {name!r}{_guess(name, METHODS)}")
    return METHODS[name]


def complete_settings(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a method, with defaults where none is given.

    Raises:
        InputError: a setting that the method does not take.
    """
    known = find_method(name).settings
    for key in settings:
        if key not in known:
            takes = ", ".join(f"{k}=" for k in known) or "no settings"
            raise InputError(f"{name} does not take {key}=; it takes {takes}{_guess(key, known)}")
    return known | dict(settings)


def check_rank(name: str, inputs: Tensor) -> None:
    """Refuse inputs that are no images, signals or rows, or none of those that the method takes.

    Raises:
        InputError: another number of dimensions.
        NotApplicableError: a kind of input that the method has no meaning for.
    """
    method = find_method(name)
    if inputs.ndim not in _RANKS:
        raise InputError(f"inputs: expected {', '.join(reversed(_RANKS.values()))}, got shape {tuple(inputs.shape)}")
    if inputs.ndim not in method.ranks:
        raise NotApplicableError(
            f"{name} takes {' or '.join(_RANKS[rank] for rank in reversed(method.ranks))}, got "
            f"{_RANKS[inputs.ndim]} {tuple(inputs.shape)}"
        )


def cost(method: str, inputs: Tensor, settings: Mapping[str, Any] | None = None) -> tuple[int, int]:
    """How many forwards and backwards of a sample a method makes for each input.

    Beside these, every call of `attribute` makes the few forwards that find the number of classes, the rival, and how
    much memory a sample takes.

    Args:
        method: a name of `METHODS`.
        inputs: (n, ...) as for `attribute`; the numbers hold for each of the n.
        settings: as for `attribute`; defaults where none is given.

    Raises:
        InputError: an unknown name or setting, or inputs that the method does not take.

    Example:
        >>> import torch
        >>> cost("integrated_gradients", torch.rand(2, 1, 28, 28), {"steps": 20})
        (20, 20)
        >>> cost("occlusion", torch.rand(2, 1, 28, 28))
        (170, 0)
    """
    check_images(inputs)
    check_rank(method, inputs)
    return METHODS[method].passes(inputs, complete_settings(method, settings or {}))


def _guess(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]}?" if close else ""
