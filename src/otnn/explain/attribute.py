"""One call for every explanation method: `attribute(model, x, target, method)`, on equal terms."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from otnn.checks import check_images
from otnn.errors import InputError
from otnn.explain.applicability import NotApplicableError
from otnn.explain.guards import draw_seed, seeded, unchanged
from otnn.explain.methods import METHODS, check_rank, complete_settings
from otnn.explain.scores import Scorer
from otnn.memory import MEMORY_BUDGET

# What torch says where a score does not depend on the inputs by differentiable operations
_NO_GRADIENT = ("have been used in the graph", "does not require grad")


def attribute(
    model: nn.Module,
    x: Tensor,
    target: Tensor | int,
    method: str | Callable[[nn.Module, Tensor, Tensor], Tensor] | Any = "saliency",
    *,
    score: str = "logit",
    steps: int | None = None,
    samples: int | None = None,
    sigma: float | None = None,
    generator: torch.Generator | None = None,
    memory_budget: float = MEMORY_BUDGET,
    **settings: Any,
) -> Tensor:
    """Signed map of what in each input speaks for (positive) or against (negative) the target.

    Twelve methods are captum's, with defaults that make sense; `otnn.explain.METHODS` tells for each name its kind, its
    settings with their defaults, and where it applies; `otnn.explain.cost` its forwards and backwards.

    Model, weights, modes, hooks and global random numbers are left as they were. The map of a method by name depends
    neither on batch mates nor on the memory budget, up to rounding.

    Args:
        model: in `eval()` mode; maps (n, ...) to scores (n, classes), or to one score z whose sign decides.
        x: (n, channels, height, width) images, (n, channels, length) signals or (n, features) rows; floats.
        target: (n,) integers, one class for all, or one-hot rows (n, classes).
        method: a name; a captum object, which explains the outputs of its own model by `.attribute(x, target=target)`;
            or a function (model, x, target) -> map. The last two take `settings` as their own keywords.
        score: what is explained: "logit", z_t; or "margin", z_t - z_j against the strongest other class j at x, for an
            OTNN divided by its Lipschitz constant (`otnn.explain.scores.Scorer`). Objects and functions: "logit" only.
        steps: of the methods that integrate.
        samples: of the methods that draw noise or masks.
        sigma: of the methods with noise, as a share of the range of each input, or with a low-pass filter.
        generator: source of all random draws; without it, every call makes the same draws.
        memory_budget: bytes that one pass may take for copies of the inputs and activations.
        **settings: others of the method, such as `baseline=`, `grid=`, `window=`, `layer=`.

    Returns:
        in the shape of x for the methods of kind "gradient" and for occlusion, LIME and Kernel SHAP; (n, 1, ...) for
        all channels together otherwise. On the device and in the dtype of x, without a graph.

    Raises:
        NotApplicableError: the method has no meaning for this model or input: gradients of a model that has none,
            Guided backprop and Deconvolution where another activation than `nn.ReLU` is seen, Grad-CAM without a
            convolution.
        InputError: an unknown method or setting, inputs, targets or a model that cannot be used, a budget too small
            for one sample, or a map that is not finite or of another shape.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
        >>> x = torch.rand(2, 1, 8, 8)
        >>> attribute(net, x, 1, "integrated_gradients", score="margin", steps=20).shape
        torch.Size([2, 1, 8, 8])
        >>> attribute(net, x, torch.tensor([0, 2]), lambda model, x, target: x - 0.5).shape
        torch.Size([2, 1, 8, 8])
        >>> attribute(net, x, 1, "guided_backprop")
        Traceback (most recent call last):
        otnn.explain.applicability.NotApplicableError: guided_backprop changes the backward pass of nn.ReLU modules, ...
    """
    given = {"steps": steps, "samples": samples, "sigma": sigma}
    settings |= {key: value for key, value in given.items() if value is not None}
    if isinstance(method, str):
        settings = complete_settings(method, settings)
    elif isinstance(method, type) or not callable(getattr(method, "attribute", method)):
        raise InputError(
            "method: expected a name, a captum object such as captum.attr.Saliency(model), or a function "
            f"(model, x, target) -> map, got {method!r}"
        )
    elif score != "logit":
        raise InputError(
            f"score: captum objects and functions choose what they explain; expected 'logit', got {score!r}"
        )
    check_images(x)
    if isinstance(method, str):
        check_rank(method, x)
    with torch.inference_mode(False), unchanged(model):
        x = x.detach().clone() if x.is_inference() else x.detach()
        scorer = _scorer(model, x, target, score)
        if not isinstance(method, str):
            return _checked(_foreign(method, scorer, x, generator, settings), x, _name(method))
        entry = METHODS[method]
        if entry.draws:
            settings["generator"] = torch.Generator().manual_seed(0) if generator is None else generator
        with parametrize.cached():
            try:
                map_ = entry.function(scorer, x, memory_budget=memory_budget, **settings)
            except RuntimeError as error:
                if any(text in str(error) for text in _NO_GRADIENT):
                    raise NotApplicableError(
                        f"{method} follows gradients, and the scores of this model have none with respect to its "
                        "inputs; take a method of perturbations, such as occlusion or rise"
                    ) from error
                raise
    return _checked(map_, x, method)


def _scorer(model: nn.Module, x: Tensor, target: Tensor | int, score: str) -> Scorer:
    """The scorer, with the refusals of torch in words."""
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    if training:
        raise InputError(f"{training[0]} is in training mode; call model.eval() before explaining")
    try:
        return Scorer(model, x, target, score)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise InputError(f"inputs: the model does not take {x.dtype} of shape {tuple(x.shape)}: {error}") from error


def _foreign(
    method: Any, scorer: Scorer, x: Tensor, generator: torch.Generator | None, settings: dict[str, Any]
) -> Any:
    """The map of a captum object or of a function."""
    target, leaf = scorer.target, x.clone().requires_grad_()
    with seeded(draw_seed(generator), x.device):
        if not hasattr(method, "attribute"):
            return method(scorer.model, leaf, target, **settings)
        with torch.no_grad():
            outputs = scorer.model(x[:1])
        if outputs.numel() == 1:
            if not bool((target == 1).all()):
                raise InputError(
                    "target: of a single output z, a captum object explains class 1 only; give a name or -z"
                )
            target = torch.zeros_like(target)
        return method.attribute(leaf, target=target if outputs.ndim == 2 else None, **settings)


def _checked(map_: Any, x: Tensor, name: str) -> Tensor:
    if not isinstance(map_, Tensor):
        raise InputError(f"{name}: expected a tensor, got {type(map_).__name__}")
    shapes = [tuple(x.shape), (len(x), 1, *x.shape[2:])] if x.ndim > 2 else [tuple(x.shape)]
    if tuple(map_.shape) not in shapes:
        expected = " or ".join(str(shape) for shape in dict.fromkeys(shapes))
        raise InputError(f"{name}: expected a map of shape {expected}, got {tuple(map_.shape)}")
    finite = torch.isfinite(map_).flatten(1).all(dim=1)
    if not bool(finite.all()):
        bad = int((~finite).nonzero()[0])
        raise InputError(f"{name}: the map of sample {bad} holds NaN or infinite values")
    return map_.detach().to(x)


def _name(method: Any) -> str:
    return getattr(method, "__name__", type(method).__name__)
