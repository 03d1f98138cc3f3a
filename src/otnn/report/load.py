"""What the report reads of a run folder, checked where it enters (docs/run-folder.md has the layout)."""

import json
import math
import tomllib
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from otnn.errors import InputError
from otnn.files import read_json
from otnn.report.guarantees import MEANINGS, SHORT

Arrays = dict[str, NDArray[Any]]

# The axes of each array: n samples, c channels, h height, w width, t steps of the path, k scores, g guarantees.
_CERTIFICATES = {"label": "n", "prediction": "n", "logit_gap": "n", "radius": "n"}
_EXPLANATIONS = {
    "images": "nchw",
    "label": "n",
    "prediction": "n",
    "target": "n",
    "radius": "n",
    "saliency": "nchw",
    "distances": "nt",
    "path": "ntchw",
    "potential": "nt",
    "scores": "ntk",
    "boundary_distance": "n",
    "tightness": "n",
    "flipped": "n",
    "status": "n",
    "index": "n",
}
_GUARANTEES = {
    "guarantee": "g",
    "guarantee_domain": "g",
    "guarantee_unit": "g",
    "guarantee_share": "g",
    "guarantee_median": "g",
    "guarantee_median_tightness": "g",
    "guarantee_samples": "",
    "guarantee_sentence": "ng",
    "guarantee_reason": "ng",
    "guarantee_bound": "ng",
    "guarantee_tightness": "ng",
    "guarantee_vacuous": "ng",
}
# How the way of each image was found
_SETTINGS = {"box": "", "iterations": ""}
# Those that have no entry per image
NOT_PER_IMAGE = tuple(name for name, axes in (_GUARANTEES | _SETTINGS).items() if not axes.startswith("n"))
_TWIN = {"unconstrained_prediction": "n", "unconstrained_saliency": "nchw"}
_PARTNERS = {
    "image": "nchw",
    "partner": "nchw",
    "one_step": "nchw",
    "same_length": "nchw",
    "label": "n",
    "partner_label": "n",
    "name": "n",
    "potential": "n",
    "potential_after": "n",
    "distance": "n",
    "share": "n",
    "cosine": "n",
}
_TEXTS = (
    *("status", "name"),
    *("guarantee", "guarantee_domain", "guarantee_unit", "guarantee_sentence", "guarantee_reason"),
)
_RESULTS = {
    "data": ("name", "classes", "input_shape", "train", "validation", "test", "class_shares"),
    "otnn": ("accuracy", "balanced_accuracy", "recall", "parameters", "lipschitz_bound"),
}
_COUNTERFACTUALS = ("samples", "from", "to", "box", "iterations", "judge", "columns", "along", "networks", "verdict")
_NETWORK = ("accuracy", "balanced_accuracy", "recall", "parameters")


@dataclass(frozen=True)
class RunFiles:
    """The files of a run that the report shows.

    Attributes:
        name: the name of the folder.
        results: results.json.
        certificates: the arrays of certificates.npz, one row per test image.
        explanations: the arrays of explanations.npz, one row per image of the gallery.
        metrics: the lines of metrics.jsonl; empty where there is none.
        config: config.toml; empty where there is none.
        audit: audit.json; None where the run was not audited.
        partners: the arrays of audit.npz; empty likewise.
        compare: compare.json; None where no explanations were compared.
        compare_pictures: the bytes of its pictures by name; empty likewise.
        counterfactuals: counterfactuals.json; None where none were measured.
        counterfactual_picture: the bytes of its picture; empty likewise.
        attacks: attacks.json; None where nothing was attacked.
        attack_picture: the bytes of its picture; empty likewise.
    """

    name: str
    results: dict[str, Any]
    certificates: Arrays
    explanations: Arrays
    metrics: list[dict[str, Any]]
    config: dict[str, Any]
    audit: dict[str, Any] | None = None
    partners: Arrays = field(default_factory=dict)
    compare: dict[str, Any] | None = None
    compare_pictures: dict[str, bytes] = field(default_factory=dict)
    counterfactuals: dict[str, Any] | None = None
    counterfactual_picture: bytes = b""
    attacks: dict[str, Any] | None = None
    attack_picture: bytes = b""

    @property
    def classes(self) -> list[str]:
        """The names of the classes."""
        return [str(name) for name in self.results["data"]["classes"]]

    @property
    def has_twin(self) -> bool:
        """Whether the run holds the ordinary network as well."""
        return "unconstrained" in self.results


