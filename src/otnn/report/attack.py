"""The section of the page on attacks: what they leave beside what is certified, and the checks of both."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from otnn.report import words
from otnn.report.load import RunFiles

_NORMS = {"l2": "L2 norm", "linf": "largest change of a value"}


@dataclass(frozen=True)
class AttackSection:
    """What the section shows.

    Attributes:
        samples: test images.
        norm: of the radii, in words.
        attacks: their names.
        networks: in plain words.
        radii: a row each: the radius, then certified and attacked accuracy of each network.
        corruptions: a row each: the corruption, its mean L2 size, then the accuracy of each network under it.
        checks: a row each: what is checked, then whether it passed, with the detail, of each network.
        failed: how many checks failed.
        verdict: sentences.
        picture: data URI.
    """

    samples: int
    norm: str
    attacks: list[str]
    networks: list[str]
    radii: list[tuple[str, list[str]]]
    corruptions: list[tuple[str, str, list[str]]]
    checks: list[tuple[str, list[tuple[str, str]]]]
    failed: int
    verdict: list[str]
    picture: str


def attack_section(files: RunFiles) -> AttackSection | None:
    """The section of a run that was attacked."""
    content = files.attacks
    if content is None:
        return None
    return AttackSection(
        samples=content["samples"],
        norm=_NORMS[content["norm"]],
        attacks=[words.attack(name) for name in content["attacks"]],
        networks=[words.network(name) for name in content["networks"]],
        radii=[(f"{radius:.4g}", _row(content, k)) for k, radius in enumerate(content["radii"])],
        corruptions=[_corruption(row) for row in content["corruptions"]["rows"]],
        checks=_checks(content),
        failed=content["failed"],
        verdict=[str(sentence) for sentence in content["verdict"]],
        picture=f"data:image/png;base64,{base64.b64encode(files.attack_picture).decode()}",
    )


def _row(content: Mapping[str, Any], k: int) -> list[str]:
    cells = []
    for network in content["networks"].values():
        cells += [words.percent(network["certified"][k]), words.percent(network["best"]["accuracy"][k])]
    return cells


def _corruption(row: Mapping[str, Any]) -> tuple[str, str, list[str]]:
    name = f"{row['name'].replace('_', ' ')}, {row['unit']} {row['severity']:g}"
    return name, f"{row['mean_size']:.2f}", [words.percent(share) for share in row["accuracy"].values()]


def _checks(content: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    rows: dict[str, list[tuple[str, str]]] = {}
    for row in content["checks"]:
        said = {True: "passed", False: "FAILED", None: "not run"}[row["passed"]]
        rows.setdefault(row["check"], []).append((said, str(row["detail"])))
    return list(rows.items())
