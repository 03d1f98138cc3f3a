"""The benchmarks of explanations time what they say: the same maps by both ways, and passes that are really made."""

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.explain import by_hand, passes, peers
from benchmarks.explain.__main__ import app, lines
from benchmarks.explain.subjects import CLASSES, SHAPE, Subject, images_of
from otnn.models import build, predict

DETERMINISTIC = ("saliency", "gradient_input", "integrated_gradients", "occlusion", "guided_backprop", "deconvolution")


def subject(name: str, **settings: object) -> Subject:
    torch.manual_seed(0)
    model = build(name.split(",")[0], SHAPE, CLASSES, **settings).eval()  # type: ignore[arg-type]
    images = images_of(4, None, 0)
    return Subject(name, model, images, predict(model(images)))


@pytest.fixture(scope="module")
def dense() -> Subject:
    return subject("dense, OTNN", widths=(16,))


@pytest.fixture(scope="module")
def conv() -> Subject:
    return subject("conv, ordinary", widths=(4, 4), constrained=False)


def test_both_ways_of_calling_captum_give_the_same_maps(dense: Subject, conv: Subject) -> None:
    for each, expected in ((dense, 4), (conv, 6)):
        pairs = by_hand._pairs(each)
        compared = [name for name in DETERMINISTIC if name in pairs]
        assert len(compared) == expected
        for name in compared:
            ours, hand = pairs[name]
            torch.testing.assert_close(ours(), hand(64).detach(), rtol=1e-4, atol=1e-6, msg=name)


def test_gradcam_by_hand_is_the_same_map(conv: Subject) -> None:
    ours, hand = by_hand._gradcam(conv)
    torch.testing.assert_close(ours(), hand(64).detach(), rtol=1e-4, atol=1e-6)


def test_the_passes_of_the_floor_are_those_that_are_made(dense: Subject) -> None:
    jobs, made = passes._jobs(dense)
    samples = [0]
    handle = dense.model.head.register_forward_hook(lambda _, inputs, output: samples.append(len(inputs[0])))
    try:
        for name in ("rise", "sobol", "hsic", "forgrad", "deletion", "insertion", "mu_fidelity", "average_stability"):
            samples[:] = []
            jobs[name]()
            # beside them: one sample to find the classes and, once for a network, three to measure the memory
            assert made[name][0] <= sum(samples) <= 1.1 * made[name][0] + 8, name
    finally:
        handle.remove()


def test_a_report_tells_what_is_within_its_bar(dense: Subject) -> None:
    entry = passes.passes(dense, 1, lambda: None)
    told = list(lines({"benchmark": "explain passes", "bar": 1e9, "measured": [entry]}))
    assert all("NOT" not in line for line in told)
    assert any("deletion" in line for line in told)
    missed = list(lines({"benchmark": "explain passes", "bar": 0.0, "measured": [entry]}))
    assert sum("NOT within" in line for line in missed) == sum("within" in line for line in told)


def test_quantus_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "available", lambda: False)
    result = CliRunner().invoke(app, ["quantus", "--images", "2", "--rounds", "1"])
    assert result.exit_code != 0
    assert "quantus cannot be imported" in str(result.exception)
