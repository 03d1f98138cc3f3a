"""Problems that tests draw."""

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from otnn.transport import TransportProblem

# One of each form; margins are in units of what `gaussian_problem` draws
FORMS: list[dict[str, Any]] = [{"hinge_weight": 0.0}, {"hinge_weight": 6.0, "margin": 0.8}, {"alpha": 0.15}]
NAMES = ["plain", "fixed", "learned"]


def tensor(values: Any) -> Tensor:
    return torch.as_tensor(np.asarray(values), dtype=torch.float64)


def weights(rng: np.random.Generator, count: int, least: float = 0.1) -> Tensor:
    """Random weights, none below `least` of the mean: optimal plans of such weights are not degenerate."""
    drawn = np.maximum(rng.exponential(size=count), least)
    return tensor(drawn / drawn.sum())


def gaussian_problem(
    n: int, m: int, dims: int, *, seed: int = 0, shift: float = 1.0, equal: bool = False, **form: Any
) -> TransportProblem:
    """Two Gaussian clouds whose centres lie `shift` apart along the first axis."""
    rng = np.random.default_rng(seed)
    x, z = rng.normal(size=(n, dims)), rng.normal(size=(m, dims))
    x[:, 0] += shift
    if not equal:
        form = {"sample_weight_x": weights(rng, n), "sample_weight_z": weights(rng, m), **form}
    return TransportProblem(tensor(x), tensor(z), **{"prior": 0.5, **form})


@st.composite
def problems(draw: st.DrawFn, most: int = 30) -> TransportProblem:
    """Small problems of order one, of every kind: ties, points of both classes, one sample, any weights and priors."""
    n, m, dims = draw(st.integers(1, most)), draw(st.integers(1, most)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x, z = rng.normal(size=(n, dims)), rng.normal(size=(m, dims)) + rng.uniform(0, 3)
    kind = draw(st.sampled_from(["gaussian", "grid", "shared"]))
    if kind == "grid":
        x, z = rng.integers(0, 4, size=x.shape), rng.integers(0, 4, size=z.shape)
    elif kind == "shared":
        z[: min(n, m) // 2] = x[: min(n, m) // 2]
    prior = draw(st.none() | st.floats(0.05, 0.95))
    p = n / (n + m) if prior is None else prior
    form: dict[str, Any] = {"hinge_weight": draw(st.sampled_from([0.0, 0.1, 1.0, 10.0, 100.0]))}
    if draw(st.booleans()):
        form["margin"] = draw(st.sampled_from([0.0, 0.2, 1.0, 5.0]))
    else:
        form["alpha"] = draw(st.floats(0.01, 1.0)) * 2 * min(p, 1 - p)
        form["hinge_weight"] = draw(st.none() | st.just(form["hinge_weight"]))
    return TransportProblem(
        tensor(x),
        tensor(z),
        prior=prior,
        norm=draw(st.sampled_from([2.0, 1.0, np.inf, 3.0])),
        sample_weight_x=draw(st.none() | st.just(weights(rng, n, 1e-6))),
        sample_weight_z=draw(st.none() | st.just(weights(rng, m, 1e-6))),
        **form,
    )
