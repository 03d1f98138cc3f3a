"""A run folder: made whole or not at all, checked when it is opened.

    config.toml  manifest.json  metrics.jsonl  results.json  certificates.csv  certificates.npz  explanations.npz
    report.html  networks/otnn.safetensors  networks/unconstrained.safetensors

`manifest.json` is written last: a folder without it is half-written.
"""

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
from torch import nn

from otnn import __version__
from otnn.errors import InputError
from otnn.files import read_json, sha256, write_json, write_whole
from otnn.models import Classifier, build
from otnn.run.config import Config, from_mapping, to_toml

FORMAT = 1
NETWORKS = ("otnn", "unconstrained")


@dataclass(frozen=True)
class Run:
    """An opened run folder.

    Attributes:
        path: the folder.
        config: its configuration.
        manifest: format, model description, checksums and bounds.
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
        return "networks/unconstrained.safetensors" in self.manifest["files"]

    def network(self, name: str, device: str | torch.device = "cpu") -> Classifier:
        """Load a network in `eval()` mode, after its checksum was verified.

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

    def update_results(self, changes: Mapping[str, Any]) -> None:
        """Merge changes into results.json, table by table."""
        results = self.results()
        for name, value in changes.items():
            if isinstance(value, Mapping) and isinstance(results.get(name), dict):
                results[name].update(value)
            else:
                results[name] = value
        write_json(self.path / "results.json", results)


def open_run(path: Path) -> Run:
    """Open a run folder and verify what it says of itself.

    Raises:
        InputError: the folder is missing, half-written, of another version, or its files were changed.
    """
    if not path.is_dir():
        raise InputError(f"{path}: no such run folder; make one with `otnn train --out {path}`")
    file = path / "manifest.json"
    if not file.exists():
        raise InputError(
            f"{path}: not a whole run folder (manifest.json is missing: the training was cut short, or this is another "
            f"folder); train again with `otnn train --out {path}`"
        )
    manifest = read_json(file)
    if manifest.get("format") != FORMAT:
        raise InputError(
            f"{path}: written in run format {manifest.get('format')} by otnn {manifest.get('otnn')}, this is otnn "
            f"{__version__} with format {FORMAT}; use that version or train again"
        )
    model, checksums = manifest.get("model"), manifest.get("files")
    described = isinstance(model, dict) and {"architecture", "classes", "input_shape", "widths"} <= set(model)
    listed = isinstance(checksums, dict) and {"config.toml", "networks/otnn.safetensors"} <= set(checksums)
    if not described or not listed or not isinstance(checksums, dict) or "data" not in manifest:
        raise InputError(f"{file}: damaged: what it says of the network, its files or its data is missing; train again")
    for name, checksum in checksums.items():
        if not (path / name).is_file():
            raise InputError(f"{path}: half-written: {name} is missing; train again")
        if sha256(path / name) != checksum:
            raise InputError(
                f"{path / name}: its SHA-256 differs from the manifest's: the file was changed; train again"
            )
    try:
        config = from_mapping(Config, tomllib.loads((path / "config.toml").read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path / 'config.toml'}: cannot be read: {error}; train again") from None
    return Run(path, config, manifest)


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
        if not path.is_dir() or (any(path.iterdir()) and not (path / "manifest.json").exists()):
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
    networks: Mapping[str, nn.Module],
    bounds: Mapping[str, Any],
    results: Mapping[str, Any],
) -> None:
    """Write networks, configuration, results and, last, the manifest with its checksums."""
    for name, network in networks.items():
        state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
        write_whole(folder / "networks" / f"{name}.safetensors", save(state))
    (folder / "config.toml").write_text(to_toml(config), encoding="utf-8")
    write_json(folder / "results.json", results)
    files = ["config.toml", *(f"networks/{name}.safetensors" for name in networks)]
    manifest = {
        "format": FORMAT,
        "otnn": __version__,
        "model": dict(model),
        "data": data,
        "bounds": dict(bounds),
        "files": {name: sha256(folder / name) for name in files},
    }
    write_json(folder / "manifest.json", manifest)


def empty_network(model: Mapping[str, Any], *, constrained: bool) -> Classifier:
    """Build the network that a manifest describes; its weights are to be loaded."""
    return build(
        model["architecture"],
        model["input_shape"],
        len(model["classes"]),
        widths=model["widths"],
        constrained=constrained,
    )
