"""The figure of the paper: two Koch snowflakes, a network, the exact optimum, and an ordinary network beside them."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from otnn.data import Split
from otnn.data.snowflakes import snowflakes
from otnn.errors import InputError
from otnn.files import json_bytes, write_whole
from otnn.lipschitz import bound
from otnn.losses import HKRLoss
from otnn.manifold import keep_on_manifold
from otnn.models import Classifier
from otnn.nn import MaxMin, OrthoLinear, UnitNormLinear
from otnn.report.levels import Panel, levels_picture
from otnn.report.partner_arrows import arrows_picture
from otnn.run.local_global import local_global
from otnn.run.progress import counting, steps_bar
from otnn.run.train import versions
from otnn.transport import Measures, TransportProblem, TransportSolution, measure, solve
from otnn.transport.audit import hypotheses
from otnn.transport.costs import distances
from otnn.transport.measures import QUANTILES, Function, values_and_gradients

PICTURE, ARROWS, FIGURES = "snowflakes.png", "counterfactual-snowflakes.png", "snowflakes.json"
HINGE_WEIGHT, MARGIN = 10.0, 0.05
# Arrows on each snowflake
_ARROWS = 45


@dataclass(frozen=True)
class Bar:
    """What the OTNN is held to.

    Attributes:
        name: of the figure.
        path: where it stands in the part of snowflakes.json that belongs to a network.
        value: the bar.
        below: whether the figure is to stay below it.
        form: how it is printed.
        table: the table of snowflakes.json that holds that part, if it is not at the top.
    """

    name: str
    path: tuple[str | int, ...]
    value: float
    below: bool = False
    form: str = "{:.4f}"
    table: tuple[str, ...] = ()


_MEDIAN = QUANTILES.index(0.5)
BARS = (
    Bar("gap", ("gap",), 0.03, below=True, form="{:.2%}"),
    Bar("mean slackness", ("slackness", "mean"), 0.97),
    Bar("median cosine, positives", ("cosine_x", "quantiles", _MEDIAN), 0.997),
    Bar("median cosine, negatives", ("cosine_z", "quantiles", _MEDIAN), 0.997),
    Bar("moved onto the zero level", ("reached",), 0.8, form="{:.1%}"),
    Bar("training, CPU seconds", (), 60.0, below=True, form="{:.1f}", table=("seconds",)),
)


@dataclass(frozen=True)
class Recipe:
    """How both networks are trained, on all points at once, by Adam on a one-cycle schedule.

    Orthogonal weights bear rates that would break an ordinary network, and need them. The biases want a fifth of it.
    Depth buys the direction of the gradient, width does not.

    Attributes:
        width: units of each hidden layer.
        depth: hidden layers.
        steps: of the optimizer.
        learning_rate: its peak, for the weights.
        bias_share: the peak for the biases, as a share of that.
        twin_depth: hidden layers of the ordinary network, which does worse where it is deeper.
        twin_steps: its steps.
        twin_learning_rate: its peak.
    """

    width: int = 32
    depth: int = 15
    steps: int = 2500
    learning_rate: float = 0.25
    bias_share: float = 0.2
    twin_depth: int = 4
    twin_steps: int = 3000
    twin_learning_rate: float = 2e-3


def run_snowflakes(
    out: Path, *, recipe: Recipe | None = None, seed: int = 0, count: int = 500, force: bool = False
) -> dict[str, Any]:
    """Train, solve, measure and draw: writes the figure, its arrows and snowflakes.json into a folder.

    Args:
        out: the folder; made where it is missing.
        recipe: how the networks are trained.
        seed: of both networks.
        count: points on each snowflake.
        force: overwrite files that exist.

    Returns:
        The content of snowflakes.json.

    Raises:
        InputError: a file exists, or the folder cannot be made.
    """
    for name in (PICTURE, ARROWS, FIGURES):
        if (out / name).exists() and not force:
            raise InputError(f"{out / name}: exists already; choose another --out, or overwrite it with --force")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be made a folder ({error.strerror}); choose another --out") from None
    recipe = recipe or Recipe()
    data = snowflakes(count)
    x, z = data.images[data.labels == 1], data.images[data.labels == 0]
    with counting("solving the exact problem") as told:
        problem = TransportProblem(x, z, hinge_weight=HINGE_WEIGHT, margin=MARGIN)
        solution = solve(problem, on_round=lambda last: told(f"round {last.number}, gap {last.gap:.0e}"))
        w1 = solve(TransportProblem(x, z, hinge_weight=0.0)).transport_cost
    network, seconds = train_otnn(data, recipe, seed)
    twin, twin_seconds = train_twin(data, recipe, seed)
    functions = {
        "otnn": potential_of(network),
        "optimum": _optimum(solution, data),
        "unconstrained": _scaled(twin, data),
    }
    measures = {name: measure(function, solution, w1, seed=seed) for name, function in functions.items()}
    ways = {name: local_global(function, solution) for name, function in functions.items()}
    content = {
        "format": 1,
        "seed": seed,
        "points": count,
        "hinge_weight": HINGE_WEIGHT,
        "margin": MARGIN,
        "recipe": dataclasses.asdict(recipe),
        "versions": versions(),
        "threads": 1,
        "seconds": {"otnn": round(seconds, 3), "unconstrained": round(twin_seconds, 3)},
        "hypotheses": dataclasses.asdict(hypotheses(solution)),
        "solver_gap": solution.gap,
        **{name: dataclasses.asdict(found) for name, found in measures.items()},
        "local_global": {name: way.figures() for name, way in ways.items()},
    }
    with counting("drawing"):
        titles = {
            "otnn": f"OTNN, gap {_percent(measures['otnn'])}",
            "optimum": "exact optimum f*",
            "unconstrained": f"ordinary network, gap {_percent(measures['unconstrained'])}",
        }
        # each sample of the optimum takes the extension that is smooth there; the level sets take the mean of both
        levels = functions | {"optimum": solution.potential}
        panels = [Panel(titles[name], *_grid(levels[name]), *_segments(functions[name], data)) for name in functions]
        picture = levels_picture(data.images.numpy(), data.labels.numpy(), panels)
        every = max(1, count // _ARROWS)
        arrows = arrows_picture(
            data.images.numpy(), data.labels.numpy(), [ways[name].panel(titles[name], every) for name in ways]
        )
    write_whole(out / PICTURE, picture)
    write_whole(out / ARROWS, arrows)
    write_whole(out / FIGURES, json_bytes(content))
    return content


def train_otnn(data: Split, recipe: Recipe, seed: int) -> tuple[Classifier, float]:
    """A dense OTNN trained by binary hKR on all points at once, and the CPU seconds that it took."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for k in range(recipe.depth):
        layers += [OrthoLinear(recipe.width if k else 2, recipe.width), MaxMin()]
    model = Classifier(nn.Sequential(*layers), UnitNormLinear(recipe.width, 1), (2,))
    loss = HKRLoss(margin=MARGIN, hinge_weight=HINGE_WEIGHT)
    rates = (recipe.learning_rate, recipe.bias_share * recipe.learning_rate)
    return model, _train(model, loss, data, rates, recipe.steps, "OTNN")


