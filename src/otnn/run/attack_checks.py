"""The checks of attacks.json: signs of a broken certificate, of a weak attack, or of gradients that mislead one."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

Json = dict[str, Any]
# The random search that no gradients mislead: were it the best, these would
BLACK_BOX = "square"
ONE_STEP = "step"
# Neither need turn all that can be turned at the largest radius
_MAY_LEAVE = (ONE_STEP, BLACK_BOX)
_NONE_OF_STEPS = "no attack of several steps along gradients was run"


def certified(network: Json, content: Json) -> tuple[bool, str]:
    """No adversarial point lies below its certified radius, and no curve below the certified one."""
    below = {name: told["below"] for name, told in network["attacks"].items() if told["below"]}
    if network["left"] is not None and network["left"]["below"]:
        below[f"{BLACK_BOX} on what was left"] = network["left"]["below"]
    if below:
        return False, f"adversarial points below the certified radius: {_listed(below)}"
    for name, told in network["attacks"].items():
        for radius, least, share in zip(content["radii"], network["certified"], told["accuracy"], strict=True):
            if share < least:
                return False, f"{name} at radius {radius:.4g}: accuracy {share:.1%}, certified {least:.1%}"
    rounding = sum(told["rounding"] for told in network["attacks"].values())
    points = sum(told["successes"] for told in network["attacks"].values())
    return True, f"none of {points} adversarial points" + (
        f"; {rounding} by the rounding of float32 alone, not counted" if rounding else ""
    )


def zero_at_large(network: Json, content: Json) -> tuple[bool | None, str]:
    """At the largest radius, where every image may become any other, nothing is left by all attacks together.

    One that leaves what another turns is named, without a failure: the figures rest on the best of them.
    """
    if set(network["attacks"]) <= set(_MAY_LEAVE):
        return None, _NONE_OF_STEPS
    left, radius = network["at_largest"], content["radii"][-1]
    told = f"accuracy {left:.1%} at radius {radius:.4g}"
    weak = gave_up(network)
    return left == 0, f"{told}; of its own {weak}" if weak else told


def gave_up(network: Json) -> str:
    """Which attacks left something at the largest radius, and how much: all but one step and the random search."""
    left = {name: told["at_largest"] for name, told in network["attacks"].items() if name not in _MAY_LEAVE}
    return ", ".join(f"{name} leaves {share:.1%}" for name, share in left.items() if share)


def monotone(network: Json, content: Json) -> tuple[bool, str]:
    """No curve rises with the radius."""
    curves = {"certified": network["certified"], "best": network["best"]["accuracy"]}
    curves |= {name: told["accuracy"] for name, told in network["attacks"].items()}
    rising = [name for name, curve in curves.items() if any(b > a for a, b in pairwise(curve))]
    return not rising, f"rising: {', '.join(rising)}" if rising else f"{len(curves)} curves"


def clean_at_zero(network: Json, content: Json) -> tuple[bool, str]:
    """At radius 0 every attack leaves the accuracy as it is."""
    off = {name: told["accuracy"][0] for name, told in network["attacks"].items()}
    off = {name: share for name, share in off.items() if share != network["accuracy"]}
    told = ", ".join(f"{name} {share:.1%}" for name, share in off.items())
    return not off, f"accuracy {network['accuracy']:.1%}" + (f", but {told}" if off else "")


def pgd_beats_one_step(network: Json, content: Json) -> tuple[bool | None, str]:
    """PGD, which is run without it, turns at least as many as one step of the whole length."""
    if not {"pgd", ONE_STEP} <= set(network["attacks"]):
        return None, f"pgd or {ONE_STEP} was not run"
    many, one = (network["attacks"][name]["accuracy"] for name in ("pgd", ONE_STEP))
    for radius, left, first in zip(content["radii"], many, one, strict=True):
        if left > first:
            return False, f"at radius {radius:.4g} PGD leaves {left:.1%}, one step {first:.1%}"
    return True, "at every radius"


def black_box_not_best(network: Json, content: Json) -> tuple[bool | None, str]:
    """The random search turns no more than the attacks that follow gradients: these would mislead them otherwise.

    It is tried on what all attacks left, with few queries; where it is one of them, its curve is compared, too.
    """
    others = [told["accuracy"] for name, told in network["attacks"].items() if name != BLACK_BOX]
    if set(network["attacks"]) <= set(_MAY_LEAVE):
        return None, _NONE_OF_STEPS
    if BLACK_BOX in network["attacks"]:
        best = [min(shares) for shares in zip(*others, strict=True)]
        for radius, left, least in zip(content["radii"], network["attacks"][BLACK_BOX]["accuracy"], best, strict=True):
            if left < least:
                return False, f"at radius {radius:.4g} it leaves {left:.1%}, the best other attack {least:.1%}"
    if network["left"] is None:
        return None, f"{BLACK_BOX} needs pyautoattack, and pictures: in L2 as high as wide, of 5 x 5 pixels or more"
    for radius, tried, turned in zip(
        content["radii"], network["left"]["tried"], network["left"]["turned"], strict=True
    ):
        if turned:
            return False, f"at radius {radius:.4g} it turns {turned} of {tried} images that all other attacks left"
    count, queries = sum(network["left"]["tried"]), network["left"]["queries"]
    return True, f"turns none of {count} that were left, in {queries} queries each"


def gradients_not_zero(network: Json, content: Json) -> tuple[bool, str]:
    """Every right prediction has a gradient to follow."""
    zero, not_finite = network["gradients"]["zero"], network["gradients"]["not_finite"]
    told = f"{zero} zero and {not_finite} not finite of {network['right']}"
    if zero and content["loss"] == "cross_entropy":
        told += "; the cross-entropy of a confident network vanishes in float32: attack the margin"
    return zero == not_finite == 0, told


def not_random(network: Json, content: Json) -> tuple[bool, str]:
    """Two passes give the same scores."""
    same = network["deterministic"]
    return same, f"two passes give {'the same' if same else 'other'} scores"


def finite(network: Json, content: Json) -> tuple[bool, str]:
    """No score is NaN or infinite, of the images and of the points of the attacks."""
    found = {name: told["not_finite"] for name, told in network["attacks"].items() if told["not_finite"]}
    if network["not_finite"]:
        found = {"the images": network["not_finite"], **found}
    return not found, f"not finite: {_listed(found)}" if found else "all finite"


CHECKS: Mapping[str, Callable[[Json, Json], tuple[bool | None, str]]] = {
    "certified <= attacked": certified,
    "0 at a large radius": zero_at_large,
    "monotone in the radius": monotone,
    "clean accuracy at radius 0": clean_at_zero,
    "PGD >= one step": pgd_beats_one_step,
    "Square never best": black_box_not_best,
    "no zero gradients": gradients_not_zero,
    "no randomness": not_random,
    "finite scores": finite,
}


def check_all(content: Json) -> list[Json]:
    """Run every check on every network of attacks.json.

    Returns:
        A row each: `check`, `network`, `passed` (None where it does not apply) and `detail`.

    Example:
        >>> network = {"deterministic": False}
        >>> not_random(network, {})
        (False, 'two passes give other scores')
    """
    rows = []
    for name, network in content["networks"].items():
        for check, function in CHECKS.items():
            passed, detail = function(network, content)
            rows.append({"check": check, "network": name, "passed": passed, "detail": detail})
    return rows


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} of {name}" for name, count in counts.items())
