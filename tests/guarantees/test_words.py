"""The sentences say what the numbers say."""

import re

import pytest
import torch

from otnn.guarantees import Guarantee, guarantees, in_words
from otnn.lipschitz import bound
from otnn.models import build


def test_every_sentence_of_every_sample_stands_alone() -> None:
    model = build("dense", (1, 8, 8), 3, widths=(32,)).eval()
    inputs = torch.rand(4, 1, 8, 8)
    inputs[0] = torch.nan
    found = guarantees(model, inputs, bound(model.body), samples=20, robustness=torch.full((4, 1), 5.0))
    for guarantee in found.values():
        sentences = in_words(guarantee)
        assert len(sentences) == 4
        for sentence in sentences:
            assert sentence[0].isupper()
            assert sentence.endswith(".")
            assert not re.search(r"\bnan\b|tensor|\binf\b|e\+", sentence)
        assert "no guarantee, as the input holds NaN" in sentences[0]


def one(name: str, bound_: float, vacuous: bool = False, reason: str = "", **details: float) -> Guarantee:
    parts = {key: torch.tensor([value], dtype=torch.float64) for key, value in details.items()}
    return Guarantee(
        name, torch.tensor([bound_], dtype=torch.float64), "", torch.tensor([vacuous]), (reason,), "", parts
    )


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (
            one("boundary_bracket", 0.81, radius=0.81, upper=1.02, outside=0.0),
            "No change of the whole image with an L2 norm below 0.81 can alter this prediction; one of at most 1.02 "
            "along the gradient does.",
        ),
        (
            one("boundary_bracket", 0.81, radius=0.4, upper=1.02, outside=0.25),
            "No change of the whole image with an L2 norm below 0.81 can bring the other class level with the "
            "predicted one; one of at most 1.02 along the gradient does, though it takes 25 % of the values out of the "
            "range of pixels.",
        ),
        (
            one("path_stability", 0.289, length=1.02, steady=0.7199),
            "Along the way to the other class, of L2 length 1.02, the map of the lead over that class differs from its "
            "direction at this image by at most 54 % in root mean square, and keeps within 60 degrees of it over at "
            "least 71 % of the way.",
        ),
        (
            one("gradient_agreement", 0.6, relative=0.6, measured=0.2, length=1.0),
            "Integrated Gradients along the way to the other class, and the map of the lead over that class times "
            "that way, differ by at most 60 % of its total (20 % measured).",
        ),
        (
            one("constant_saliency", 0.00001, True),
            "The map of the lead over the other class is exactly the same for every image within an L2 norm of "
            "0.00001, which is less than one grey level of one pixel.",
        ),
        (
            one("constant_saliency", torch.inf),
            "The map of the lead over the other class is exactly the same for every image.",
        ),
    ],
)
def test_sentences(found: Guarantee, sentence: str) -> None:
    assert in_words(found) == (sentence,)


def test_no_figure_says_more_than_is_proven() -> None:
    found = one("boundary_bracket", 0.8199, radius=0.8199, upper=1.0201, outside=0.0)
    assert in_words(found)[0].startswith("No change of the whole image with an L2 norm below 0.819 can alter")
    assert in_words(found)[0].endswith("one of at most 1.03 along the gradient does.")
    found = one("boundary_bracket", 0.8199, radius=0.8199, upper=1.0201, outside=0.004)
    assert "though it takes less than 1 % of the values out" in in_words(found)[0]
    # the radius of the prediction is a little below that of the pair, by less than a digit
    found = one("boundary_bracket", 0.8101, radius=0.8099, upper=1.0201, outside=0.0)
    assert "below 0.809 can alter this prediction" in in_words(found)[0]
    found = one("path_stability", 0.2892, length=1.0, steady=0.7199)
    assert "at most 54 % in root mean square" in in_words(found)[0]  # 53.78 %
    found = one("path_stability", 0.2401, length=1.0, steady=0.7599)  # exactly 49 %, and 75.99 %
    assert (
        "at most 49 % in root mean square, and keeps within 60 degrees of it over at least 75 %" in in_words(found)[0]
    )
    found = one("gradient_agreement", 0.601, relative=0.601, measured=0.2, length=1.0)
    assert "at most 61 % of its total" in in_words(found)[0]
    found = one("robustness_sr", 0.12399, upper=0.5001)
    assert (
        "below 0.123 cannot alter the prediction; on the sets attacked, one of at most 0.501 did" in in_words(found)[0]
    )


def test_the_sentence_on_smoothgrad() -> None:
    parts = {"top": torch.tensor([[True, False, False]]), "candidates": torch.tensor([[True, True, False]])}
    values = {"confidence": torch.tensor([0.999]), "needed": torch.tensor([16000.0])}
    found = Guarantee(
        "certified_smoothgrad",
        torch.tensor([0.12], dtype=torch.float64),
        "",
        torch.tensor([False]),
        ("",),
        "",
        {**parts, **values},
    )
    assert in_words(found) == (
        "With 99.9 % confidence the 1 pixels of the smoothed map that matter most are among 2 known ones, for "
        "this image and every image within an L2 norm of 0.12.",
    )