def load_run(run: Path) -> RunFiles:
    """Read and check the files of a run.

    Raises:
        InputError: a file is missing, damaged, or does not belong to the others.
    """
    if not run.is_dir():
        raise InputError(f"{run}: no such run folder; make one with `otnn train --out {run}`")
    results = _results(run)
    twin = _TWIN if "unconstrained" in results else {}
    certificates = _arrays(run, "certificates.npz", _CERTIFICATES, "certify")
    explanations = _arrays(run, "explanations.npz", _EXPLANATIONS | _GUARANTEES | _SETTINGS | twin, "explain")
    _check_certificates(run, results, certificates)
    _check_explanations(run, results, explanations)
    index = explanations["index"]
    if index.min() < 0 or index.max() >= len(certificates["radius"]):
        raise InputError(
            f"{run / 'explanations.npz'}: index is not that of test images; delete it and run `otnn explain`"
        )
    explanations["radius"] = certificates["radius"][index]  # in the arithmetic that was asked for last
    told = (results, certificates, explanations, _metrics(run), _config(run))
    name, audited = run.resolve().name, _audit(run, results)
    return RunFiles(name, *told, *audited, *_compare(run), *_counterfactuals(run), *_attacks(run))


def _results(run: Path) -> dict[str, Any]:
    file = run / "results.json"
    results = read_json(file)
    if results.get("format") != 1:
        raise InputError(
            f"{file}: expected format 1, got {results.get('format')}; make the run again with `otnn train`"
        )
    tables = _RESULTS | ({"unconstrained": _NETWORK} if "unconstrained" in results else {})
    for table, names in tables.items():
        entries = results.get(table)
        missing = [name for name in names if not isinstance(entries, dict) or name not in entries]
        if missing:
            raise InputError(
                f"{file}: {table} lacks {', '.join(missing)}; make the run again with `otnn train --out {run} --force`"
            )
    for name in ("certified_accuracy", "mean_radius"):
        if name not in results["otnn"]:
            raise InputError(f"{file}: otnn lacks {name}; make it with `otnn certify {run}`")
    try:
        _check_numbers(results)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(
            f"{file}: damaged: a figure is missing or no number; "
            f"make the run again with `otnn train --out {run} --force`"
        ) from None
    return results


def _check_numbers(results: dict[str, Any]) -> None:
    """Raise an error of Python where a figure that the page needs is none."""
    data = results["data"]
    counts = [*data["input_shape"], data["train"], data["validation"], data["test"]]
    networks = [results[name] for name in ("otnn", "unconstrained") if name in results]
    shares = [*data["class_shares"], *results["otnn"]["certified_accuracy"].values()]
    for network in networks:
        shares += [network["accuracy"], network["balanced_accuracy"], *network["recall"].values()]
        counts.append(network["parameters"])
    sizes = [*map(float, results["otnn"]["certified_accuracy"]), results["otnn"]["mean_radius"]]
    sizes += [results["otnn"]["lipschitz_bound"], *results.get("seconds", {}).values()]
    if not (
        len(data["input_shape"]) == 3
        and len(data["class_shares"]) == len(data["classes"]) > 0
        and all(int(count) == count >= 0 for count in counts)
        and all(0 <= share <= 1 for share in shares)
        and all(0 <= size < math.inf for size in sizes)
    ):
        raise ValueError


