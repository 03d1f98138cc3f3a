"""Certified SmoothGrad: the pixels that matter most stay among twice as many (theory, section 5.4).

With h = grad(g * N(0, sigma^2)), the expectation of grad g under noise, of a 1-Lipschitz g:

1. ||h(x') - h(x)|| <= sqrt(2 / pi) / sigma ||x' - x||: for a unit vector w, <h(x') - h(x), w> is the integral of
   <grad g, w> <= 1 against the difference of two Gaussians, at most twice their distance in total variation.
2. Let r be the scores of the pixels of a map m, their L2 norms over channels, S the 2k highest, r_k >= ... >= r_2k the
   k + 1 lowest of these, and b the highest outside S. A map v with ||v - m|| < rho has its top k inside S, where
   rho^2 = min over c >= b of (c - b)^2 + sum_{i=k}^{2k} (r_i - c)_+^2.
   Proof: if a pixel outside S, whose score in v is c, were among the top k of v, fewer than k pixels would be above it,
   so that k + 1 pixels of S or more have a score of c at most in v. The score of a pixel moves by no more than its part
   of v - m does, so ||v - m||^2 is at least (c - b)_+^2 plus the sum of (r_i - c)_+^2 over these, which is least for
   the k + 1 lowest of S, and c < b only adds to it. With one of these alone the minimum is (r_k - b) / sqrt(2), the
   formula of the theory; rho is up to sqrt(2) times as large.
3. The mean m of N independent gradients is within eps = (1 + sqrt(2 ln(1 / delta))) / sqrt(N) of h(x) with probability
   1 - delta: E||m - h|| <= 1 / sqrt(N), and one gradient moves the distance by 2 / N (McDiarmid).
   So the top k of h(x') lies inside S while ||x' - x|| < (rho - eps) sigma sqrt(pi / 2).
4. Value by value m is nearer: with q = ln(3 d / delta) for d values, and s the mean of their squares, all d values are
   within sqrt(2 q / N) (sqrt(q / 2N) + sqrt(s + q / 2N)) + 2 q / 3N of h(x) with probability 1 - delta. For each value
   Bernstein's inequality, twice, bounds the distance by sqrt(2 M q / N) + 2 q / 3N, M the expected square; and
   M - s <= sqrt(2 M q / N) by that for numbers >= 0 (Maurer 2003), which solved for M is the square in brackets.
   So the top k of h(x') lies inside S while ||x' - x|| < rho' sigma sqrt(pi / 2), rho' as rho with the scores inside S
   lowered and those outside raised by their errors.

Both are computed, each with delta / 2, and the larger radius holds. Nothing is clipped: clipped noise is not Gaussian.
"""

import math

import torch
from torch import Tensor

from otnn.batches import spread
from otnn.errors import InputError
from otnn.guarantees.potential import Potential
from otnn.guarantees.result import Guarantee, first_reasons
from otnn.memory import chunk_size

DOMAIN = (
    "With the stated confidence over the noise that was drawn, for each sample by itself; for every real change of the "
    "whole image below the radius; up to the rounding of the gradients."
)


def noise_error(samples: int, delta: float) -> float:
    """How far the mean of so many gradients of norm <= 1 may be from its expectation, with probability 1 - delta.

    Raises:
        InputError: no sample, or a delta outside (0, 1).

    Example:
        >>> round(noise_error(10_000, 0.001), 4)
        0.0472
    """
    if samples < 1:
        raise InputError(f"samples: expected at least 1, got {samples}")
    if not 0 < delta < 1:
        raise InputError(f"delta: expected a probability in (0, 1), got {delta}")
    return (1 + math.sqrt(2 * math.log(1 / delta))) / math.sqrt(samples)


