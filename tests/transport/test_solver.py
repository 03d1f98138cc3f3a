"""The optimum: two independent ways to it, what makes it one on samples of every kind, and how it is found."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from otnn.errors import InputError
from otnn.transport import Round, TransportProblem, solve, solver
from otnn.transport.flow import required_memory
from tests.transport.optimality import assert_optimal, size
from tests.transport.problems import FORMS, NAMES, gaussian_problem, problems, tensor, weights
from tests.transport.slow import cost_matrix, dual, primal

EVERY_FORM = pytest.mark.parametrize("form", FORMS, ids=NAMES)


# --- three ways --------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100, derandomize=True)
@given(problems())
def test_two_linear_programmes_agree(problem: TransportProblem) -> None:
    solution = solve(problem)
    assert_optimal(solution)
    close = {"rel": 1e-9, "abs": 1e-9 * size(solution) + 1e-12}  # samples that coincide have value 0
    assert solution.value == pytest.approx(primal(problem).minimum(), **close)
    assert solution.value == pytest.approx(dual(problem).value(), **close)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(problems(most=12))
def test_the_learned_margin_is_one_of_the_optimal_margins(problem: TransportProblem) -> None:
    solution = solve(problem)
    if not problem.learns_margin:
        assert solution.margin == (problem.margin or 0.0)
        return
    least, largest = primal(problem).optimal().margins()
    # the programme may exceed the optimum by 1e-10, which lets a margin move a little further where the loss is flat
    assert least - 1e-6 <= solution.margin <= largest + 1e-6


@pytest.mark.parametrize("norm", [1.0, math.inf, 1.5])
@EVERY_FORM
def test_other_norms_agree_too(norm: float, form: dict[str, Any]) -> None:
    problem = gaussian_problem(17, 23, 3, norm=norm, **form)
    solution = solve(problem)
    assert_optimal(solution)
    assert solution.value == pytest.approx(primal(problem).minimum(), rel=1e-9)
    assert abs(solution.value - solve(gaussian_problem(17, 23, 3, **form)).value) > 0.05


# --- what makes it an optimum ------------------------------------------------------------------------------------


def clustered(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    centres = rng.normal(size=(10, 20))
    return (
        centres[rng.integers(10, size=200)] + 1e-6 * rng.normal(size=(200, 20)),
        centres[rng.integers(10, size=150)] + 1e-6 * rng.normal(size=(150, 20)),
    )


def nearly_the_same(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    x = rng.normal(size=(60, 3))
    return x, x + 1e-9 * rng.normal(size=x.shape)


def grid(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return rng.integers(0, 6, size=(250, 3)).astype(float), rng.integers(0, 6, size=(200, 3)).astype(float)


def shared(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    x = rng.normal(size=(120, 4))
    return x, np.concatenate([x[:60], rng.normal(size=(60, 4))])


SAMPLES: list[tuple[str, Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]]] = [
    ("300 x 400 in 20 dimensions", lambda rng: (rng.normal(size=(300, 20)) + 0.5, rng.normal(size=(400, 20)))),
    ("500 x 500 in 784 dimensions", lambda rng: (rng.normal(size=(500, 784)) + 0.1, rng.normal(size=(500, 784)))),
    ("clusters", clustered),
    ("duplicates", lambda rng: (np.repeat(rng.normal(size=(20, 3)), 9, 0), np.repeat(rng.normal(size=(30, 3)), 7, 0))),
    ("points of a grid", grid),
    ("points of both classes", shared),
    ("the same points twice", lambda rng: (shared(rng)[0],) * 2),
    ("nearly the same points", nearly_the_same),
    ("one point", lambda rng: (np.ones((20, 40)), np.ones((30, 40)))),
    ("one sample each", lambda rng: (rng.normal(size=(1, 3)), rng.normal(size=(1, 3)))),
    ("one against many", lambda rng: (rng.normal(size=(1, 3)), rng.normal(size=(200, 3)))),
    ("many against one", lambda rng: (rng.normal(size=(200, 3)), rng.normal(size=(1, 3)))),
    ("one number each", lambda rng: (rng.normal(size=(200, 1)), rng.normal(size=(150, 1)) + 1)),
    ("far apart", lambda rng: (rng.normal(size=(80, 2)) + 1e6, rng.normal(size=(90, 2)))),
    ("far from the origin", lambda rng: (rng.normal(size=(80, 40)) + 1e6, rng.normal(size=(90, 40)) + 1e6)),
]  # fmt: skip


@pytest.mark.parametrize("equal", [True, False], ids=["equal weights", "unequal weights"])
@pytest.mark.parametrize("samples", [make for _, make in SAMPLES], ids=[name for name, _ in SAMPLES])
@EVERY_FORM
def test_samples_of_every_kind(
    form: dict[str, Any],
    samples: Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]],
    equal: bool,
) -> None:
    rng = np.random.default_rng(0)
    x, z = samples(rng)
    if not equal:
        drawn = (10 ** rng.uniform(-6, 0, size=len(sample)) for sample in (x, z))
        form = form | dict(
            zip(("sample_weight_x", "sample_weight_z"), (tensor(w / w.sum()) for w in drawn), strict=True)
        )
    assert_optimal(solve(TransportProblem(tensor(x), tensor(z), prior=0.4, **form)))


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e12])
@EVERY_FORM
def test_units_do_not_matter(scale: float, form: dict[str, Any]) -> None:
    problem = gaussian_problem(150, 150, 3, equal=True, **form)
    reference = solve(problem)
    if "margin" in form:
        form = form | {"margin": scale * form["margin"]}
    scaled = solve(TransportProblem(scale * problem.x, scale * problem.z, prior=0.5, **form))
    assert_optimal(scaled)
    assert scaled.value == pytest.approx(scale * reference.value, rel=1e-9)


@pytest.mark.parametrize("alpha", [0.3, 0.6])
def test_a_learned_margin_at_the_ceiling_of_alpha(alpha: float) -> None:
    # at alpha = 2 min(p, 1-p) the loss is flat in large m: the value is unique, the margin is not
    problem = gaussian_problem(20, 15, 2, prior=alpha / 2, alpha=alpha)
    solution = solve(problem)
    assert_optimal(solution)
    assert solution.value == pytest.approx(primal(problem).minimum(), rel=1e-9)
    assert solution.value == pytest.approx(
        problem.loss(solution.potential_x - 5, solution.potential_z - 5, solution.margin + 5), rel=1e-9
    )


# --- from the other side -----------------------------------------------------------------------------------------


def lipschitz_functions(problem: TransportProblem, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Values on the samples of a random function: slope min_k (h_k + ||. - q_k||) + shift, |slope| <= 1."""
    anchors = rng.normal(size=(int(rng.integers(1, 8)), problem.x.shape[1])) * 2
    heights = rng.normal(size=len(anchors))
    slope, shift = rng.uniform(-1, 1), rng.normal()
    f_x, f_z = ((cost_matrix(s.numpy(), anchors) + heights).min(axis=1) for s in (problem.x, problem.z))
    return tensor(slope * f_x + shift), tensor(slope * f_z + shift)


