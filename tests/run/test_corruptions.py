"""Corruptions: closed forms, an independent JPEG and blur, sizes, and what is refused."""

import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from otnn.errors import InputError
from otnn.models import Classifier, build, predict
from otnn.run.corruptions import CORRUPTIONS, corrupt, corrupted_accuracy


def images(channels: int = 1, size: int = 12) -> torch.Tensor:
    return torch.rand(4, channels, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_shape_range_and_strength(name: str, channels: int) -> None:
    inputs = images(channels)
    sizes = []
    for severity in CORRUPTIONS[name].severities:
        changed = corrupt(inputs, name, severity, seed=3)
        assert changed.shape == inputs.shape
        assert changed.dtype == inputs.dtype
        assert float(changed.min()) >= 0
        assert float(changed.max()) <= 1
        assert torch.equal(changed, corrupt(inputs, name, severity, seed=3))
        sizes.append(float((changed - inputs).norm()))
    # from weak to strong
    assert sizes == sorted(sizes)
    assert sizes[0] > 0


def test_noise_has_its_deviation_and_its_seed() -> None:
    grey = torch.full((40, 1, 30, 30), 0.5)
    noise = corrupt(grey, "gaussian_noise", 0.05, seed=1) - grey  # ten deviations from the walls
    # mean and deviation of 36,000 draws: within five standard errors
    assert abs(float(noise.mean())) < 5 * 0.05 / math.sqrt(36_000)
    assert abs(float(noise.std()) - 0.05) < 5 * 0.05 / math.sqrt(2 * 36_000)
    assert not torch.equal(corrupt(grey, "gaussian_noise", 0.05, seed=2) - grey, noise)


def test_a_blurred_point_is_the_product_of_two_gaussians() -> None:
    point = torch.zeros(1, 2, 31, 31)
    point[0, 0, 15, 15] = 1
    blurred = corrupt(point, "gaussian_blur", 2.0)
    bell = np.exp(-0.5 * (np.arange(-15, 16) / 2.0) ** 2)
    bell[np.abs(np.arange(-15, 16)) > 8] = 0  # four deviations
    bell /= bell.sum()
    np.testing.assert_allclose(blurred[0, 0].numpy(), np.outer(bell, bell), atol=1e-7)
    # channels do not mix
    assert float(blurred[0, 1].abs().max()) == 0


def test_a_blur_keeps_the_mean_as_it_mirrors_at_the_rim() -> None:
    inputs = images(3)
    blurred = corrupt(inputs, "gaussian_blur", 1.0)
    assert torch.allclose(blurred.mean(dim=(2, 3)), inputs.mean(dim=(2, 3)), atol=1e-6)
    assert float(blurred.std()) < float(inputs.std())


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_what_pillow_writes(channels: int) -> None:
    inputs = images(channels, size=16)
    changed = corrupt(inputs, "jpeg", 20.0)
    for one, other in zip(inputs, changed, strict=True):
        pixels = (one.numpy() * 255).round().astype(np.uint8)
        picture = Image.fromarray(pixels[0] if channels == 1 else pixels.transpose(1, 2, 0))
        stream = io.BytesIO()
        picture.save(stream, "jpeg", quality=20)
        read = np.asarray(Image.open(stream)).astype(np.float32) / 255
        expected = read[None] if channels == 1 else read.transpose(2, 0, 1)
        np.testing.assert_allclose(other.numpy(), expected, atol=1e-6)


def test_brightness_is_a_shift_that_the_wall_stops() -> None:
    inputs = torch.tensor([[[[0.0, 0.5], [0.75, 1.0]]]])
    expected = torch.tensor([[[[0.4, 0.9], [1.0, 1.0]]]])
    assert torch.allclose(corrupt(inputs, "brightness", 0.4), expected)


def test_accuracy_and_size_are_counted_on_the_same_images() -> None:
    torch.manual_seed(0)
    networks: dict[str, Classifier] = {
        name: build("dense", (1, 12, 12), 3, widths=(8,)).eval() for name in ("one", "two")
    }
    inputs, labels = images(), torch.tensor([0, 1, 2, 0])
    told: list[str] = []
    rows = corrupted_accuracy(networks, inputs, labels, seed=5, begin=told.append)
    assert [(row["name"], row["severity"]) for row in rows] == [
        (name, severity) for name, one in CORRUPTIONS.items() for severity in one.severities
    ]
    assert told == [name.replace("_", " ") for name in CORRUPTIONS]
    for row in rows:
        changed = corrupt(inputs, row["name"], row["severity"], seed=5)
        for name, model in networks.items():
            with torch.no_grad():
                right = predict(model(changed)) == labels
            assert row["accuracy"][name] == float(right.double().mean())
        sizes = [float(np.linalg.norm((b - a).numpy().ravel())) for a, b in zip(inputs, changed, strict=True)]
        assert row["mean_size"] == pytest.approx(sum(sizes) / 4, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((images(), "fog", 1.0), "corruption: expected one of gaussian_noise.*got 'fog'"),
        ((images() + 1, "brightness", 0.1), r"expected values in \[0, 1\]"),
        ((torch.full((1, 1, 2, 2), torch.nan), "jpeg", 50.0), "NaN or infinite"),
        ((torch.zeros(0, 1, 2, 2), "jpeg", 50.0), "at least one sample"),
        ((images(), "gaussian_blur", -1.0), r"severity: expected a finite number >= 0 \(pixels of gaussian_blur\)"),
        ((images(), "jpeg", math.nan), "severity: expected a finite number >= 1 and <= 100 .* got nan"),
        ((images(), "jpeg", 101), r"severity: expected a finite number >= 1 and <= 100 \(quality of jpeg\), got 101"),
        ((images(), "gaussian_noise", math.inf), "severity: expected a finite number >= 0 .* got inf"),
        ((images(), "brightness", "a"), "severity: expected a finite number >= 0 .* got 'a'"),
        ((torch.zeros(2, 4), "jpeg", 50.0), r"expected images \(n, channels, height, width\), got shape \(2, 4\)"),
        ((torch.zeros(1, 1, 2, 2, dtype=torch.uint8), "jpeg", 50.0), "floating-point"),
    ],
)
def test_what_cannot_be_used_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        corrupt(*arguments)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_images_with_a_graph_are_corrupted_without_it(name: str) -> None:
    inputs, severity = images(), CORRUPTIONS[name].severities[0]
    changed = corrupt(inputs.clone().requires_grad_(), name, severity)
    assert not changed.requires_grad
    assert torch.equal(changed, corrupt(inputs, name, severity))


def test_networks_and_labels_are_checked_as_in_attacks() -> None:
    model = build("dense", (1, 12, 12), 3, widths=(8,)).eval()
    inputs, labels = images(), torch.tensor([0, 1, 2, 0])
    for given, message in (
        (labels.unsqueeze(1), r"labels: expected one per sample, shape \(4,\)"),
        (labels.float(), "labels: expected integers, got torch.float32"),
        (labels + 1, r"labels: expected integers in 0\.\.2"),
        ([0, 1, 2, 0], "labels: expected a tensor, got list"),
    ):
        with pytest.raises(InputError, match=message):
            corrupted_accuracy({"one": model}, inputs, given)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"expected torch\.float32 as the weights"):
        corrupted_accuracy({"one": model}, inputs.double(), labels)
    model.body[0].train()
    with pytest.raises(InputError, match=r"body\.0 is in training mode"):
        corrupted_accuracy({"one": model}, inputs, labels)
