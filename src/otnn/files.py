"""Files that are written whole or not at all, and read with a clear word where they are damaged."""

import hashlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from otnn.errors import InputError


def write_whole(file: Path, content: bytes) -> None:
    """Write a file under a temporary name and rename it: it is there whole or not at all."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write JSON whole; numbers that are not finite are refused."""
    write_whole(file, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def write_npz(file: Path, arrays: Mapping[str, Any]) -> None:
    """Write a compressed npz archive whole."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_whole(file, buffer.getvalue())


def sha256(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: the file is missing, damaged, or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{file}: cannot be read: {error}; make the run again with `otnn train`") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected a JSON object; make the run again with `otnn train`")
    return content