@EVERY_FORM
def test_no_function_does_better(form: dict[str, Any]) -> None:
    problem = gaussian_problem(30, 40, 2, shift=3.0, **form)
    solution = solve(problem)
    rng = np.random.default_rng(1)
    nothing = problem.loss(torch.zeros(30), torch.zeros(40), solution.margin)
    best = np.inf
    for _ in range(300):
        margin = solution.margin if not problem.learns_margin else abs(rng.normal())
        loss = problem.loss(*lipschitz_functions(problem, rng), margin)
        assert loss >= solution.value - 1e-9 * size(solution)
        best = min(best, loss)
    assert best < (nothing + solution.value) / 2  # some of them are good
    # near the optimum: f* and m* moved a little, f* made 1-Lipschitz again
    points = np.concatenate([problem.x.numpy(), problem.z.numpy()])
    apart = cost_matrix(points, points)
    for scale in (1e-6, 1e-3, 0.1):
        f = torch.cat([solution.potential_x, solution.potential_z]).numpy() + scale * rng.normal(size=len(points))
        f = (f + apart).min(axis=1)
        margin = abs(solution.margin + scale * rng.normal()) if problem.learns_margin else solution.margin
        loss = problem.loss(tensor(f[:30]), tensor(f[30:]), margin)
        assert loss >= solution.value - 1e-9 * size(solution)
        assert loss <= solution.value + 30 * scale * (1 + problem.hinge_weight)


# --- how it gets there -------------------------------------------------------------------------------------------


@EVERY_FORM
def test_rounds_end_with_few_arcs_and_no_gap(form: dict[str, Any]) -> None:
    rounds: list[Round] = []
    solution = solve(gaussian_problem(200, 300, 5, **form), on_round=rounds.append)
    assert [r.number for r in rounds] == list(range(1, len(rounds) + 1))
    assert len(rounds) > 1
    assert rounds[0].gap > 1e-6  # the first arcs do not suffice: this problem tests the rounds
    assert rounds[-1].gap == solution.gap <= 1e-9
    arcs = [r.arcs for r in rounds]
    assert arcs == sorted(arcs)
    assert arcs[-1] < 200 * 300 / 8


