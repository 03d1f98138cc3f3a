"""ONNX: a classifier in one file that runs without torch, with the numbers that certify it.

The metadata of the file, all of them text:

    otnn               version that wrote the file
    input              "pixels in [0, 1], shape (batch, c, h, w)"
    lipschitz_bound    proven bound of the body in L2
    pair_distances     JSON matrix: the proven constants of the score differences; with a multi-label head
    label_distances    JSON list: those of the scores
    radius             how scores and distances give the prediction and its radius
    classes            JSON list of names, where they are known

The radius is that of the stored weights in exact arithmetic, up to the rounding of the scores that it is made from.
"""

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from otnn import __version__
from otnn.errors import InputError
from otnn.files import write_whole
from otnn.lipschitz import bound, export
from otnn.models import Classifier
from otnn.potential import label_distances, pair_distances

# Circular padding needs 19; 20 is what torch writes by default and what runtimes read since 2024.
OPSET = 20
# Batches on which the file is compared with torch, and how far scores may differ, relative to the size of the input.
_BATCHES = (1, 2, 7)
_TOLERANCE = 1e-5


def write_onnx(model: Classifier, path: Path, *, classes: Sequence[str] = ()) -> None:
    """Write `otnn.lipschitz.export(model)` as one ONNX file: input "images", output "scores", batches of any size.

    The weights are stored bit by bit. Where onnxruntime is installed, a file whose scores differ from those of the
    model is not written.

    Args:
        model: a classifier of float32 weights.
        path: the file; it is replaced where it exists.
        classes: names of the classes, or of the labels of a multi-label head.

    Raises:
        InputError: weights that are not float32 or not finite; a layer without a known bound or without a form in ONNX;
            a wrong number of names; a path that cannot be written; onnx or onnxscript are not installed.

    Example:
        >>> import tempfile, onnxruntime
        >>> from otnn.certify import certify
        >>> from otnn.models import build
        >>> model, images = build("dense", (1, 8, 8), 2, widths=(16,)).eval(), torch.rand(5, 1, 8, 8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_onnx(model, Path(folder) / "model.onnx")
        ...     session = onnxruntime.InferenceSession(Path(folder) / "model.onnx")
        >>> (scores,) = session.run(["scores"], {"images": images.numpy()})
        >>> metadata = session.get_modelmeta().custom_metadata_map
        >>> metadata["radius"]
        '|score| / pair_distances[0][1]; class 1 where the score is positive'
        >>> radius = abs(scores[:, 0]) / json.loads(metadata["pair_distances"])[0][1]
        >>> bool(abs(radius - certify(model, images).radius.numpy()).max() < 1e-5)
        True
    """
    if not isinstance(model, Classifier):
        raise InputError(f"expected an otnn Classifier, got {type(model).__name__}")
    path = Path(path)
    labels = model.head.out_features if model.multilabel else model.classes
    if classes and len(classes) != labels:
        raise InputError(f"classes: expected {labels} names, got {len(classes)}")
    _check_weights(model)
    plain = export(model).cpu()
    body = bound(plain.body, plain.input_shape)
    distances = (label_distances if plain.multilabel else pair_distances)(plain, body)
    metadata = {
        "otnn": __version__,
        "input": f"pixels in [0, 1], shape (batch, {', '.join(map(str, plain.input_shape))})",
        "lipschitz_bound": repr(body.constant),
        "label_distances" if plain.multilabel else "pair_distances": json.dumps(distances.tolist()),
        "radius": _radius_text(plain),
        **({"classes": json.dumps(list(classes))} if classes else {}),
    }
    content = _onnx_bytes(plain, metadata)
    _check_scores(content, plain, float(distances.max()))
    try:
        write_whole(path, content)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another file") from None


def _check_weights(model: Classifier) -> None:
    for name, value in model.state_dict().items():
        if value.is_floating_point() and value.dtype != torch.float32:
            raise InputError(f"{name}: expected float32 weights, got {value.dtype}; convert them with model.float()")
        if not bool(torch.isfinite(value).all()):
            raise InputError(f"{name} holds NaN or infinite values; train again with a lower learning rate")


def _radius_text(model: Classifier) -> str:
    if model.multilabel:
        return "|scores[t]| / label_distances[t]; label t is set where scores[t] is positive"
    if model.head.out_features == 1:
        return "|score| / pair_distances[0][1]; class 1 where the score is positive"
    return "minimum over j != t of (scores[t] - scores[j]) / pair_distances[t][j]; class t of the largest score"


def _onnx_bytes(model: Classifier, metadata: dict[str, str]) -> bytes:
    """The content of the file. `optimize=True` may fuse layers and so change their weights: only constants are folded.

    Raises:
        InputError: a layer without a form in ONNX; onnx or onnxscript are not installed.
    """
    try:
        import onnx_ir.passes.common
        import onnxscript.optimizer
    except ImportError:
        raise InputError('ONNX files need the packages onnx and onnxscript: pip install "otnn[onnx]"') from None
    with _quiet():
        try:
            program = torch.onnx.export(
                model,
                (torch.zeros(2, *model.input_shape),),
                input_names=["images"],
                output_names=["scores"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=OPSET,
                optimize=False,
                verbose=False,
                dynamo=True,
            )
        except torch.onnx.OnnxExporterError as error:
            cause = str(error.__cause__ or error).strip().splitlines()[0]
            raise InputError(f"torch cannot write this network as ONNX: {cause}; expected other layers") from None
        graph: Any = program.model  # type: ignore[union-attr]
        onnxscript.optimizer.fold_constants(graph)
        onnxscript.optimizer.remove_unused_nodes(graph)
        # torch notes at every node which lines of which files on this machine it comes from
        onnx_ir.passes.common.ClearMetadataAndDocStringPass()(graph)
        graph.metadata_props.update(metadata)
        content: bytes = program.model_proto.SerializeToString(deterministic=True)  # type: ignore[union-attr]
    return content


@torch.no_grad()
def _check_scores(content: bytes, model: Classifier, constant: float) -> None:
    """Compare a file in onnxruntime, where that is installed, with its model in torch; `constant` scales their scores.

    Raises:
        InputError: they differ.
    """
    try:
        import onnxruntime
    except ImportError:
        return
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    for size in _BATCHES:
        images = torch.rand(size, *model.input_shape, generator=generator)
        expected = model(images)
        found: Tensor = torch.from_numpy(session.run(["scores"], {"images": images.numpy()})[0])
        allowed = _TOLERANCE * (constant * images.flatten(1).norm(dim=1) + expected.abs().amax(dim=1))
        difference = (found - expected).abs().amax(dim=1)
        if not bool((difference <= allowed).all()):
            raise InputError(
                f"onnxruntime computes scores that differ from torch's by {float(difference.max()):.3g}, so no file is "
                "written; upgrade torch, onnxscript and onnxruntime"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what no user can mend: the exporter warns of deprecations within torch and of missing torchvision."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
