import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from otnn.errors import InputError
from otnn.transport import TransportProblem, plan_partner, solve
from tests.transport.problems import FORMS, gaussian_problem, problems


@settings(deadline=None, max_examples=20)
@given(problems(most=8), st.integers(1, 3))
def test_partners_are_the_largest_entries_of_the_plan(problem: TransportProblem, k: int) -> None:
    solution = solve(problem)
    plan = solution.plan.toarray()
    count_x, count_z = plan.shape
    found = plan_partner(solution, torch.arange(count_x + count_z), k=k)
    assert set(found.status) == {"ok"}
    for sample in range(count_x + count_z):
        positive = sample < count_x
        carried = plan[sample] if positive else plan[:, sample - count_x]
        masses = sorted((mass for mass in carried if mass > 0), reverse=True)[:k]
        partners = [int(j) for j in found.partner[sample] if j >= 0]
        assert len(partners) == len(set(partners)) == len(masses)
        others = [j - count_x if positive else j for j in partners]
        assert [carried[j] for j in others] == pytest.approx(masses)
        assert found.share[sample, : len(masses)].tolist() == pytest.approx([m / carried.sum() for m in masses])
        own = problem.x[sample] if positive else problem.z[sample - count_x]
        points = problem.z if positive else problem.x
        lengths = [float(torch.linalg.vector_norm(own - points[j], ord=problem.norm)) for j in others]
        assert found.distance[sample, : len(masses)].tolist() == pytest.approx(lengths)
        assert (found.partner[sample, len(masses) :] == -1).all()
        assert (found.share[sample, len(masses) :] == 0).all()
        assert found.distance[sample, len(masses) :].isnan().all()


@pytest.mark.parametrize("form", FORMS)
def test_indices_are_those_of_the_data(form: dict[str, float]) -> None:
    solution = solve(gaussian_problem(5, 4, 3, **form))
    indices = (torch.tensor([10, 3, 7, 100, 8]), torch.tensor([50, 2, 60, 41]))
    samples = torch.tensor([41, 10, 9, 2, 1000, -3])
    here = plan_partner(solution, samples, indices)
    plain = plan_partner(solution, torch.tensor([8, 0, 6]))
    assert here.status == ("ok", "ok", "not in the plan", "ok", "not in the plan", "not in the plan")
    place = torch.cat(indices)
    known = torch.tensor([0, 1, 3])
    assert here.partner[known].flatten().tolist() == place[plain.partner.flatten()].tolist()
    assert torch.equal(here.share[known], plain.share)
    assert torch.equal(here.distance[known], plain.distance)
    unknown = torch.tensor([2, 4, 5])
    assert (here.partner[unknown] == -1).all()
    assert here.distance[unknown].isnan().all()
    assert math.isclose(float(here.share[unknown].sum()), 0.0)


@pytest.mark.parametrize(
    ("samples", "indices", "k", "text"),
    [
        (torch.tensor([0.5]), None, 1, r"expected indices \(n,\), got torch.float32"),
        (torch.tensor([[0]]), None, 1, r"of shape \(1, 1\)"),
        (torch.tensor([0]), None, 0, "at least 1 partner"),
        (torch.tensor([0]), (torch.arange(3), torch.arange(4)), 1, "5 positives and 4 negatives of the solution"),
    ],
)
def test_bad_input_says_what_was_expected(samples: torch.Tensor, indices: object, k: int, text: str) -> None:
    solution = solve(gaussian_problem(5, 4, 3, hinge_weight=0.0))
    with pytest.raises(InputError, match=text):
        plan_partner(solution, samples, indices, k=k)  # type: ignore[arg-type]
