"""The second stage: a certificate for every test image, as CSV, npz and a table of certified accuracy."""

import csv
import io
import time
from typing import Any

import numpy as np
import torch

from otnn.certify import Certificate, certified_accuracy, certify
from otnn.data import Dataset
from otnn.files import npz_bytes
from otnn.run.folder import Run
from otnn.run.progress import status
from otnn.run.train import dataset_of

# L2 radii in [0, 1] pixel units; 0.1412 is 36/255 rounded up.
RADII = (0.0, 0.1, 0.1412, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)


def certify_run(
    run: Run,
    *,
    arithmetic: str = "real",
    dataset: Dataset | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """Certify the test split: writes certificates.csv, certificates.npz and the OTNN's part of results.json.

    Args:
        run: an opened run.
        arithmetic: what the radii hold for, see `otnn.certify.certify`.
        dataset: its data, if they are at hand already.
        device: where the network runs.

    Returns:
        The figures that were written: certified_accuracy, mean_radius (errors count 0), arithmetic.
    """
    start = time.perf_counter()
    with status(f"certifying {run.path}"):
        dataset = dataset or dataset_of(run)
        model = run.network("otnn", device)
        certificate = certify(model, dataset.test.images, arithmetic=arithmetic)
        labels = dataset.test.labels
        right = certificate.prediction == labels
        figures: dict[str, Any] = {
            "certified_accuracy": certified_accuracy(certificate, labels, RADII),
            "mean_radius": float(torch.where(right, certificate.radius, 0.0).mean()),
            "arithmetic": certificate.arithmetic,
        }
        columns = {
            "label": labels.numpy(),
            "prediction": certificate.prediction.numpy(),
            "logit_gap": certificate.logit_gap.numpy(),
            "radius": certificate.radius.numpy(),
            "reason": np.array(certificate.reason),
        }
        run.write(
            {
                "certificates.npz": npz_bytes(columns),
                "certificates.csv": _csv(run.classes, labels, certificate).encode(),
            },
            {"otnn": figures, "seconds": {"certify": round(time.perf_counter() - start, 3)}},
        )
    return figures


def _csv(classes: tuple[str, ...], labels: torch.Tensor, certificate: Certificate) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["index", "label", "prediction", "right", "logit_gap", "radius", "reason"])
    rows = zip(
        labels.tolist(),
        certificate.prediction.tolist(),
        certificate.logit_gap.tolist(),
        certificate.radius.tolist(),
        certificate.reason,
        strict=True,
    )
    for index, (label, prediction, gap, radius, reason) in enumerate(rows):
        named = classes[prediction] if prediction >= 0 else ""
        writer.writerow([index, classes[label], named, int(label == prediction), repr(gap), repr(radius), reason])
    return stream.getvalue()
