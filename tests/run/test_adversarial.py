"""The third network: an ordinary one, trained on attacks."""

from pathlib import Path

import pytest
import torch
from torch import nn

from otnn.data import load as load_data
from otnn.errors import InputError
from otnn.losses import temperature_cross_entropy
from otnn.models import build
from otnn.run import config
from otnn.run.fit import attacked
from otnn.run.folder import open_run
from otnn.run.train import dataset_of, train


def linear() -> nn.Module:
    """One output w.x, so that no attack moves the score by more than radius * ||w||."""
    model = build("dense", (1, 8, 8), 2, widths=(2,), constrained=False)
    model.body = nn.Sequential(nn.Flatten())
    model.head = nn.Linear(64, 1)
    return model


def test_on_a_linear_model_the_attack_is_the_closed_form() -> None:
    model = linear()
    generator = torch.Generator().manual_seed(0)
    images = 0.5 + 0.01 * torch.randn(6, 1, 8, 8, generator=generator)
    labels = torch.arange(6) % 2
    found = attacked(model, Entropy(), images, labels, 0.5, 20, generator)
    moved = (model(found) - model(images)).squeeze(1).detach() * torch.where(labels == 1, -1.0, 1.0)
    most = 0.5 * float(model.head.weight.detach().norm())
    # every step turns what is left of the random start by 1 / (1 + 2.5 / 20): the cosine of the last angle is about .98
    assert moved.max() <= most * (1 + 1e-5)
    assert moved.min() >= 0.96 * most
    assert model.training


class Entropy(nn.Module):
    def forward(self, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return temperature_cross_entropy(scores, labels)


def test_attacks_stay_in_the_ball_and_in_the_box_and_raise_the_loss() -> None:
    digits = load_data("digits")
    images, labels = digits.test.images[:64], digits.test.labels[:64]
    model = build("dense", (1, 8, 8), 10, widths=(32,), constrained=False)
    found = attacked(model, Entropy(), images, labels, 0.3, 5, torch.Generator().manual_seed(1))
    assert (found - images).flatten(1).norm(dim=1).max() <= 0.3 * (1 + 1e-6)
    assert found.min() >= 0
    assert found.max() <= 1
    model.eval()
    with torch.no_grad():
        assert float(Entropy()(model(found), labels)) > float(Entropy()(model(images), labels)) + 0.01
    again = attacked(model, Entropy(), images, labels, 0.3, 5, torch.Generator().manual_seed(1))
    assert again.equal(found)


def test_the_third_network_bears_attacks_better_than_the_second(tmp_path: Path) -> None:
    settings = config.load(overrides=["training.epochs=6", "model.widths=[64]", "training.adversarial=0.5"])
    run = train(settings, tmp_path / "run", quiet=True)
    assert run.networks == ("otnn", "unconstrained", "adversarial")
    assert open_run(tmp_path / "run").results()["adversarial"]["accuracy"] > 0.8
    test = dataset_of(run).test
    accuracy = {}
    for name in ("unconstrained", "adversarial"):
        model = run.network(name)
        found = attacked(model, Entropy(), test.images, test.labels, 0.5, 10, torch.Generator().manual_seed(0))
        model.eval()
        accuracy[name] = float((model(found).argmax(dim=1) == test.labels).double().mean())
    # .57 against .76 in a trial
    assert accuracy["adversarial"] > accuracy["unconstrained"] + 0.05


@pytest.mark.parametrize("value", ["0", "-1.0", "inf"])
def test_a_radius_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(InputError, match=r"training\.adversarial: expected"):
        config.load(overrides=[f"training.adversarial={value}"])
