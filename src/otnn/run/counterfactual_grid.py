"""The rows of counterfactuals.png: a few test images on every network, and training images beside their partners."""

import math
import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from otnn.batches import spread
from otnn.data import Dataset
from otnn.explain import Counterfactual, counterfactual, nearest
from otnn.lipschitz import bound
from otnn.models import Classifier, predict
from otnn.report.counterfactual_pictures import Block, Panel
from otnn.report.pictures import label
from otnn.report.words import down
from otnn.run.counterfactual_words import shown
from otnn.run.fit import scores_of
from otnn.run.folder import Run

PICTURES = 4
# Lengths in units of the length to the boundary; the last is beyond the reflected image, on straight paths only
TIMES = (0.5, 1.0, 1.5, 2.0, 4.0)
# Images along an iterated path, of which those at the lengths are taken
_STEPS = 41
# Of the distance, in float64
_BEYOND = 1e-9
# Images that are looked through for the pictures, at most
_LOOKED = 2048


def blocks(
    run: Run,
    dataset: Dataset,
    index: Tensor,
    source: int | None,
    target: int | None,
    judge: Classifier,
    *,
    box: bool,
    iterations: int,
    device: str | torch.device,
) -> tuple[list[str], list[Block], str]:
    """Titles of the columns, blocks of rows and a note, for `otnn.report.counterfactual_pictures.grid_picture`.

    All networks go to the target of the OTNN. With audit.npz in the folder, a block shows training images with their
    partners under the exact plan.

    Args:
        run: an opened run.
        dataset: its data.
        index: (n,) the test images that were measured; up to four are shown, which the OTNN gets right.
        source: the class of the audit's training images that are shown; all by default.
        target: the class that all go to; the nearest rival of each on the OTNN by default.
        judge: says what it sees, below the network's own word.
        box: keep the paths in [0, 1].
        iterations: gradients to the boundary.
        device: where the networks run.
    """
    times = TIMES if iterations == 1 else TIMES[:-1]
    grid = _Grid(run, dataset, judge, times, box, iterations, device)
    model = run.network("otnn", device)
    looked = index[:_LOOKED]
    chosen = looked[pictured(model, dataset.test.images[looked], dataset.test.labels[looked])]
    images, labels = dataset.test.images[chosen], dataset.test.labels[chosen]
    goal = None if target is None else torch.full((len(images),), target)
    if goal is None:
        goal = grid.walk(model, images, None).target.cpu()  # -1 of an image that cannot be read
    found = [Block(f"{shown(name)}: test images", grid.rows(name, images, labels, goal)) for name in run.networks]
    partners = grid.partners(source, target)
    columns = ["the image", "gradient of the\npotential"]
    words = {1.0: "\n(even with target)", 2.0: "\n(reflected)"}
    columns += [f"t = {time:g} t*{words.get(time, '')}" for time in times]
    columns += ["nearest real image\nof the target"]
    if partners is not None:
        columns.append("partner under\nthe exact plan")
        found = [Block(block.title, [[*row, None] for row in block.rows]) for block in found]
        found.append(partners)
    return columns, found, _note(box, iterations)


def _note(box: bool, iterations: int) -> str:
    kept = "kept in [0, 1]" if box else "clipped to [0, 1] for display"
    return (
        f"t* is the length of the path to the boundary, moved the L2 distance; {iterations} gradient"
        f"{'s' * (iterations > 1)} to the boundary, {kept}.\n"
        "Below each image: what the network says, and what the independent judge sees.\n"
        "Small: the training image, of any class, that is nearest to the one above, and how far away it is.\n"
        "Below the gradient: no change of a smaller L2 norm makes the network say the target.\n"
        "Gradient: channel mean, divided by its L2 norm; brighter in blue and darker in orange leads to the target."
    )


def _excluded(name: str, radius: float) -> str:
    """Below which L2 norm no change makes the target: the pair's, as a third class may come nearer; rounded down."""
    return f"not {name}\nbelow {down(radius)}" if math.isfinite(radius) else "no bound"


def pictured(model: Classifier, images: Tensor, labels: Tensor, count: int = PICTURES) -> Tensor:
    """Places of up to `count` images that a network gets right, of classes that are spread over all there are."""
    right = predict(scores_of(model, images)) == labels
    if not bool(right.any()):
        right = torch.ones_like(right)
    queues = [(right & (labels == k)).nonzero().squeeze(1).tolist() for k in labels.unique().tolist()]
    queues = [queue for queue in queues if queue]
    taken = torch.linspace(0, len(queues) - 1, min(count, len(queues))).round().long().tolist()
    deepest = max(map(len, queues))
    picked = [queues[k][turn] for turn in range(deepest) for k in taken if turn < len(queues[k])][:count]
    return torch.tensor(sorted(picked, key=lambda k: (int(labels[k]), k)))


