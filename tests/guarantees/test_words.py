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
    parts = {key: torch.tensor([value]).double() for key, value in details.items()}
    return Guarantee(name, torch.tensor([bound_]).double(), "", torch.tensor([vacuous]), (reason,), "", parts)


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (
            one("boundary_bracket", 0.81, radius=0.81, upper=1.02, outside=0.0),
            "No change of the whole image with an L2 norm below 0.81 can alter this prediction; one of 1.02 along the "
            "gradient does.",
        ),
        (
            one("boundary_bracket", 0.81, radius=0.4, upper=1.02, outside=0.25),
            "No change of the whole image with an L2 norm below 0.81 can bring the other class level with the "
            "predicted one; one of 1.02 along the gradient does, though it takes 25 % of the values out of the range "
            "of pixels.",
        ),
        (
            one("path_stability", 0.289, length=1.02, steady=0.7199),
            "Along the way to the other class, of L2 length 1.02, the map keeps within 60 degrees of the one shown "
            "over at least 71 % of the way.",
        ),
        (
            one("gradient_agreement", 0.6, relative=0.6, measured=0.2, length=1.0),
            "Integrated Gradients along the way to the other class and the map shown, times that way, differ by at "
            "most 60 % of its total (20 % measured).",
        ),
        (
            one("constant_saliency", 0.00001, True),
            "The map is exactly the same for every image within an L2 norm of 1e-05, which is less than one grey level "
            "of one pixel.",
        ),
        (one("constant_saliency", torch.inf), "The map is exactly the same for every image."),
    ],
)
def test_sentences(found: Guarantee, sentence: str) -> None:
    assert in_words(found) == (sentence,)


def test_the_sentence_on_smoothgrad() -> None:
    parts = {"top": torch.tensor([[True, False, False]]), "candidates": torch.tensor([[True, True, False]])}
    values = {"confidence": torch.tensor([0.999]), "needed": torch.tensor([16000.0])}
    found = Guarantee(
        "certified_smoothgrad", torch.tensor([0.12]), "", torch.tensor([False]), ("",), "", {**parts, **values}
    )
    assert in_words(found) == (
        "With 99.9 % confidence the 1 pixels of the smoothed map that matter most are among the 2 marked, for this "
        "image and every image within an L2 norm of 0.12.",
    )
