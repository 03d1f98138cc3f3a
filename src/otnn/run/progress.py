"""Progress on stderr: bars on a terminal, a line per epoch elsewhere."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from otnn.run.fit import EpochMetrics

console = Console(stderr=True, highlight=False, markup=False)


@dataclass
class TrainingBar:
    """Shows the steps of one training with its last figures."""

    progress: Progress
    task: TaskID
    name: str
    figures: str = ""

    def on_step(self, step: int, steps: int, loss: float) -> None:
        """Move the bar."""
        self.progress.update(self.task, completed=step, total=steps, figures=f"loss {loss:.3f}{self.figures}")

    def on_epoch(self, metrics: EpochMetrics) -> None:
        """Show the validation figures; off a terminal, print them."""
        self.figures = f"  validation accuracy {metrics.accuracy:.1%}"
        if metrics.certified_accuracy is not None:
            self.figures += f"  certified {metrics.certified_accuracy:.1%}"
        if isinstance(metrics.margin, float):
            self.figures += f"  margin {metrics.margin:.3f}"
        elif metrics.margin:
            self.figures += f"  margins {min(metrics.margin):.3f}..{max(metrics.margin):.3f}"
        if not console.is_terminal:
            console.print(
                f"{self.name}: epoch {metrics.epoch}  loss {metrics.loss:.3f}{self.figures}  {metrics.seconds:.0f} s",
                soft_wrap=True,
            )


@contextmanager
def training_bar(name: str, quiet: bool) -> Iterator[TrainingBar]:
    """A bar for the training of one network."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
    )
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task(name, total=None, figures="")
        yield TrainingBar(progress, task, name)


@contextmanager
def steps_bar(name: str, steps: int) -> Iterator[Callable[[int, Tensor], None]]:
    """A bar for a short training without epochs: call what is yielded with the step and the loss."""
    with training_bar(name, quiet=False) as bar:
        if not console.is_terminal:
            console.print(f"training {name}", soft_wrap=True)

        def show(step: int, loss: Tensor) -> None:
            if step % 20 == 0 or step == steps:
                bar.on_step(step, steps, float(loss.detach()))

        yield show


@contextmanager
def status(message: str) -> Iterator[None]:
    """Say what is being done while it lasts."""
    with counting(message):
        yield


@contextmanager
def counting(message: str) -> Iterator[Callable[[str], None]]:
    """Say what is being done while it lasts, and how far it is: call what is yielded with a text."""
    if not console.is_terminal:
        console.print(message, soft_wrap=True)
        yield lambda text: None
        return
    with console.status(Text(message)) as shown:
        yield lambda text: shown.update(Text(f"{message}: {text}"))


@contextmanager
def tasks_bar(name: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar over tasks of known number: call what is yielded with the name of each before it starts."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[now]}", markup=False),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=total, now="")
        begun = 0

        def begin(now: str) -> None:
            nonlocal begun
            progress.update(task, completed=begun, now=now)
            begun += 1
            if not console.is_terminal:
                console.print(f"{begun}/{total} {now}", soft_wrap=True)

        yield begin
        progress.update(task, completed=total, now="")


def tell(message: str) -> None:
    """Say something before a stage starts."""
    console.print(message, soft_wrap=True)


def name_skipped(names: Sequence[str]) -> None:
    """Name the broken images that were left out."""
    if names:
        count = f"{len(names)} broken image{'s' * (len(names) != 1)}"
        console.print(f"left out {count}: {', '.join(names)}", soft_wrap=True)
