"""The figure on two snowflakes, at a hundredth of its size."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from otnn.data.snowflakes import koch_snowflake, snowflakes
from otnn.errors import InputError
from otnn.run.snowflakes import ARROWS, BARS, FIGURES, PICTURE, Recipe, figure, missed, run_snowflakes
from otnn.transport.costs import distances

QUICK = Recipe(width=8, depth=2, steps=30, twin_steps=30)


@pytest.mark.parametrize("order", [0, 1, 2, 4])
def test_the_curve_is_as_long_and_as_symmetric_as_a_snowflake(order: int) -> None:
    corners = 3 * 4**order
    points = koch_snowflake(order, 2.0, corners)
    # a triangle in a circle of radius R has the side R sqrt(3); every order has 4/3 of the length
    side = 2.0 * 3**0.5 / 3**order
    assert (points.roll(-1, 0) - points).norm(dim=1).numpy() == pytest.approx(np.full(corners, side))
    assert points[0].tolist() == pytest.approx([0.0, 2.0])
    assert points.norm(dim=1).max() == pytest.approx(2.0)
    turned = points @ torch.tensor([[-0.5, 3**0.5 / 2], [-(3**0.5) / 2, -0.5]], dtype=torch.float64)
    assert distances(points, turned).min(dim=1).values.max() < 1e-12
    mirrored = points * torch.tensor([-1.0, 1.0])
    assert distances(points, mirrored).min(dim=1).values.max() < 1e-12
    # peaks point outwards: the area grows to 8/5 of the triangle's, by 1/3 (4/9)^k a time
    area = 3 * 3**0.5 / 4 * 4.0 * (1 + sum((4 / 9) ** k for k in range(order)) / 3)
    x, y = points.T
    found = 0.5 * (x * y.roll(-1) - y * x.roll(-1)).sum().abs()
    assert float(found) == pytest.approx(area)


def test_points_lie_at_even_steps_along_the_curve() -> None:
    points = koch_snowflake(3, 1.0, 500)
    fine = koch_snowflake(3, 1.0, 500 * 8)
    assert fine[::8].numpy() == pytest.approx(points.numpy())
    split = snowflakes(50)
    assert split.labels.tolist() == [1] * 50 + [0] * 50
    assert split.images[50:].norm(dim=1).max() == pytest.approx(1.6, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "text"), [((9, 1.0, 3), "order"), ((2, 0.0, 3), "radius"), ((2, 1.0, 0), "count")]
)
def test_numbers_without_a_snowflake_are_refused(arguments: tuple[int, float, int], text: str) -> None:
    with pytest.raises(InputError, match=f"{text}: expected"):
        koch_snowflake(*arguments)


def test_a_quick_figure_has_a_gap_where_it_must(tmp_path: Path) -> None:
    content = run_snowflakes(tmp_path / "new" / "folder", recipe=QUICK, count=40)
    written = json.loads((tmp_path / "new" / "folder" / FIGURES).read_text())
    assert written == json.loads(json.dumps(content))
    assert content["optimum"]["gap"] == pytest.approx(0, abs=1e-9)
    assert content["optimum"]["slackness"]["mean"] == pytest.approx(1)
    assert content["hypotheses"]["hinge_can_vanish"]
    # both networks are feasible on the points, so neither can be better than the optimum
    assert content["otnn"]["gap"] > 0
    assert content["unconstrained"]["gap"] > 0
    assert content["unconstrained"]["slackness"]["quantiles"][-1] <= 1 + 1e-9
    assert "gap" in missed(content)  # thirty steps do not reach it
    assert all(figure(content, "otnn", bar) is not None for bar in BARS)
    assert figure(content, "optimum", BARS[-1]) is None
    ways = content["local_global"]
    assert list(ways) == ["otnn", "optimum", "unconstrained"]
    assert ways["optimum"]["right"] == ways["optimum"]["boundary"] == 80
    assert ways["optimum"]["cosine"]["mean"] > ways["otnn"]["cosine"]["mean"]
    assert ways["optimum"]["best_cosine"]["quantiles"][2] == pytest.approx(1)
    for name in (PICTURE, ARROWS):
        with Image.open(tmp_path / "new" / "folder" / name) as picture:
            assert picture.size[0] > 1000


@pytest.mark.parametrize("name", [PICTURE, ARROWS])
def test_files_that_exist_are_kept_without_force(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        run_snowflakes(tmp_path, recipe=QUICK, count=10)
    assert (tmp_path / name).read_text() == "mine"
    run_snowflakes(tmp_path, recipe=QUICK, count=10, force=True)
    assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