class _Grid:
    """What all rows share."""

    def __init__(
        self,
        run: Run,
        dataset: Dataset,
        judge: Classifier,
        times: Sequence[float],
        box: bool,
        iterations: int,
        device: str | torch.device,
    ) -> None:
        self.run, self.dataset, self.judge, self.times = run, dataset, judge, times
        self.box, self.iterations, self.device = box, iterations, device

    def walk(self, model: Classifier, images: Tensor, goal: Tensor | None) -> Counterfactual:
        """The counterfactuals of a few images, in float64: at the boundary the next pass agrees that it is crossed."""
        return counterfactual(
            model.double(),
            images.double().to(self.device),
            bound(model.body, model.input_shape),
            None if goal is None else goal.to(self.device),
            steps=2 if self.iterations == 1 else _STEPS,
            box=self.box,
            iterations=self.iterations,
        )

    def along(self, way: Counterfactual) -> Tensor:
        """Images (n, times, ...) at the multiples of the length to the boundary."""
        if self.iterations == 1:
            down = way.inputs - way.one_step  # along the gradient
            unit = down / spread(torch.linalg.vector_norm(down.flatten(1), dim=1), down)
            points = [way.inputs - spread(time * way.boundary_length, unit) * unit for time in self.times]
            images = torch.stack(points, dim=1)
            images = images.clamp(0, 1) if self.box else images
        else:
            wanted = way.boundary_length.nan_to_num().unsqueeze(1) * way.lengths.new_tensor(self.times)
            place = (way.lengths.nan_to_num().unsqueeze(1) - wanted.unsqueeze(2)).abs().argmin(dim=2)
            images = way.path[torch.arange(len(place), device=self.device).unsqueeze(1), place]
        # a little further than the change of sign, which another batch may round to the other side
        beyond = way.inputs + (1 + _BEYOND) * (way.boundary - way.inputs)
        images[:, self.times.index(1.0)] = beyond.clamp(0, 1) if self.box else beyond
        return images

    def rows(self, name: str, images: Tensor, labels: Tensor, goal: Tensor) -> list[list[Panel | None]]:
        """One row per image: the image, the gradient, the way, and the nearest real image of the target to its end.

        Small, below the image and those along the way: the nearest real image of any class.
        """
        model = self.run.network(name, self.device)
        way = self.walk(model, images, goal)
        train = self.dataset.train
        near = nearest(train.images, way.reflected.float().cpu().clamp(0, 1), train.labels, goal)
        path = self.along(way)
        stacked = torch.cat([way.inputs.unsqueeze(1), path], dim=1)
        with torch.no_grad():
            flat = stacked.flatten(0, 1).nan_to_num()
            says = predict(model(flat)).view(len(images), -1).cpu()
            displayed = flat.float().clamp(0, 1)
            sees = predict(self.judge(displayed)).view(len(images), -1).cpu()
        around = nearest(train.images, displayed.cpu())
        real_of, far_of = (each.view(len(images), -1) for each in (around.index, around.distance))
        moved = torch.linalg.vector_norm((path - way.inputs.unsqueeze(1)).flatten(2), dim=2).cpu()
        gradient = (way.inputs - way.one_step).float().cpu().numpy()
        shown_path = path.float().cpu().numpy()
        rows: list[list[Panel | None]] = []
        for k in range(len(images)):
            heard = [f"says {self._name(a)}\njudge {self._name(b)}" for a, b in zip(says[k], sees[k], strict=True)]
            real = [self._real(int(i), float(far)) for i, far in zip(real_of[k], far_of[k], strict=True)]
            known = bool(torch.isfinite(images[k]).all())
            start = f"is {self._name(labels[k])}\n{heard[0]}"
            row: list[Panel | None] = [Panel(images[k].numpy(), start, below=real[0] if known else None)]
            goal_name = self._name(goal[k]) if goal[k] >= 0 else "no class"
            wanted = f"to {goal_name}"
            if way.status[k] != "ok":
                rest = len(self.times) + 1
                words = Panel(None, "\n".join(textwrap.wrap(f"{wanted}: {way.status[k]}", 24)))
                rows.append([*row, None, words, *[None] * (rest - 1)])
                continue
            row.append(Panel(gradient[k], f"{wanted}\n{_excluded(goal_name, float(way.pair_radius[k]))}", signed=True))
            for image, far, word, small in zip(shown_path[k], moved[k], heard[1:], real[1:], strict=True):
                row.append(Panel(image, f"moved {float(far):.2f}\n{word}", below=small))
            found = int(near.index[k, 0])
            last = None if found < 0 else train.images[found].numpy()
            row.append(Panel(last, f"{goal_name}\n{float(near.distance[k, 0]):.1f} away"))
            rows.append(row)
        return rows

    def _real(self, place: int, far: float) -> Panel:
        """A training image, to stand below the one that it is nearest to."""
        train = self.dataset.train
        return Panel(train.images[place].numpy(), f"{self._name(train.labels[place])}\n{far:.1f} away")

    def partners(self, source: int | None, target: int | None) -> Block | None:
        """Training images of audit.npz on the OTNN, with their partners; None where there are none of the classes."""
        file = self.run.path / "audit.npz"
        if not file.exists():
            return None
        with np.load(file) as stored:
            arrays = {name: stored[name] for name in ("index", "label", "partner_index", "partner_label", "distance")}
        fits = np.ones(len(arrays["index"]), dtype=bool)
        for wanted, own in ((source, "label"), (target, "partner_label")):
            if wanted is not None:
                fits &= arrays[own] == wanted
        if not fits.any():
            return None
        chosen = {name: torch.from_numpy(values[fits][:PICTURES]) for name, values in arrays.items()}
        train = self.dataset.train
        rows = self.rows("otnn", train.images[chosen["index"]], chosen["label"], chosen["partner_label"].long())
        for row, partner, kind, far in zip(
            rows, chosen["partner_index"], chosen["partner_label"], chosen["distance"], strict=True
        ):
            row.append(
                Panel(train.images[int(partner)].numpy(), f"{self._name(kind)}\n{float(far):.1f} from the image")
            )
        return Block("OTNN: training images of the audit", rows)

    def _name(self, k: Tensor | int) -> str:
        return label(self.run.classes[int(k)])
