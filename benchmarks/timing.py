"""How benchmarks time: rounds in which everything is timed by turns, and ratios of times of the same round."""

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

Json = dict[str, Any]


@contextmanager
def timed(times: list[float]) -> Iterator[None]:
    """Append the seconds that the block takes, without those of the garbage collector."""
    gc.disable()
    try:
        start = time.perf_counter()
        yield
        times.append(time.perf_counter() - start)
    finally:
        gc.enable()


def by_turns(jobs: Mapping[str, Callable[[], Any]], rounds: int, advance: Callable[[], None]) -> dict[str, list[float]]:
    """The seconds of each job in each round; each runs once before, to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for job in jobs.values():
        job()
    for _ in range(rounds):
        for name, job in jobs.items():
            with timed(seconds[name]):
                job()
        advance()
    return seconds


def ratios(times: Sequence[float], others: Sequence[float]) -> list[float]:
    """Ratios of the same rounds."""
    return [one / other for one, other in zip(times, others, strict=True)]


def spread(values: Sequence[float]) -> Json:
    """Median, least and most."""
    return {"median": median(values), "min": min(values), "max": max(values)}


@contextmanager
def peak_memory() -> Iterator[list[int | None]]:
    """Bytes that the block took at most, beyond what the process held before it; None where Linux does not say."""
    result: list[int | None] = []
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is held now
        before = _high_water()
    except OSError:
        before = None
    yield result
    result.append(None if before is None else _high_water() - before)


def _high_water() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