def train_twin(data: Split, recipe: Recipe, seed: int) -> tuple[nn.Module, float]:
    """An ordinary network of the same width, trained by cross-entropy, and the CPU seconds that it took."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for k in range(recipe.twin_depth):
        layers += [nn.Linear(recipe.width if k else 2, recipe.width), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(recipe.width, 1))
    for layer in layers[::2]:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # type: ignore[arg-type]
    entropy = nn.BCEWithLogitsLoss()
    rates = (recipe.twin_learning_rate, recipe.twin_learning_rate)

    def loss(scores: Tensor, labels: Tensor) -> Tensor:
        value: Tensor = entropy(scores.squeeze(1), labels.to(scores.dtype))
        return value

    return model, _train(model, loss, data, rates, recipe.twin_steps, "ordinary network")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices this small leave a second thread waiting, and make it tenfold slower where the cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _train(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    data: Split,
    rates: tuple[float, float],
    steps: int,
    name: str,
) -> float:
    """Train in place, and return the seconds of the processor that it took: on one thread, those of a quiet machine."""
    start = time.process_time()
    groups: list[dict[str, Any]] = [{"params": []}, {"params": []}]
    for parameter_name, parameter in model.named_parameters():
        groups[parameter_name.endswith("bias")]["params"].append(parameter)
    optimizer = torch.optim.Adam(groups, lr=rates[0])
    hooks = keep_on_manifold(optimizer, model)
    schedule = OneCycleLR(optimizer, max_lr=list(rates), total_steps=steps + 1, cycle_momentum=False)
    with _one_thread(), steps_bar(name, steps) as show:
        for step in range(steps):
            optimizer.zero_grad()
            value = loss(model(data.images), data.labels)
            value.backward()
            optimizer.step()
            schedule.step()
            show(step + 1, value)
    hooks.remove()
    model.eval()
    return time.process_time() - start


def potential_of(model: Classifier) -> Function:
    """The one output in float64, divided by the proven bound of the network: 1-Lipschitz."""
    model = model.double()
    constant = bound(model).constant
    return lambda inputs: model(inputs).squeeze(1) / constant


def _scaled(model: nn.Module, data: Split) -> Function:
    """The logit of an ordinary network over its steepest slope between two points: 1-Lipschitz on them, not beyond."""
    model = model.double()
    points = data.images.double()
    with torch.no_grad():
        values = model(points)
        slopes = (values - values.T).abs() / distances(points, points).fill_diagonal_(torch.inf)
        constant = float(slopes.max())
    return lambda inputs: model(inputs).squeeze(1) / constant


def _optimum(solution: TransportSolution, data: Split) -> Function:
    """The exact potential, at every point by the extension that is smooth at the class of the nearest sample."""
    points = data.images.double()

    def function(inputs: Tensor) -> Tensor:
        nearest = distances(inputs.detach(), points).argmin(dim=1)
        return solution.potential(inputs, data.labels[nearest])

    return function


def _grid(function: Function, size: int = 201, end: float = 1.8) -> tuple[Any, Any]:
    """Values of a function on a square: (places of each axis, values (rows, columns))."""
    axis = torch.linspace(-end, end, size, dtype=torch.float64)
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    with torch.no_grad():
        points = torch.stack([columns.flatten(), rows.flatten()], dim=1)
        values = torch.cat([function(part) for part in points.split(4096)])
    return axis.numpy(), values.view(size, size).numpy()


def _segments(function: Function, data: Split) -> tuple[Any, Any]:
    """The segments [x, x - f(x) grad f(x)] of all samples: (starts, ends)."""
    points = data.images.double()
    values, gradients = values_and_gradients(function, points)
    return points.numpy(), (points - values.unsqueeze(1) * gradients).numpy()


def _percent(found: Measures) -> str:
    return "-" if found.gap is None else f"{100 * found.gap:.2g} %"


def figure(content: Mapping[str, Any], network: str, bar: Bar) -> float | None:
    """What a network reached of a figure; None where it has none."""
    value: Any = content
    for key in (*bar.table, network, *bar.path):
        value = value.get(key) if isinstance(value, Mapping) else value[key]
        if value is None:
            return None
    return float(value)


def missed(content: Mapping[str, Any]) -> list[str]:
    """The names of the bars that the OTNN missed."""
    short = []
    for bar in BARS:
        value = figure(content, "otnn", bar)
        if value is None or not (value <= bar.value if bar.below else value >= bar.value):
            short.append(bar.name)
    return short
