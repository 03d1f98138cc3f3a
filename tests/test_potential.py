import itertools
from fractions import Fraction

import pytest
import torch
from torch import nn

from otnn.lipschitz import LipschitzBound
from otnn.models import Classifier
from otnn.potential import label_distances, pair_distances
from tests.exact import distance, fractions


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_distances_of_rows_are_rounded_up(scale: float) -> None:
    head = nn.Linear(12, 6)
    with torch.no_grad():
        head.weight.mul_(scale)
    model = Classifier(nn.Sequential(), head, (12,))
    body = LipschitzBound(0.7, ())
    rows = [fractions(row) for row in head.weight]
    pairs, single = pair_distances(model, body), label_distances(model, body)
    for i, j in itertools.product(range(6), range(6)):
        square = Fraction(0.7) ** 2 * distance(rows[i], rows[j])
        assert square <= Fraction(float(pairs[i, j])) ** 2 <= square * (1 + Fraction(1, 10**12))
    for i in range(6):
        square = Fraction(0.7) ** 2 * distance(rows[i], [Fraction(0)] * 12)
        assert square <= Fraction(float(single[i])) ** 2 <= square * (1 + Fraction(1, 10**12))
    one = Classifier(nn.Sequential(), nn.Linear(12, 1), (12,))
    square = Fraction(0.7) ** 2 * distance(fractions(one.head.weight), [Fraction(0)] * 12)
    assert square <= Fraction(float(pair_distances(one, body)[0, 1])) ** 2 <= square * (1 + Fraction(1, 10**12))
