"""No point within the radius changes the prediction: exact distances on linear models, searches on others."""

import copy
import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from otnn.certify import certify
from otnn.errors import InputError
from otnn.lipschitz import bound
from otnn.lipschitz.forward_error import BoundedExecution
from otnn.lipschitz.graph import trace
from otnn.losses import SoftHKRLoss
from otnn.manifold import keep_on_manifold
from otnn.models import Classifier, build, predict
from otnn.nn import Centering, MaxMin, OrthoConv2d, UnitNormLinear
from tests.exact import Residual, Scaled, Vector, exactly, fractions, product
from tests.operators import convolution_matrix

SHAPE = (1, 3, 4)


def images(count: int, seed: int = 1) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def linear_model(outputs: int, *, scale: float = 1.0, multilabel: bool = False, seed: int = 0) -> Classifier:
    """scores = W P (x - 1/2) scale + b, with P a signed permutation: the body's bound is its norm."""
    generator = torch.Generator().manual_seed(seed)
    head, turn = nn.Linear(12, outputs), nn.Linear(12, 12, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(outputs, 12, generator=generator))
        head.bias.copy_(0.2 * torch.randn(outputs, generator=generator))
        signs = torch.randn(12, generator=generator).sign()
        turn.weight.copy_(scale * (torch.eye(12) * signs)[torch.randperm(12, generator=generator)])
    body = nn.Sequential(Centering(torch.tensor([0.5])), nn.Flatten(), turn)
    return Classifier(body, head, SHAPE, multilabel=multilabel).eval()


def boundaries(model: Classifier, sample: Tensor) -> list[list[Fraction]]:
    """For each decision of a linear model the squares of the exact distances to its boundaries."""
    body = nn.Sequential(*model.body, model.head)
    scores, _ = exactly(body, fractions(sample), SHAPE)
    zero, _ = exactly(body, [Fraction(0)] * 12, SHAPE)
    columns = [exactly(body, [Fraction(int(i == j)) for j in range(12)], SHAPE)[0] for i in range(12)]
    rows = [[column[k] - zero[k] for column in columns] for k in range(len(scores))]

    def square(gap: Fraction, row: Vector) -> Fraction:
        return gap**2 / sum(entry**2 for entry in row)

    if model.multilabel or len(scores) == 1:
        return [[square(score, row)] for score, row in zip(scores, rows, strict=True)]
    top = max(range(len(scores)), key=lambda k: scores[k])
    others = [k for k in range(len(scores)) if k != top]
    return [[square(scores[top] - scores[k], [a - b for a, b in zip(rows[top], rows[k], strict=True)]) for k in others]]


def assert_radius(radius: float, squares: list[Fraction], loss: float) -> None:
    """At most the nearest distance, with no tolerance, and hardly less."""
    nearest = min(squares)
    assert Fraction(radius) ** 2 <= nearest, "the radius reaches beyond the boundary"
    assert radius >= (1 - loss) * math.sqrt(nearest), "the radius is too small"


HEADS = {"one output": (1, False), "two outputs": (2, False), "classes": (5, False), "labels": (3, True)}


# What rounding may cost: a share, 1e-9 in real arithmetic, and in float32 some 1e-6 of the size of the scores
@pytest.mark.parametrize(("arithmetic", "loss", "lost"), [("real", 1e-9, 0.0), ("float32", 1e-4, 2e-5)])
@pytest.mark.parametrize("scale", [1.0, 0.125, 30.0])
@pytest.mark.parametrize("kind", HEADS)
def test_the_radius_of_a_linear_model_is_the_distance_to_its_boundary(
    kind: str, scale: float, arithmetic: str, loss: float, lost: float
) -> None:
    outputs, multilabel = HEADS[kind]
    model, x = linear_model(outputs, scale=scale, multilabel=multilabel), images(20)
    found = certify(model, x, arithmetic=arithmetic)
    assert torch.equal(found.prediction, predict(model(x), multilabel))
    assert found.reason == ("",) * 20
    for sample, radii in zip(x, found.radius.view(20, -1).tolist(), strict=True):
        for radius, squares in zip(radii, boundaries(model, sample), strict=True):
            assert_radius(radius, squares, loss + lost / math.sqrt(min(squares)))


