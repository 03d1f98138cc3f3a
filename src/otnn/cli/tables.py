"""Tables that the command line prints: the figures of a run, side by side."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

# Metrics in one table of a comparison
_COLUMNS = 4


def networks_table(results: dict[str, Any]) -> Table:
    """Both networks side by side."""
    data = results["data"]
    table = Table("test split", title=f"{data['name']}: {data['test']} test images, {len(data['classes'])} classes")
    names = [name for name in ("otnn", "unconstrained", "adversarial") if name in results]
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


def explained_table(rows: list[dict[str, Any]]) -> Table:
    """The user's images with what was found of each."""
    table = Table("image", "prediction", "certified radius", "towards", "tightness", "flips")
    for row in rows:
        tightness = row["status"] if row["tightness"] is None else f"{row['tightness']:.3f}"
        flips = "yes" if row["flipped"] else "no"
        name = Path(row["file"]).name
        table.add_row(name, row["prediction"], f"{row['radius']:.4f}", row["target"], tightness, flips)
    return table


def guarantees_table(guarantees: dict[str, dict[str, Any]], over: str) -> Table:
    """Of how many images each guarantee says something, and the medians of its bound and of the part that is used."""
    table = Table("guarantee", title=f"guarantees over {over}")
    for name in ("not vacuous", "median bound", "median tightness"):
        table.add_column(name, justify="right")
    for name, found in guarantees.items():
        bound, used = found["median_bound"], found["median_tightness"]
        told = "-" if bound is None else f"{bound:.4g}"
        table.add_row(name.replace("_", " "), f"{found['share']:.1%}", told, "-" if used is None else f"{used:.3f}")
    return table


def compare_tables(content: dict[str, Any]) -> list[Table]:
    """Networks and methods against metrics: some metrics a table, the best of each network in bold."""
    cells = {(cell["network"], cell["method"], cell["metric"]): cell for cell in content["cells"]}
    names = [column["name"] for column in content["columns"] if column["metric"] != "explanation_distance"]
    parts = [names[k : k + _COLUMNS] for k in range(0, len(names), _COLUMNS)]
    tables = [_cost_table(content)]
    for part in parts:
        table = Table("", title=f"{content['samples']} test images, bold: best of its network, 95 % intervals")
        for name in part:
            arrow = _arrow(cell for cell in content["cells"] if cell["metric"] == name)
            table.add_column(Text(f"{name.replace('_', ' ')} {arrow}".rstrip()), justify="right")
        for network in content["networks"]:
            table.add_section()
            table.add_row("OTNN" if network == "otnn" else network)
            for method in content["methods"]:
                shown = [_cell(cells[network, method, name]) for name in part]
                table.add_row(f"  {method.replace('_', ' ')}", *shown)
        tables.append(table)
    distances = [cell for cell in content["cells"] if cell["metric"].startswith("distance_")]
    if distances:
        table = Table("", title="distance between the maps of Saliency and SmoothGrad on one network")
        columns = list(dict.fromkeys(cell["metric"] for cell in distances))
        for name in columns:
            table.add_column(f"{name.replace('_', ' ')} ↓", justify="right")
        for network in content["networks"]:
            own = [cell for cell in distances if cell["network"] == network]
            table.add_row("OTNN" if network == "otnn" else network, *(_cell(cell) for cell in own))
        tables.append(table)
    return tables


def _cost_table(content: dict[str, Any]) -> Table:
    """What a map costs, and how good the methods are over all metrics."""
    table = Table("", title="cost of a map, and mean rank over the metrics that tell networks apart (1 is best)")
    for name in ("forwards", "backwards", "seconds for all", "mean rank ↓"):
        table.add_column(name, justify="right")
    rank = {(point["network"], point["method"]): point["mean_rank"] for point in content["quality"]}
    best = min(rank.values(), default=None)
    for network in content["networks"]:
        table.add_section()
        table.add_row("OTNN" if network == "otnn" else network)
        for entry in (entry for entry in content["maps"] if entry["network"] == network):
            name = f"  {entry['method'].replace('_', ' ')}"
            if entry["reason"] is not None:
                table.add_row(name, *["not applicable"] * 3, "-")
                continue
            own = rank.get((network, entry["method"]))
            shown = Text("-" if own is None else f"{own:.2f}", style="bold" if own == best else "")
            passes = (f"{entry[key]:,}" for key in ("forwards", "backwards"))
            table.add_row(name, *passes, f"{entry['seconds']:.2f}", shown)
    return table


def _cell(cell: dict[str, Any]) -> Text:
    """Mean over interval, and how many samples were undefined."""
    if cell["reason"] is not None:
        return Text("not applicable", style="dim")
    if cell["mean"] is None:
        return Text("undefined", style="dim")
    low, high = cell["interval"]
    text = Text(f"{cell['mean']:.4g}", style="bold" if cell["best"] else "")
    if low is not None:
        text.append(f"\n{low:.3g} .. {high:.3g}", style="not bold")
    if cell["undefined"]:
        text.append(f"\n{cell['undefined']} undefined", style="not bold")
    return text


def _arrow(cells: Iterable[dict[str, Any]]) -> str:
    return next(({"up": "↑", "down": "↓"}[cell["direction"]] for cell in cells if cell["reason"] is None), "")


