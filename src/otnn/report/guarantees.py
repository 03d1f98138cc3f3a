"""The guarantees on the page: the short lines under a map, the full list of an image, and the table over images."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from otnn.report.words import figure

Arrays = Mapping[str, NDArray[Any]]

# What stands under a map without being asked for
SHORT = ("boundary_bracket", "path_stability")
# Title and what is promised, in plain words
MEANINGS = {
    "boundary_bracket": (
        "How far the boundary is",
        "No smaller change of the whole picture alters the answer; the boundary was found within the upper end.",
    ),
    "path_stability": (
        "How steady the map is on the way",
        "How much the map of the lead turns at most, in the mean over the way to the other class.",
    ),
    "gradient_agreement": (
        "Integrated Gradients and the map",
        "How far another well-known map, Integrated Gradients along the way, can be from this one.",
    ),
    "certified_smoothgrad": (
        "The smoothed map's main pixels",
        "How far the picture may change while the 5 % of pixels that matter most stay among a fixed tenth of all.",
    ),
    "constant_saliency": (
        "Where the map is constant",
        "How far the picture may change while the map stays exactly the same.",
    ),
    "masking_deletion": ("Hiding pixels: Deletion", "How much the lead can change, in the mean over steps that hide."),
    "masking_insertion": ("Hiding pixels: Insertion", "The same for steps that show the pixels that matter first."),
    "masking_mu_fidelity": ("Hiding pixels: muFidelity", "The same for random patterns."),
    "masking_occlusion": ("Hiding pixels: occlusion", "The same for a window that moves over the picture."),
    "robustness_sr": (
        "Changing a set of pixels: Robustness-Sr",
        "No smaller change of any set of pixels alters the answer.",
    ),
}


@dataclass(frozen=True)
class Promise:
    """One guarantee of one image.

    Attributes:
        title: what it is about.
        sentence: in plain words.
        vacuous: whether it says nothing of this image.
        domain: where it holds.
    """

    title: str
    sentence: str
    vacuous: bool
    domain: str


@dataclass(frozen=True)
class PromiseTable:
    """Every guarantee over many images.

    Attributes:
        images: how many.
        random: whether they were drawn at random, or are those of the gallery.
        rows: title, meaning, images that it says something of, median bound with unit, share of it used, domain.
    """

    images: int
    random: bool
    rows: list[tuple[str, ...]]


def promises(arrays: Arrays, k: int) -> list[Promise]:
    """All guarantees of image k."""
    return [
        Promise(
            MEANINGS[name][0],
            str(arrays["guarantee_sentence"][k, g]),
            bool(arrays["guarantee_vacuous"][k, g]),
            str(arrays["guarantee_domain"][g]),
        )
        for g, name in enumerate(map(str, arrays["guarantee"]))
    ]


def short_lines(arrays: Arrays, k: int) -> list[str]:
    """The sentences that stand under the map of image k."""
    names = [str(name) for name in arrays["guarantee"]]
    return [str(arrays["guarantee_sentence"][k, names.index(name)]) for name in SHORT]


def promise_table(arrays: Arrays) -> PromiseTable:
    """Shares and medians, over the images that they were counted on."""
    counted = int(arrays["guarantee_samples"])
    images = counted or len(arrays["guarantee_vacuous"])
    rows: list[tuple[str, ...]] = []
    for g, name in enumerate(map(str, arrays["guarantee"])):
        share, median, used = (float(arrays[f"guarantee_{key}"][g]) for key in ("share", "median", "median_tightness"))
        rows.append(
            (
                *MEANINGS[name],
                f"{round(share * images)} of {images}",
                _bound(name, median, str(arrays["guarantee_unit"][g])),
                f"{100 * used:.0f} %" if np.isfinite(used) else "–",
                str(arrays["guarantee_domain"][g]),
            )
        )
    return PromiseTable(images, bool(counted), rows)


def _bound(name: str, median: float, unit: str) -> str:
    if np.isnan(median):
        return "none"
    if name == "path_stability":
        return f"{100 * np.sqrt(median):.0f} % in root mean square"
    return f"{figure(median)} ({unit})" if np.isfinite(median) else "any change"
