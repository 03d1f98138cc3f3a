"""What attacks.json says in sentences."""

from typing import Any

from otnn.report import words
from otnn.run.attack_checks import gave_up
from otnn.run.counterfactual_words import shown


def verdict(content: dict[str, Any]) -> list[str]:
    """The figures in sentences: failed checks, attacks that gave up, each network, how attacks on the OTNN collapse."""
    failed = [
        f"FAILED: {row['check']} ({shown(row['network'])}): {row['detail']}."
        for row in content["checks"]
        if row["passed"] is False
    ]
    radius = content["radii"][-1]
    failed += [
        f"WARNING: attacks gave up ({shown(name)}): at radius {radius:.4g}, where others turn everything, {weak}."
        for name, network in content["networks"].items()
        if (weak := gave_up(network)) and not network["at_largest"]
    ]
    sentences = [sentence for name in content["networks"] for sentence in _of_network(name, content)]
    return failed + sentences + _collapse(content) + [content["corruptions"]["note"], _sizes(content)]


def _of_network(name: str, content: dict[str, Any]) -> list[str]:
    network = content["networks"][name]
    shares = zip(content["radii"], network["best"]["accuracy"], network["certified"], strict=True)
    inner = [row for row in shares if 0 < row[0] < content["radii"][-1]]
    told = f"{shown(name)}: {network['accuracy']:.1%} right"
    if not inner:
        return [f"{told}."]
    # the radius at which the attacks leave what is nearest to half of it
    radius, left, least = min(inner, key=lambda row: abs(row[1] - network["accuracy"] / 2))
    return [f"{told}; at radius {radius:.4g} the best attack leaves {left:.1%}, and {least:.1%} are certified."]


def _collapse(content: dict[str, Any]) -> list[str]:
    """How near the attacks on the OTNN come to the gradient step at the certified distance."""
    found = {name: told["collapse"] for name, told in content["networks"]["otnn"]["attacks"].items()}
    told = {name: one for name, one in found.items() if one and one["cosine"] and one["ratio"]}
    if not told:
        return []
    figures = "; ".join(
        f"{words.attack(name)} {one['cosine']['quantiles'][1]:.3f} and {one['ratio']['quantiles'][1]:.3f}"
        for name, one in told.items()
    )
    ideal = "" if content["box"] else " (both 1 at the optimum of its loss)"
    return [
        "Attacks on the OTNN, median cosine with its gradient and median distance over certified radius"
        f"{ideal}: {figures}.",
        *_short_of_it(content["audit"]),
    ]


def _short_of_it(audit: dict[str, Any] | None) -> list[str]:
    """How far from that optimum the network is, where the run was audited."""
    gaps = {split: told["gap"] for split, told in (audit or {}).items() if told["gap"] is not None}
    if not gaps:
        return []
    images = {"train": "training images", "test": "test images"}
    told = " and ".join(f"{gap:.1%} on the {images[split]}" for split, gap in gaps.items())
    return [f"The audit found it short of that optimum by {told}, of W1 and in the median."]


def _sizes(content: dict[str, Any]) -> str:
    """How the corruptions compare with what is certified."""
    rows, radius = content["corruptions"]["rows"], content["networks"]["otnn"]["mean_radius"]
    larger = sum(row["mean_size"] > radius for row in rows)
    return (
        f"{larger} of {len(rows)} corruptions change an image by more, in the mean, than the OTNN's mean certified "
        f"radius, {radius:.3f}."
    )
