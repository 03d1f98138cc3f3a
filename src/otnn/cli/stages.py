"""The commands that read a run folder and add to it: one a stage, each from files to files."""

from pathlib import Path
from typing import Annotated, Any

import typer

from otnn.cli.options import (
    AcceptEdits,
    AsJson,
    Box,
    Device,
    Iterations,
    MovedData,
    RunFolder,
    SkipBroken,
    listed,
    numbers,
    say,
    tell,
)
from otnn.cli.tables import (
    attack_tables,
    audit_table,
    compare_tables,
    counterfactual_table,
    explained_table,
    guarantees_table,
    radii_table,
)
from otnn.errors import InputError


def certify(
    run: RunFolder,
    data_dir: MovedData = None,
    accept_edits: AcceptEdits = False,
    arithmetic: Annotated[
        str, typer.Option(help='Radii of the map in exact arithmetic ("real"), or as executed ("float32").')
    ] = "real",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Certify every test image: certificates.csv, certificates.npz and certified accuracy over radii."""
    from otnn.run.certify import certify_run
    from otnn.run.folder import open_run
    from otnn.run.train import choose_device, dataset_of

    place = choose_device(device)
    opened = open_run(run, accept_edits=accept_edits)
    figures = certify_run(opened, arithmetic=arithmetic, dataset=dataset_of(opened, data_dir), device=place)
    tell(figures, as_json, radii_table(opened.results()))


def explain(
    run: RunFolder,
    images: Annotated[
        list[Path] | None, typer.Argument(help="Image files; without any, a gallery of test images.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="The class that the counterfactuals go to.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the pictures; RUN/explanations by default.")] = None,
    data_dir: MovedData = None,
    accept_edits: AcceptEdits = False,
    skip_broken: SkipBroken = False,
    samples: Annotated[
        int, typer.Option(help="Random test images over which guarantees are counted; 0: the gallery.", min=0)
    ] = 0,
    gradients: Annotated[
        int, typer.Option(help="Gradients of certified SmoothGrad per image; it says something from ~20,000 on.", min=1)
    ] = 10,
    box: Box = False,
    iterations: Iterations = 1,
    device: Device = "auto",
    force: Annotated[bool, typer.Option("--force", help="Overwrite pictures that exist.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show where a prediction comes from, and the image that another class would need."""
    from otnn.report.guarantees import SHORT
    from otnn.run.explain import explain_files, explain_gallery
    from otnn.run.folder import open_run
    from otnn.run.guarantees import figures
    from otnn.run.train import choose_device, dataset_of

    place = choose_device(device)
    opened = open_run(run, accept_edits=accept_edits)
    way: dict[str, Any] = {"box": box, "iterations": iterations}
    if not images:
        if target is not None or out is not None:
            raise InputError("--target and --out go with image files; give some, or leave them out for the gallery")
        dataset = dataset_of(opened, data_dir)
        arrays = explain_gallery(opened, dataset=dataset, samples=samples, gradients=gradients, device=place, **way)
        counted = min(samples, len(dataset.test)) or len(arrays["index"])
        file = str(run / "explanations.npz")
        told: dict[str, Any] = {"gallery": file, **way, "samples": counted, "guarantees": figures(arrays)}
        over = f"{counted} {'random test images' if samples else 'images of the gallery'}"
        tell(told, as_json, guarantees_table(told["guarantees"], over), f"gallery of test images: {file}")
        return
    if samples:
        raise InputError("--samples goes with the gallery; leave out the image files")
    settings: dict[str, Any] = {"out": out, "force": force, "skip_broken": skip_broken, "gradients": gradients}
    rows = explain_files(opened, images, target=target, device=place, **settings, **way)
    tell({**way, "images": rows}, as_json, explained_table(rows))
    for row in rows:
        say(f"\n{Path(row['file']).name}", as_json)
        for name in SHORT:
            say(f"  {row['guarantees'][name]['sentence']}", as_json)
        say(f"  {row['picture']}", as_json)


def audit(
    run: RunFolder,
    samples: Annotated[
        int, typer.Option(help="Samples of each side of a problem, at most; 0 takes all. More need more time.", min=0)
    ] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of the samples that are drawn.", min=0, max=2**63 - 1)] = 0,
    data_dir: MovedData = None,
    accept_edits: AcceptEdits = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure the network against the exact optimum of its loss: audit.json, audit.npz and audit.png."""
    from otnn.run.audit import audit_run
    from otnn.run.folder import open_run
    from otnn.run.train import choose_device, dataset_of

    place = choose_device(device)
    opened = open_run(run, accept_edits=accept_edits)
    dataset = dataset_of(opened, data_dir)
    content = audit_run(opened, dataset=dataset, samples=samples or None, seed=seed, device=place)
    tell(content, as_json, audit_table(content))
    for sentence in content["verdict"]:
        say(sentence, as_json)
    say("slack. is the mean slackness, zero the share moved onto the zero level; all figures: docs/audit.md", as_json)
    say(f"pictures: {run / 'audit.png'}", as_json)


def attack(
    run: RunFolder,
    samples: Annotated[int, typer.Option(help="Test images, drawn at random; 0 takes all.", min=0)] = 200,
    attacks: Annotated[
        str | None, typer.Option(help="Others than the quick ones that are installed, with commas; or: all.")
    ] = None,
    norm: Annotated[str, typer.Option(help="l2 or linf.")] = "l2",
    loss: Annotated[str, typer.Option(help="What is raised: margin or cross_entropy.")] = "margin",
    box: Annotated[bool, typer.Option("--box", help="Keep the images in the range of pixels.")] = False,
    radii: Annotated[str | None, typer.Option(help="Others than the usual ones, with commas.")] = None,
    steps: Annotated[int, typer.Option(help="Of PGD.", min=1)] = 20,
    settings: Annotated[
        bool, typer.Option("--settings", help="Also the collapse with the other loss, and in or out of the box.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of images, attacks and noise.", min=0, max=2**63 - 1)] = 0,
    data_dir: MovedData = None,
    accept_edits: AcceptEdits = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Attack all networks beside what is certified, and check both: attacks.json and attacks.png."""
    from otnn.run.attack import attack_run, available, check_settings, choose_attacks
    from otnn.run.folder import open_run
    from otnn.run.train import choose_device, dataset_of

    names = available(norm) if attacks == "all" else listed(attacks)
    grid = numbers(radii, "--radii")
    check_settings(samples or None, norm, loss, steps, grid)
    choose_attacks(names, norm)
    place = choose_device(device)
    opened = open_run(run, accept_edits=accept_edits)
    content = attack_run(
        opened,
        dataset=dataset_of(opened, data_dir),
        samples=samples or None,
        seed=seed,
        norm=norm,
        loss=loss,
        box=box,
        attacks=names,
        radii=grid,
        steps=steps,
        settings=settings,
        device=place,
    )
    tell(content, as_json, *attack_tables(content))
    for name, reason in content["skipped"].items():
        say(f"not run: {name} {reason}", as_json)
    for sentence in content["verdict"]:
        failed = sentence.startswith("FAILED")
        say(sentence, as_json, style="bold red" if failed else "")
        if failed and as_json:  # loud, whoever reads the JSON
            typer.echo(sentence, err=True)
    say(f"pictures: {run / 'attacks.png'}", as_json)
    if content["failed"]:
        raise typer.Exit(1)


def compare(
    run: RunFolder,
    profile: Annotated[str, typer.Option(help="quick, or full: all methods and all metrics.")] = "quick",
    methods: Annotated[str | None, typer.Option(help="Others than those of the profile, with commas.")] = None,
    metrics: Annotated[str | None, typer.Option(help="Others than those of the profile, with commas.")] = None,
    samples: Annotated[int, typer.Option(help="Test images, drawn at random.", min=1)] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the images, masks and noise.")] = 0,
    score: Annotated[str, typer.Option(help="What is explained: margin or logit.")] = "margin",
    data_dir: MovedData = None,
    accept_edits: AcceptEdits = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Compare explanation methods on the networks of a run: compare.json, compare.csv and two pictures."""
    from otnn.run.compare import choose, compare_run
    from otnn.run.folder import open_run
    from otnn.run.train import choose_device, dataset_of

    choice: dict[str, Any] = {"profile": profile, "methods": listed(methods), "metrics": listed(metrics)}
    choose(**choice)
    place = choose_device(device)
    opened = open_run(run, accept_edits=accept_edits)
    dataset = dataset_of(opened, data_dir)
    content = compare_run(opened, dataset=dataset, samples=samples, seed=seed, score=score, device=place, **choice)
    tell(content, as_json, *compare_tables(content))
    for sentence in content["verdict"]:
        say(sentence, as_json)
    say(f"pictures: {run / 'compare.png'}, {run / 'compare-pareto.png'}", as_json)


def counterfactual(
    run: RunFolder,
    source: Annotated[
        str | None, typer.Option("--from", help="Test images of this class only.", metavar="CLASS")
    ] = None,
    target: Annotated[
        str | None, typer.Option("--to", help="The class to go to; by default the nearest rival.", metavar="CLASS")
    ] = None,
    samples: Annotated[int, typer.Option(help="Test images, drawn at random; 0 takes all.", min=0)] = 1000,
    box: Box = False,
    iterations: Iterations = 1,
    judge: Annotated[
        Path | None,
        typer.Option(
            help="A run whose ordinary network judges; by default one is trained and kept.", metavar="OTHER_RUN"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the images that are drawn.", min=0, max=2**63 - 1)] = 0,
    data_dir: MovedData = None,
    accept_edits: AcceptEdits = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure and show the images that another class would need: counterfactuals.json and counterfactuals.png."""
    from otnn.run.counterfactuals import counterfactual_run
    from otnn.run.folder import open_run
    from otnn.run.train import choose_device, dataset_of

    place = choose_device(device)
    opened = open_run(run, accept_edits=accept_edits)
    content = counterfactual_run(
        opened,
        dataset=dataset_of(opened, data_dir),
        samples=samples or None,
        seed=seed,
        source=source,
        target=target,
        box=box,
        iterations=iterations,
        judge=None if judge is None else open_run(judge),
        device=place,
    )
    tell(content, as_json, counterfactual_table(content))
    for sentence in content["verdict"]:
        say(sentence, as_json)
    told = content["judge"]
    origin = f"the ordinary network of {told['from']}" if told["from"] else f"of seed {told['seed']}"
    say(f"judge: {origin}, {told['epochs']} epochs, right on {told['accuracy']:.1%} of the test images", as_json)
    say(f"what the figures mean: docs/counterfactuals.md; pictures: {run / 'counterfactuals.png'}", as_json)


def report(
    run: RunFolder, data_dir: MovedData = None, accept_edits: AcceptEdits = False, as_json: AsJson = False
) -> None:
    """Write report.html: one page that a non-expert can read; runs certify and explain where they are missing."""
    from otnn.report import write_report
    from otnn.run.certify import certify_run
    from otnn.run.explain import explain_gallery
    from otnn.run.folder import open_run
    from otnn.run.train import dataset_of

    opened = open_run(run, accept_edits=accept_edits)
    certified = (run / "certificates.npz").exists() and "certified_accuracy" in opened.results()["otnn"]
    explained = (run / "explanations.npz").exists()
    if not (certified and explained):
        dataset = dataset_of(opened, data_dir)
        if not certified:
            certify_run(opened, dataset=dataset)
        if not explained:
            explain_gallery(opened, dataset=dataset)
    file = write_report(opened)
    tell({"report": str(file)}, as_json, f"report: {file}")


def export(
    run: RunFolder,
    out: Annotated[Path | None, typer.Option(help="The file; RUN/otnn.onnx by default.", metavar="FILE.onnx")] = None,
    accept_edits: AcceptEdits = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that exists.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the network with its proven bounds as an ONNX file, for use without torch."""
    from otnn.run.export import export_run
    from otnn.run.folder import open_run

    opened = open_run(run, accept_edits=accept_edits)
    file = export_run(opened, run / "otnn.onnx" if out is None else out, force=force)
    tell({"onnx": str(file)}, as_json, f"ONNX file: {file}")
