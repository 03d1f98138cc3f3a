"""Tables that the command line prints: the figures of a run, side by side."""

from typing import Any

from rich.table import Table


def networks_table(results: dict[str, Any]) -> Table:
    """Both networks side by side."""
    data = results["data"]
    table = Table("test split", title=f"{data['name']}: {data['test']} test images, {len(data['classes'])} classes")
    names = [name for name in ("otnn", "unconstrained") if name in results]
    for name in names:
        table.add_column("OTNN" if name == "otnn" else name, justify="right")
    for label, key, form in (
        ("accuracy", "accuracy", "{:.2%}"),
        ("balanced accuracy", "balanced_accuracy", "{:.2%}"),
        ("mean certified radius", "mean_radius", "{:.4f}"),
        ("Lipschitz bound of the body", "lipschitz_bound", "{:.7f}"),
        ("parameters", "parameters", "{:,}"),
    ):
        cells = [form.format(results[name][key]) if key in results[name] else "-" for name in names]
        if any(cell != "-" for cell in cells):
            table.add_row(label, *cells)
    seconds = [f"{results['seconds'].get(f'train_{name}', 0):.1f}" for name in names]
    table.add_row("training, seconds", *seconds)
    return table


def radii_table(results: dict[str, Any]) -> Table:
    """Certified accuracy over radii."""
    table = Table("L2 radius", "certified accuracy", title="share of test images right with radius >= r, [0,1] pixels")
    for radius, share in results["otnn"]["certified_accuracy"].items():
        table.add_row(radius, f"{share:.2%}")
    return table


def audit_table(content: dict[str, Any]) -> Table:
    """The gap and what makes it up: each potential, on the images of the training and of the test."""
    from otnn.transport.verdict import FIGURES

    splits = content["splits"]
    kind = (
        "the exact optimum of the loss" if splits["train"][0]["exact"] else "the exact optimum of pairs (descriptive)"
    )
    table = Table("", title=f"against {kind}")
    for name, _, _ in FIGURES:
        table.add_column(name, justify="right", no_wrap=True)
    for train, test in zip(splits["train"], splits["test"], strict=True):
        table.add_section()
        table.add_row(train["name"])
        for split, entry in (("train", train), ("test", test)):
            table.add_row(split, *(show(entry) for _, _, show in FIGURES))
    return table


def snowflakes_table(content: dict[str, Any]) -> Table:
    """The figures of all three potentials, with the bars that the OTNN is held to."""
    from otnn.run.snowflakes import BARS, figure

    table = Table("", "OTNN", "bar", "exact f*", "ordinary", title="two snowflakes against the exact optimum")
    for bar in BARS:
        cells = [figure(content, name, bar) for name in ("otnn", "optimum", "unconstrained")]
        told = ["-" if value is None else bar.form.format(value) for value in cells]
        table.add_row(bar.name, told[0], f"{'<=' if bar.below else '>='} {bar.form.format(bar.value)}", *told[1:])
    return table
