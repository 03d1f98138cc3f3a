"""The whole page: numbers of a run to texts, tables and charts, and those through the templates to HTML."""

import base64
import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from otnn.report import words
from otnn.report.attack import attack_section
from otnn.report.audit import audit_section
from otnn.report.charts import Chart, chart, headroom
from otnn.report.compare import compare_section
from otnn.report.counterfactuals import counterfactual_section
from otnn.report.figures import DIVERGING
from otnn.report.gallery import make_cards
from otnn.report.guarantees import promise_table
from otnn.report.load import RunFiles, certified_share, numbers

# Radii that the summary names, where the run has them; the first with any certified picture otherwise.
_HEADLINES = ("0.25", "0.5", "1")
_BINS = 24
_LOSSES = {
    "hkr": "hKR",
    "one_vs_all_hkr": "one-vs-all hKR",
    "soft_hkr": "soft hKR",
    "cross_entropy": "cross-entropy",
}
_NETWORKS = {"otnn": "Optimal-transport network", "unconstrained": "Ordinary network"}
# A path of the machine that trained says nothing to the reader.
_PRIVATE = ("data.data_dir",)


def render(files: RunFiles) -> str:
    """The HTML of the report."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("otnn.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = environment.get_template("page.js").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = environment.get_template("page.html.j2")
    return page.render(
        script=Markup(script),
        script_hash=digest,
        words=words,
        stops=[f"rgb({r},{g},{b})" for r, g, b in DIVERGING],
        cards=make_cards(files),
        **context(files),
    )


def context(files: RunFiles) -> dict[str, Any]:
    """Everything but the gallery, ready for the template."""
    results = files.results
    radii = radius_rows(files)
    rows = {row["radius"]: row for row in radii}
    headlines = [rows[name] for name in _HEADLINES if name in rows and rows[name]["share"] > 0]
    headlines = headlines or [row for row in radii if row["share"] > 0 and row["value"] > 0][:2]
    return {
        "run": files.name,
        "data": results["data"] | {"skipped": results["data"].get("skipped", [])},
        "otnn": results["otnn"],
        "twin": results.get("unconstrained"),
        "seconds": results.get("seconds", {}),
        "versions": results.get("versions", {}),
        "seed": results.get("seed"),
        "classes": files.classes,
        "networks": _NETWORKS,
        "losses": _LOSSES,
        "radii": radii,
        "values": [row for k, row in enumerate(radii) if k == 0 or radii[k - 1]["share"] > 0],
        "headlines": headlines[:2],
        "certified_chart": certified_chart(files),
        "histogram": histogram(files),
        "groups": radius_groups(files),
        "training": training_charts(files),
        "audit": audit_section(files),
        "counterfactuals": counterfactual_section(files),
        "compare": compare_section(files),
        "box": bool(files.explanations["box"]),
        "iterations": int(files.explanations["iterations"]),
        "attack": attack_section(files),
        "promises": promise_table(files.explanations),
        "settings": settings(files.config),
    }


def radius_rows(files: RunFiles) -> list[dict[str, Any]]:
    """The radii of results.json with the certified accuracy that certificates.npz gives, and what each radius means."""
    shape = files.results["data"]["input_shape"]
    count = len(files.certificates["label"])
    rows = []
    for name in sorted(files.results["otnn"]["certified_accuracy"], key=float):
        value = float(name)
        share = certified_share(files.certificates, value)
        rows.append(
            {
                "radius": name,
                "value": value,
                "share": share,
                "certified": words.percent(share),
                "count": round(share * count),
                "evenly": words.evenly(value, shape),
                "one_place": words.in_one_place(value, shape[0]),
            }
        )
    return rows


def certified_chart(files: RunFiles) -> Chart:
    """Share of test pictures that are right with at least each radius: exact at every one of 481 radii."""
    right = files.certificates["label"] == files.certificates["prediction"]
    sorted_radii = np.sort(files.certificates["radius"][right])
    end = 1.04 * float(sorted_radii[-1]) if len(sorted_radii) and sorted_radii[-1] > 0 else 1.0
    grid = np.linspace(0, end, 481)
    shares = (len(sorted_radii) - np.searchsorted(sorted_radii, grid, side="left")) / len(right)
    median = f"{np.median(sorted_radii):.3f}" if len(sorted_radii) else "none"
    drawn = chart(
        "Certified accuracy over the radius",
        f"It starts at {words.percent(float(shares[0]))} for radius 0 and falls to 0 % at radius "
        f"{end / 1.04:.3f}; half of the right predictions reach {median}. The table below has the values.",
        (0.0, end, "radius (L2 norm of the change, in pixel units)"),
        (0.0, 1.0, "right, and certified to this radius"),
        share=True,
    )
    drawn.line(grid, shares, "otnn", "optimal-transport network, certified", steps=True)
    if files.has_twin:
        clean = files.results["unconstrained"]["accuracy"]
        drawn.line([0.0, end], [clean, clean], "twin", "ordinary network on unchanged pictures: no certificate")
    return drawn


def radius_groups(files: RunFiles) -> list[dict[str, Any]]:
    """Radii of right and of wrong predictions: number, median, largest."""
    right = files.certificates["label"] == files.certificates["prediction"]
    groups = []
    for name, style, chosen in (("right", "right", right), ("wrong", "wrong", ~right)):
        radii = files.certificates["radius"][chosen]
        figures = [f"{np.median(radii):.3f}", f"{radii.max():.3f}"] if len(radii) else ["–", "–"]
        groups.append({"name": name, "style": style, "count": len(radii), "median": figures[0], "largest": figures[1]})
    return groups


def histogram(files: RunFiles) -> Chart:
    """Radii of right predictions upwards and of wrong ones downwards, each as shares of its own group."""
    radii = files.certificates["radius"]
    right = files.certificates["label"] == files.certificates["prediction"]
    edges = np.linspace(0, float(radii.max()) or 1.0, _BINS + 1)
    shares = {}
    for name, chosen in (("right", right), ("wrong", ~right)):
        counts = np.histogram(radii[chosen], edges)[0]
        shares[name] = counts / max(1, counts.sum())
    most = {name: float(values.max()) for name, values in shares.items()}
    drawn = chart(
        "Certified radii of right and of wrong predictions",
        "; ".join(
            f"{group['count']} {group['name']} predictions, median radius {group['median']}"
            for group in radius_groups(files)
        )
        + ". Right ones stand upwards, wrong ones downwards.",
        (0.0, float(edges[-1]), "certified radius"),
        (-1.1 * most["wrong"], 1.1 * most["right"] or 1.0, "share of the group: right up, wrong down"),
        share=True,
        unsigned=True,
    )
    for name, sign in (("right", 1), ("wrong", -1)):
        for low, high, share in zip(edges, edges[1:], shares[name], strict=False):
            if share > 0:
                title = f"radius {low:.3f} to {high:.3f}: {words.percent(float(share))} of the {name} predictions"
                drawn.bar(low, high, 0.0, sign * share, name, title)
    drawn.zero = round(float(drawn.y.place(0.0)), 1)
    drawn.legend.extend([("right", "right predictions"), ("wrong", "wrong predictions")])
    return drawn


def training_charts(files: RunFiles) -> list[Chart]:
    """Validation accuracy of all networks, and the loss of each: one loss has nothing to do with the other's."""
    series: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(line["network"] for line in files.metrics):
        lines = [line for line in files.metrics if line["network"] == name]
        keys = ("epoch", "loss", "validation_accuracy", "validation_certified_accuracy")
        series[name] = {key: numbers([line.get(key) for line in lines]) for key in keys}
    if not series:
        return []
    epochs = (1.0, max(float(s["epoch"].max()) for s in series.values()), "epoch (pass over the training pictures)")
    radius = files.config.get("training", {}).get("radius")
    at = f" at radius {radius}" if radius is not None else ""
    ends = [
        f"{_title(name)} ends at {words.percent(float(s['validation_accuracy'][-1]))}"
        for name, s in series.items()
        if math.isfinite(s["validation_accuracy"][-1])
    ]
    accuracy = chart(
        "Accuracy on the validation pictures during training",
        "; ".join(ends) + ".",
        epochs,
        (0.0, 1.0, "accuracy on the validation pictures"),
        share=True,
    )
    charts = [accuracy]
    for name, s in series.items():
        style = "twin" if name == "unconstrained" else "otnn"
        accuracy.line(s["epoch"], s["validation_accuracy"], style, _title(name).lower())
        if np.isfinite(s["validation_certified_accuracy"]).any():
            certified = f"{_title(name).lower()}, certified{at}"
            accuracy.line(s["epoch"], s["validation_certified_accuracy"], "certified-line", certified)
        finite = s["loss"][np.isfinite(s["loss"])]
        if len(finite):
            low, high = headroom(finite.tolist())
            loss = chart(
                f"Loss during training: {_title(name).lower()}",
                f"From {finite[0]:.3g} to {finite[-1]:.3g}.",
                epochs,
                (low, high, "loss: lower is better"),
                height=200,
            )
            loss.line(s["epoch"], s["loss"], style)
            charts.append(loss)
    return charts


def settings(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Dotted names and values of a nested configuration.

    Example:
        >>> settings({"seed": 0, "data": {"name": "digits", "data_dir": "somewhere"}})
        [('seed', '0'), ('data.name', 'digits')]
    """
    rows: list[tuple[str, str]] = []
    for name, value in config.items():
        dotted = f"{prefix}{name}"
        if isinstance(value, Mapping):
            rows.extend(settings(value, f"{dotted}."))
        elif dotted not in _PRIVATE:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            rows.append((dotted, {"True": "yes", "False": "no"}.get(text, text)))
    return rows


def _title(network: str) -> str:
    return _NETWORKS.get(network, network)
