"""The second stage: a certificate for every test image, as CSV, npz and a table of certified accuracy."""

import csv
import io
import time
from typing import Any

import torch

from otnn.certify import Certificate, certified_accuracy, certify
from otnn.data import Dataset
from otnn.files import write_npz, write_whole
from otnn.lipschitz import bound
from otnn.run.folder import Run
from otnn.run.progress import status
from otnn.run.train import dataset_of

# L2 radii in [0, 1] pixel units; 0.1412 is 36/255 rounded up.
RADII = (0.0, 0.1, 0.1412, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)


def certify_run(run: Run, *, dataset: Dataset | None = None, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Certify the test split: writes certificates.csv, certificates.npz and the OTNN's part of results.json.

    Args:
        run: an opened run.
        dataset: its data, if they are at hand already.
        device: where the network runs.

    Returns:
        The figures that were written: certified_accuracy, mean_radius (errors count 0), lipschitz_bound.
    """
    start = time.perf_counter()
    with status(f"certifying {run.path}"):
        dataset = dataset or dataset_of(run)
        model = run.network("otnn", device)
        body = bound(model.body)
        certificate = certify(model, dataset.test.images, body)
        labels = dataset.test.labels
        right = certificate.prediction == labels
        figures: dict[str, Any] = {
            "certified_accuracy": certified_accuracy(certificate, labels, RADII),
            "mean_radius": float(torch.where(right, certificate.radius, 0.0).mean()),
            "lipschitz_bound": body.constant,
        }
        columns = {
            "label": labels.numpy(),
            "prediction": certificate.prediction.numpy(),
            "logit_gap": certificate.logit_gap.numpy(),
            "radius": certificate.radius.numpy(),
        }
        write_npz(run.path / "certificates.npz", columns)
        write_whole(run.path / "certificates.csv", _csv(run.classes, labels, certificate).encode())
    run.update_results({"otnn": figures, "seconds": {"certify": round(time.perf_counter() - start, 3)}})
    return figures


def _csv(classes: tuple[str, ...], labels: torch.Tensor, certificate: Certificate) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["index", "label", "prediction", "right", "logit_gap", "radius"])
    rows = zip(
        labels.tolist(),
        certificate.prediction.tolist(),
        certificate.logit_gap.tolist(),
        certificate.radius.tolist(),
        strict=True,
    )
    for index, (label, prediction, gap, radius) in enumerate(rows):
        writer.writerow([index, classes[label], classes[prediction], int(label == prediction), repr(gap), repr(radius)])
    return stream.getvalue()
