"""Deletion, Insertion and muFidelity over quantus's nearest metrics, on the same maps in the same process.

quantus 0.6 fails with numpy >= 2.4, so that both are timed in an environment of its own:

    python -m venv quantus-env
    grep -v numpy constraints.txt > quantus-constraints.txt
    quantus-env/bin/pip install -c quantus-constraints.txt "numpy<2.4" quantus==0.6.0 .

Its nearest metrics: PixelFlipping for Deletion; PixelFlipping of the negated map for Insertion, as it removes the least
important pixels first; FaithfulnessCorrelation with Spearman for muFidelity, which hides single pixels and not cells.
Baselines are black, the images one batch, the steps and runs the same.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks.explain.subjects import Subject
from benchmarks.timing import Json, by_turns, ratios, spread
from otnn import metrics
from otnn.explain import attribute
from otnn.explain.scores import Scorer

BAR = 10.0
STEPS = 14  # 784 pixels in equal parts, as quantus asks
MASKS = 200
# Maps scored in one call, as a comparison of methods does it
MAPS: dict[str, dict[str, int]] = {
    "saliency": {},
    "gradient_input": {},
    "integrated_gradients": {"steps": 5},
    "smoothgrad": {"samples": 5},
    "squaregrad": {"samples": 5},
    "vargrad": {"samples": 5},
}


def peers(subject: Subject, rounds: int, advance: Callable[[], None]) -> Json:
    """Seconds of both and their ratios, for one map and, of muFidelity, for the maps of six methods."""
    jobs = _ours(subject) | _quantus(subject)
    seconds = by_turns(jobs, rounds, advance)
    rows = {}
    for name in ("deletion", "insertion", "mu_fidelity", "mu_fidelity, six maps"):
        pair = {"otnn": seconds[f"otnn {name}"], "quantus": seconds[f"quantus {name}"]}
        rows[name] = {
            "seconds": {key: spread(values) for key, values in pair.items()},
            "ratio": spread(ratios(pair["quantus"], pair["otnn"])),
        }
    return {"network": subject.name, "images": len(subject.images), "of": rows}


def _maps(subject: Subject) -> dict[str, Tensor]:
    return {
        name: attribute(subject.model, subject.images, subject.target, name, **settings)
        for name, settings in MAPS.items()
    }


def _ours(subject: Subject) -> dict[str, Callable[[], Any]]:
    images, maps = subject.images, _maps(subject)
    scorer = Scorer(subject.model, images, subject.target)
    one = maps["saliency"]
    return {
        "otnn deletion": lambda: metrics.deletion(scorer, images, one, steps=STEPS),
        "otnn insertion": lambda: metrics.insertion(scorer, images, one, steps=STEPS),
        "otnn mu_fidelity": lambda: metrics.mu_fidelity(scorer, images, one, samples=MASKS),
        "otnn mu_fidelity, six maps": lambda: metrics.mu_fidelity(scorer, images, maps, samples=MASKS),
    }


def _quantus(subject: Subject) -> dict[str, Callable[[], Any]]:
    import quantus

    x, y = subject.images.numpy(), subject.target.numpy()
    maps = {name: map_.numpy() for name, map_ in _maps(subject).items()}
    pixels = x[0].size
    common = {"abs": False, "normalise": False, "disable_warnings": True, "display_progressbar": False}
    flipping = quantus.PixelFlipping(
        features_in_step=pixels // STEPS, perturb_baseline="black", return_auc_per_sample=True, **common
    )
    correlation = quantus.FaithfulnessCorrelation(
        similarity_func=quantus.similarity_func.correlation_spearman,
        nr_runs=MASKS,
        subset_size=pixels // 5,
        perturb_baseline="black",
        return_aggregate=False,
        **common,
    )

    def run(metric: Any, map_: Any) -> Any:
        return metric(
            model=subject.model, x_batch=x, y_batch=y, a_batch=map_, softmax=False, batch_size=len(x), device="cpu"
        )

    one = maps["saliency"]
    return {
        "quantus deletion": lambda: run(flipping, one),
        "quantus insertion": lambda: run(flipping, -one),
        "quantus mu_fidelity": lambda: run(correlation, one),
        "quantus mu_fidelity, six maps": lambda: [run(correlation, map_) for map_ in maps.values()],
    }


def available() -> bool:
    """Whether quantus can be imported here."""
    try:
        import quantus  # noqa: F401
    except Exception:  # also AttributeError, with a numpy that it does not fit
        return False
    return True