@EVERY_FORM
def test_small_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, form: dict[str, Any]) -> None:
    problem = gaussian_problem(50, 70, 3, **form)
    whole = solve(problem)
    monkeypatch.setattr(solver, "_BLOCK", 333)
    blocks = solve(problem)
    assert blocks.value == whole.value
    assert torch.equal(blocks.potential_x, whole.potential_x)
    assert torch.equal(blocks.potential_z, whole.potential_z)
    assert (blocks.plan.toarray() == whole.plan.toarray()).all()


def test_classes_trade_places() -> None:
    # f -> -f: the same problem from the other side
    problem = gaussian_problem(25, 40, 3, prior=0.3, hinge_weight=5.0, margin=1.0)
    other = TransportProblem(
        problem.z, problem.x, prior=0.7, hinge_weight=5.0, margin=1.0,
        sample_weight_x=problem.sample_weight_z, sample_weight_z=problem.sample_weight_x,
    )  # fmt: skip
    there, back = solve(problem), solve(other)
    assert there.value == pytest.approx(back.value, rel=1e-12)
    np.testing.assert_allclose(there.plan.toarray(), back.plan.toarray().T, atol=1e-12)


def test_samples_are_left_as_they_are() -> None:
    images = torch.rand(6, 1, 4, 4, requires_grad=True)
    others = torch.rand(9, 1, 4, 4)
    given = (images.detach().clone(), others.clone())
    solution = solve(TransportProblem(images, others, alpha=0.2))
    assert torch.equal(images.detach(), given[0])
    assert torch.equal(others, given[1])
    assert not solution.potential_x.requires_grad
    flat = TransportProblem(images.detach().flatten(1).double(), others.flatten(1).double(), alpha=0.2)
    assert solution.value == solve(flat).value


def test_too_large_a_problem_is_refused_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def computed(*_: Any) -> Tensor:
        raise AssertionError("distances were computed")

    monkeypatch.setattr(solver, "distances", computed)
    problem = TransportProblem(torch.zeros(2000, 1), torch.zeros(1000, 1), hinge_weight=0.0)
    needed = required_memory(2000, 1000, 1)
    assert needed > 8 * 2000 * 1000
    text = r"memory: 2000 x 1000 samples of 1 values need 0\.\d+ GB, the budget is 0\.001 GB; take fewer"
    with pytest.raises(InputError, match=text):
        solve(problem, memory_budget=1e6)
    with pytest.raises(InputError, match=f"need {needed / 1e9:.3g} GB"):
        solve(problem, memory_budget=needed - 1)
    with pytest.raises(AssertionError, match="distances were computed"):
        solve(problem, memory_budget=needed)


def test_a_margin_beside_which_distances_vanish_is_refused() -> None:
    x, z = torch.zeros(2, 1), torch.tensor([[8.0], [2.0]])
    solve(TransportProblem(x, z, hinge_weight=1.0, margin=7e5))
    with pytest.raises(InputError, match=r"margin = 900000: expected at most 100000 times the largest"):
        solve(TransportProblem(x, z, hinge_weight=1.0, margin=9e5))


def test_data_of_many_scales_take_few_rounds() -> None:
    # pairs within the rounding of the multipliers would come in without end: 124 rounds before
    generator = torch.Generator().manual_seed(0)
    scale = 10 ** torch.linspace(-6, 6, 700).double().unsqueeze(1)
    x, z = (torch.randn(700, 3, generator=generator).double() * scale for _ in range(2))
    rounds: list[Round] = []
    solution = solve(TransportProblem(x, z, hinge_weight=10.0, margin=1.0), on_round=rounds.append)
    assert solution.gap <= 1e-9
    assert len(rounds) <= 20


def test_weights_say_how_often_a_sample_counts() -> None:
    rng = np.random.default_rng(3)
    x, z = tensor(rng.normal(size=(6, 2))), tensor(rng.normal(size=(8, 2)))
    times = torch.tensor([1, 3, 2, 1, 4, 1])
    for form in FORMS:
        weighted = solve(TransportProblem(x, z, prior=0.5, sample_weight_x=times / times.sum(), **form))
        repeated = solve(TransportProblem(x.repeat_interleave(times, 0), z, prior=0.5, **form))
        assert weighted.value == pytest.approx(repeated.value, rel=1e-6)  # the weights were float32
    assert float(weights(rng, 5).sum()) == pytest.approx(1)
