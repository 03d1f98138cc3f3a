import pytest
import torch

from otnn.errors import InputError
from otnn.explain import saliency
from otnn.lipschitz import bound
from otnn.models import Classifier, build
from otnn.potential import nearest_rival
from tests.explain.nets import classifier, rows


def test_saliency_is_the_derivative() -> None:
    torch.manual_seed(0)
    model = build("conv", (3, 8, 8), 4, widths=(4, 8, 8)).double().eval()
    x, target = torch.rand(2, 3, 8, 8, dtype=torch.float64), torch.tensor([1, 3])
    map_ = saliency(model, x, target)
    direction = torch.randn_like(x)
    step = 1e-6
    ahead, behind = model(x + step * direction), model(x - step * direction)
    numeric = ((ahead - behind) / (2 * step)).gather(1, target.unsqueeze(1)).squeeze(1)
    assert torch.allclose((map_ * direction).sum(dim=(1, 2, 3)), numeric, atol=1e-6)
    assert (map_.flatten(1).norm(dim=1) <= bound(model.body).constant + 1e-9).all()


def test_saliency_of_one_output_has_the_sign_of_the_class() -> None:
    model = classifier(torch.tensor([[3.0, -4.0]]), torch.zeros(1))
    map_ = saliency(model, rows([0.5, 0.5], [0.5, 0.5]), torch.tensor([1, 0]))
    assert map_.flatten(1).tolist() == [[3.0, -4.0], [-3.0, 4.0]]


def test_nearest_rival_is_by_potential_not_by_score() -> None:
    distances = torch.tensor([[0, 1.0, 10.0], [1.0, 0, 1.0], [10.0, 1.0, 0]], dtype=torch.float64)
    scores = torch.tensor([[3.0, 2.0, 0.0]])  # class 1 is second (potential 1), class 2 has potential 0.3
    assert nearest_rival(scores, torch.tensor([0]), distances).tolist() == [2]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m, x: saliency(m.train(), x, torch.tensor([0, 0])), "training mode"),
        (lambda m, x: saliency(m, x, torch.tensor([0])), r"one per sample, shape \(2,\)"),
        (lambda m, x: saliency(m, x, torch.tensor([0.0, 1.0])), "expected integers, got torch.float32"),
        (lambda m, x: saliency(m, (x * 255).byte(), torch.tensor([0, 0])), "divide 8-bit images by 255"),
    ],
)
def test_bad_input_says_what_was_expected(change: object, text: str) -> None:
    model: Classifier = classifier(torch.eye(2), torch.zeros(2))
    with pytest.raises(InputError, match=text):
        change(model, rows([0.2, 0.4], [0.9, 0.1]))  # type: ignore[operator]
