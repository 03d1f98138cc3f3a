"""The picture of one explanation: image, saliency, what is guaranteed, path and score curve, as PNG."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from otnn.report.figures import DIVERGING
from otnn.report.gallery import decisions, unit_map
from otnn.report.guarantees import short_lines

_FRAMES = 7
_LABEL = 18  # letters
_LINE = 175  # letters of small print across the picture


def explanation_picture(arrays: Mapping[str, Any], classes: Sequence[str]) -> bytes:
    """Draw the first sample of arrays in the layout of explanations.npz (docs/run-folder.md).

    Maps are signed channel means on one symmetric colour scale, each divided by its own L2 norm.

    Args:
        arrays: images, path, saliency and so on, each with a leading sample dimension.
        classes: the names of the classes.

    Returns:
        The bytes of a PNG.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    image, path, scores = arrays["images"][0], arrays["path"][0], arrays["scores"][0]
    prediction, target = (label(class_name(classes, int(arrays[key][0]))) for key in ("prediction", "target"))
    radius, end, status = (arrays[key][0] for key in ("radius", "boundary_distance", "status"))
    maps = {f"OTNN: what speaks\nfor {prediction}": arrays["saliency"][0]}
    if "unconstrained_saliency" in arrays:
        twin = label(class_name(classes, int(arrays["unconstrained_prediction"][0])))
        maps[f"unconstrained: what\nspeaks for {twin}"] = arrays["unconstrained_saliency"][0]
    lines = [line for text in short_lines(arrays, 0) for line in textwrap.wrap(text, _LINE)]
    figure = Figure(figsize=(12, 6.0 + 0.2 * len(lines)), layout="constrained", dpi=110)
    rows: Any = figure.subfigures(3, 1, height_ratios=(3.5, 0.1 + 0.2 * len(lines), 2.4))
    top = rows[0].subplots(1, 2 + len(maps), width_ratios=(*[1] * (1 + len(maps)), 1.7))
    show_image(top[0], image, f"{prediction}\ncertified radius {radius:.3f}")
    scaled = {name: unit_map(values) for name, values in maps.items()}
    limit = max(float(np.abs(values).max()) for values in scaled.values()) or 1.0
    # the colours of the page
    colours = LinearSegmentedColormap.from_list("diverging", [[part / 255 for part in stop] for stop in DIVERGING])
    for axes, (name, values) in zip(top[1:-1], scaled.items(), strict=True):
        drawn = axes.imshow(values, cmap=colours, vmin=-limit, vmax=limit, interpolation="nearest")
        axes.set_title(name, fontsize=10)
        axes.set_axis_off()
    bar = rows[0].colorbar(drawn, ax=list(top[1:-1]), location="bottom", shrink=0.6, aspect=40)
    bar.set_label("brighter here: blue lowers, orange raises the score (share of the map's L2 norm)", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    _curves(top[-1], arrays, classes)
    rows[1].text(0.01, 0.5, "\n".join(lines).replace("$", r"\$"), fontsize=9, va="center", linespacing=1.35)
    lengths = arrays["distances"][0]
    decided = decisions(scores)
    frames = rows[2].subplots(1, _FRAMES)
    for axes, k in zip(frames, np.linspace(0, len(path) - 1, _FRAMES).round().astype(int), strict=True):
        show_image(axes, path[k], f"moved {lengths[k]:.3f}\n{label(classes[decided[k]])}")
    ending = f"even at {end:.3f}, tightness {arrays['tightness'][0]:.3f}" if status == "ok" else str(status)
    rows[2].suptitle(f"the way to {target}, with what the network says ({way_words(arrays)}); {ending}", fontsize=11)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def way_words(arrays: Mapping[str, Any]) -> str:
    """How the ways were found: gradients to the boundary where they turn, and whether they stay in the box.

    Example:
        >>> way_words({"box": np.array(True), "iterations": np.array(3)})
        '3 gradients to the boundary, kept in [0, 1]'
    """
    turns = int(arrays["iterations"])
    return f"{turns} gradients to the boundary, " * (turns > 1) + (
        "kept in [0, 1]" if bool(arrays["box"]) else "clipped to [0, 1] for display"
    )


def show_image(axes: Any, image: NDArray[Any], title: str) -> None:
    """An image (channels, height, width), grey or colour."""
    pixels = np.clip(image, 0, 1)
    if len(pixels) == 3:
        axes.imshow(pixels.transpose(1, 2, 0), interpolation="nearest")
    else:
        axes.imshow(pixels.mean(axis=0), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=10)
    axes.set_axis_off()


def _curves(axes: Any, arrays: Mapping[str, Any], classes: Sequence[str]) -> None:
    """The scores along the path, with the certified radius and the place where the pair is even."""
    scores, lengths = arrays["scores"][0], arrays["distances"][0]
    if scores.shape[1] == 1:
        axes.plot(lengths, scores[:, 0], color="C0", label=f"{label(classes[1])} if above 0")
        axes.axhline(0, color="0.6", linewidth=0.8)
    else:
        shown = [int(arrays["prediction"][0]), int(arrays["target"][0])]
        others = [k for k in range(scores.shape[1]) if k not in shown]
        shown += sorted(others, key=lambda k: -float(scores[:, k].max()))[:1]  # the strongest of the others
        for k, style in zip(dict.fromkeys(shown), ("-", "-", "--"), strict=False):
            axes.plot(lengths, scores[:, k], style, label=label(classes[k]))
    axes.axvline(arrays["radius"][0], color="0.3", linestyle="-.", linewidth=1, label="certified radius")
    if np.isfinite(arrays["boundary_distance"][0]):
        axes.axvline(arrays["boundary_distance"][0], color="0.3", linestyle=":", linewidth=1, label="pair is even")
    axes.set_xlabel("length moved (L2, [0,1] pixels)", fontsize=9)
    axes.set_ylabel("score", fontsize=9)
    axes.set_title("scores along the way", fontsize=10)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8)


def class_name(classes: Sequence[str], index: int) -> str:
    """The name of a class, or what stands for it where there is none (-1)."""
    return classes[index] if index >= 0 else "no class"


def label(name: str) -> str:
    """A class name that fits over a frame; matplotlib would read a pair of dollar signs as mathematics."""
    short = name if len(name) <= _LABEL else name[: _LABEL - 1] + "\u2026"
    return short.replace("$", r"\$")
