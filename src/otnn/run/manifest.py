"""The manifest of a run folder: a SHA-256 of every file that otnn wrote, and one of itself.

A commit writes each new file under a pending name, then the new manifest, then renames the pending files. The manifest
decides: what it lists is finished at the next opening, anything else that is pending is dropped.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from otnn import __version__
from otnn.errors import InputError
from otnn.files import json_bytes, read_json, sha256, write_through

if sys.platform != "win32":
    import fcntl

FORMAT = 2
MANIFEST = "manifest.json"
OTNN, TWIN = "networks/otnn.safetensors", "networks/unconstrained.safetensors"
ADVERSARIAL = "networks/adversarial.safetensors"
# What every training leaves; nothing but training makes it again.
TRAINED = frozenset({"config.toml", "metrics.jsonl", "results.json", OTNN})
# What a command makes again.
DERIVED = {
    "certificates.csv": "certify",
    "certificates.npz": "certify",
    "explanations.npz": "explain",
    "audit.json": "audit",
    "audit.npz": "audit",
    "audit.png": "audit",
    "compare.json": "compare",
    "compare.csv": "compare",
    "compare.png": "compare",
    "compare-pareto.png": "compare",
    "counterfactuals.json": "counterfactual",
    "counterfactuals.png": "counterfactual",
    "judge.safetensors": "counterfactual",
    "attacks.json": "attack",
    "attacks.png": "attack",
    "report.html": "report",
    "otnn.onnx": "export",
}


def sealed(entries: Mapping[str, Any]) -> bytes:
    """The text of a manifest: its entries and, last, `sha256` of the text that they have without it.

    Example:
        >>> print(sealed({"format": 2}).decode())
        {
          "format": 2,
          "sha256": "d7cc2ebf7f17aa9b5536e14fc0066e2e9d34e277910a2a8468c6d03fcbdc7ccb"
        }
    """
    unsealed = {name: value for name, value in entries.items() if name != "sha256"}
    return json_bytes({**unsealed, "sha256": sha256(json_bytes(unsealed))})


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of a run folder, and check its own digest and its layout.

    Raises:
        InputError: it is missing, of another format, damaged, or edited.
    """
    file = path / MANIFEST
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
    try:
        whole = sealed(manifest) == file.read_bytes()
    except ValueError:
        whole = False  # it holds NaN or infinity, which no manifest does
    if not whole:
        raise InputError(
            f"{file}: its SHA-256 differs from the one in it: damaged or edited; restore it from a copy, or train again"
        )
    if not _is_complete(manifest):
        raise InputError(
            f"{file}: damaged: what it says of the network, its files, its bounds or its data is missing; train again"
        )
    return manifest


def _is_complete(manifest: Mapping[str, Any]) -> bool:
    model, files = manifest.get("model"), manifest.get("files")
    return (
        isinstance(model, dict)
        and {"architecture", "classes", "input_shape", "widths"} <= set(model)
        and isinstance(files, dict)
        and set(files) >= TRAINED
        and set(files) <= TRAINED | {TWIN, ADVERSARIAL} | set(DERIVED)
        and isinstance(manifest.get("config"), dict)
        and {"data", "bounds"} <= set(manifest)
    )


@contextmanager
def verified(path: Path) -> Iterator[dict[str, Any]]:
    """Hold a run folder for this process, finish what a crash cut short, verify the files, and yield the manifest.

    `config.toml` is left to the caller, who can say what changed in it.

    Raises:
        InputError: the manifest or a file is damaged, edited or missing.
    """
    with _held(path):
        manifest = read_manifest(path)
        _settle(path, manifest)
        _verify(path, manifest["files"])
        yield manifest


def commit(path: Path, manifest: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """Put new files into a run folder that is held, and list them in its manifest: all or none, whatever happens.

    Derived files that have gone are listed no longer.
    """
    kept = {name: checksum for name, checksum in manifest["files"].items() if (path / name).exists()}
    listed = {**kept, **{name: sha256(content) for name, content in files.items()}}
    try:
        for name, content in files.items():
            write_through(_pending(path, name), content)
        write_through(_pending(path, MANIFEST), sealed({**manifest, "files": listed}))
        os.replace(_pending(path, MANIFEST), path / MANIFEST)
    finally:
        # by the manifest on the disk: an interruption may come between its renaming and the next line
        _settle(path, read_manifest(path))


def _settle(path: Path, manifest: Mapping[str, Any]) -> None:
    """Rename the pending files that the manifest lists into place, and remove the others."""
    for name in ("results.json", *DERIVED, MANIFEST):
        pending = _pending(path, name)
        if not pending.exists():
            continue
        if sha256(pending.read_bytes()) == manifest["files"].get(name):
            os.replace(pending, path / name)
        else:
            with suppress(OSError):  # a medium that cannot be written keeps it, and is no worse for it
                pending.unlink()


def _pending(path: Path, name: str) -> Path:
    return path / f".{name}.pending"


def _verify(path: Path, files: Mapping[str, Any]) -> None:
    for name, checksum in files.items():
        file = path / name
        if not file.is_file():
            if name in DERIVED:
                continue  # the user removed it, so that it is made again
            raise InputError(f"{path}: half-written: {name} is missing; restore it from a copy, or train again")
        if name == "config.toml" or sha256(file.read_bytes()) == checksum:
            continue
        mend = "restore it from a copy, or train again"
        if name in DERIVED:
            mend = f"delete it, and make it again with `otnn {DERIVED[name]} {path}`"
        raise InputError(f"{file}: its SHA-256 differs from the manifest's: damaged or edited; {mend}")
    for name, command in DERIVED.items():
        if name not in files and (path / name).exists():
            raise InputError(
                f"{path / name}: is not in the manifest, so it is not of this run; "
                f"delete it, and make it again with `otnn {command} {path}`"
            )


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Keep other processes and threads from the folder, where the system has such locks; a crash frees them."""
    if sys.platform == "win32":
        yield
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems lock no folders
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
