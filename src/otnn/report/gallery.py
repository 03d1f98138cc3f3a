"""The gallery: one card per explained image, with its maps and its way to the other class."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from otnn.report.charts import Chart, chart, headroom
from otnn.report.figures import Sheet, picture, sheet, signed_picture, signed_sheet
from otnn.report.guarantees import Promise, promises, short_lines
from otnn.report.load import NOT_PER_IMAGE, Arrays, RunFiles
from otnn.report.words import down, evenly, percent

_STRIP = 7


@dataclass(frozen=True)
class Figure:
    """A picture with its caption and its text alternative."""

    uri: str
    caption: str
    alt: str


@dataclass(frozen=True)
class Frame:
    """One step of a way as it stands in the strip, for print and without JavaScript."""

    window: str
    length: str
    label: str
    alt: str


@dataclass(frozen=True)
class Walk:
    """The way of an image towards the other class.

    Attributes:
        frames: the images along it.
        changes: the difference of each from the original, signed channel means.
        scale: the change that has the full colour, in grey levels of 255.
        chart: the lead of the prediction along the way.
        strip: some of the frames.
        steps: what the slider shows at each step: window, changes, alt, state and marker.
        outside: a sentence on values that leave [0, 1], if any do.
    """

    frames: Sheet
    changes: Sheet
    scale: str
    chart: Chart
    strip: list[Frame]
    steps: list[dict[str, Any]]
    outside: str


@dataclass(frozen=True)
class Card:
    """Everything that is shown of one image; texts are ready to be read.

    Attributes:
        number: place in the gallery, from 1.
        index: place in the test split.
        truth: the class that it is labelled with.
        prediction: the class that the OTNN says.
        right: whether they agree.
        target: the class that the way leads to.
        twin: what the ordinary network says, if there is one.
        twin_right: whether that is right.
        radius: certified, rounded down.
        levels: the same spread evenly, in grey levels.
        boundary: the length at which the prediction changed, or empty.
        tightness: radius over that length, or empty.
        trouble: why a part is missing, or empty.
        figures: the original and the saliency maps.
        scale: the value that has the full colour in the maps.
        walk: the way, where there is one to walk.
        lines: what is guaranteed, in two sentences.
        promises: all that is.
    """

    number: int
    index: int
    truth: str
    prediction: str
    right: bool
    target: str
    twin: str
    twin_right: bool
    radius: str
    levels: str
    boundary: str
    tightness: str
    trouble: str
    figures: list[Figure]
    scale: str
    walk: Walk | None
    lines: list[str]
    promises: list[Promise]


def make_cards(files: RunFiles) -> list[Card]:
    """The cards of all images in explanations.npz, in its order."""
    return [_card(files, k) for k in range(len(files.explanations["label"]))]


def _card(files: RunFiles, k: int) -> Card:
    one = {name: values[k] for name, values in files.explanations.items() if name not in NOT_PER_IMAGE}
    classes = files.classes
    truth, prediction, target = (classes[int(one[name])] for name in ("label", "prediction", "target"))
    twin = classes[int(one["unconstrained_prediction"])] if files.has_twin else ""
    figures, scale = _figures(one, truth, prediction, twin)
    end, radius = float(one["boundary_distance"]), float(one["radius"])
    return Card(
        number=k + 1,
        index=int(one["index"]),
        truth=truth,
        prediction=prediction,
        right=truth == prediction,
        target=target,
        twin=twin,
        twin_right=twin == truth,
        radius=down(radius),
        levels=evenly(radius, one["images"].shape),
        boundary=f"{end:.3f}" if np.isfinite(end) else "",
        tightness=percent(round(float(one["tightness"]), 3)) if np.isfinite(one["tightness"]) else "",
        trouble="" if str(one["status"]) == "ok" else str(one["status"]),
        figures=figures,
        scale=scale,
        walk=_walk(one, classes) if _walkable(one) else None,
        lines=short_lines(files.explanations, k),
        promises=promises(files.explanations, k),
    )


def _figures(one: Arrays, truth: str, prediction: str, twin: str) -> tuple[list[Figure], str]:
    """The original and the maps on one symmetric scale, each first divided by its own L2 norm."""
    height, width = one["images"].shape[1:]
    sort = "colour" if len(one["images"]) == 3 else "grey"
    index = int(one["index"])
    original = Figure(
        picture(one["images"]),
        "The picture",
        f"Test picture {index}, labelled “{truth}”: {height} by {width} pixels, {sort}.",
    )
    maps = [("The optimal-transport network", prediction, unit_map(one["saliency"]))]
    if twin:
        maps.append(("The ordinary network", twin, unit_map(one["unconstrained_saliency"])))
    limit = max(float(np.abs(values).max()) for _, _, values in maps)
    drawn = [
        Figure(
            signed_picture(values, limit),
            f"{network}, for “{says}”",
            f"Saliency map for “{says}”: values from {values.min():.3f} to {values.max():.3f}, "
            f"strongest at row {place[0] + 1}, column {place[1] + 1} of {height} by {width}.",
        )
        for network, says, values in maps
        for place in [np.unravel_index(int(np.abs(values).argmax()), values.shape)]
    ]
    return [original, *drawn], f"{limit:.2g}"


def unit_map(values: NDArray[Any]) -> NDArray[np.float64]:
    """A saliency (channels, height, width) divided by its L2 norm, then its channel mean (height, width)."""
    exact = np.nan_to_num(values.astype(float), posinf=0.0, neginf=0.0)
    norm = float(np.linalg.norm(exact))
    mean: NDArray[np.float64] = (exact / norm if norm > 0 else exact).mean(axis=0)
    return mean


def _walkable(one: Arrays) -> bool:
    finite = all(np.isfinite(one[name]).all() for name in ("distances", "path", "potential", "scores"))
    return finite and bool(one["distances"][-1] > one["distances"][0])


def _walk(one: Arrays, classes: list[str]) -> Walk:
    lengths, path = one["distances"], one["path"].astype(float)
    shown = np.clip(path, 0, 1)
    differences = (shown - shown[0]).mean(axis=1)
    limit = float(np.abs(differences).max())
    frames, changes = sheet(path), signed_sheet(differences, limit)
    labels = [classes[k] for k in decisions(one["scores"])]
    curve = _curve(one, classes)
    marks = curve.points(lengths, one["potential"])
    curve.marker = (marks[0][0], marks[0][1])
    largest = 255 * np.abs(differences).max(axis=(1, 2))
    steps = [
        {
            "frame": frames.window(k),
            "change": changes.window(k),
            "alt": f"The picture moved by {lengths[k]:.3f}; the network says “{labels[k]}”.",
            "changeAlt": f"The change so far: at most {largest[k]:.1f} grey levels of 255 in a pixel.",
            "state": _state(one, classes, k, labels[k]),
            "mark": marks[k],
        }
        for k in range(len(lengths))
    ]
    chosen = np.unique(np.linspace(0, len(lengths) - 1, _STRIP).round().astype(int))
    strip = [Frame(frames.window(k), f"{lengths[k]:.3f}", labels[k], str(steps[k]["alt"])) for k in chosen]
    return Walk(frames, changes, f"{255 * limit:.0f}", curve, strip, steps, _outside(path, lengths))


def decisions(scores: NDArray[Any]) -> list[int]:
    """The class of scores (steps, outputs): the sign of one output, the largest of several."""
    chosen = (scores[:, 0] > 0).astype(int) if scores.shape[1] == 1 else scores.argmax(axis=1)
    return [int(k) for k in chosen]


def _state(one: Arrays, classes: list[str], k: int, label: str) -> str:
    """One sentence on a step of the way."""
    length = float(one["distances"][k])
    moved = f"Moved by {length:.3f}: the network says “{label}”"
    if k == 0:
        return f"Not moved yet: the network says “{label}”."
    if length < one["radius"]:
        return f"{moved}. No change as small as this can alter its answer."
    if label == classes[int(one["prediction"])]:
        return f"{moved} still. This is beyond the certified radius: the answer may change."
    return f"{moved} now."


def _outside(path: NDArray[Any], lengths: NDArray[Any]) -> str:
    out = (path < -1e-6) | (path > 1 + 1e-6)
    if not out.any():
        return ""
    first = int(out.any(axis=(1, 2, 3)).argmax())
    return (
        f"From {lengths[first]:.3f} on, the way leaves the range from black to white (at its end in "
        f"{percent(round(float(out[-1].mean()), 4))} of the values). Pictures are shown clipped to "
        "it; answers and curve are those of the way itself."
    )


def _curve(one: Arrays, classes: list[str]) -> Chart:
    """The pair potential along the way, with the certified radius and the boundary."""
    lengths, potential = one["distances"], one["potential"]
    prediction, target = classes[int(one["prediction"])], classes[int(one["target"])]
    radius, end = float(one["radius"]), float(one["boundary_distance"])
    low, high = headroom([0.0, *potential.tolist()])
    boundary = f", and is zero at {end:.3f}" if np.isfinite(end) else ""
    curve = chart(
        f"Lead of “{prediction}” over “{target}” along the way",
        f"The lead goes from {potential[0]:.3f} at the start to {potential[-1]:.3f} after "
        f"{lengths[-1]:.3f}{boundary}. "
        f"The certified radius is {down(radius)}.",
        (float(lengths[0]), float(lengths.max()), "length moved"),
        (low, high, "lead of the first answer"),
        width=380,
        height=200,
    )
    curve.zero = round(float(curve.y.place(0.0)), 1)
    curve.zone(0.0, radius, "certified")
    curve.legend.append(("certified-zone", "certified: the answer cannot change"))
    if np.isfinite(end) and end <= lengths[-1]:
        curve.rule(end, "boundary", "boundary found")
    curve.line(lengths, potential, "otnn")
    return curve
