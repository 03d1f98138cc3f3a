"""captum's methods behind `attribute`, over captum called by hand at the same settings with its best chunk."""

import warnings
from collections.abc import Callable
from statistics import median

import captum.attr
import torch
from captum._utils.models.linear_model import SkLearnRidge
from captum.attr._core.lime import get_exp_kernel_similarity_function
from torch import Tensor

from benchmarks.explain.subjects import Subject
from benchmarks.timing import Json, by_turns, ratios, spread, timed
from otnn.explain import attribute
from otnn.explain.applicability import find_layer
from otnn.explain.captum_perturbations import occlusion_windows, superpixels

BAR = 1.05
SAMPLES = 50
MASKS = 200
# Copies in a forward of captum by hand; the best of them is what ours is compared with
CHUNKS = (64, 256, 1024)

Call = Callable[[int], Tensor]


def by_hand(subject: Subject, rounds: int, advance: Callable[[], None]) -> Json:
    """Seconds of both and their ratio, for each of captum's methods that applies to the network."""
    rows = {}
    for name, (ours, hand) in _pairs(subject).items():
        chunk = _best(hand, len(subject.images))
        jobs = {"attribute": ours, "captum": lambda hand=hand, chunk=chunk: hand(chunk)}  # type: ignore[misc]
        seconds = by_turns(jobs, rounds, advance)
        rows[name] = {
            "seconds": {key: spread(values) for key, values in seconds.items()},
            "copies in a forward of captum": chunk,
            "ratio": spread(ratios(seconds["attribute"], seconds["captum"])),
        }
    return {"network": subject.name, "images": len(subject.images), "of": rows}


def _best(hand: Call, count: int) -> int:
    """The chunk with which captum is fastest."""
    times = {}
    for chunk in CHUNKS:
        if chunk < count:
            continue
        hand(chunk)
        once: list[float] = []
        for _ in range(2):
            with timed(once):
                hand(chunk)
        times[chunk] = median(once)
    return min(times, key=times.__getitem__)


def _pairs(subject: Subject) -> dict[str, tuple[Callable[[], Tensor], Call]]:
    """For each method, ours and captum by hand, called with the copies of a forward."""
    model, x, target, n = subject.model, subject.images, subject.target, len(subject.images)

    def ours(name: str, **settings: int) -> Callable[[], Tensor]:
        return lambda: attribute(model, x, target, name, **settings)

    def leaf() -> Tensor:
        return x.clone().requires_grad_()

    saliency = captum.attr.Saliency(model)
    integrated = captum.attr.IntegratedGradients(model)
    tunnel = captum.attr.NoiseTunnel(saliency)
    gradient_input = captum.attr.InputXGradient(model)
    windows, strides, _ = occlusion_windows(x, None, None)
    occlusion = captum.attr.Occlusion(model)
    pairs: dict[str, tuple[Callable[[], Tensor], Call]] = {
        "saliency": (ours("saliency"), lambda _: saliency.attribute(leaf(), target, abs=False)),
        "gradient_input": (ours("gradient_input"), lambda _: gradient_input.attribute(leaf(), target)),
        "integrated_gradients": (
            ours("integrated_gradients", steps=SAMPLES),
            lambda chunk: integrated.attribute(x, 0, target, n_steps=SAMPLES, internal_batch_size=chunk),
        ),
        "occlusion": (
            ours("occlusion"),
            lambda chunk: occlusion.attribute(
                x, windows, strides, 0, target, perturbations_per_eval=max(1, chunk // n)
            ),
        ),
        **{
            name: (
                ours(name, samples=SAMPLES),
                lambda chunk, kind=kind: tunnel.attribute(  # type: ignore[misc]
                    x,
                    nt_type=kind,
                    nt_samples=SAMPLES,
                    nt_samples_batch_size=max(1, min(SAMPLES, chunk // n)),
                    stdevs=0.2,
                    target=target,
                    abs=False,
                ),
            )
            for name, kind in (("smoothgrad", "smoothgrad"), ("squaregrad", "smoothgrad_sq"), ("vargrad", "vargrad"))
        },
    }
    pairs |= _surrogates(subject)
    if "ordinary" in subject.name:
        guided, deconvolution = captum.attr.GuidedBackprop(model), captum.attr.Deconvolution(model)
        pairs["guided_backprop"] = (ours("guided_backprop"), lambda _: _quietly(guided, leaf(), target))
        pairs["deconvolution"] = (ours("deconvolution"), lambda _: _quietly(deconvolution, leaf(), target))
    if "conv" in subject.name:
        pairs["gradcam"] = _gradcam(subject)
    return pairs


def _quietly(method: captum.attr.Attribution, x: Tensor, target: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting backward hooks on ReLU")
        return method.attribute(x, target)  # type: ignore[no-any-return]


def _surrogates(subject: Subject) -> dict[str, tuple[Callable[[], Tensor], Call]]:
    """LIME and Kernel SHAP, of which captum explains one sample a call."""
    model, x, target = subject.model, subject.images, subject.target
    mask = superpixels(x)
    lime = captum.attr.Lime(model, SkLearnRidge(alpha=1.0), get_exp_kernel_similarity_function("cosine", 0.25))
    shap = captum.attr.KernelShap(model)

    def each(method: captum.attr.Attribution, chunk: int) -> Tensor:
        return torch.cat(
            [
                method.attribute(
                    x[i : i + 1],
                    0,
                    target[i : i + 1],
                    feature_mask=mask,
                    n_samples=MASKS,
                    perturbations_per_eval=min(chunk, MASKS),
                )
                for i in range(len(x))
            ]
        )

    return {
        "lime": (lambda: attribute(model, x, target, "lime", samples=MASKS), lambda chunk: each(lime, chunk)),
        "kernel_shap": (
            lambda: attribute(model, x, target, "kernel_shap", samples=MASKS),
            lambda chunk: each(shap, chunk),
        ),
    }


def _gradcam(subject: Subject) -> tuple[Callable[[], Tensor], Call]:
    """Grad-CAM at the last activation that keeps places, brought to the size of the image."""
    model, x, target = subject.model, subject.images, subject.target
    gradcam = captum.attr.LayerGradCam(model, find_layer(model, x, None))

    def hand(_: int) -> Tensor:
        cells = gradcam.attribute(x, target)
        found: Tensor = captum.attr.LayerAttribution.interpolate(cells, tuple(x.shape[2:]), "bilinear")
        return found

    return lambda: attribute(model, x, target, "gradcam"), hand
