"""Attacks as a stage: accuracy over radii of the networks of a run beside what is certified, with checks."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import product
from typing import Any

import torch

from otnn.attacks.objective import LOSSES, check_norm
from otnn.attacks.table import ATTACKS, libraries
from otnn.data import Dataset
from otnn.errors import InputError
from otnn.files import json_bytes
from otnn.report import words
from otnn.report.attack_pictures import attack_picture
from otnn.run.attack_checks import check_all
from otnn.run.attack_figures import collapse_figures, network_figures
from otnn.run.attack_words import verdict
from otnn.run.attacked import Found, Victim, runs
from otnn.run.black_box import search_left
from otnn.run.corruptions import CORRUPTIONS, NOTE, corrupted_accuracy
from otnn.run.folder import Run
from otnn.run.progress import tasks_bar
from otnn.run.train import dataset_of, versions

SAMPLES = 200
STEPS = 20
# Of the default set: what is left out takes hundreds of passes, and is named by hand
SLOW = ("carlini_wagner", "apgd", "fab", "square")
# Those that are made of one loss keep it, whatever the others raise
OWN_LOSS = {"carlini_wagner": "margin", "fmn": "margin", "fab": "margin"}
# In [0, 1] pixel units; the largest, at which any image may become any other, is added
RADII: Mapping[str, Sequence[float]] = {
    "l2": (0.0, 36 / 255, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0),
    "linf": (0.0, 1 / 255, 2 / 255, 4 / 255, 8 / 255, 16 / 255, 0.1, 0.2, 0.3),
}
# Samples on which the collapse is measured in the other settings
OTHERS = 100


def attack_run(
    run: Run,
    *,
    dataset: Dataset | None = None,
    samples: int | None = SAMPLES,
    seed: int = 0,
    norm: str = "l2",
    loss: str = "margin",
    box: bool = False,
    attacks: Sequence[str] | None = None,
    radii: Sequence[float] | None = None,
    steps: int = STEPS,
    settings: bool = False,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """Attack every network of a run on the same test images: writes attacks.json and attacks.png.

    Attacks start from right predictions; a wrong one counts as turned at distance 0. Every point is evaluated again by
    the network itself, its distance in float64. An attack within a radius runs at each radius on what no smaller one
    turned, and at the largest on all.

    Args:
        run: an opened run.
        dataset: its data, if they are at hand already.
        samples: test images at most, drawn at random; None takes all.
        seed: of the images, the attacks and the noise.
        norm: "l2" or "linf".
        loss: "margin" or "cross_entropy", raised by the attacks that follow one.
        box: keep the points in [0, 1].
        attacks: names of `otnn.attacks.ATTACKS`; by default those that are installed, know the norm and take no
            hundreds of passes.
        radii: in input units, > 0; 0 and the distance over which every image in [0, 1] may become any other are added.
        steps: of PGD.
        settings: also measure the collapse with the other loss, and with the other choice of the box, on fewer images.
        device: where the networks run.

    Returns:
        The content of attacks.json (docs/run-folder.md).

    Raises:
        InputError: unknown names, an attack that is not installed or does not know the norm, radii or numbers that
            cannot be used.
    """
    start = time.perf_counter()
    check_settings(samples, norm, loss, steps, radii)
    chosen, skipped = choose_attacks(attacks, norm)
    dataset = dataset or dataset_of(run)
    grid = _grid(RADII[norm] if radii is None else radii, norm, dataset.test.images.shape[1:].numel())
    index = torch.randperm(len(dataset.test), generator=torch.Generator().manual_seed(seed))
    index = index if samples is None else index[:samples]
    images, labels = dataset.test.images[index].to(device), dataset.test.labels[index].to(device)
    how = {"norm": norm, "loss": loss, "box": box}
    own: dict[str, dict[str, Any]] = {name: {"loss": kept} for name, kept in OWN_LOSS.items()}
    # without the gradient step itself, against which it is checked and its direction is compared
    own["pgd"] = {"steps": steps, "one_step": False}
    others = [one for one in product(LOSSES, (False, True)) if one != (loss, box)] if settings and norm == "l2" else []
    each = sum(runs(ATTACKS[name], grid) for name in chosen)
    networks = {name: run.network(name, device) for name in run.networks}
    told: dict[str, Any] = {}
    tasks = len(networks) * (each + 1) + len(others) * each + len(CORRUPTIONS)
    with tasks_bar(f"attacking {run.path.name}", tasks) as begin:
        for name, model in networks.items():
            victim = Victim(name, model, images, labels, how)
            found = _all(victim, chosen, grid, seed, own, begin)
            left = search_left(victim, found, grid, seed, partial(_tell, begin, victim, "square"))
            told[name] = network_figures(victim, found, grid, left)
        collapses: list[dict[str, Any]] = []
        for other_loss, other_box in others:
            victim = Victim(
                f"otnn, {other_loss.replace('_', '-')}{', in the box' if other_box else ''}",
                networks["otnn"],
                images[:OTHERS],
                labels[:OTHERS],
                {"norm": norm, "loss": other_loss, "box": other_box},
            )
            found = _all(victim, chosen, grid, seed, own, begin)
            told_of = {name: collapse_figures(victim, one, ATTACKS[name].minimal) for name, one in found.items()}
            collapses.append({"loss": other_loss, "box": other_box, "samples": len(victim.labels), "attacks": told_of})
        corrupted = corrupted_accuracy(networks, images, labels, seed=seed, begin=begin)
    content: dict[str, Any] = {
        "format": 1,
        "samples": len(index),
        "seed": seed,
        **how,
        "steps": steps,
        "radii": grid,
        "versions": versions() | libraries(chosen),
        "images": index.tolist(),
        "attacks": {
            name: {
                "source": ATTACKS[name].source,
                "minimal": ATTACKS[name].minimal,
                "loss": OWN_LOSS.get(name, loss),
                "passes": _passes(name, steps),
            }
            for name in chosen
        },
        "skipped": skipped,
        "networks": told,
        "settings": collapses,
        "audit": run.results().get("audit"),
        "corruptions": {"note": NOTE, "rows": corrupted},
    }
    content["checks"] = check_all(content)
    content["failed"] = sum(row["passed"] is False for row in content["checks"])
    content["verdict"] = verdict(content)
    files = {"attacks.json": json_bytes(content), "attacks.png": attack_picture(content)}
    run.write(files, {"seconds": {"attack": round(time.perf_counter() - start, 3)}})
    return content


def check_settings(samples: int | None, norm: str, loss: str, steps: int, radii: Sequence[float] | None) -> None:
    """Refuse settings before anything is read.

    Raises:
        InputError: what was expected.
    """
    if samples is not None and samples < 1:
        raise InputError(f"samples: expected at least 1 test image, got {samples}")
    check_norm(norm)
    if loss not in LOSSES:
        raise InputError(f"loss: expected one of {', '.join(LOSSES)}, got {loss!r}")
    if steps < 1:
        raise InputError(f"steps: expected at least 1, got {steps}")
    wrong = [radius for radius in radii or () if not 0 <= radius < math.inf]
    if wrong or (radii is not None and not radii):
        raise InputError(f"radii: expected finite numbers >= 0, got {wrong[0] if wrong else 'none'}")


def available(norm: str) -> list[str]:
    """The attacks that can run here, the slow ones as well."""
    return [name for name in ATTACKS if _reason(name, norm) is None]


def choose_attacks(names: Sequence[str] | None, norm: str) -> tuple[list[str], dict[str, str]]:
    """The attacks to run, and why each of the others of the default set is left out.

    Raises:
        InputError: an unknown name, none, or one that cannot run here.
    """
    reasons = {name: _reason(name, norm) for name in ATTACKS}
    if names is None:
        chosen = [name for name in ATTACKS if reasons[name] is None and name not in SLOW]
        slow = {name: "takes hundreds of passes; name it to run it" for name in SLOW if name in ATTACKS}
        return chosen, slow | {name: reason for name, reason in reasons.items() if reason is not None}
    unknown = [name for name in names if name not in ATTACKS]
    if unknown or not names:
        got = ", ".join(repr(name) for name in unknown) or "none"
        raise InputError(f"attacks: expected some of {', '.join(ATTACKS)}, got {got}")
    for name in names:
        if reasons[name] is not None:
            raise InputError(f"attacks: {name} {reasons[name]}")
    return list(dict.fromkeys(names)), {}


def _reason(name: str, norm: str) -> str | None:
    attack = ATTACKS[name]
    if attack.source != "otnn" and find_spec(attack.source) is None:
        return f'needs {attack.source}, which is not installed: pip install -c constraints.txt ".[attacks]"'
    if norm not in attack.norms:
        return f"knows {', '.join(attack.norms)} alone, not {norm}"
    return None


def _passes(name: str, steps: int) -> str:
    return f"{steps} steps a radius, 1 start" if name == "pgd" else ATTACKS[name].passes


def _grid(radii: Sequence[float], norm: str, values: int) -> list[float]:
    """Radii from 0 to the largest, ascending."""
    largest = 1.0 if norm == "linf" else values**0.5
    return sorted({0.0, *(float(radius) for radius in radii), max(largest, *radii)})


def _all(
    victim: Victim,
    names: Sequence[str],
    grid: Sequence[float],
    seed: int,
    own: dict[str, dict[str, Any]],
    begin: Callable[[str], None],
) -> dict[str, Found]:
    return {
        name: victim.run(ATTACKS[name], grid, seed, own.get(name, {}), partial(_tell, begin, victim, name))
        for name in names
    }


def _tell(begin: Callable[[str], None], victim: Victim, name: str, text: str) -> None:
    begin(f"{victim.name}: {words.attack(name)} {text}".rstrip())