def value_errors(squares: Tensor, samples: int, delta: float) -> Tensor:
    """How far each value of the mean may be from its expectation, all at once with probability 1 - delta (step 4).

    Args:
        squares: (n, ...) the means of the squares of the values of `samples` gradients of norm <= 1.
        samples: N.
        delta: for each sample of the batch.

    Example:
        >>> value_errors(torch.full((1, 1, 28, 28), 1 / 784), 10_000, 0.001).max()
        tensor(0.0049)
    """
    noise_error(samples, delta)  # checks them
    q = math.log(3 * squares[0].numel() / delta) / samples
    return math.sqrt(2 * q) * (math.sqrt(q / 2) + (squares + q / 2).sqrt()) + 2 * q / 3


def smoothed_gradient(
    potential: Potential, *, sigma: float, samples: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """The mean of the gradients of g at x + sigma z for `samples` Gaussian z, and the mean of their squares: (n, ...).

    All samples share the noise: a map depends neither on the rest of the batch nor on the memory budget.

    Raises:
        InputError: a sigma that is not above 0, or no sample.
    """
    if not 0 < sigma < math.inf:
        raise InputError(f"sigma: expected a standard deviation > 0 in pixel units, got {sigma}")
    if samples < 1:
        raise InputError(f"samples: expected at least 1, got {samples}")
    inputs = potential.inputs
    n, shape = len(inputs), tuple(inputs.shape[1:])
    device = torch.device("cpu") if generator is None else generator.device
    rows = max(1, chunk_size(inputs[:1], potential.memory_budget, potential.model, gradient=True) // n)
    total, squares = torch.zeros_like(inputs), torch.zeros_like(inputs)
    for first in range(0, samples, rows):
        draws = [
            torch.randn(shape, generator=generator, device=device, dtype=torch.float64)
            for _ in range(min(rows, samples - first))
        ]
        noise = sigma * torch.stack(draws).to(inputs.device)
        points = (inputs.unsqueeze(1) + noise).flatten(0, 1)
        index = torch.arange(n, device=inputs.device).repeat_interleave(len(noise))
        gradients = potential.gradient_at(points, index).view(n, len(noise), *shape)
        total += gradients.sum(dim=1)
        squares += gradients.square().sum(dim=1)
    return total / samples, squares / samples


def pixel_scores(maps: Tensor) -> Tensor:
    """The L2 norm of each pixel over its channels: (n, pixels) of maps (n, channels, ...) or (n, features)."""
    return torch.linalg.vector_norm(maps.flatten(2), dim=1) if maps.ndim > 2 else maps.abs()


def smallest_change(scores: Tensor, k: int, errors: Tensor | None = None) -> Tensor:
    """The rho of step 2: no smaller L2 change of a map brings a pixel from outside the top 2k into the top k.

    Args:
        scores: (n, pixels), of more than 2k pixels.
        k: at least 1.
        errors: (n, pixels), how far each score may be from the truth; then it is the rho' of step 4.

    Returns:
        (n,); without errors it is attained by a change of the k + 1 lowest pixels of the 2k and the next one.

    Raises:
        InputError: too few pixels.

    Example:
        >>> smallest_change(torch.tensor([[3.0, 3.0, 1.0]]), 1)  # three pixels meet at 7/3: sqrt(4/9 + 4/9 + 16/9)
        tensor([1.6330])
    """
    if k < 1 or 2 * k >= scores.shape[1]:
        raise InputError(f"k: expected at least 1 and less than half of the {scores.shape[1]} pixels, got {k}")
    errors = torch.zeros_like(scores) if errors is None else errors
    inside = _highest(scores, 2 * k)
    outside = (scores + errors).masked_fill(inside, -torch.inf).amax(dim=1, keepdim=True)
    lowest = (scores - errors).masked_fill(~inside, torch.inf).topk(k + 1, dim=1, largest=False).values.flip(1)
    kept = torch.maximum(lowest, outside)
    # c is the mean of the outside pixel and of those that sink to it: the first few, as they are the highest
    means = (outside + kept.cumsum(dim=1)) / torch.arange(2, k + 3, device=scores.device)
    following = torch.cat([kept[:, 1:], outside], dim=1)
    level = means.gather(1, (means >= following).to(torch.uint8).argmax(dim=1, keepdim=True))
    change: Tensor = ((level - outside).square() + (kept - level).clamp(min=0).square().sum(dim=1, keepdim=True)).sqrt()
    return change.squeeze(1)


def certified_smoothgrad(
    potential: Potential,
    *,
    share: float = 0.05,
    sigma: float = 0.25,
    samples: int = 200,
    delta: float = 0.001,
    generator: torch.Generator | None = None,
) -> Guarantee:
    """Bound how far an image may change while the top k pixels of its smoothed gradient stay among a fixed set of 2k.

    The set is estimated, what stays inside it is the top k of the *exact* smoothed gradient, at the image and at every
    image within the radius. Vacuous where the radius is 0: then nothing is certain even at the image itself. The error
    of the Monte-Carlo mean falls with the number of gradients and is most often what is missing.

    Args:
        potential: of the samples.
        share: of the pixels, k; below one half.
        sigma: standard deviation of the noise, in pixel units; nothing is clipped.
        samples: gradients for each sample.
        delta: probability that the statement of one sample fails.
        generator: draws the noise.

    Returns:
        The radius in the L2 norm of the input. `details`: "map" (n, ...) the mean gradient; "top" and "candidates"
        (n, pixels) bool, its top k and top 2k; "needed" (n,), a number of gradients, a power of two times `samples`,
        from which the radius is above 0 if the map stays as it is, infinite beyond 2^40; "confidence" (n,), 1 - delta.

    Raises:
        InputError: settings that do not fit.

    Example:
        >>> from otnn.lipschitz import bound
        >>> from otnn.models import build
        >>> model = build("dense", (1, 8, 8), 2, widths=(32,)).eval()
        >>> potential = Potential(model, torch.rand(3, 1, 8, 8), bound(model.body))
        >>> found = certified_smoothgrad(potential, samples=50)
        >>> found.details["top"].sum(dim=1), found.details["candidates"].sum(dim=1)
        (tensor([3, 3, 3]), tensor([6, 6, 6]))
    """
    if not 0 < share < 0.5:
        raise InputError(f"share: expected a share of the pixels in (0, 1/2), got {share}")
    noise_error(samples, delta)  # checks them
    mean, squares = smoothed_gradient(potential, sigma=sigma, samples=samples, generator=generator)
    scores = pixel_scores(mean)
    k = max(1, round(share * scores.shape[1]))
    left = _left(scores, squares, k, samples, delta)
    radius = torch.where(potential.known, left * (1 - 1e-12) * sigma * math.sqrt(math.pi / 2), torch.nan)
    needed = torch.full_like(radius, torch.inf)
    for doubling in range(41):
        open_ = needed.isinf() & potential.known
        if not bool(open_.any()):
            break
        enough = open_ & (_left(scores, squares, k, samples * 2**doubling, delta) > 0)
        needed[enough] = samples * 2.0**doubling
    return Guarantee(
        name="certified_smoothgrad",
        bound=radius,
        unit="L2 norm of the change",
        vacuous=~(radius > 0),
        reason=first_reasons(
            potential.reason, (~(radius > 0), f"the gap is below the Monte-Carlo error of {samples} gradients")
        ),
        domain=DOMAIN,
        details={
            "map": torch.where(spread(potential.known, mean), mean, torch.nan),
            "top": _highest(scores, k),
            "candidates": _highest(scores, 2 * k),
            "needed": needed,
            "confidence": torch.full_like(radius, 1 - delta),
        },
    )


def _left(scores: Tensor, squares: Tensor, k: int, samples: int, delta: float) -> Tensor:
    """What the Monte-Carlo error leaves of the smallest change (n,), by the better of the steps 3 and 4."""
    as_vector = smallest_change(scores, k) - noise_error(samples, delta / 2)
    by_value = smallest_change(scores, k, pixel_scores(value_errors(squares, samples, delta / 2)))
    return torch.maximum(as_vector, by_value).clamp(min=0)


def _highest(scores: Tensor, count: int) -> Tensor:
    """Which pixels (n, pixels) are the highest ones."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(count, dim=1).indices, True)
