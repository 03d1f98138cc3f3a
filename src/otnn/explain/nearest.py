"""The real images that lie nearest to given ones, in the L2 distance of the pixels."""

from dataclasses import dataclass

import torch
from torch import Tensor

from otnn.checks import check_images, check_labels
from otnn.errors import InputError
from otnn.memory import MEMORY_BUDGET

# So many more candidates than asked for are measured again: the matrix product orders near ones up to rounding
_SPARE = 8


@dataclass(frozen=True)
class Neighbours:
    """The nearest images of each query, nearest first.

    Attributes:
        index: (queries, k) places in the images; -1 where there are fewer of the class, the query is not finite, or its
            target is -1.
        distance: (queries, k) L2 distances; NaN likewise.
    """

    index: Tensor
    distance: Tensor


@torch.no_grad()
def nearest(
    images: Tensor,
    queries: Tensor,
    labels: Tensor | None = None,
    target: Tensor | None = None,
    *,
    k: int = 1,
    memory_budget: float = MEMORY_BUDGET,
) -> Neighbours:
    """Find the k images that are nearest to each query, of all classes or of one that each query names.

    Candidates come from one matrix product per chunk of queries, and their distances from the differences.

    Args:
        images: (m, ...) the real images, such as those of the training.
        queries: (q, ...) what is looked for, such as the images along a path; those that are not finite find nothing.
        labels: (m,) the classes of the images; given together with `target`.
        target: (q,) the class that each query looks among; -1 where none is known, as of a `Counterfactual` whose input
            cannot be read, and then nothing is found.
        k: how many.
        memory_budget: bytes of one chunk, beside images and queries.

    Raises:
        InputError: images of different shapes, labels without targets or the other way, or fewer than one neighbour.

    Example:
        >>> images = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0]])
        >>> nearest(images, torch.zeros(1, 2), k=2)
        Neighbours(index=tensor([[0, 2]]), distance=tensor([[0., 1.]]))
        >>> nearest(images, torch.zeros(1, 2), torch.tensor([0, 1, 0]), torch.tensor([1])).distance
        tensor([[5.]])
    """
    check_images(images, what="images")
    usable = torch.isfinite(queries).flatten(1).all(dim=1)
    if queries.shape[1:] != images.shape[1:] or queries.dtype != images.dtype:
        raise InputError(
            f"queries: expected the shape and dtype of the images, {tuple(images.shape[1:])} {images.dtype}, "
            f"got {tuple(queries.shape[1:])} {queries.dtype}"
        )
    if k < 1:
        raise InputError(f"k: expected at least 1 neighbour, got {k}")
    if (labels is None) != (target is None):
        raise InputError("labels and target: expected both, the classes of the images and of the queries, or neither")
    if labels is not None and target is not None:
        classes = 1 + int(labels.max())
        check_labels(labels, len(images), classes)
        # a class without images is no mistake: it finds nothing
        most = max(classes, 1 + int(target.max())) if len(target) else classes
        check_labels(target.masked_fill(target == -1, 0), len(queries), most, what="target")
        usable &= (target >= 0).to(usable.device)
        labels, target = labels.to(images.device), target.to(images.device)
    centre = images.flatten(1).mean(dim=0)
    rows = images.flatten(1) - centre
    squares = rows.square().sum(dim=1)
    wanted = min(k, len(images))
    some = min(wanted + _SPARE, len(images))
    # a row of the matrix of distances, its mask, and the differences to the candidates
    each = len(images) * (2 * rows.element_size() + 1) + 2 * some * rows.shape[1] * rows.element_size()
    index = torch.full((len(queries), k), -1, device=images.device)
    distance = torch.full((len(queries), k), torch.nan, dtype=images.dtype, device=images.device)
    for chosen in usable.nonzero().squeeze(1).split(max(1, int(memory_budget // each))):
        points = queries[chosen].flatten(1).to(images.device) - centre
        chosen = chosen.to(images.device)
        table = torch.addmm(squares, points, rows.mT, alpha=-2)  # less ||query||^2, the same for all
        if labels is not None and target is not None:
            table.masked_fill_(labels != target[chosen].unsqueeze(1), torch.inf)
        far, place = table.topk(some, dim=1, largest=False)
        exact = torch.linalg.vector_norm(rows[place] - points.unsqueeze(1), dim=2)
        exact, order = exact.masked_fill(far.isinf(), torch.inf).sort(dim=1, stable=True)
        place, exact = place.gather(1, order)[:, :wanted], exact[:, :wanted]
        index[chosen, :wanted] = torch.where(exact.isinf(), -1, place)
        distance[chosen, :wanted] = torch.where(exact.isinf(), torch.nan, exact)
    return Neighbours(index, distance)
