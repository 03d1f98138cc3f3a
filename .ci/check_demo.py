"""Hold a demo run on the digits against the bars of the project; one seed, so with the tolerance of one test image."""

import json
import sys
from pathlib import Path

folder = Path(sys.argv[1])
results = json.loads((folder / "results.json").read_text())
ours = results["otnn"]
one_image = 1 / results["data"]["test"]
figures = {
    "accuracy": (ours["accuracy"], 0.98 - one_image),
    "certified at 0.25": (ours["certified_accuracy"]["0.25"], 0.90 - one_image),
    "certified at 0.5": (ours["certified_accuracy"]["0.5"], 0.65 - one_image),
    "mean radius": (ours["mean_radius"], 0.5),
    "twin's accuracy": (results["unconstrained"]["accuracy"], 0.95),
    "bound within 1 + 1e-5": (1 + 1e-5, ours["lipschitz_bound"]),
    "seconds under 90": (90, results["seconds"]["total"]),
}
for name, (value, bar) in figures.items():
    print(f"{name}: {value:.7g} (bar {bar:.7g})")
missed = [name for name, (value, bar) in figures.items() if not value >= bar]
if not (folder / "report.html").stat().st_size > 10_000:
    missed.append("report.html")
if missed:
    sys.exit(f"missed: {', '.join(missed)}")
