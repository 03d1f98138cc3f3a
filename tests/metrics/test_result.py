import json
import math

import pytest
import torch

from otnn.explain.scores import Scorer
from otnn.metrics import Cost, bootstrap_interval, cost_of, deletion, gini, insertion, mu_fidelity
from tests.metrics.networks import conv, images

FREE = ("explanation_distance", "jpeg_bytes", "entropy", "gini", "top_share", "pointing_game", "human_alignment")


def test_a_result_tells_how_to_read_it() -> None:
    x = images(6, 2, 9, 9)
    result = deletion(Scorer(conv(), x, 1), x, x, steps=4, baseline=0.5)
    told = json.loads(json.dumps(result.summary()))
    assert told["settings"] == {"steps": 4, "baseline": 0.5}
    assert (told["direction"], told["map"], told["samples"], told["forwards"]) == ("down", "signed", 6, 30)
    assert result.arrow == "↓"
    low, high = result.interval
    assert low <= result.mean <= high
    assert result.interval == bootstrap_interval(result.per_sample)


def test_one_sample_has_a_mean_but_no_interval() -> None:
    result = gini(images(1, 1, 4, 4))
    assert math.isfinite(result.mean)
    assert all(math.isnan(end) for end in result.interval)


def test_results_keep_no_graph() -> None:
    x = images(3, 2, 9, 9)
    model = conv()
    maps = model[0].weight.sum() * x
    assert maps.requires_grad
    for metric in (deletion, insertion, mu_fidelity):
        result = metric(Scorer(model, x, 1), x, maps)
        assert not result.per_sample.requires_grad
        assert result.curves is None or not result.curves.raw.requires_grad


def test_the_cost_is_what_the_metrics_report() -> None:
    x = images(3, 2, 4, 4)
    scorer = Scorer(conv(), x, 1)
    for steps in (5, 10, 40):
        expected = cost_of("deletion", 3, steps=steps, pixels=16).forwards
        assert deletion(scorer, x, x, steps=steps).forwards == insertion(scorer, x, x, steps=steps).forwards == expected
    assert mu_fidelity(scorer, x, x, samples=11).forwards == cost_of("mu_fidelity", 3, samples=11).forwards == 33
    for name in FREE:
        assert cost_of(name, 1000, forwards_per_map=50) == Cost(0, 0, 0)


def test_time_follows_from_measured_passes() -> None:
    cost = cost_of("average_stability", 10, forwards_per_map=50, backwards_per_map=50)
    assert cost == Cost(10 * 21 * 50, 10 * 21 * 50, 210)
    assert cost.seconds(1e-3, 2e-3) == pytest.approx(31.5)


def test_devices_are_kept() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x = images(3, 2, 9, 9).to(device)
    scorer = Scorer(conv().to(device), x, 1)
    result = mu_fidelity(scorer, x, x, baseline="uniform")
    assert result.per_sample.device == x.device
