"""What hiding pixels can do to a 1-Lipschitz score: no more than the picture changes (theory, sections 5.6 and 5.7)."""

import torch
from torch import Tensor

from otnn.batches import sample_norm
from otnn.errors import InputError
from otnn.explain.masking import upsample
from otnn.guarantees.potential import Potential
from otnn.guarantees.result import GREY, Guarantee, first_reasons
from otnn.guarantees.smoothing import pixel_scores
from otnn.memory import chunk_size

CEILING_DOMAIN = "For the masked images that were scored, each by itself, whatever they are filled with."
SR_DOMAIN = (
    "The lower end holds for the changes of any set of pixels, inside [0, 1] or not; the upper end for the sets that "
    "were attacked."
)


def masking_ceiling(
    potential: Potential, masks: Tensor, baseline: Tensor | float = 0.0, *, name: str = "masking_ceiling"
) -> Guarantee:
    """Bound what each mask changes in the potential: |g(x) - g(x_masked)| <= ||x - x_masked||.

    A drop divided by its ceiling lies in [0, 1] and compares across models, whatever their scale: above 1 it is only by
    the errors of the two values of g, and 1 is told. Vacuous where no mask
    that changes the picture has a ceiling below g(x): then none is certain to leave the decision as it is.

    Args:
        potential: of the samples.
        masks: values in [0, 1], 1 keeps and 0 hides; one bank (k, ...) for all samples, or one each (n, k, ...), where
            what follows is broadcast to a sample. `deletion_masks`, `insertion_masks`, `occlusion_masks` and
            `cell_masks` make those of the metrics.
        baseline: what hidden values become: a number, one sample (...), or one per sample (n, ...).
        name: of the result.

    Returns:
        The mean ceiling over the masks, in the L2 norm of the input, which bounds the mean change of g. `details`:
        "ceiling" (n, k); "drop" (n, k), g(x) - g(x_masked); "ratio" (n, k), the absolute drop over the ceiling, NaN for
        masks that change nothing, or less than the drop may be off by rounding; "safe" (n,), the share of the masks
        that change the picture by less than g(x).

    Raises:
        InputError: masks or a baseline that do not fit.

    Example:
        >>> from otnn.lipschitz import bound
        >>> from otnn.models import build
        >>> model = build("dense", (1, 8, 8), 2, widths=(32,)).eval()
        >>> potential = Potential(model, torch.rand(3, 1, 8, 8), bound(model.body))
        >>> found = masking_ceiling(potential, occlusion_masks((8, 8), patch=4))
        >>> found.details["ratio"].shape, bool((found.details["ratio"] <= 1).all())
        (torch.Size([3, 4]), True)
    """
    inputs = potential.inputs
    filling, bank = _filling(inputs, baseline), _bank(inputs, masks)
    n, k = len(inputs), bank.shape[1]
    ceiling, score, error = (inputs.new_empty(n, k) for _ in range(3))
    rows = chunk_size(inputs[:1], potential.memory_budget, potential.model)
    for part in torch.arange(n * k, device=inputs.device).split(rows):
        of, which = part // k, part % k
        mask = bank[of if len(bank) > 1 else torch.zeros_like(of), which]
        fill = filling[of] if len(filling) > 1 else filling
        masked = torch.lerp(fill.expand_as(inputs[of]), inputs[of], mask.expand_as(inputs[of]))
        ceiling[of, which] = sample_norm(inputs[of] - masked) * (1 + (inputs[0].numel() + 8) * 2.0**-53)
        score[of, which], error[of, which] = potential.bounded(masked, of)
    drop = potential.value.unsqueeze(1) - score
    known = potential.known.unsqueeze(1)
    changed = ceiling > 0
    off = (error + potential.error.unsqueeze(1)) * (1 + 2.0**-50) + drop.abs() * 2.0**-52
    limited = torch.where(drop.abs() - ceiling <= off, drop.abs().minimum(ceiling), drop.abs())
    ratio = torch.where(known & (ceiling > off), limited / torch.where(changed, ceiling, 1.0), torch.nan)
    safe = (changed & (ceiling < (potential.value - potential.error).unsqueeze(1))).double().sum(dim=1)
    limit = torch.where(potential.known, ceiling.mean(dim=1), torch.nan)
    vacuous = ~potential.known | (safe == 0)
    return Guarantee(
        name=name,
        bound=limit,
        unit="L2 norm, mean over the masks",
        vacuous=vacuous,
        reason=first_reasons(
            potential.reason,
            (~changed.any(dim=1), "no mask changes the picture"),
            (vacuous, "every mask changes the picture by more than g(x)"),
        ),
        domain=CEILING_DOMAIN,
        details={
            "ceiling": ceiling,
            "drop": torch.where(known, drop, torch.nan),
            "ratio": ratio,
            "safe": torch.where(potential.known, safe / changed.double().sum(dim=1).clamp(min=1), 0.0),
        },
    )


