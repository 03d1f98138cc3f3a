"""A run folder: made whole or not at all, checked when it is opened.

    config.toml  manifest.json  metrics.jsonl  results.json  certificates.csv  certificates.npz  explanations.npz
    report.html  networks/otnn.safetensors  networks/unconstrained.safetensors  networks/adversarial.safetensors

`manifest.json` is written last: a folder without it is half-written.
"""

import math
import os
import shutil
import tomllib
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from otnn import __version__
from otnn.errors import InputError
from otnn.files import json_bytes, read_json, sha256, write_whole
from otnn.lipschitz import bound, plain_structure
from otnn.models import Classifier, build
from otnn.run.config import Config, from_mapping, to_toml
from otnn.run.manifest import FORMAT, MANIFEST, OTNN, TWIN, commit, sealed, verified

# Bounds are computed in float64: another machine rounds them differently by far less.
_SAME_BOUND = 1e-9


@dataclass(frozen=True)
class Run:
    """An opened run folder.

    Attributes:
        path: the folder.
        config: its configuration.
        manifest: format, configuration, model description, checksums and bounds, as they were at the opening.
    """

    path: Path
    config: Config
    manifest: dict[str, Any]

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""
        return tuple(self.manifest["model"]["classes"])

    @property
    def has_twin(self) -> bool:
        """Whether the unconstrained twin was trained."""
        return TWIN in self.manifest["files"]

    @property
    def networks(self) -> tuple[str, ...]:
        """The names of the networks that were trained: otnn, and unconstrained and adversarial where they are."""
        names = ("otnn", "unconstrained", "adversarial")
        return tuple(name for name in names if f"networks/{name}.safetensors" in self.manifest["files"])

    def network(self, name: str, device: str | torch.device = "cpu") -> Classifier:
        """Load a network in `eval()` mode; `open_run` has verified its checksum and its bounds.

        Raises:
            InputError: the file does not hold this network.
        """
        file = self.path / "networks" / f"{name}.safetensors"
        model = empty_network(self.manifest["model"], constrained=name == "otnn")
        try:
            model.load_state_dict(load_file(file))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise InputError(f"{file}: does not hold the network of this run: {error}; train again") from None
        return model.to(device).eval()

    def results(self) -> dict[str, Any]:
        """Read results.json.

        Raises:
            InputError: it is damaged.
        """
        results = read_json(self.path / "results.json")
        if not all(isinstance(results.get(part), dict) for part in ("data", "otnn", "seconds")):
            raise InputError(f"{self.path / 'results.json'}: damaged: data, otnn or seconds are missing; train again")
        return results

    def write(self, files: Mapping[str, bytes], results: Mapping[str, Any]) -> None:
        """Write files into the folder and merge changes into results.json, table by table: all of it or nothing.

        Args:
            files: contents of `otnn.run.manifest.DERIVED`, by name.
            results: what changes in results.json.

        Raises:
            InputError: since the opening a file was damaged, or the run was trained anew.
        """
        with verified(self.path) as manifest:
            if manifest["files"][OTNN] != self.manifest["files"][OTNN]:
                raise InputError(f"{self.path}: trained anew since it was opened; open it again, or repeat the command")
            changed = dict(files)
            if results:
                changed["results.json"] = json_bytes(_merged(self.results(), results))
            commit(self.path, manifest, changed)


def open_run(path: Path, *, accept_edits: bool = False) -> Run:
    """Open a run folder and verify it: the checksum of every file, the configuration and the proven bounds.

    Args:
        path: the folder.
        accept_edits: go on with a config.toml that was edited by hand.

    Raises:
        InputError: the folder is missing, half-written or of another version, its files were changed, or its network
            does not have the bounds that were proven.
    """
    if not path.is_dir():
        raise InputError(f"{path}: no such run folder; make one with `otnn train --out {path}`")
    with verified(path) as manifest:
        run = Run(path, _read_config(path, manifest, accept_edits), manifest)
    if not _same_bounds(manifest["bounds"], {"otnn": proven_bounds(run.network("otnn"))}):
        raise InputError(
            f"{path / MANIFEST}: the bounds of the manifest do not reproduce from the weights of the network; "
            "restore the folder from a copy, or train again"
        )
    return run


