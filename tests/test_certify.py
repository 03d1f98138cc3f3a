"""What `certify` returns, and that it sees the model and the inputs as they are."""

import copy
import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from otnn.certify import Certificate, certified_accuracy, certify
from otnn.lipschitz import bound, export
from otnn.models import Classifier, build, predict
from otnn.nn import MaxMin
from tests.exact import Residual

SHAPE = (1, 4, 4)
BOTH = pytest.mark.parametrize("arithmetic", ["real", "float32"])


def dense(outputs: int = 3) -> Classifier:
    return build("dense", SHAPE, max(2, outputs), widths=(8,)).eval()


def images(count: int = 5, shape: Sequence[int] = SHAPE) -> Tensor:
    return torch.rand(count, *shape)


def scores_model(rows: list[list[float]], bias: list[float], multilabel: bool = False) -> Classifier:
    """An affine map of rows of two numbers."""
    head = nn.Linear(2, len(rows))
    with torch.no_grad():
        head.weight.copy_(torch.tensor(rows))
        head.bias.copy_(torch.tensor(bias))
    return Classifier(nn.Sequential(), head, (2,), multilabel=multilabel).eval()


# --- what it returns --------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(("outputs", "multilabel"), [(1, False), (3, False), (3, True)])
def test_the_fields_of_a_certificate(outputs: int, multilabel: bool, arithmetic: str) -> None:
    model, x = dense(outputs), images()
    model.multilabel = multilabel
    found = certify(model, x, arithmetic=arithmetic)
    shape = (5, 3) if multilabel else (5,)
    assert found.prediction.shape == found.logit_gap.shape == found.radius.shape == shape
    assert found.prediction.dtype == torch.int64
    assert found.logit_gap.dtype == found.radius.dtype == torch.float64
    assert not found.radius.requires_grad
    assert found.arithmetic == arithmetic
    assert found.reason == ("",) * 5
    scores = model(x).detach().double()
    assert torch.equal(found.prediction, predict(scores, multilabel))
    two = scores.topk(2).values if outputs > 1 else None
    gap = scores.abs().view(shape) if multilabel or two is None else two[:, 0] - two[:, 1]
    assert torch.allclose(found.logit_gap, gap, atol=1e-6)


def test_a_tie_has_radius_0() -> None:
    x = torch.tensor([[0.5, 0.5], [0.25, 0.5], [0.5, 0.25]])
    found = certify(scores_model([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], [0.0, 0.0, 0.0]), x)
    assert found.prediction.tolist() == [0, 1, 0]
    assert found.logit_gap.tolist() == [0.0, 0.25, 0.25]
    assert found.radius.tolist() == [0.0, pytest.approx(0.25 / math.sqrt(2)), pytest.approx(0.25 / math.sqrt(2))]
    assert found.reason == ("tie", "", "")
    one = certify(scores_model([[1.0, -1.0]], [0.0]), x)
    assert one.radius.tolist() == [0.0, pytest.approx(0.25 / math.sqrt(2)), pytest.approx(0.25 / math.sqrt(2))]
    assert (one.reason, one.prediction.tolist()) == (("tie", "", ""), [0, 0, 1])
    labels = certify(scores_model([[1.0, -1.0], [0.0, 1.0]], [0.0, 0.0], multilabel=True), x)
    assert (labels.reason, labels.radius[0].tolist()) == (("tie", "", ""), [0.0, pytest.approx(0.5)])
    assert labels.prediction.tolist() == [[0, 1], [0, 1], [1, 1]]


@BOTH
def test_classes_with_equal_rows(arithmetic: str) -> None:
    """Equal biases tie; with different ones the order of the two never changes, and other classes decide."""
    rows, x = [[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]], torch.tensor([[0.5, 0.5]])
    tied = certify(scores_model(rows, [0.0, 0.0, 0.0]), x, arithmetic=arithmetic)
    assert (tied.radius.tolist(), tied.reason) == ([0.0], ("tie",))
    apart = certify(scores_model(rows, [1.0, 0.0, 0.0]), x, arithmetic=arithmetic)
    assert apart.radius.tolist() == [pytest.approx(1.0, rel=1e-5)]