WRONG: dict[str, Callable[[Classifier, Tensor], Tensor]] = {
    "sqrt(2) for any head": lambda model, gap: gap / (math.sqrt(2) * bound(model.body).constant),
    "the constant of the whole map": lambda model, gap: gap / bound(model).constant,
    "the head twice": lambda model, gap: gap / (math.sqrt(2) * bound(model).constant * _longest_row(model)),
    "the body forgotten": lambda model, gap: gap / _longest_row(model),
    "the longest row": lambda model, gap: gap / (2 * bound(model.body).constant * _longest_row(model)),
}


def _longest_row(model: Classifier) -> float:
    return float(model.head.weight.detach().norm(dim=1).max())


@pytest.mark.parametrize("name", WRONG)
def test_control_wrong_formulas_do_not_pass(name: str) -> None:
    model, x = linear_model(4, scale=3.0), images(20)
    radii = WRONG[name](model, certify(model, x).logit_gap).tolist()
    refuted = 0
    for sample, radius in zip(x, radii, strict=True):
        try:
            assert_radius(radius, boundaries(model, sample)[0], 1e-9)
        except AssertionError:
            refuted += 1
    assert refuted > 10


@pytest.mark.parametrize("outputs", [2, 3])
def test_rows_normalised_one_by_one_can_be_2_apart(outputs: int) -> None:
    """A radius of gap / sqrt(2), right for orthogonal rows, is broken by a step of 0.6 gap."""
    head = UnitNormLinear(12, outputs)
    with torch.no_grad():
        head.weight[1] = -head.weight[0]
        head.bias[:2] = 1.0
    model = Classifier(nn.Sequential(nn.Flatten()), head, SHAPE).eval()
    x = images(1)
    found = certify(model, x)
    gap, own = float(found.logit_gap), int(found.prediction)
    assert float(found.radius) == pytest.approx(gap / 2, rel=1e-6)
    moved = x.double() - (0.6 * gap * head.weight[own]).view_as(x)
    assert int(predict(copy.deepcopy(model).double()(moved))) != own


def test_the_nearest_boundary_need_not_be_that_of_the_runner_up() -> None:
    head = nn.Linear(2, 3)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[5.0, 0.0], [-5.0, 0.0], [4.0, 0.0]]))
        head.bias.copy_(torch.tensor([0.0, 4.0, 0.0]))
    model = Classifier(nn.Sequential(), head, (2,)).eval()
    found = certify(model, torch.tensor([[0.5, 0.5]]))
    assert float(found.logit_gap) == 0.5  # to class 2, whose boundary is 0.5 away; that of class 1 is 0.1 away
    assert float(found.radius) == pytest.approx(0.1, rel=1e-9)


def test_a_normalisation_inside_the_model_scales_the_radius() -> None:
    """Outside of it, a radius is one in divided units: of pixels it is wrong by the deviation."""
    inner = linear_model(1)
    inside = Classifier(nn.Sequential(Scaled(4.0), *inner.body), inner.head, SHAPE).eval()
    x = 0.2 * images(10)
    outside = certify(inner, 4 * x)
    found = certify(inside, x)
    assert torch.allclose(found.radius, outside.radius / 4, rtol=1e-6)
    for sample, radius in zip(x, found.radius.tolist(), strict=True):
        assert Fraction(radius) ** 2 <= boundaries(inner, 4 * sample)[0][0] / 16
    with pytest.raises(InputError, match=r"^inputs: expected values in \[0, 1\], got .* normalisation"):
        certify(inner, (x - 0.5) / 0.25)


# --- every direction ------------------------------------------------------------------------------------------------