def counterfactual_table(content: dict[str, Any]) -> Table:
    """Measures against networks, the best in bold where a better value makes a better network."""
    way = f"{content['from'] or 'all classes'} to {content['to'] or 'the nearest rival'}"
    table = Table("", title=f"counterfactuals, {way}: {content['samples']} test images, 95 % intervals, bold: best")
    for name in content["networks"]:
        table.add_column("OTNN" if name == "otnn" else name, justify="right")
    for column in content["columns"]:
        cells = [network["measures"][column["name"]] for network in content["networks"].values()]
        arrow = {"up": " ↑", "down": " ↓"}[cells[0]["direction"]] if column["compared"] else ""
        name = column["name"].replace("_start", ", image itself").replace("_", " ")
        table.add_row(f"{name}{arrow}", *(_cell({"reason": None, **cell}) for cell in cells))
    statuses = dict.fromkeys(status for network in content["networks"].values() for status in network["statuses"])
    table.add_section()
    for status in statuses:
        table.add_row(status, *(f"{network['statuses'].get(status, 0)}" for network in content["networks"].values()))
    return table


def attack_tables(content: dict[str, Any]) -> list[Table]:
    """Accuracy over radii of every network, the collapse, corruptions, and the checks: a failed one in red."""
    tables = [*(_attacked_table(content, name) for name in content["networks"])]
    tables += [*_collapse_tables(content), _corruptions_table(content)]
    checks = Table("check", title="checks of certificates and attacks")
    for name in content["networks"]:
        checks.add_column(_title(name))
    for check in dict.fromkeys(row["check"] for row in content["checks"]):
        own = [row for row in content["checks"] if row["check"] == check]
        checks.add_row(check, *(_check(row) for row in own))
    return [*tables, checks]


def _attacked_table(content: dict[str, Any], name: str) -> Table:
    """The attacks on one network against radii."""
    from otnn.report import words

    network = content["networks"][name]
    norm = {"l2": "L2", "linf": "largest"}[content["norm"]]
    where = f"{norm} norm, {'in the box [0, 1]' if content['box'] else 'no box'}, {content['samples']} images"
    # narrow, so that usual radii fit 80 columns
    title = f"{_title(name)}: % right within a radius; {where}"
    table = Table("radius", title=title, box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.columns[0].no_wrap, table.min_width = True, min(len(title), 80)
    columns = {"certified": network["certified"]}
    columns |= {words.attack(attack): told["accuracy"] for attack, told in network["attacks"].items()}
    columns["best attack"] = network["best"]["accuracy"]
    for radius in content["radii"]:
        short = f"{radius:.3f}".rstrip("0").rstrip(".")
        table.add_column(short if float(short) or not radius else f"{radius:.1g}", justify="right", no_wrap=True)
    for column, shares in columns.items():
        bold = "bold" if column in ("certified", "best attack") else ""
        cells = (f"{100 * share:.1f}" if share < 1 else "100" for share in shares)
        table.add_row(column, *cells, style=bold)
    return table


def _title(name: str) -> str:
    return "OTNN" if name == "otnn" else name


def _check(row: dict[str, Any]) -> Text:
    if row["passed"] is None:
        return Text(row["detail"], style="dim")
    text = Text("passed", style="green") if row["passed"] else Text("FAILED", style="bold red")
    return text.append(f"\n{row['detail']}", style="not bold")


def _collapse_tables(content: dict[str, Any]) -> list[Table]:
    """Medians of cosine and ratio: of every network, then of the OTNN in the other settings."""
    from otnn.report import words

    columns = {
        _title(name): {attack: told["collapse"] for attack, told in network["attacks"].items()}
        for name, network in content["networks"].items()
    }
    for other in content["settings"]:
        title = f"OTNN, {other['loss'].replace('_', '-')},{' box' if other['box'] else ' no box'}"
        columns[f"{title}, {other['samples']} images"] = other["attacks"]
    if not any(told for column in columns.values() for told in column.values()):
        return []
    table = Table("", title="collapse: median cosine with the gradient, over median distance / certified radius")
    for name in columns:
        table.add_column(name, justify="right")
    for attack in content["attacks"]:
        table.add_row(words.attack(attack), *(_collapsed(column[attack]) for column in columns.values()))
        table.add_section()
    return [table]


def _collapsed(told: dict[str, Any] | None) -> str:
    if not told:
        return "-"
    medians = (None if told[key] is None else told[key]["quantiles"][1] for key in ("cosine", "ratio"))
    return "\n".join("-" if median is None else f"{median:.4g}" for median in medians)


def _corruptions_table(content: dict[str, Any]) -> Table:
    """Accuracy under noise, blur, JPEG and brightness, beside the size of each change."""
    radius = content["networks"]["otnn"]["mean_radius"]
    table = Table("corruption", title=f"accuracy under corruptions, not certified; mean certified radius {radius:.3f}")
    table.add_column("severity", justify="right")
    table.add_column("mean L2 size", justify="right")
    for name in content["networks"]:
        table.add_column(_title(name), justify="right")
    for row in content["corruptions"]["rows"]:
        cells = (f"{row['accuracy'][name]:.1%}" for name in content["networks"])
        table.add_row(
            row["name"].replace("_", " "), f"{row['unit']} {row['severity']:g}", f"{row['mean_size']:.3f}", *cells
        )
    return table