def test_a_network_that_never_changes_has_an_infinite_radius() -> None:
    found = certify(scores_model([[0.0, 0.0], [0.0, 0.0]], [1.0, 0.0]), torch.rand(2, 2))
    assert found.radius.tolist() == [math.inf] * 2
    assert found.reason == ("", "")


@BOTH
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("outputs", "multilabel"), [(1, False), (3, False), (3, True)])
def test_a_sample_that_is_not_finite_is_told_and_leaves_the_others_alone(
    bad: float, outputs: int, multilabel: bool, arithmetic: str
) -> None:
    model, x = dense(outputs), images()
    model.multilabel = multilabel
    expected = certify(model, x, arithmetic=arithmetic)
    x[2, 0, 1, 3] = bad
    found = certify(model, x, arithmetic=arithmetic)
    assert found.reason == ("", "", "input not finite", "", "")
    for name, value in (("radius", 0.0), ("logit_gap", 0.0), ("prediction", -1.0)):
        assert bool((getattr(found, name)[2] == value).all())
        others = [0, 1, 3, 4]
        assert torch.allclose(getattr(found, name)[others], getattr(expected, name)[others], rtol=1e-9)
    nothing = certify(model, torch.full((2, *SHAPE), bad), arithmetic=arithmetic)
    assert nothing.reason == ("input not finite",) * 2


def test_scores_that_overflow_are_told() -> None:
    model = Classifier(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2), (2,)).eval()
    with torch.no_grad():
        for layer in (*model.body, model.head):
            layer.weight.fill_(1e20)
            layer.bias.fill_(0.0)
        model.head.weight[1] = 0.0
    x = torch.tensor([[0.5, 0.5], [0.0, 0.0]])
    found = certify(model, x, arithmetic="float32")
    assert found.reason == ("scores not finite", "tie")
    assert (found.radius.tolist(), found.prediction.tolist()) == ([0.0, 0.0], [-1, 0])
    assert certify(model, x).reason == ("", "tie")  # float64 holds them


@BOTH
def test_an_overflow_that_an_activation_hides_gives_radius_0(arithmetic: str) -> None:
    first, head = nn.Linear(1, 2), nn.Linear(2, 2)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[-3e38], [0.0]]))
        first.bias.copy_(torch.tensor([-3e38, 1.0]))
        head.weight.copy_(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
        head.bias.zero_()
    model = Classifier(nn.Sequential(first, nn.ReLU()), head, (1,)).eval()
    found = certify(model, torch.tensor([[1.0]]), arithmetic=arithmetic)  # ReLU makes 0 of minus infinity
    assert (float(found.logit_gap), int(found.prediction)) == (1.0, 0)
    assert (found.radius.tolist(), found.reason) == ([0.0], ("gap below the rounding error",))


def test_a_constant_that_overflows_gives_radius_0() -> None:
    model = Classifier(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2), (2,)).double().eval()
    with torch.no_grad():
        for layer in model.body:
            layer.weight.copy_(1e200 * torch.eye(2, dtype=torch.float64))
            layer.bias.zero_()
        model.head.bias.copy_(torch.tensor([1.0, 0.0]))
    assert certify(model, torch.zeros(1, 2)).radius.tolist() == [0.0]


def test_a_gap_below_the_rounding_error_is_told() -> None:
    model = scores_model([[1.0, 0.0], [0.0, 1.0]], [2e6, 2e6])
    x = torch.tensor([[0.5, 0.25], [0.75, 0.0]])
    found = certify(model, x, arithmetic="float32")
    assert found.reason == ("gap below the rounding error",) * 2
    assert found.radius.tolist() == [0.0, 0.0]
    assert found.logit_gap.tolist() == [0.25, 0.75]
    assert certify(model, x).reason == ("", "")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 11, 1000])