def planar(kind: str) -> Classifier:
    """A network of two inputs, whose plane can be searched."""
    body: list[nn.Module] = [nn.Linear(2, 8), MaxMin(), nn.Linear(8, 8), MaxMin()]
    if kind == "residual":
        body = [nn.Linear(2, 6), Residual(nn.Linear(6, 6), nn.ReLU()), nn.Sequential(Residual(nn.Linear(6, 6)))]
    features = 6 if kind == "residual" else 8
    outputs, multilabel = HEADS.get(kind, HEADS["classes"])
    model = Classifier(nn.Sequential(*body), nn.Linear(features, outputs), (2,), multilabel=multilabel).eval()
    with torch.no_grad():  # every boundary passes through the middle
        model.head.bias.sub_(model(torch.full((1, 2), 0.5)).squeeze(0))
    return model


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", [*HEADS, "residual"])
@pytest.mark.parametrize("arithmetic", ["real", "float32"])
def test_no_direction_changes_the_prediction_of_a_small_network(kind: str, seed: int, arithmetic: str) -> None:
    torch.manual_seed(seed)
    model, x = planar(kind), torch.rand(12, 2)
    found = certify(model, x, arithmetic=arithmetic)
    exact = copy.deepcopy(model).double() if arithmetic == "real" else model
    dtype = torch.float64 if arithmetic == "real" else torch.float32
    angles = torch.linspace(0, 2 * math.pi, 721, dtype=torch.float64)
    ring = torch.stack([angles.cos(), angles.sin()], dim=1)
    steps = torch.cat([torch.linspace(0.02, 1, 25, dtype=torch.float64), 1 - torch.logspace(-2, -6, 5)]).view(-1, 1, 1)
    flips = 0
    for sample, own, radii in zip(x, found.prediction, found.radius.view(12, -1), strict=True):
        for index, radius in enumerate(radii):
            for reach in (1.0, 20.0):
                points = (sample.double() + reach * radius * steps * ring).view(-1, 2).to(dtype)
                decided = predict(exact(points), model.multilabel)
                changed = decided[:, index] != own[index] if model.multilabel else decided != own
                near = (points.double() - sample.double()).norm(dim=1) < radius
                assert not bool((changed & near).any())
                flips += bool(changed.any())
    assert flips > 2  # boundaries are found further away


# --- ascent ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> tuple[Classifier, Tensor, Tensor]:
    """A small network trained on three noisy patterns."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(3)
    patterns = torch.rand(3, *SHAPE, generator=generator)
    y = torch.arange(60) % 3
    x = (patterns[y] + 0.15 * torch.randn(60, *SHAPE, generator=generator)).clamp(0, 1)
    model = build("dense", SHAPE, 3, widths=(16, 16))
    loss = SoftHKRLoss(torch.full((3,), 1 / 3), margin=0.3, hinge_weight=10.0)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    keep_on_manifold(optimizer, model)
    for _ in range(60):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    return model.eval(), x, y


def worst_margin(model: Classifier, x: Tensor, own: Tensor, radius: Tensor, steps: int = 40) -> Tensor:
    """Ascent on the largest rival's margin within `radius`, from three starts; > 0 if the prediction changes."""
    exact, x = copy.deepcopy(model).double(), x.double()
    worst = torch.full((len(x),), -math.inf, dtype=torch.float64)
    size = radius.view(-1, 1, 1, 1)
    for start in range(3):
        delta = torch.zeros_like(x) if start == 0 else torch.randn_like(x)
        delta = F.normalize(delta.flatten(1)).view_as(x) * size
        for step in range(steps):
            delta.requires_grad_()
            scores = exact(x + delta)
            rivals = scores.masked_fill(F.one_hot(own, scores.shape[1]).bool(), -math.inf).amax(dim=1)
            margin = rivals - scores.gather(1, own.unsqueeze(1)).squeeze(1)
            worst = torch.maximum(worst, margin.detach())
            (gradient,) = torch.autograd.grad(margin.sum(), delta)
            delta = delta.detach() + size * 2 / (step + 2) * F.normalize(gradient.flatten(1)).view_as(x)
            delta = delta * (size / delta.flatten(1).norm(dim=1).view_as(size).clamp(min=1e-300)).clamp(max=1)
    return worst