def deletion_masks(attribution: Tensor, steps: int = 10) -> Tensor:
    """Masks (n, steps + 1, 1, ...) that hide the pixels of the highest attribution first, none to all.

    Pixels are ordered by the L2 norm over channels; ties by their place.

    Args:
        attribution: (n, channels, ...) or (n, features).
        steps: at most one per pixel.

    Raises:
        InputError: no step.

    Example:
        >>> deletion_masks(torch.tensor([[0.1, 0.9, -0.5]]), steps=3)[0]
        tensor([[1., 1., 1.],
                [1., 0., 1.],
                [1., 0., 0.],
                [0., 0., 0.]])
    """
    if steps < 1:
        raise InputError(f"steps: expected at least 1, got {steps}")
    scores = pixel_scores(attribution.detach())
    pixels = scores.shape[1]
    steps = min(steps, pixels)
    order = scores.argsort(dim=1, descending=True, stable=True)
    place = torch.empty_like(order).scatter_(1, order, torch.arange(pixels, device=order.device).expand_as(order))
    # halves rounded up, as by `otnn.metrics.deletion`
    counts = torch.tensor([(2 * s * pixels + steps) // (2 * steps) for s in range(steps + 1)], device=place.device)
    kept = place.unsqueeze(1) >= counts.view(-1, 1)
    shape = (1, *attribution.shape[2:]) if attribution.ndim > 2 else tuple(attribution.shape[1:])
    return kept.to(attribution.dtype).view(len(scores), steps + 1, *shape)


def insertion_masks(attribution: Tensor, steps: int = 10) -> Tensor:
    """Masks (n, steps + 1, 1, ...) that show the pixels of the highest attribution first: `deletion_masks` reversed."""
    return 1 - deletion_masks(attribution, steps)


def occlusion_masks(size: tuple[int, ...], *, patch: int, stride: int | None = None) -> Tensor:
    """Masks (windows, 1, height, width) or (windows, 1, length) that hide one window each; the edges are covered.

    Args:
        size: (height, width) or (length,).
        patch: side of the window.
        stride: between windows; the patch by default.

    Raises:
        InputError: a patch or a stride that does not fit.

    Example:
        >>> occlusion_masks((4,), patch=2, stride=1)[:, 0]
        tensor([[0., 0., 1., 1.],
                [1., 0., 0., 1.],
                [1., 1., 0., 0.]], dtype=torch.float64)
    """
    stride = patch if stride is None else stride
    if not 1 <= patch <= min(size) or stride < 1:
        raise InputError(
            f"patch: expected 1 to {min(size)} pixels and a stride of at least 1, got {patch} and {stride}"
        )
    lines = []
    for pixels in size:
        starts = [*range(0, pixels - patch, stride), pixels - patch]  # the last window ends at the edge
        first = torch.tensor(starts).unsqueeze(1)
        place = torch.arange(pixels)
        lines.append(((place >= first) & (place < first + patch)).double())
    hidden = lines[0] if len(size) == 1 else torch.einsum("ah,bw->abhw", *lines).flatten(0, 1)
    return 1 - hidden.unsqueeze(1)


def cell_masks(
    size: tuple[int, ...],
    *,
    grid: int = 9,
    subset: float = 0.2,
    samples: int = 50,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Masks (samples, 1, height, width) as those of muFidelity: every cell of a grid is hidden with one probability.

    Raises:
        InputError: a probability outside (0, 1).

    Example:
        >>> cell_masks((8, 8), grid=4, samples=3, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([3, 1, 8, 8])
    """
    if not 0 < subset < 1:
        raise InputError(f"subset: expected a probability in (0, 1), got {subset}")
    cells = (min(grid, *size) if len(size) > 1 else min(grid, size[0]),) * len(size)
    device = torch.device("cpu") if generator is None else generator.device
    shown = torch.rand((samples, *cells), generator=generator, device=device, dtype=torch.float64) >= subset
    return upsample(shown.double(), size)


def robustness_bracket(potential: Potential, upper: Tensor, support: Tensor | None = None) -> Guarantee:
    """Bracket Robustness-Sr: the smallest change of a set of pixels alone that alters the prediction.

    Any such change is one of the image, so that the certified radius of the prediction is below it, whatever the set.
    To first order the distance is g / ||grad g on the set||: this is no bound, in either direction, and only told.

    Vacuous where the lower end is below `GREY`, or no upper end is known.

    Args:
        potential: of the samples.
        upper: (n, sets) distances at which a search found a change, such as `details["radius"]` of
            `otnn.metrics.robustness_sr`; infinite or NaN where it found none (its `details["failed"]`).
        support: (n, sets, ...) bool, the sets, broadcast to a sample, for the value of first order.

    Returns:
        The lower end, in the L2 norm of the change. `details`: "upper" (n, sets); "tightness" (n, sets), the quotient
        of the ends, 0 without an upper end; with a support "first_order" (n, sets), of the pair of classes at hand,
        which is no bound.

    Raises:
        InputError: distances or sets that do not fit.

    Example:
        >>> from otnn.lipschitz import bound
        >>> from otnn.models import build
        >>> model = build("dense", (1, 8, 8), 2, widths=(32,)).eval()
        >>> potential = Potential(model, torch.rand(3, 1, 8, 8), bound(model.body))
        >>> robustness_bracket(potential, torch.full((3, 2), 9.0)).details["tightness"].shape
        torch.Size([3, 2])
    """
    inputs = potential.inputs
    if upper.ndim != 2 or len(upper) != len(inputs):
        raise InputError(f"upper: expected distances ({len(inputs)}, sets), got shape {tuple(upper.shape)}")
    upper = upper.detach().to(inputs).nan_to_num(nan=torch.inf, posinf=torch.inf)
    certain = potential.radius > 0  # of the prediction, whatever the target
    lower = torch.where(certain, potential.radius, torch.nan)
    details = {"upper": upper, "tightness": (lower.unsqueeze(1) / upper).nan_to_num(nan=0.0)}
    if support is not None:
        if support.ndim != inputs.ndim + 1 or tuple(support.shape[:2]) != tuple(upper.shape):
            raise InputError(
                f"support: expected sets {tuple(upper.shape)} of pixels, broadcast to samples "
                f"{tuple(inputs.shape[1:])}, got shape {tuple(support.shape)}"
            )
        slope = (potential.gradient.unsqueeze(1) * support).flatten(2).square().sum(dim=2).sqrt()
        details["first_order"] = potential.value.unsqueeze(1) / slope  # infinite where the set has no gradient
    none = torch.isinf(upper).all(dim=1) & ~torch.isinf(lower)  # a radius without end needs no upper one
    return Guarantee(
        name="robustness_sr",
        bound=lower,
        unit="L2 norm of the change of the set",
        vacuous=~(lower >= GREY) | none,
        reason=first_reasons(
            ["" if sure else reason for sure, reason in zip(certain.tolist(), potential.reason, strict=True)],
            (lower < GREY, "the lower end is below one grey level of one pixel"),
            (none, "the search found no change: no upper end"),
            (torch.isinf(upper).any(dim=1) & ~torch.isinf(lower), "the search found no change of some of the sets"),
        ),
        domain=SR_DOMAIN,
        details=details,
    )


def _bank(inputs: Tensor, masks: Tensor) -> Tensor:
    """Masks as (n or 1, k, ...), in the dtype of the inputs."""
    bank = masks if masks.ndim == inputs.ndim + 1 else masks.unsqueeze(0)
    fits = bank.ndim == inputs.ndim + 1 and bank.shape[0] in (1, len(inputs)) and bank.shape[1] > 0
    if not fits or any(m not in (1, s) for m, s in zip(bank.shape[2:], inputs.shape[1:], strict=True)):
        raise InputError(
            f"masks: expected a bank (k, ...) or one per sample ({len(inputs)}, k, ...), broadcastable to samples "
            f"{tuple(inputs.shape[1:])}, got {tuple(masks.shape)}"
        )
    bank = bank.to(inputs)
    if not bool(((bank >= 0) & (bank <= 1)).all()):
        raise InputError("masks: expected values in [0, 1]")
    return bank


def _filling(inputs: Tensor, baseline: Tensor | float) -> Tensor:
    """The baseline as (n or 1, ...)."""
    filling = torch.as_tensor(baseline, dtype=inputs.dtype, device=inputs.device)
    if not bool(torch.isfinite(filling).all()):
        raise InputError("baseline: expected finite values, got NaN or infinite ones")
    if filling.ndim > 0 and filling.shape not in (inputs.shape, inputs.shape[1:]):
        raise InputError(
            f"baseline: expected a number, one sample {tuple(inputs.shape[1:])} or one per sample "
            f"{tuple(inputs.shape)}, got {tuple(filling.shape)}"
        )
    return filling if filling.shape == inputs.shape else filling.expand(1, *inputs.shape[1:])