@BOTH
def test_the_size_of_batches_does_not_matter(size: int, arithmetic: str) -> None:
    model, x = build("conv", (1, 8, 8), 3, widths=(4, 8)).eval(), images(11, (1, 8, 8))
    x[5] = math.nan
    whole = certify(model, x, arithmetic=arithmetic)
    parts = certify(model, x, arithmetic=arithmetic, batch_size=size)
    assert torch.equal(whole.prediction, parts.prediction)
    tolerance = {"rtol": 1e-9} if arithmetic == "real" else {"atol": 1e-5}
    assert torch.allclose(whole.radius, parts.radius, **tolerance)
    assert whole.reason == parts.reason


# --- it sees the model and the inputs as they are ---------------------------------------------------------------------


def test_weights_that_changed_since_count_with_their_new_values() -> None:
    model, x = dense(), images()
    before = certify(model, x)
    with torch.no_grad():
        model.body[2].weight.mul_(2.0)
        model.body[2].bias.mul_(2.0)
    after = certify(model, x)
    scores = model(x).detach().topk(2).values
    assert torch.allclose(after.logit_gap, (scores[:, 0] - scores[:, 1]).double(), atol=1e-6)
    assert bound(model.body).constant == pytest.approx(2.0, rel=1e-5)
    shares = after.radius / after.logit_gap
    assert torch.allclose(2 * shares, before.radius / before.logit_gap, rtol=0.5)
    assert not torch.allclose(shares, before.radius / before.logit_gap, rtol=0.1)
    with torch.no_grad():
        model.head.weight.mul_(1e6)
        model.head.bias.mul_(1e6)
    assert torch.allclose(certify(model, x).radius, after.radius, rtol=1e-6)  # units of the scores do not matter


def test_certifying_leaves_the_model_and_the_inputs_alone() -> None:
    model, x = build("conv", (1, 8, 8), 3, widths=(4, 8)).eval(), images(3, (1, 8, 8))
    x[1, 0, 0, 0] = math.nan
    kept, before = x.clone(), copy.deepcopy(model.state_dict())
    for arithmetic in ("real", "float32"):
        certify(model, x, arithmetic=arithmetic)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in model.parameters())
    assert not model.training
    assert torch.equal(x.nan_to_num(), kept.nan_to_num())


@BOTH
def test_how_the_inputs_lie_in_memory_does_not_matter(arithmetic: str) -> None:
    model, x = build("conv", (2, 8, 8), 3, widths=(4, 8)).eval(), images(4, (2, 8, 8))
    expected = certify(model, x, arithmetic=arithmetic)
    strided = torch.zeros(8, 2, 8, 16)[::2, :, :, ::2].copy_(x)
    with torch.inference_mode():
        inferred = certify(model, x, arithmetic=arithmetic)
    with torch.no_grad():
        silent = certify(model, x.clone().requires_grad_(), arithmetic=arithmetic)
    layouts = [certify(model, strided, arithmetic=arithmetic), inferred, silent]
    layouts.append(certify(model, x.to(memory_format=torch.channels_last), arithmetic=arithmetic))
    if arithmetic == "real":
        layouts += [certify(model, x.double()), certify(copy.deepcopy(model).double(), x)]
    for found in layouts:
        assert torch.allclose(found.radius, expected.radius, rtol=1e-4, atol=1e-6)


