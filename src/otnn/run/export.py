"""The network of a run as an ONNX file, for use without torch."""

from pathlib import Path

from otnn.errors import InputError
from otnn.onnx import write_onnx
from otnn.run.folder import Run
from otnn.run.progress import status


def export_run(run: Run, out: Path, *, force: bool = False) -> Path:
    """Write the OTNN of a run as an ONNX file with its proven bounds and the names of its classes.

    Args:
        run: an opened run.
        out: the file; its folder is made where it is missing.
        force: overwrite a file that exists.

    Returns:
        The file.

    Raises:
        InputError: the file exists or cannot be written, or `otnn.onnx.write_onnx` refuses the network.
    """
    if out.is_dir():
        raise InputError(f"{out}: is a folder; expected a file name, as --out {out / 'otnn.onnx'}")
    if out.exists() and not force:
        raise InputError(f"{out}: exists already; choose another --out, or overwrite it with --force")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out.parent}: cannot be made a folder ({error.strerror}); choose another --out") from None
    with status(f"exporting {run.path}"):
        write_onnx(run.network("otnn"), out, classes=run.classes)
    return out
