"""Distances: exact to a few units in the last place, whatever the norm, the dimension, and how near a pair lies."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from otnn.transport import costs
from otnn.transport.costs import distances, pair_distances
from tests.transport.problems import tensor
from tests.transport.slow import cost_matrix

NORMS = [2.0, 1.0, math.inf, 1.5, 3.0]


def extended(x: Tensor, z: Tensor) -> NDArray[np.longdouble]:
    """Euclidean distances in extended precision, from the differences."""
    wide_x, wide_z = x.numpy().astype(np.longdouble), z.numpy().astype(np.longdouble)
    return np.stack([np.sqrt(((row - wide_z) ** 2).sum(axis=1)) for row in wide_x])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dims", [1, 2, 32, 33, 784])
def test_the_matrix_is_that_of_scipy(dims: int, norm: float) -> None:
    rng = np.random.default_rng(dims)
    x, z = rng.normal(size=(40, dims)), rng.normal(size=(30, dims)) * 2 + 1
    z[:10] = x[:10]
    found = distances(tensor(x), tensor(z), norm).numpy()
    np.testing.assert_allclose(found, cost_matrix(x, z, norm), rtol=1e-12)
    assert (np.diag(found)[:10] == 0).all()


@pytest.mark.parametrize("apart", [1e-9, 1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("offset", [0.0, 1.0, 1e3, 1e6])
def test_near_duplicates_keep_their_digits(offset: float, apart: float) -> None:
    rng = np.random.default_rng(0)
    x = tensor(offset + rng.normal(size=(40, 784)))
    z = x + apart * torch.nn.functional.normalize(tensor(rng.normal(size=(40, 784))), dim=1)
    np.testing.assert_allclose(distances(x, z).numpy(), extended(x, z).astype(float), rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-100, 1e-6, 1e6, 1e100])
@pytest.mark.parametrize("dims", [3, 50])
def test_units_do_not_matter(dims: int, scale: float) -> None:
    rng = np.random.default_rng(1)
    x, z = tensor(rng.normal(size=(9, dims))), tensor(rng.normal(size=(8, dims)))
    found = distances(scale * x, scale * z) / scale
    np.testing.assert_allclose(found.numpy(), cost_matrix(x.numpy(), z.numpy()), rtol=1e-12)


def test_one_cluster_far_from_the_other() -> None:
    rng = np.random.default_rng(2)
    x, z = tensor(rng.normal(size=(20, 64))), tensor(1e8 + 1e-3 * rng.normal(size=(15, 64)))
    np.testing.assert_allclose(distances(x, z).numpy(), extended(x, z).astype(float), rtol=1e-12)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    x, z = tensor(rng.normal(size=(23, 40))), tensor(rng.normal(size=(17, 40)))
    z[::2] = x[:9] + 1e-7
    whole = distances(x, z)
    monkeypatch.setattr(costs, "_CHUNK", 100)
    assert torch.equal(distances(x, z), whole)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1)])
@pytest.mark.parametrize("dims", [2, 50])
def test_one_sample(shape: tuple[int, int], dims: int) -> None:
    rng = np.random.default_rng(4)
    x, z = rng.normal(size=(shape[0], dims)), rng.normal(size=(shape[1], dims))
    found = distances(tensor(x), tensor(z))
    assert found.shape == shape
    np.testing.assert_allclose(found.numpy(), cost_matrix(x, z), rtol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_pairs_are_the_diagonal(norm: float) -> None:
    rng = np.random.default_rng(5)
    x, z = tensor(rng.normal(size=(12, 5))), tensor(rng.normal(size=(12, 5)))
    torch.testing.assert_close(pair_distances(x, z, norm), distances(x, z, norm).diag(), rtol=1e-14, atol=0)
