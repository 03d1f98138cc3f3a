"""What the figures of counterfactuals.json say: the best of the networks, and sentences."""

from typing import Any

# Below this share the judge mostly does not follow
_HALF = 0.5


def mark_best(content: dict[str, Any]) -> None:
    """Set `best` in the measures that compare networks, where two and more have a mean."""
    for column in content["columns"]:
        cells = [network["measures"][column["name"]] for network in content["networks"].values()]
        means = [cell["mean"] for cell in cells if cell["mean"] is not None]
        for cell in cells:
            extreme = (max if cell["direction"] == "up" else min)(means, default=None)
            cell["best"] = column["compared"] and len(means) > 1 and cell["mean"] == extreme


def verdict(content: dict[str, Any]) -> list[str]:
    """The figures in sentences: of each network, and of the OTNN against the others."""
    networks = content["networks"]
    sentences = [
        sentence for name in networks for sentence in (*_of_network(name, content), *_on_the_way(name, content))
    ]
    for name in networks:
        if name != "otnn":
            sentences += _against(name, content)
    return sentences


def _of_network(name: str, content: dict[str, Any]) -> list[str]:
    measures = content["networks"][name]["measures"]
    valid, moved, seen = (measures[key] for key in ("validity", "distance", "independent_score"))
    if valid["mean"] is None:
        return [f"{shown(name)}: no image could be asked for a counterfactual."]
    count = valid["samples"] - valid["undefined"]
    length = "" if moved["mean"] is None else f", after a mean L2 distance of {moved['mean']:.2f}"
    told = f"{shown(name)}: {valid['mean']:.1%} of {count} images flip{length}"
    if seen["mean"] is None:
        return [f"{told}."]
    before = measures["independent_score_start"]["mean"]
    told += f"; the judge sees the target in {seen['mean']:.1%} of the reflected images ({before:.1%} of the originals)"
    if seen["mean"] < _HALF:
        told += ", so that mostly the decision changes and not what an independent network sees"
    near, start = (measures[key] for key in ("data_distance", "data_distance_start"))
    if near["mean"] is None or start["mean"] is None:
        return [f"{told}."]
    way = "neither nearer to the data of the target nor farther, by the intervals,"
    if None not in (*near["interval"], *start["interval"]):
        if near["interval"][1] < start["interval"][0]:
            way = "nearer to the data of the target"
        elif near["interval"][0] > start["interval"][1]:
            way = "farther from the data of the target"
    return [
        f"{told}. They are {way} than the originals: {near['mean']:.2f} against {start['mean']:.2f} (real images: 1)."
    ]


def _on_the_way(name: str, content: dict[str, Any]) -> list[str]:
    """Whose training images are the nearest, before and after."""
    share = content["networks"][name]["along"]["nearest_is_target"]["mean"]
    if None in (share[0], share[-1]):
        return []
    return [
        f"{shown(name)}: the nearest training image is of the target for {share[0]:.1%} of the images before they are "
        f"moved, and for {share[-1]:.1%} of the reflected ones."
    ]


def _against(name: str, content: dict[str, Any]) -> list[str]:
    """The judge's opinion of the OTNN's images against another network's, by the intervals."""
    own, other = (content["networks"][key]["measures"]["independent_score"] for key in ("otnn", name))
    if None in (*own["interval"], *other["interval"]):
        return []
    figures = f"{own['mean']:.1%} against {other['mean']:.1%}"
    if own["interval"][0] > other["interval"][1]:
        return [f"The judge follows the OTNN's images more often than those of the {name} network: {figures}."]
    if own["interval"][1] < other["interval"][0]:
        return [f"The judge follows the OTNN's images less often than those of the {name} network: {figures}."]
    return [f"The intervals do not tell the judge's opinion of the OTNN and the {name} network apart: {figures}."]


def shown(name: str) -> str:
    """A network's name as tables and pictures write it."""
    return "OTNN" if name == "otnn" else name
