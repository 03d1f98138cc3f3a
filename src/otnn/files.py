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


def write_through(file: Path, content: bytes) -> None:
    """Write a file and wait until the disk has it, so that a later rename cannot overtake its content."""
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """The text of a JSON file; numbers that are not finite raise ValueError.

    Example:
        >>> print(json_bytes({"radius": 0.5}).decode())
        {
          "radius": 0.5
        }
    """
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def npz_bytes(arrays: Mapping[str, Any]) -> bytes:
    """A compressed npz archive of named arrays."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def sha256(content: bytes) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def read_json(file: Path, mend: str = "make the run again with `otnn train`") -> dict[str, Any]:
    """Read a JSON object.

    Args:
        file: that holds it.
        mend: what to do where it cannot be read.

    Raises:
        InputError: the file is missing, damaged, or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read: {error}; {mend}") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected a JSON object; {mend}")
    return content
