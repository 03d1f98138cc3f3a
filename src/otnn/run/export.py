"""The network of a run as an ONNX file, for use without torch."""

from pathlib import Path
from tempfile import TemporaryDirectory

from otnn.errors import InputError
from otnn.onnx import write_onnx
from otnn.run.folder import Run
from otnn.run.progress import status

ONNX = "otnn.onnx"


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
    inside = out.absolute().parent == run.path.absolute()
    if inside and out.name != ONNX:
        raise InputError(f"{out}: in the run folder the file is {ONNX}; choose that name, or another folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out.parent}: cannot be made a folder ({error.strerror}); choose another --out") from None
    with status(f"exporting {run.path}"):
        if not inside:
            write_onnx(run.network("otnn"), out, classes=run.classes)
            return out
        with TemporaryDirectory() as folder:  # the run keeps the checksums of its own files
            write_onnx(run.network("otnn"), Path(folder) / ONNX, classes=run.classes)
            run.write({ONNX: (Path(folder) / ONNX).read_bytes()}, {})
    return out