def _read_config(path: Path, manifest: Mapping[str, Any], accept_edits: bool) -> Config:
    """Read config.toml; where it was edited by hand, refuse it with the settings that changed, or accept it."""
    file = path / "config.toml"
    content = file.read_bytes()
    try:
        values = tomllib.loads(content.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{file}: damaged: {error}; restore it from a copy, or train again") from None
    if sha256(content) != manifest["files"]["config.toml"] and not accept_edits:
        old, new = _flat(manifest["config"]), _flat(values)
        changes = "; ".join(
            f"{name} {_was('is', new.get(name))}, {_was('was', old.get(name))}"
            for name in dict.fromkeys([*old, *new])
            if repr(old.get(name)) != repr(new.get(name))
        )
        raise InputError(
            f"{file}: edited by hand since the training: {changes or 'no setting changed, only layout or comments'}; "
            "undo that, or go on with --accept-edits"
        )
    try:
        config: Config = from_mapping(Config, values)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    return config


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings of nested tables by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _was(verb: str, value: Any) -> str:
    return f"{verb} not set" if value is None else f"{verb} {value!r}"


def proven_bounds(network: Classifier) -> dict[str, Any]:
    """The Lipschitz bounds of the body as a manifest keeps them: constant, and layers by name."""
    body = bound(network.body, network.input_shape)
    return {"constant": body.constant, "layers": dict(body.layers)}


def _same_bounds(told: Any, found: Any) -> bool:
    """Whether two nested tables of bounds have the same names and, up to rounding, the same numbers."""
    if isinstance(told, Mapping) and isinstance(found, Mapping):
        return set(told) == set(found) and all(_same_bounds(told[name], found[name]) for name in told)
    numbers = isinstance(told, float) and isinstance(found, float)
    return numbers and math.isclose(told, found, rel_tol=_SAME_BOUND)


@contextmanager
def new_run(path: Path, *, force: bool) -> Iterator[Path]:
    """Yield a folder to write into; it becomes `path` when the block ends well, and vanishes when it does not.

    Raises:
        InputError: `path` exists and `force` is not given, or it is not a run folder and so is never replaced.
    """
    path = path.absolute()
    if path.exists():
        if not force:
            raise InputError(f"{path}: exists already; choose another --out, or overwrite it with --force")
        if not path.is_dir() or (any(path.iterdir()) and not (path / MANIFEST).exists()):
            raise InputError(f"{path}: is not a run folder, so --force does not replace it; choose another --out")
    partial = path.with_name(f".{path.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        (partial / "networks").mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another --out") from None
    try:
        yield partial
        if path.exists():
            old = path.with_name(f".{path.name}.old-{uuid.uuid4().hex[:8]}")
            os.replace(path, old)
            os.replace(partial, path)
            shutil.rmtree(old)
        else:
            os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_run(
    folder: Path,
    config: Config,
    model: Mapping[str, Any],
    data: str,
    networks: Mapping[str, Classifier],
    results: Mapping[str, Any],
) -> None:
    """Write networks, configuration, results with the proven bound and, last, the manifest with all checksums.

    Raises:
        FloatingPointError: weights that are not finite.
    """
    for name, network in networks.items():
        state = {key: value.contiguous() for key, value in network.cpu().state_dict().items()}
        wrong = [key for key, value in state.items() if not torch.isfinite(value).all()]
        if wrong:
            raise FloatingPointError(f"{wrong[0]} of the network {name} is not finite; lower training.learning_rate")
        write_whole(folder / "networks" / f"{name}.safetensors", save(state))
    bounds = proven_bounds(networks["otnn"])
    text = to_toml(config)
    write_whole(folder / "config.toml", text.encode())
    told = _merged(results, {"otnn": {"lipschitz_bound": bounds["constant"]}})
    write_whole(folder / "results.json", json_bytes(told))
    files = ["config.toml", "metrics.jsonl", "results.json", *(f"networks/{name}.safetensors" for name in networks)]
    manifest = {
        "format": FORMAT,
        "otnn": __version__,
        "config": tomllib.loads(text),
        "model": dict(model),
        "data": data,
        "bounds": {"otnn": bounds},
        "files": {name: sha256((folder / name).read_bytes()) for name in files},
    }
    write_whole(folder / MANIFEST, sealed(manifest))


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Tables with changes written over them, table by table."""
    merged = dict(base)
    for name, value in changes.items():
        old = merged.get(name)
        merged[name] = {**old, **value} if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def empty_network(model: Mapping[str, Any], *, constrained: bool) -> Classifier:
    """Build the network that a manifest describes, the OTNN as exported; its weights are to be loaded."""
    network = build(
        model["architecture"],
        model["input_shape"],
        len(model["classes"]),
        widths=model["widths"],
        constrained=constrained,
        activation=model.get("activation", "maxmin"),
        head=model.get("head", "unit_rows"),
    )
    return plain_structure(network)
