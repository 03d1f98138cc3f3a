"""What follows from the optimum anywhere: the potential with its gradients, and where the plan carries a point."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from otnn.errors import InputError
from otnn.transport import TransportProblem, TransportSolution, solution, solve
from tests.transport.problems import FORMS, NAMES, gaussian_problem, tensor
from tests.transport.slow import cost_matrix, image

EVERY_FORM = pytest.mark.parametrize("form", FORMS, ids=NAMES)
NORMS = [2.0, 1.0, math.inf]


def gradient(solved: TransportSolution, points: Tensor, label: int | None) -> Tensor:
    points = points.clone().requires_grad_()
    labels = None if label is None else torch.full((len(points),), label)
    return torch.autograd.grad(solved.potential(points, labels).sum(), points)[0]


def samples(solved: TransportSolution) -> Tensor:
    return torch.cat([solved.problem.x, solved.problem.z])


# --- the potential -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@EVERY_FORM
def test_the_potential_has_the_optimal_values_on_the_samples(form: dict[str, Any], norm: float) -> None:
    solved = solve(gaussian_problem(30, 40, 3, norm=norm, **form))
    values = torch.cat([solved.potential_x, solved.potential_z])
    own = torch.arange(70).lt(30).long()
    for labels in (None, own, 1 - own, torch.zeros(70, dtype=torch.long), torch.ones(70, dtype=torch.long)):
        torch.testing.assert_close(solved.potential(samples(solved), labels), values, rtol=1e-12, atol=1e-12)


@EVERY_FORM
def test_the_two_extensions_are_the_extreme_ones(form: dict[str, Any]) -> None:
    solved = solve(gaussian_problem(15, 20, 2, **form))
    rng = np.random.default_rng(0)
    points = rng.normal(size=(50, 2)) * 3
    upper = (solved.potential_z.numpy() + cost_matrix(points, solved.problem.z.numpy())).min(axis=1)
    lower = (solved.potential_x.numpy() - cost_matrix(points, solved.problem.x.numpy())).max(axis=1)
    assert (upper >= lower - 1e-12).all()
    assert (upper > lower + 0.1).any()
    ones = torch.ones(50, dtype=torch.long)
    np.testing.assert_allclose(solved.potential(tensor(points), ones), upper, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(solved.potential(tensor(points), 0 * ones), lower, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(solved.potential(tensor(points)), (upper + lower) / 2, rtol=1e-13, atol=1e-13)
    # each point takes the extension of its own label
    labels = torch.arange(50) % 2
    mixed = solved.potential(tensor(points), labels)
    np.testing.assert_allclose(mixed, np.where(labels.numpy() == 1, upper, lower), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("label", [None, 1, 0])
@pytest.mark.parametrize("norm", NORMS)
@EVERY_FORM
def test_the_potential_is_1_lipschitz_everywhere(form: dict[str, Any], norm: float, label: int | None) -> None:
    solved = solve(gaussian_problem(15, 20, 3, norm=norm, **form))
    rng = np.random.default_rng(1)
    points = np.concatenate([rng.normal(size=(150, 3)), rng.normal(size=(50, 3)) * 10, samples(solved).numpy()])
    points = np.concatenate([points, points + 1e-4 * rng.normal(size=points.shape)])
    labels = None if label is None else torch.full((len(points),), label)
    f = solved.potential(tensor(points), labels).numpy()
    apart = cost_matrix(points, points, norm)
    assert (np.abs(f[:, None] - f) <= apart * (1 + 1e-9) + 1e-12).all()
    # and no flatter than that: each point falls, or rises, at full slope towards some sample
    np.fill_diagonal(apart, 1)
    if label is not None:
        assert (np.abs(f[:, None] - f) / apart).max(axis=1).min() > 1 - 1e-9


@pytest.mark.parametrize("label", [1, 0])
@EVERY_FORM
def test_gradients_at_samples_point_along_the_plan(form: dict[str, Any], label: int) -> None:
    # weights are random: where they are equal, optima are degenerate and an extension may have kinks at its own class
    for dims in (2, 20):
        solved = solve(gaussian_problem(60, 80, dims, **form))
        x, z = solved.problem.x, solved.problem.z
        found = gradient(solved, x if label else z, label)
        torch.testing.assert_close(found.norm(dim=1), torch.ones(len(found)).double(), rtol=1e-12, atol=0)
        rows, columns = solved.rows, solved.columns
        own = rows if label else columns
        along = torch.nn.functional.normalize(x[rows] - z[columns], dim=1)
        off = (along - found[own]).norm(dim=1)
        partners = torch.bincount(own, minlength=len(found))
        assert (partners >= 1).all()
        for k in range(len(found)):  # at split samples there is a kink: autograd takes one of the partners
            assert off[own == k].min() < 1e-9
        unsplit = partners[own] == 1
        assert unsplit.sum() >= 10
        assert off[unsplit].max() < 1e-9


def test_the_other_extension_has_cones_at_the_samples() -> None:
    # why labels are asked for: at its own samples an extension is a distance to itself, whose gradient is 0 there
    solved = solve(gaussian_problem(10, 12, 2, hinge_weight=0.0))
    assert (gradient(solved, solved.problem.x, 0) == 0).all()
    assert (gradient(solved, solved.problem.z, 1) == 0).all()


@pytest.mark.parametrize("label", [None, 1, 0])
@EVERY_FORM
def test_gradients_are_those_of_differences(form: dict[str, Any], label: int | None) -> None:
    solved = solve(gaussian_problem(12, 9, 3, **form))
    points = tensor(np.random.default_rng(2).normal(size=(60, 3)))
    # away from kinks, where the nearest and the second nearest cone differ by little
    cones = [
        tensor(cost_matrix(points.numpy(), solved.problem.z.numpy())) + solved.potential_z,
        tensor(cost_matrix(points.numpy(), solved.problem.x.numpy())) - solved.potential_x,
    ]
    smooth = torch.ones(60, dtype=torch.bool)
    for cone in cones:
        two = cone.topk(2, dim=1, largest=False).values
        smooth &= two[:, 1] - two[:, 0] > 1e-3
    points = points[smooth].requires_grad_()
    assert len(points) > 30
    labels = None if label is None else torch.full((len(points),), label)
    assert torch.autograd.gradcheck(lambda at: solved.potential(at, labels), points, eps=1e-6, atol=1e-7)


def test_images_keep_their_shape_and_dtype() -> None:
    rng = np.random.default_rng(3)
    x, z = (torch.from_numpy(rng.random(size=(6, 1, 4, 4), dtype=np.float32)) for _ in range(2))
    solved = solve(TransportProblem(x, z, alpha=0.2))
    assert solved.potential(x).dtype == torch.float64
    assert solved.potential(x).shape == (6,)
    found = gradient(solved, x, 1)
    assert found.shape == x.shape
    assert found.dtype == torch.float32
    moved = solved.transport(x)
    assert moved.shape == x.shape
    assert moved.dtype == torch.float64
    assert solved.potential(x[:0]).shape == (0,)
    assert solved.transport(x[:0]).shape == (0, 1, 4, 4)


def test_small_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    solved = solve(gaussian_problem(15, 20, 3, alpha=0.2))
    points = tensor(np.random.default_rng(4).normal(size=(33, 3)))
    labels = torch.arange(33) % 2
    whole = [solved.potential(points), solved.potential(points, labels), solved.transport(points)]
    monkeypatch.setattr(solution, "_CHUNK", 50)
    parts = [solved.potential(points), solved.potential(points, labels), solved.transport(points)]
    assert all(torch.equal(part, one) for part, one in zip(parts, whole, strict=True))


# --- where points are carried ------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [1, 0])
@pytest.mark.parametrize("norm", NORMS)
@EVERY_FORM
def test_transport_is_that_of_a_loop(form: dict[str, Any], norm: float, label: int) -> None:
    solved = solve(gaussian_problem(15, 20, 3, norm=norm, **form))
    rng = np.random.default_rng(5)
    points = np.concatenate([samples(solved).numpy(), rng.normal(size=(30, 3)) * 2])
    expected = [image(solved, point, label) for point in points]
    np.testing.assert_allclose(solved.transport(tensor(points), label), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("label", [1, 0])
@EVERY_FORM
def test_unsplit_samples_go_to_their_partner(form: dict[str, Any], label: int) -> None:
    solved = solve(gaussian_problem(40, 60, 5, **form))
    x, z = solved.problem.x, solved.problem.z
    own, other = (solved.rows, solved.columns) if label else (solved.columns, solved.rows)
    partners = torch.bincount(own)
    unsplit = partners[own] == 1
    assert unsplit.sum() >= 5
    here, there = (x, z) if label else (z, x)
    moved = solved.transport(here[own[unsplit]], label)
    torch.testing.assert_close(moved, there[other[unsplit]], rtol=1e-13, atol=1e-13)
    # a split one goes in between
    split = torch.nonzero(partners > 1)[0]
    assert (solved.transport(here[split], label) - there).norm(dim=1).min() > 1e-3


def test_positives_are_what_transport_takes_by_default() -> None:
    solved = solve(gaussian_problem(8, 8, 2, alpha=0.2))
    assert torch.equal(solved.transport(solved.problem.x), solved.transport(solved.problem.x, 1))
    assert not torch.equal(solved.transport(solved.problem.x), solved.transport(solved.problem.x, 0))


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images() -> TransportSolution:
    generator = torch.Generator().manual_seed(0)
    x, z = torch.rand(3, 1, 2, 2, generator=generator), torch.rand(4, 1, 2, 2, generator=generator)
    return solve(TransportProblem(x, z, hinge_weight=0.0))


@pytest.mark.parametrize("shape", [(1, 2, 2), (5, 4), (5, 1, 2, 3), (5, 1, 2, 2, 1), ()])
def test_points_of_another_shape_are_refused(images: TransportSolution, shape: tuple[int, ...]) -> None:
    text = r"points: expected a batch of the samples' shape \(1, 2, 2\), got \("
    with pytest.raises(InputError, match=text):
        images.potential(torch.zeros(shape))
    with pytest.raises(InputError, match=text):
        images.transport(torch.zeros(shape))


def test_labels_that_are_none_are_refused(images: TransportSolution) -> None:
    points = torch.zeros(2, 1, 2, 2)
    with pytest.raises(InputError, match=r"labels: expected one per sample, shape \(2,\), got \(3,\)"):
        images.potential(points, torch.tensor([0, 1, 0]))
    with pytest.raises(InputError, match=r"labels: expected integers in 0\.\.1, got -1\.\.1"):
        images.potential(points, torch.tensor([-1, 1]))
    with pytest.raises(InputError, match=r"labels: expected integers, got torch\.float32; convert them with"):
        images.potential(points, torch.tensor([0.0, 1.0]))
    with pytest.raises(InputError, match="label: expected 1 for positives or 0 for negatives, got -1"):
        images.transport(points, -1)
