"""The section of the page on the audit: how near the network is to the exact optimum."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from otnn.report.charts import Chart, chart
from otnn.report.figures import picture
from otnn.report.gallery import Figure
from otnn.report.load import RunFiles
from otnn.transport.verdict import FIGURES

_SPLITS = (("train", "training"), ("test", "test"))


@dataclass(frozen=True)
class Pair:
    """A sample with its steps along the gradient and its partner under the plan.

    Attributes:
        title: both classes.
        text: distance, cosine and the share of the partner.
        figures: the image, both steps and the partner.
    """

    title: str
    text: str
    figures: list[Figure]


@dataclass(frozen=True)
class AuditSection:
    """What the section shows.

    Attributes:
        verdict: sentences.
        exact: whether the network was trained for the problems that it is measured against.
        samples: the most that were taken of each side, or None for all.
        columns: name and meaning of each figure of the table.
        rows: potential, images, and the figures.
        profile: cosine and norm of the gradient along the way from samples to their partners.
        pairs: samples and their partners.
    """

    verdict: list[str]
    exact: bool
    samples: int | None
    columns: list[tuple[str, str]]
    rows: list[tuple[str, str, list[str]]]
    profile: Chart | None
    pairs: list[Pair]


def audit_section(files: RunFiles) -> AuditSection | None:
    """The section of a run that was audited."""
    if files.audit is None:
        return None
    splits = files.audit["splits"]
    entries = [(name, shown, entry) for name, shown in _SPLITS for entry in splits[name]]
    return AuditSection(
        verdict=[str(sentence) for sentence in files.audit["verdict"]],
        exact=all(entry["exact"] for _, _, entry in entries),
        samples=files.audit["samples"],
        columns=[(name, meaning) for name, meaning, _ in FIGURES],
        rows=[(entry["name"], shown, [show(entry) for _, _, show in FIGURES]) for _, shown, entry in entries],
        profile=_profile(splits["train"]),
        pairs=[_pair(files, k) for k in range(len(files.partners["label"]))],
    )


def _profile(entries: list[Mapping[str, Any]]) -> Chart | None:
    """Means over the potentials of cosine and norm at each place of the segments."""
    profiles = [entry["segment_profile"] for entry in entries if entry["segment_profile"]]
    if not profiles:
        return None
    place, cosine, norm = np.mean(profiles, axis=0).T
    drawn = chart(
        "The gradient on the way from a sample to its partner",
        f"The cosine runs from {cosine[0]:.2f} at the positive end to {cosine[-1]:.2f} at the negative one, "
        f"the norm from {norm[0]:.2f} to {norm[-1]:.2f}; at the optimum both are 1 everywhere.",
        (0.0, 1.0, "place on the way: 0 at the positive, 1 at the negative"),
        (min(0.0, float(cosine.min())), 1.05, "mean over segments of the plan"),
    )
    drawn.line(place, cosine, "otnn", "cosine of the gradient with the way")
    drawn.line(place, norm, "twin", "norm of the gradient")
    return drawn


def _pair(files: RunFiles, k: int) -> Pair:
    one = {name: values[k] for name, values in files.partners.items()}
    own, other = (files.classes[int(one[name])] for name in ("label", "partner_label"))
    captions = {
        "image": (f"“{own}”", f"A training picture of “{own}”."),
        "one_step": (
            f"one gradient step: from {one['potential']:+.2f} to {one['potential_after']:+.2f}",
            "The picture after one step along the gradient, as long as the potential is high.",
        ),
        "same_length": (
            "along the gradient, as far as the partner",
            "The picture moved along the gradient by the partner's distance.",
        ),
        "partner": (f"partner: “{other}”", f"Its partner under the exact plan, a training picture of “{other}”."),
    }
    cosine = f"has cosine {one['cosine']:.2f} with the way there" if one["distance"] > 0 else "has no way to go"
    text = (
        f"Potential “{one['name']}”. The partner is {one['distance']:.2f} away and takes {one['share']:.0%} of what "
        f"the plan carries from this picture; the gradient {cosine}."
    )
    figures = [Figure(picture(one[name]), *told) for name, told in captions.items()]
    return Pair(f"“{own}” and “{other}”", text, figures)