MODELS: dict[str, Callable[[], Classifier]] = {
    "rows": lambda: Classifier(nn.Sequential(nn.Linear(5, 6), MaxMin()), nn.Linear(6, 3), (5,)),
    "no body": lambda: Classifier(nn.Sequential(), nn.Linear(5, 3), (5,)),
    "signals": lambda: Classifier(
        nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), MaxMin(), nn.Flatten()), nn.Linear(28, 3), (2, 7)
    ),
    "nested": lambda: Classifier(
        nn.Sequential(nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(16, 8))), nn.ReLU()), nn.Linear(8, 1), SHAPE
    ),
    "a module of the user": lambda: Classifier(Residual(nn.Linear(5, 5)), nn.Linear(5, 3), (5,)),  # type: ignore[arg-type]
    "a layer used twice": lambda: Classifier(nn.Sequential(*[nn.Linear(5, 5)] * 2), nn.Linear(5, 3), (5,)),
    "exported": lambda: export(dense()),
    "twin": lambda: build("conv", (1, 8, 8), 3, widths=(4, 8), constrained=False),
}


@BOTH
@pytest.mark.parametrize("name", MODELS)
def test_models_of_all_kinds(name: str, arithmetic: str) -> None:
    model = MODELS[name]().eval()
    x = images(6, model.input_shape)
    found = certify(model, x, arithmetic=arithmetic)
    assert torch.equal(found.prediction, predict(model(x)))
    own = model.head.weight.detach().double()
    lengths = torch.cdist(own, own)[found.prediction] if len(own) > 1 else own.norm().view(1, 1)
    smallest = found.logit_gap / (bound(model.body, model.input_shape).constant * lengths.amax(dim=1))
    largest = found.logit_gap / (bound(model.body, model.input_shape).constant * lengths[lengths > 0].min())
    assert bool((found.radius <= largest).all())
    if arithmetic == "real":
        assert bool((found.radius >= smallest * (1 - 1e-6)).all())


def test_a_head_that_is_a_layer_of_the_body_as_well() -> None:
    layer = nn.Linear(4, 4)
    model = Classifier(nn.Sequential(layer, MaxMin()), layer, (4,)).eval()
    apart = Classifier(nn.Sequential(copy.deepcopy(layer), MaxMin()), copy.deepcopy(layer), (4,)).eval()
    x = torch.rand(3, 4)
    assert torch.equal(certify(model, x).radius, certify(apart, x).radius)


# --- certified accuracy -----------------------------------------------------------------------------------------------


def certificate(radii: Sequence[float], predictions: Sequence[int]) -> Certificate:
    radius = torch.tensor(radii, dtype=torch.float64)
    return Certificate(torch.tensor(predictions), radius, radius, "real", ("",) * len(radii))


def test_certified_accuracy_by_hand() -> None:
    found = certified_accuracy(
        certificate([0.0, 0.25, 0.5, 2.0], [1, 0, 1, 2]),
        torch.tensor([1, 0, 0, 2]),
        [0, 0.25, 0.250001, 36 / 255, 2, 3.0],
    )
    assert found == {"0": 0.75, "0.25": 0.5, "0.250001": 0.25, "0.141176": 0.5, "2": 0.25, "3": 0.0}


def test_certified_accuracy_of_labels_asks_for_all_of_them() -> None:
    radius = torch.tensor([[0.5, 0.1], [0.5, 0.5], [0.5, 0.5]], dtype=torch.float64)
    found = Certificate(torch.tensor([[1, 0], [1, 1], [-1, -1]]), radius, radius, "real", ("",) * 3)
    shares = certified_accuracy(found, torch.tensor([[1, 0], [1, 1], [1, 1]]), [0.0, 0.25])
    assert shares == {"0": pytest.approx(2 / 3), "0.25": pytest.approx(1 / 3)}


def test_certified_accuracy_falls_from_the_accuracy_to_0() -> None:
    model, x = dense(), images(200)
    labels = torch.randint(0, 3, (200,))
    x[7, 0, 0, 0] = math.nan
    found = certify(model, x)
    shares = list(certified_accuracy(found, labels, [0.0, *torch.linspace(0.001, 3, 50).tolist(), 1e6]).values())
    right = predict(model(x.nan_to_num())) == labels
    right[7] = False
    assert shares[0] == float(right.double().mean())
    assert all(first >= second for first, second in itertools.pairwise(shares))
    assert 0 < shares[3] < shares[0]
    assert shares[-1] == 0.0
