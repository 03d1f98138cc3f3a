"""The third stage: saliency, counterfactual and guarantees of a gallery of test images, or of the user's images."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from otnn.batches import spread
from otnn.certify import certify
from otnn.data import Dataset, Split, load_images
from otnn.errors import InputError
from otnn.explain import Counterfactual, counterfactual, saliency
from otnn.files import npz_bytes, write_whole
from otnn.lipschitz import LipschitzBound, bound
from otnn.models import Classifier, predict
from otnn.report.load import NOT_PER_IMAGE
from otnn.report.pictures import class_name, explanation_picture
from otnn.run.fit import scores_of
from otnn.run.folder import Run
from otnn.run.guarantees import GRADIENTS, guarantee_arrays, image_guarantees, over_samples, shares
from otnn.run.progress import name_skipped, status
from otnn.run.train import dataset_of

GALLERY = 12
STEPS = 21
_BUDGET = 2**30  # bytes


def explain_gallery(
    run: Run,
    *,
    dataset: Dataset | None = None,
    size: int = GALLERY,
    samples: int = 0,
    gradients: int = GRADIENTS,
    box: bool = False,
    iterations: int = 1,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """Explain a fixed choice of test images: writes explanations.npz, which the report shows.

    Args:
        run: an opened run.
        dataset: its data, if they are at hand already.
        size: the number of images.
        samples: random test images over which the shares of the guarantees are counted; 0 counts them over the gallery.
        gradients: of the certified SmoothGrad, for each image.
        box: keep the counterfactual in [0, 1].
        iterations: gradients on its way to the boundary.
        device: where the networks run.

    Returns:
        The arrays of explanations.npz.

    Raises:
        InputError: fewer than one iteration.
    """
    _check(iterations)
    start = time.perf_counter()
    with status(f"explaining {run.path}"):
        dataset = dataset or dataset_of(run)
        model = run.network("otnn", device)
        index = choose_gallery(model, dataset.test, size)
        settings: dict[str, Any] = {"gradients": gradients, "box": box, "iterations": iterations, "device": device}
        arrays = explain_images(run, dataset.test.images[index], **settings)
        if samples:
            body = bound(model.double().body, model.input_shape)
            arrays |= over_samples(model, body, dataset.test, samples, gradients=gradients, device=device)
        arrays["label"] = dataset.test.labels[index].numpy()
        arrays["index"] = index.numpy()
        seconds = round(time.perf_counter() - start, 3)
        run.write({"explanations.npz": npz_bytes(arrays)}, {"seconds": {"explain": seconds}})
    return arrays


def explain_files(
    run: Run,
    files: Sequence[Path],
    *,
    target: str | None = None,
    out: Path | None = None,
    force: bool = False,
    skip_broken: bool = False,
    gradients: int = GRADIENTS,
    box: bool = False,
    iterations: int = 1,
    device: str | torch.device = "cpu",
) -> list[dict[str, Any]]:
    """Explain image files: NAME.explained.png and NAME.explained.npz of each, in the run's `explanations` or in `out`.

    Args:
        run: an opened run.
        files: images; they are cropped and resized as the training images were.
        target: the class that the counterfactuals go to, by name or index; the nearest rival by default.
        out: another folder for the pictures.
        force: overwrite pictures that exist.
        skip_broken: leave out images that cannot be read, and name them on stderr.
        gradients: of the certified SmoothGrad, for each image.
        box: keep the counterfactual in [0, 1].
        iterations: gradients on its way to the boundary.
        device: where the networks run.

    Returns:
        Per image: file, prediction, target, radius, tightness, flipped, status, the PNG written, and by name the
        guarantees, see `otnn.run.guarantees.image_guarantees`.

    Raises:
        InputError: an unknown class, an image that cannot be read, pictures that exist, a folder that cannot be made,
            fewer than one iteration.
    """
    _check(iterations)
    chosen = None if target is None else class_index(run.classes, target)
    shape = tuple(run.manifest["model"]["input_shape"])
    images, names = load_images(files, (shape[0], shape[1], shape[2]), skip_broken=skip_broken)
    name_skipped([str(file) for file in files if str(file) not in names])
    folder = out or run.path / "explanations"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made a folder ({error.strerror}); choose another --out") from None
    pictures = [folder / f"{stem}.explained.png" for stem in _stems(names)]
    existing = [str(path) for path in pictures if path.exists()]
    if existing and not force:
        raise InputError(f"{existing[0]}: exists already; choose another --out, or overwrite it with --force")
    targets = None if chosen is None else torch.full((len(images),), chosen)
    with status(f"explaining {len(images)} image{'s' * (len(images) != 1)}"):
        settings: dict[str, Any] = {"gradients": gradients, "box": box, "iterations": iterations, "device": device}
        arrays = explain_images(run, images, targets, **settings)
        rows = []
        for k, picture in enumerate(pictures):
            one = {key: value if key in NOT_PER_IMAGE else value[k : k + 1] for key, value in arrays.items()}
            write_whole(picture.with_suffix(".npz"), npz_bytes(one))
            write_whole(picture, explanation_picture(one, run.classes))
            rows.append(
                {
                    "file": names[k],
                    "prediction": class_name(run.classes, int(one["prediction"][0])),
                    "target": class_name(run.classes, int(one["target"][0])),
                    "radius": float(one["radius"][0]),
                    "tightness": float(one["tightness"][0]) if one["status"][0] == "ok" else None,
                    "flipped": bool(one["flipped"][0]),
                    "status": str(one["status"][0]),
                    "picture": str(picture),
                    "guarantees": image_guarantees(arrays, k),
                }
            )
    return rows


def explain_images(
    run: Run,
    images: Tensor,
    target: Tensor | None = None,
    *,
    gradients: int = GRADIENTS,
    box: bool = False,
    iterations: int = 1,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """Everything that is shown of images, as arrays of the layout of explanations.npz.

    The networks run in float64, so that boundaries are found to about 1e-9, in chunks within a memory budget. An image
    that is not finite or leaves [0, 1] has the radius 0, no maps, and says so in its status.

    Args:
        run: an opened run.
        images: (batch, channels, height, width) in [0, 1].
        target: (batch,) the class that each counterfactual goes to; the nearest rival by default.
        gradients: of the certified SmoothGrad, for each image.
        box: keep the counterfactual in [0, 1].
        iterations: gradients on its way to the boundary.
        device: where the networks run.
    """
    model = run.network("otnn", device).double()
    twin = run.network("unconstrained", device).double() if run.has_twin else None
    body = bound(model.body, model.input_shape)
    # a path of STEPS images at once, and the features of the widest layer in float64
    channels = max(64, *run.manifest["model"]["widths"])
    size = max(1, _BUDGET // (STEPS * images[0].numel() * channels * 8))
    targets = [None] * len(images.split(size)) if target is None else list(target.to(device).split(size))
    chunks = [
        _explain_chunk(model, twin, body, chunk.double().to(device), goal, gradients, box, iterations)
        for chunk, goal in zip(images.split(size), targets, strict=True)
    ]
    arrays = {
        name: value if name in NOT_PER_IMAGE else np.concatenate([chunk[name] for chunk in chunks])
        for name, value in chunks[0].items()
    }
    return arrays | shares(arrays) | {"box": np.array(box), "iterations": np.array(iterations)}


def _check(iterations: int) -> None:
    if iterations < 1:
        raise InputError(f"iterations: expected at least 1 gradient on the way to the boundary, got {iterations}")


def _explain_chunk(
    model: Classifier,
    twin: Classifier | None,
    body: LipschitzBound,
    images: Tensor,
    target: Tensor | None,
    gradients: int,
    box: bool,
    iterations: int,
) -> dict[str, Any]:
    way: Counterfactual = counterfactual(model, images, body, target, steps=STEPS, box=box, iterations=iterations)
    # the guarantees are of the straight line against the gradient, whose boundary is looked for where this is another
    boundary = None if box or iterations > 1 else way.boundary
    # of the same pair of classes; -1 where a score is not finite and there is none
    proven = guarantee_arrays(model, images, body, way.target, boundary, gradients=gradients)
    readable = ((images >= 0) & (images <= 1)).flatten(1).all(dim=1)
    safe = torch.where(spread(readable, images), images, 0.0)
    maps = {"saliency": saliency(model, safe, way.prediction.clamp(min=0))}
    arrays = {
        "images": images.float(),
        "prediction": way.prediction,
        "target": way.target,
        "radius": torch.where(readable, certify(model, safe).radius, 0.0),  # of the prediction, whatever the target
        "distances": way.distances,
        "path": way.path.float(),
        "potential": way.potential,
        "scores": way.scores,
        "one_step": way.one_step.float(),
        "boundary": way.boundary.float(),
        "boundary_distance": way.boundary_distance,
        "tightness": way.tightness,
        "flipped": way.flipped,
    }
    if twin is not None:
        with torch.no_grad():
            seen = predict(twin(safe))
        maps["unconstrained_saliency"] = saliency(twin, safe, seen)
        arrays["unconstrained_prediction"] = seen.masked_fill(~readable, -1)
    arrays |= {name: torch.where(spread(readable, each), each, torch.nan).float() for name, each in maps.items()}
    told = {name: value.cpu().numpy() for name, value in arrays.items()}
    return {**told, "status": np.array(way.status), **proven}


def choose_gallery(model: Classifier, test: Split, size: int) -> Tensor:
    """Indices of test images, sorted by class: round the classes, up to a sixth of them errors of the network."""
    # test splits may be sorted by class: look at images spread over all of it
    sample = torch.linspace(0, len(test) - 1, min(len(test), 2048)).round().long()
    labels = test.labels[sample]
    wrong = predict(scores_of(model, test.images[sample])) != labels

    def round_the_classes(chosen: Tensor) -> list[int]:
        queues = [sample[chosen & (labels == k)].tolist() for k in range(model.classes)]
        return [queue[turn] for turn in range(max(map(len, queues))) for queue in queues if turn < len(queue)]

    errors = round_the_classes(wrong)[: size // 6]
    picked = [*errors, *round_the_classes(~wrong)][:size]
    return torch.tensor(sorted(picked, key=lambda i: (int(test.labels[i]), i)))


def class_index(classes: tuple[str, ...], name: str, option: str = "--target") -> int:
    """The index of a class given by name or number, by an option of the command line.

    Raises:
        InputError: no such class.
    """
    if name in classes:
        return classes.index(name)
    if name.isascii() and name.isdecimal() and int(name) < len(classes):
        return int(name)
    raise InputError(f"{option} {name}: no such class; expected one of {', '.join(classes)}")


def _stems(names: Sequence[str]) -> list[str]:
    """File names without ending, made different where they repeat."""
    stems: list[str] = []
    taken: set[str] = set()  # folded: some file systems ignore case
    for name in names:
        stem = base = Path(name).stem
        number = 2
        while stem.casefold() in taken:
            stem, number = f"{base}-{number}", number + 1
        taken.add(stem.casefold())
        stems.append(stem)
    return stems
