"""The picture of an audit: samples, their steps along the gradient, and their partners under the exact plan, as PNG."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from otnn.report.pictures import label, show_image

# Array of audit.npz, and what stands over its column.
COLUMNS = (
    ("image", "the image"),
    ("one_step", "local: one step\nx - f grad f"),
    ("same_length", "local: along the gradient,\nas far as the partner"),
    ("partner", "global: partner under\nthe exact plan"),
)


def partners_picture(arrays: Mapping[str, Any], classes: Sequence[str]) -> bytes:
    """Draw the samples of audit.npz (docs/run-folder.md) in rows: image, local and global counterfactual.

    At the optimum the last two columns are equal where a sample has one partner.

    Args:
        arrays: image, one_step, same_length, partner and the figures of each sample.
        classes: the names of the classes.

    Returns:
        The bytes of a PNG.
    """
    from matplotlib.figure import Figure

    count = len(arrays["image"])
    half = -(-count // 2)  # two samples in a row
    figure = Figure(figsize=(13.5, 2.0 * half + 0.7), layout="constrained", dpi=110)
    grid = figure.subplots(half, 2 * len(COLUMNS), squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for k in range(count):
        row, side = k % half, k // half
        own, other = (label(classes[int(arrays[name][k])]) for name in ("label", "partner_label"))
        notes = {
            "image": f"{own}\nf = {arrays['potential'][k]:+.2f}",
            "one_step": f"{arrays['name'][k]}\nf = {arrays['potential_after'][k]:+.2f}",
            "same_length": f"cosine {arrays['cosine'][k]:.2f}" if arrays["distance"][k] > 0 else "the same picture",
            "partner": f"{other}\n{arrays['distance'][k]:.2f} away, share {arrays['share'][k]:.0%}",
        }
        for column, (name, title) in enumerate(COLUMNS):
            axes = grid[row][side * len(COLUMNS) + column]
            show_image(axes, arrays[name][k], "")
            above = f"{title}\n" if row == 0 else ""
            axes.set_title(above + notes[name], fontsize=8)
    figure.suptitle("local counterfactual (gradient) and global one (plan); clipped to [0, 1] for display", fontsize=10)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()