def test_no_adversarial_point_lies_within_the_radius(trained: tuple[Classifier, Tensor, Tensor]) -> None:
    model, x, y = trained
    found = certify(model, x)
    assert float((found.prediction == y).double().mean()) > 0.9
    assert float(found.radius.mean()) > 0.1
    assert worst_margin(model, x, found.prediction, found.radius).max() < 0  # no tolerance
    beyond = worst_margin(model, x, found.prediction, 2.5 * found.radius)
    assert float((beyond > 0).double().mean()) > 0.8  # the search is able


@pytest.mark.parametrize(
    ("architecture", "shape", "widths"),
    [
        ("dense", SHAPE, (6,)),
        ("dense", SHAPE, (20, 10)),
        ("conv", (1, 8, 8), (4, 4, 8)),
        ("resnet", (1, 8, 8), (4, 4, 8)),
    ],
)
@pytest.mark.parametrize("constrained", [True, False])
def test_no_adversarial_point_of_random_networks(
    architecture: str, shape: tuple[int, ...], widths: tuple[int, ...], constrained: bool
) -> None:
    model = build(architecture, shape, 4, widths=widths, constrained=constrained).eval()
    x = torch.rand(20, *shape)
    found = certify(model, x)
    assert float(found.radius.min()) > 0
    assert worst_margin(model, x, found.prediction, found.radius, 20).max() < 0


# --- rounding --------------------------------------------------------------------------------------------------------


def rounded_below(points: Tensor, ways: Tensor) -> Tensor:
    """Float32 points beside float64 ones, each coordinate moved to the side that `ways` says."""
    nearest = points.float()
    return torch.nextafter(nearest, nearest + ways.float().sign())


def test_the_search_for_rounding_breaks_the_radius_of_exact_arithmetic_but_not_that_of_float32() -> None:
    """784 pixels, and scores that cancel: float32 decides differently from the map that it stands for."""
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(784, 1)
    with torch.no_grad():
        head.weight.copy_(torch.rand(1, 784, generator=generator) + 0.5)
        head.bias.fill_(-392.0)
    model = Classifier(nn.Sequential(), head, (784,)).eval()
    x = torch.rand(200, 784, generator=generator)
    x = (x - ((model(x).detach().double() - 2e-4) * head.weight / head.weight.norm() ** 2).float()).clamp(0, 1)
    broken = {}
    for arithmetic in ("real", "float32"):
        found = certify(model, x, arithmetic=arithmetic)
        way = F.normalize(-(2 * found.prediction - 1).unsqueeze(1) * head.weight.detach().double())
        flipped = torch.zeros(200, dtype=torch.bool)
        for factor in (1 - 1e-7, 0.999, 0.99, 0.9, 0.5, 0.0):
            for trial in range(20):
                noise = torch.randn(way.shape, generator=generator) if trial else way
                points = rounded_below(x + factor * found.radius.unsqueeze(1) * way, noise)
                near = (points.double() - x.double()).norm(dim=1) < found.radius
                flipped |= (predict(model(points)) != found.prediction) & near
        broken[arithmetic] = int(flipped.sum())
    assert broken["float32"] == 0
    assert broken["real"] > 20


@pytest.mark.parametrize("seed", [0, 13, 16])
def test_the_kernel_that_executes_is_the_one_that_is_bounded(seed: int) -> None:
    """Factors multiplied in float64 give another kernel than in float32: its norm may be above that one's bound."""
    torch.manual_seed(seed)
    layer, squares = OrthoConv2d(1, 4, 3, padding=1, bias=False), []
    head = nn.Linear(400, 1, bias=False)
    model = Classifier(nn.Sequential(layer, nn.Flatten()), head, (1, 10, 10)).eval()
    matrices = [
        convolution_matrix(kernel, (10, 10), padding=1) for kernel in (layer.double().weight, layer.float().weight)
    ]
    left, _, right = torch.linalg.svd(matrices[0], full_matrices=False)
    with torch.no_grad():
        head.weight.copy_(1000 * left[:, :1].T)
    x = (0.5 + 0.4 * right[0] / right[0].abs().max()).view(1, 1, 10, 10)
    for matrix in matrices:
        row = product(matrix.T, fractions(head.weight))
        score = sum((a * b for a, b in zip(row, fractions(x), strict=True)), Fraction(0))
        squares.append(score**2 / sum((entry**2 for entry in row), Fraction(0)))
    assert Fraction(float(certify(model, x).radius)) ** 2 <= max(squares)


