"""The model parameter randomisation test: a map that does not change when the weights do explains nothing."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from otnn.checks import check_images
from otnn.errors import InputError
from otnn.manifold import Manifold
from otnn.memory import MEMORY_BUDGET
from otnn.metrics.maps import Explain, call_size, explain_pixels, is_constant
from otnn.metrics.result import MetricResult, summarise
from otnn.metrics.statistics import correlation, ranks

# Passes after which power iteration has found the norm of a redrawn weight
_SETTLE = 30


def mprt(
    model: nn.Module,
    explain: Explain,
    inputs: Tensor,
    *,
    forwards_per_map: int = 1,
    generator: torch.Generator | None = None,
    memory_budget: float = MEMORY_BUDGET,
) -> MetricResult:
    """Similarity of the maps to those of the model with its layers redrawn one by one from the top. Lower is better.

    The layers stay redrawn (cascading); after each, Spearman of the signed maps (channel mean) with the original ones.
    The score of a sample is the mean over the layers. Constrained weights are redrawn on their manifold, others by the
    layer's `reset_parameters`, and raw weights behind a parametrisation as noise of their size, so that a redrawn OTNN
    is one. The model is restored bit by bit, whatever happens.
    A sample whose original map is constant or not finite is left out and told in `undefined`; where a redrawn model
    gives such a map, nothing is left of the original one, and the similarity counts as 0. Adebayo et al. (2018).

    Args:
        model: in `eval()` mode; changed in place for a while.
        explain: function of inputs (m, ...) and of the samples `index` (m,) that they are, to maps of this very model:
            a copy or cached weights would not change.
        inputs: (n, ...) the samples.
        forwards_per_map: what one map costs, to report the forwards.
        generator: draws the weights; the global state of torch's generators is left as it was.
        memory_budget: bytes of the inputs of one call of `explain`, which 256 never exceed.

    Returns:
        In [-1, 1]; `details`: "spearman" and "cosine" (n, layers) after each layer, `settings["layers"]` their names.

    Raises:
        InputError: a model without parameters or in training mode, or maps that do not fit.

    Example:
        >>> from otnn.models import build
        >>> model = build("dense", (1, 4, 4), 2, widths=(8,)).eval()
        >>> result = mprt(model, lambda x, index: x, torch.rand(3, 1, 4, 4))
        >>> result.settings["layers"], round(result.mean, 6)
        (['head', 'body.2'], 1.0)
    """
    check_images(inputs)
    if model.training:
        raise InputError("the model is in training mode; call model.eval() before explaining")
    layers = layers_from_top(model, inputs)
    if not layers:
        raise InputError("model: expected layers with parameters, got none to randomise")
    n, size = len(inputs), call_size(inputs, memory_budget)
    index = torch.arange(n, device=inputs.device)

    def maps() -> tuple[Tensor, Tensor]:
        parts = [explain_pixels(explain, inputs[i], i, "explain") for i in index.split(size)]
        return torch.cat([values for values, _ in parts]), torch.cat([finite for _, finite in parts])

    own, finite = maps()
    undefined, own_ranks = is_constant(own) | ~finite, ranks(own)
    ranked, cosines = [], []
    with restored(model), _seeded(model, generator):
        for _, layer in layers:
            redraw(layer)
            now, _ = maps()
            ranked.append(_or_zero(correlation(own_ranks, ranks(now))))
            cosines.append(_cosine(own, now))
    values = torch.stack(ranked, dim=1)
    made = n * (len(layers) + 1)
    return summarise(
        "mprt",
        torch.where(undefined, torch.nan, values.mean(dim=1)),
        "down",
        signed=True,
        undefined=undefined,
        counted_as="left out",
        forwards=made * forwards_per_map,
        maps=made,
        details={"spearman": values, "cosine": torch.stack(cosines, dim=1)},
        settings={"layers": [name for name, _ in layers]},
    )


def layers_from_top(model: nn.Module, inputs: Tensor) -> list[tuple[str, nn.Module]]:
    """The layers that own parameters, the last one that runs first; those that do not run come last.

    One sample passes through the model to tell the order.
    """
    order: dict[nn.Module, int] = {}
    named = [
        (name, module)
        for name, module in model.named_modules()
        if "parametrizations" not in name.split(".") and _owns_parameters(module)
    ]

    def ran(module: nn.Module, _: object) -> None:
        order[module] = len(order)

    handles = [module.register_forward_pre_hook(ran) for _, module in named]
    try:
        with torch.no_grad():
            model(inputs[:1])
    finally:
        for handle in handles:
            handle.remove()
    return sorted(named, key=lambda pair: -order.get(pair[1], -1))


@torch.no_grad()
def redraw(layer: nn.Module) -> None:
    """Draw the parameters of one layer anew, from torch's global generator, where its constraints let them be.

    * `manifolds` (ours): from the uniform law of the manifold.
    * a torch parametrisation: its raw tensors as noise of their root mean square, since `reset_parameters` would write
      to a weight that is thrown away.
    * else `reset_parameters`, or, without it, noise of the root mean square.
    """
    manifolds: dict[str, Manifold] = getattr(layer, "manifolds", {})
    raw = list(layer.parameters(recurse=False))
    reset = getattr(layer, "reset_parameters", None)
    if parametrize.is_parametrized(layer):
        chains = [chain for chain in layer.parametrizations.values() if isinstance(chain, nn.Module)]  # type: ignore[operator]
        raw += [parameter for chain in chains for parameter in chain.parameters()]
        _noise(raw)
        for chain in chains:
            mode = chain.training
            chain.train()  # lets power iteration find the norm of the new weight
            for _ in range(_SETTLE):
                chain()
            chain.train(mode)
    elif callable(reset):
        reset()
    else:
        _noise(raw)
    for name, manifold in manifolds.items():
        parameter = layer.get_parameter(name)
        parameter.copy_(manifold.sample(*parameter.shape, dtype=parameter.dtype))


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Put parameters and buffers back bit by bit at the end, also after an exception."""
    kept = [(tensor, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, copy in kept:
                tensor.copy_(copy)


@contextmanager
def _seeded(model: nn.Module, generator: torch.Generator | None) -> Iterator[None]:
    """Seed the global generators, from which layers draw, by one draw of `generator`; put them back at the end."""
    device = torch.device("cpu") if generator is None else generator.device
    seed = int(torch.randint(2**62, (1,), generator=generator, device=device))
    used = {tensor.device for tensor in model.parameters() if tensor.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(used, key=str)):
        torch.manual_seed(seed)
        yield


def _owns_parameters(module: nn.Module) -> bool:
    return parametrize.is_parametrized(module) or next(module.parameters(recurse=False), None) is not None


def _noise(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        if parameter.is_floating_point():
            parameter.copy_(torch.randn_like(parameter) * parameter.square().mean().sqrt())


def _or_zero(similarity: Tensor) -> Tensor:
    return torch.where(similarity.isnan(), 0.0, similarity)


def _cosine(first: Tensor, second: Tensor) -> Tensor:
    """Cosine of maps (n, pixels): (n,), 0 where one of them is 0."""
    return torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=1, eps=1e-300)
