"""Local and global counterfactuals of the same samples, where both are known."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from otnn.report.partner_arrows import Panel, arrows_picture
from otnn.run.local_global import LocalGlobal, local_global
from otnn.transport import TransportProblem, TransportSolution, solve


def clouds(shift: float = 2.0) -> TransportSolution:
    z = torch.stack([torch.zeros(5), torch.arange(5.0)], dim=1)
    return solve(TransportProblem(z + torch.tensor([shift, 0.0]), z, hinge_weight=10.0, margin=0.5))


def turned(angle: float, offset: float) -> LocalGlobal:
    direction = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    return local_global(lambda points: points @ direction - offset, clouds())


@pytest.mark.parametrize("angle", [0.0, 0.3, -0.7])
def test_a_turned_plane_misses_by_its_angle(angle: float) -> None:
    # the zero level at the height of no sample: far below them all the positives are right, and the negatives wrong
    found = turned(angle, -10.0)
    assert found.cosine[:5].numpy() == pytest.approx(np.full(5, math.cos(angle)))
    assert found.best_cosine[:5].numpy() == pytest.approx(np.full(5, math.cos(angle)))
    # the third side of a triangle of which two are as long as the way to the partner
    assert found.landing[:5].numpy() == pytest.approx(np.full(5, 2 * math.sin(abs(angle) / 2)), abs=1e-9)
    assert (found.landing_nearest[:5] <= found.landing[:5] + 1e-12).all()
    assert found.cosine[5:].isnan().all()
    assert found.figures()["right"] == 5


def test_the_reflected_point_is_the_mirror_image() -> None:
    # zero level at 0.7 instead of 1: 1.3 from the positives, 0.7 from the negatives, whose partners are 2 away
    found = turned(0.0, 0.7)
    assert found.length.numpy() == pytest.approx(np.repeat([1.3, 0.7], 5))
    assert found.miss.numpy() == pytest.approx(np.full(10, 0.3))
    assert found.reflected[:5, 0].numpy() == pytest.approx(np.full(5, -0.6))
    assert found.nearest.numpy() == pytest.approx(np.full(10, 0.3))
    assert found.start.numpy() == pytest.approx(np.ones(10))
    assert found.partners.tolist() == [1] * 10
    assert found.figures()["miss"]["quantiles"] == pytest.approx([0.3] * 5)


def test_a_bent_potential_is_walked_to_where_its_sign_changes() -> None:
    # tanh does not move the zero level, but the first-order estimate of its distance
    found = local_global(lambda points: torch.tanh(2 * (points[:, 0] - 1)), clouds())
    assert found.miss.max() < 1e-9


def test_without_a_gradient_or_a_change_of_sign_there_is_no_reflected_point() -> None:
    flat = local_global(lambda points: 0 * points[:, 0] + 1, clouds())
    assert flat.cosine.isnan().all()
    assert flat.figures()["miss"] is None
    never = local_global(lambda points: torch.exp(points[:, 0]), clouds())  # above 0 wherever it is looked at
    assert never.cosine[:5].numpy() == pytest.approx(np.ones(5))
    assert never.length.isnan().all()
    assert never.figures()["boundary"] == 0
    assert never.panel("", 1).starts.shape == (0, 2)


def test_of_several_partners_the_heaviest_counts_and_the_best_is_told() -> None:
    # one positive, two negatives of the weights 1/2 and 1/2: a gradient can point to one of them
    z = torch.tensor([[-1.0, 0.0], [0.0, -1.0]])
    solution = solve(TransportProblem(torch.tensor([[1.0, 1.0]]), z, hinge_weight=0.0))
    up = torch.tensor([1.0, 2.0], dtype=torch.float64) / 5**0.5  # from the second negative to the positive
    found = local_global(lambda points: points @ up - 0.1, solution)
    assert found.partners.tolist() == [2, 1, 1]
    assert float(found.share[0]) == pytest.approx(0.5)
    assert float(found.best_cosine[0]) == pytest.approx(1.0)
    assert min(float(found.cosine[0]), 0.8) == pytest.approx(0.8)  # the other one is at (2, 1), 4/5 of a right angle
    assert bool((found.best_cosine.nan_to_num(1.0) >= found.cosine.nan_to_num(1.0)).all())


def test_at_the_optimum_the_gradient_points_to_a_partner() -> None:
    """Proposition 1, with numbers of samples that leave one optimum: of several partners, the gradient takes one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(23, 2, generator=generator) + torch.tensor([1.3, 0.0])
    z = torch.rand(37, 2, generator=generator)
    solution = solve(TransportProblem(x, z, hinge_weight=10.0, margin=0.1))
    data = torch.cat([x, z]).double()

    def optimum(points: Tensor) -> Tensor:
        return solution.potential(points, (torch.cdist(points.detach(), data).argmin(dim=1) < 23).long())

    found = local_global(optimum, solution)
    assert found.partners.max() > 1
    assert found.best_cosine.numpy() == pytest.approx(np.ones(60))
    towards = found.cosine > 1 - 1e-9  # to the heaviest partner, at the distance f(x) - f(z)
    assert 20 < towards.sum() < 60
    # the sign changes at |f(x)|, so the reflected point is the partner only where f(z) = -f(x)
    values = torch.cat([solution.potential_x, solution.potential_z]).abs()
    apart = (found.samples - found.partner).norm(dim=1)
    assert found.length[towards].numpy() == pytest.approx((2 * values / apart)[towards].numpy())
    assert found.miss[towards].numpy() == pytest.approx((found.length[towards] - 1).abs().numpy())
    assert found.miss[towards].max() > 0.1


def test_the_picture_shows_black_and_grey_arrows() -> None:
    points = np.array([[1.0, 1.0], [0.5, 0.5]])
    panel = Panel("name", points[:1], points[1:], points[1:] - 0.3)
    with Image.open(io.BytesIO(arrows_picture(points, np.array([0, 1]), [panel, panel]))) as picture:
        assert picture.size == (920, 510)
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20) or []}
    assert {(0, 0, 0), (180, 180, 180)} <= colours
