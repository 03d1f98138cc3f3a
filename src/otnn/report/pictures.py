"""The picture of one explanation: image, saliency, counterfactual path and score curve, as PNG."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_FRAMES = 7


def explanation_picture(arrays: Mapping[str, Any], classes: Sequence[str]) -> bytes:
    """Draw the first sample of arrays in the layout of explanations.npz (docs/run-folder.md).

    Maps are signed channel means on one symmetric colour scale, each divided by its own L2 norm.

    Args:
        arrays: images, path, saliency and so on, each with a leading sample dimension.
        classes: the names of the classes.

    Returns:
        The bytes of a PNG.
    """
    from matplotlib.figure import Figure

    image, path = arrays["images"][0], arrays["path"][0]
    prediction, target = classes[int(arrays["prediction"][0])], classes[int(arrays["target"][0])]
    radius, end, status = (arrays[key][0] for key in ("radius", "boundary_distance", "status"))
    maps = {"saliency, OTNN": arrays["saliency"][0]}
    if "unconstrained_saliency" in arrays:
        twin = classes[int(arrays["unconstrained_prediction"][0])]
        maps[f"saliency, unconstrained\n({_plain(twin)})"] = arrays["unconstrained_saliency"][0]
    figure = Figure(figsize=(12, 6.2), layout="constrained", dpi=110)
    rows: Any = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    top = rows[0].subplots(1, 2 + len(maps), width_ratios=(*[1] * (1 + len(maps)), 1.7))
    _show(top[0], image, f"{_plain(prediction)}\ncertified radius {radius:.3f}")
    scaled = {name: _unit(values).mean(axis=0) for name, values in maps.items()}
    limit = max(float(np.abs(values).max()) for values in scaled.values()) or 1.0
    for axes, (name, values) in zip(top[1:-1], scaled.items(), strict=True):
        drawn = axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        axes.set_title(name, fontsize=10)
        axes.set_axis_off()
    bar = rows[0].colorbar(drawn, ax=list(top[1:-1]), location="bottom", shrink=0.6, aspect=40)
    bar.set_label("brighter here: blue lowers, red raises the score (share of the map's L2 norm)", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    _curve(top[-1], arrays, prediction, target)
    lengths = arrays["distances"][0]
    frames = rows[1].subplots(1, _FRAMES)
    for axes, k in zip(frames, np.linspace(0, len(path) - 1, _FRAMES).round().astype(int), strict=True):
        side = prediction if arrays["potential"][0][k] > 0 else target
        _show(axes, path[k], f"t = {lengths[k]:.3f}\n{_plain(side) if status == 'ok' else ''}")
    ending = f"boundary at {end:.3f}, tightness {radius / end:.3f}" if status == "ok" else str(status)
    rows[1].suptitle(
        f"the way to {_plain(target)}: x - t u (clipped to [0, 1] for display); {_plain(ending)}", fontsize=11
    )
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def _show(axes: Any, image: NDArray[Any], title: str) -> None:
    """An image (channels, height, width), grey or colour."""
    pixels = np.clip(image, 0, 1)
    if len(pixels) == 3:
        axes.imshow(pixels.transpose(1, 2, 0), interpolation="nearest")
    else:
        axes.imshow(pixels.mean(axis=0), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=10)
    axes.set_axis_off()


def _curve(axes: Any, arrays: Mapping[str, Any], prediction: str, target: str) -> None:
    """The pair potential along the path, with the certified radius and the boundary."""
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.plot(arrays["distances"][0], arrays["potential"][0], color="C0")
    axes.axvline(arrays["radius"][0], color="C2", linestyle="--", label="certified radius")
    if np.isfinite(arrays["boundary_distance"][0]):
        axes.axvline(arrays["boundary_distance"][0], color="C1", linestyle=":", label="boundary found")
    axes.set_xlabel("length t moved (L2, [0,1] pixels)", fontsize=9)
    axes.set_title(f"{_plain(prediction)} against {_plain(target)}", fontsize=10)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8)


def _unit(values: NDArray[Any]) -> NDArray[Any]:
    norm = float(np.linalg.norm(values))
    return values / norm if norm > 0 else values


def _plain(text: str) -> str:
    """A class name as it stands: matplotlib would read a pair of dollar signs as mathematics."""
    return text.replace("$", r"\$")