def _arrays(run: Path, name: str, layout: dict[str, str], command: str) -> Arrays:
    """Read an npz archive and hold its arrays against their axes; sizes of one letter must agree."""
    file = run / name
    mend = f"make it with `otnn {command} {run}`"
    if not file.is_file():
        raise InputError(f"{file}: no such file; {mend}")
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(f"{file}: cannot be read ({error}); {mend}") from None
    sizes: dict[str, int] = {}
    for key, axes in layout.items():
        if key not in arrays:
            raise InputError(f"{file}: the array {key} is missing; {mend}")
        if arrays[key].dtype.kind not in ("U" if key in _TEXTS else "fiub"):
            raise InputError(
                f"{file}: {key}: expected {'text' if key in _TEXTS else 'numbers'}, got {arrays[key].dtype}; {mend}"
            )
        shape = arrays[key].shape
        if len(shape) != len(axes) or any(sizes.setdefault(a, s) != s for a, s in zip(axes, shape, strict=True)):
            wanted = ", ".join(str(sizes.get(axis, axis)) for axis in axes)
            raise InputError(f"{file}: {key}: expected shape ({wanted}), got {shape}; {mend}")
    if sizes["n"] == 0:
        raise InputError(f"{file}: expected at least one sample, got none; {mend}")
    return arrays


def _check_certificates(run: Path, results: dict[str, Any], arrays: Arrays) -> None:
    """Refuse certificates that are not those that results.json tells of."""
    file, mend = run / "certificates.npz", f"make both again with `otnn certify {run}`"
    _check_classes(file, results, arrays, ("label", "prediction"), "certify")
    if len(arrays["label"]) != results["data"]["test"]:
        raise InputError(
            f"{file}: expected the {results['data']['test']} test samples of results.json, "
            f"got {len(arrays['label'])}; {mend}"
        )
    _check_radii(file, arrays, "certify")
    for radius, share in results["otnn"]["certified_accuracy"].items():
        counted = certified_share(arrays, float(radius))
        if abs(counted - share) > 1e-6:
            raise InputError(
                f"{file}: holds a certified accuracy of {counted:.4f} at radius {radius}, "
                f"results.json has {share:.4f}; {mend}"
            )


def _check_explanations(run: Path, results: dict[str, Any], arrays: Arrays) -> None:
    file = run / "explanations.npz"
    names = ("label", "prediction", "target", *(["unconstrained_prediction"] if "unconstrained" in results else []))
    _check_classes(file, results, arrays, names, "explain")
    _check_radii(file, arrays, "explain")
    if not np.isfinite(arrays["images"]).all():
        raise InputError(f"{file}: expected images of finite values, got others; make it with `otnn explain {run}`")
    shape = tuple(results["data"]["input_shape"])
    if arrays["images"].shape[1:] != shape:
        raise InputError(
            f"{file}: expected images of shape {shape} as in results.json, got {arrays['images'].shape[1:]}; "
            f"make it with `otnn explain {run}`"
        )
    told = {str(name) for name in arrays["guarantee"]}
    if not set(SHORT) <= told <= set(MEANINGS):
        raise InputError(
            f"{file}: expected guarantees among {', '.join(MEANINGS)}, got {', '.join(sorted(told))}; "
            f"make it with `otnn explain {run}`"
        )
    if arrays["scores"].shape[2] not in (
        len(results["data"]["classes"]),
        *([1] * (len(results["data"]["classes"]) == 2)),
    ):
        raise InputError(
            f"{file}: expected scores of {len(results['data']['classes'])} classes, got {arrays['scores'].shape[2]}; "
            f"make it with `otnn explain {run}`"
        )


def _audit(run: Path, results: dict[str, Any]) -> tuple[dict[str, Any] | None, Arrays]:
    """Read audit.json and audit.npz, where the run was audited."""
    file = run / "audit.json"
    if not file.exists() and not (run / "audit.npz").exists():
        return None, {}
    mend = f"make it with `otnn audit {run}`"
    if not file.exists():
        raise InputError(f"{file}: no such file; {mend}")
    audit = read_json(file)
    if audit.get("format") != 1:
        raise InputError(f"{file}: expected format 1, got {audit.get('format')}; {mend}")
    partners = _arrays(run, "audit.npz", _PARTNERS, "audit")
    _check_classes(run / "audit.npz", results, partners, ("label", "partner_label"), "audit")
    return audit, partners