def test_numbers_that_would_overflow_within_the_radius_are_out_of_reach() -> None:
    largest = torch.finfo(torch.float32).max
    first, head = nn.Linear(1, 2), nn.Linear(2, 1)
    with torch.no_grad():
        first.weight.fill_(3.4e38)
        first.bias.fill_(largest)
        head.weight.copy_(torch.tensor([[1e-30, -1e-30]]))
        head.bias.fill_(1000.0)
    model = Classifier(nn.Sequential(first), head, (1,)).eval()
    x = torch.zeros(1, 1)
    radius = float(certify(model, x, arithmetic="float32").radius)
    moved = torch.tensor([[1e-7]])
    assert int(predict(model(x))) == 1
    assert int(predict(model(moved))) == 0  # infinity less infinity is NaN
    assert radius <= 1e-7


def test_the_radius_of_float32_is_smaller(trained: tuple[Classifier, Tensor, Tensor]) -> None:
    model, x, _ = trained
    real, executed = certify(model, x), certify(model, x, arithmetic="float32")
    assert bool((executed.radius < real.radius).all())
    assert bool((executed.radius > 0.99 * real.radius - 1e-4).all())
    assert torch.equal(real.prediction, executed.prediction)
    assert (real.arithmetic, executed.arithmetic) == ("real", "float32")


@pytest.mark.parametrize("kind", HEADS)
def test_the_radius_of_float32_takes_the_errors_of_both_ends_off(kind: str) -> None:
    """(gap - w (E + E')) / (L |row| + w growth), with w = sqrt(2) for the errors of two scores together."""
    outputs, multilabel = HEADS[kind]
    model, x = linear_model(outputs, multilabel=multilabel, scale=3.0), images(10)
    run = BoundedExecution(trace(model), torch.float32)(x)
    found = certify(model, x, arithmetic="float32")
    alone = multilabel or outputs == 1
    width = 1.0 if alone else math.sqrt(2)
    rows = model.head.weight.detach().double()
    error = (width * (run.error + run.around)).unsqueeze(1)
    if alone:
        gaps, lengths = run.scores.double().abs(), 3 * rows.norm(dim=1)
    else:
        own = F.one_hot(found.prediction, outputs).bool()
        gaps = (run.scores.double().amax(dim=1, keepdim=True) - run.scores.double()).masked_fill(own, math.inf)
        lengths = 3 * (rows[found.prediction].unsqueeze(1) - rows).norm(dim=2)
    radii = (gaps - error) / (lengths + width * run.growth)
    expected = radii if multilabel else radii.amin(dim=1)
    assert torch.allclose(found.radius, expected, rtol=1e-10)


def test_no_two_points_violate_the_lipschitz_constant(trained: tuple[Classifier, Tensor, Tensor]) -> None:
    model, data, _ = trained
    constant, body = bound(model.body).constant, copy.deepcopy(model.body).double()
    spread = torch.logspace(-6, 1, 60, dtype=torch.float64).view(-1, 1, 1, 1)
    x = torch.cat([data.double(), torch.randn(60, *SHAPE, dtype=torch.float64) * spread])
    y = x + torch.randn_like(x) * torch.cat([spread, spread.flip(0)])
    best = torch.zeros(120, dtype=torch.float64)
    for _ in range(60):
        x.requires_grad_()
        y.requires_grad_()
        value = (body(x) - body(y)).norm(dim=1) / (x - y).flatten(1).norm(dim=1)
        best = torch.maximum(best, value.detach())
        steps = torch.autograd.grad(value.sum(), (x, y))
        gap = 0.2 * (x - y).detach().flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        x, y = (
            (point + gap * F.normalize(step.flatten(1)).view_as(x)).detach()
            for point, step in zip((x, y), steps, strict=True)
        )
    # differences of 1e-6 between numbers of size 1 to 10 carry rounding of 1e-9
    assert 0.9 * constant < best.max() <= constant * (1 + 1e-8)
