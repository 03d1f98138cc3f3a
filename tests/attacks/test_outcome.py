import pytest
import torch

from otnn.attacks import evaluate
from otnn.errors import InputError
from tests.attacks.nets import Plain, linear, predicted, rows


def test_success_is_what_the_model_says() -> None:
    """Points a share k of the way to the boundary of one output: k < 1 fails, k > 1 succeeds, at the distance moved."""
    model, x = linear(1), rows(40)
    labels, w = predicted(model, x), model.weight.detach()
    normal = model(x).detach() * w / w.norm() ** 2
    for share in (0.0, 0.999, 1.001, 3.0):
        found = evaluate(model, x, labels, x - share * normal)
        assert (found.success == (share > 1)).all()
        assert torch.allclose(found.distance, share * normal.norm(dim=1))
        assert found.finite.all()
        turned = evaluate(model, x, 1 - labels, x - share * normal, targeted=True, norm="linf")
        assert (turned.success == (share > 1)).all()
        assert torch.allclose(turned.distance, share * normal.abs().amax(dim=1))


def test_a_point_outside_the_box_is_no_success_in_it() -> None:
    model, x = linear(1, 2), torch.full((4, 2), 0.5, dtype=torch.float64)
    model.weight.data, model.bias.data = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([-0.25]).double()
    points = torch.tensor([[0.0, 1.0], [-1e-9, 0.5], [0.2, 1 + 1e-9], [0.3, 0.5]], dtype=torch.float64)
    labels = torch.ones(4).long()
    assert evaluate(model, x, labels, points).success.tolist() == [True, True, True, False]
    assert evaluate(model, x, labels, points, box=True).success.tolist() == [True, False, False, False]


def test_points_and_scores_that_are_not_finite_are_no_success() -> None:
    model = Plain(lambda rows: torch.cat([rows.log(), torch.zeros_like(rows)], dim=1))
    x = torch.full((4, 1), 2.0)
    points = torch.tensor([[torch.nan], [torch.inf], [0.0], [0.5]])
    found = evaluate(model, x, torch.zeros(4).long(), points)
    assert found.finite.tolist() == [False, False, False, True]
    assert found.success.tolist() == [False, False, False, True]


def test_accuracy_counts_what_is_left_at_each_radius() -> None:
    """Distances 0 (misclassified), 1, 2, and one failure at the distance 0.5, which never counts."""
    model = linear(1, 1)
    model.weight.data, model.bias.data = torch.ones(1, 1).double(), torch.zeros(1).double()
    x = torch.tensor([[-1.0], [0.5], [1.5], [3.0]], dtype=torch.float64)
    points = torch.tensor([[-1.0], [-0.5], [-0.5], [2.5]], dtype=torch.float64)
    found = evaluate(model, x, torch.ones(4).long(), points)
    assert found.success.tolist() == [True, True, True, False]
    assert found.accuracy([0, 0.5, 1 - 1e-12, 1, 2, 100]) == [0.75, 0.75, 0.75, 0.5, 0.25, 0.25]


def test_points_of_another_shape_or_precision_are_refused() -> None:
    model, x = linear(1), rows(4)
    labels = predicted(model, x)
    with pytest.raises(InputError, match=r"adversarial: expected \(4, 6\) of torch.float64, got \(3, 6\)"):
        evaluate(model, x, labels, x[:3])
    with pytest.raises(InputError, match="the model must see the point as it was found"):
        evaluate(model, x, labels, x.float())
    with pytest.raises(InputError, match="norm: expected one of l2, linf"):
        evaluate(model, x, labels, x, norm="l0")