def _compare(run: Path) -> tuple[dict[str, Any] | None, dict[str, bytes]]:
    """Read compare.json and its pictures, where explanations were compared."""
    return _with_pictures(run, "compare.json", ("compare.png", "compare-pareto.png"), "compare")


def _counterfactuals(run: Path) -> tuple[dict[str, Any] | None, bytes]:
    """Read counterfactuals.json and its picture, where counterfactuals were measured."""
    name = "counterfactuals.png"
    content, pictures = _with_pictures(run, "counterfactuals.json", (name,), "counterfactual")
    if content is None:
        return None, b""
    missing = [key for key in _COUNTERFACTUALS if key not in content]
    if missing:
        raise InputError(
            f"{run / 'counterfactuals.json'}: lacks {', '.join(missing)}; make it with `otnn counterfactual {run}`"
        )
    return content, pictures[name]


def _with_pictures(
    run: Path, name: str, pictures: tuple[str, ...], command: str
) -> tuple[dict[str, Any] | None, dict[str, bytes]]:
    """Read the JSON file of a command and its pictures by name; nothing where all are absent."""
    files = [run / each for each in (name, *pictures)]
    missing = [path for path in files if not path.exists()]
    if len(missing) == len(files):
        return None, {}
    mend = f"make it with `otnn {command} {run}`"
    if missing:
        raise InputError(f"{missing[0]}: no such file; {mend}")
    content = read_json(files[0])
    if content.get("format") != 1:
        raise InputError(f"{files[0]}: expected format 1, got {content.get('format')}; {mend}")
    return content, {path.name: path.read_bytes() for path in files[1:]}


def _attacks(run: Path) -> tuple[dict[str, Any] | None, bytes]:
    """Read attacks.json and its picture, where the run was attacked."""
    content, pictures = _with_pictures(run, "attacks.json", ("attacks.png",), "attack")
    return content, pictures.get("attacks.png", b"")


def _check_radii(file: Path, arrays: Arrays, command: str) -> None:
    if not (np.isfinite(arrays["radius"]) & (arrays["radius"] >= 0)).all():
        raise InputError(f"{file}: expected finite radii >= 0, got others; make it with `otnn {command} {file.parent}`")


def _check_classes(file: Path, results: dict[str, Any], arrays: Arrays, names: tuple[str, ...], command: str) -> None:
    count = len(results["data"]["classes"])
    for name in names:
        values = arrays[name]
        if values.dtype.kind not in "iu" or values.min() < 0 or values.max() >= count:
            raise InputError(
                f"{file}: {name}: expected class indices in 0..{count - 1}, got others; "
                f"make it with `otnn {command} {file.parent}`"
            )


def certified_share(certificates: Arrays, radius: float) -> float:
    """Share of all test samples that are right with a certified radius of at least `radius`."""
    right = certificates["label"] == certificates["prediction"]
    return float((right & (certificates["radius"] >= radius)).mean())


def _metrics(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    if not file.is_file():
        return []
    lines = []
    for number, text in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            line = json.loads(text)
            lines.append({"network": str(line["network"]), "epoch": int(line["epoch"]), **line})
        except (json.JSONDecodeError, TypeError, KeyError, ValueError):
            raise InputError(
                f"{file}: line {number} is damaged; expected JSON with network and epoch: remove the line or the file"
            ) from None
    return lines


def _config(run: Path) -> dict[str, Any]:
    file = run / "config.toml"
    if not file.is_file():
        return {}
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(
            f"{file}: cannot be read ({error}); restore the file, or make the run again with `otnn train`"
        ) from None


def numbers(values: list[Any]) -> NDArray[np.float64]:
    """Values of a metrics file as floats; what is no finite number becomes NaN."""
    return np.array([v if isinstance(v, int | float) and math.isfinite(v) else math.nan for v in values], dtype=float)
