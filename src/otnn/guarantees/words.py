"""Each guarantee in plain words, one sentence for each sample."""

import math
from collections.abc import Callable
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Context

from torch import Tensor

from otnn.guarantees.result import Guarantee


def in_words(guarantee: Guarantee) -> tuple[str, ...]:
    """A sentence for each sample that a layman can read, true as it stands: figures are rounded to the safe side.

    Example:
        >>> import torch
        >>> from otnn.guarantees import Potential, bracket
        >>> from otnn.lipschitz import bound
        >>> from otnn.models import build
        >>> model = build("dense", (1, 8, 8), 2, widths=(32,)).eval()
        >>> in_words(bracket(Potential(model, torch.rand(2, 1, 8, 8), None)))[0]
        'How far the boundary is: no guarantee, as the network has no proven Lipschitz bound.'
    """
    topic, say = _SENTENCES.get(guarantee.name, _SENTENCES["masking_ceiling"])
    return tuple(
        f"{topic}: no guarantee, as {reason}."
        if reason and not bool(guarantee.bound[k] == guarantee.bound[k])
        else say(guarantee, k)
        for k, reason in enumerate(guarantee.reason)
    )


def _bracket(found: Guarantee, k: int) -> str:
    lower, radius, upper = found.bound[k], found.details["radius"][k], found.details["upper"][k]
    # the pair that was asked for decides the prediction, up to less than the digits shown
    decides = bool(radius >= 0.999 * lower)
    least = _number(lower.minimum(radius) if decides else lower, ROUND_FLOOR)
    what = "alter this prediction" if decides else "bring the other class level with the predicted one"
    first = f"No change of the whole image with an L2 norm below {least} can {what}"
    if not bool(upper < float("inf")):
        return f"{first}; {found.reason[k]}."
    outside = float(found.details["outside"][k])
    end = f"one of at most {_number(upper, ROUND_CEILING)} along the gradient does"
    if outside > 0:
        share = _percent(outside) if outside >= 0.01 else "less than 1 %"
        end += f", though it takes {share} of the values out of the range of pixels"
    return f"{first}; {end}."


def _stability(found: Guarantee, k: int) -> str:
    way = f"Along the way to the other class, of L2 length {_number(found.details['length'][k])},"
    if bool(found.vacuous[k]):
        return f"{way} nothing is certain of how much the map of the lead over that class turns: {found.reason[k]}."
    return (
        f"{way} the map of the lead over that class differs from its direction at this image by at most "
        f"{_percent(math.sqrt(float(found.bound[k])), up=True)} in root mean square, and keeps within 60 degrees of it "
        f"over at least {_percent(float(found.details['steady'][k]), down=True)} of the way."
    )


def _agreement(found: Guarantee, k: int) -> str:
    limit = float(found.details["relative"][k])
    measured = float(found.details["measured"][k] / found.details["length"][k])
    what = (
        "Integrated Gradients along the way to the other class, and the map of the lead over that class times that "
        "way, differ by"
    )
    if bool(found.vacuous[k]):
        return f"{what} {_percent(measured)} of its total; nothing useful is certain: {found.reason[k]}."
    return f"{what} at most {_percent(limit, up=True)} of its total ({_percent(measured)} measured)."


def _smoothing(found: Guarantee, k: int) -> str:
    top, marked = (int(found.details[name][k].sum()) for name in ("top", "candidates"))
    if bool(found.vacuous[k]):
        needed = float(found.details["needed"][k])
        mend = f"; some {needed:,.0f} would do" if needed < 1e9 else ""
        return f"Which {top} pixels of the smoothed map matter most is not certain: {found.reason[k]}{mend}."
    confidence = f"{float(found.details['confidence'][k]) * 100:.6g} %"
    return (
        f"With {confidence} confidence the {top} pixels of the smoothed map that matter most are among {marked} "
        f"known ones, for this image and every image within an L2 norm of {_number(found.bound[k], ROUND_FLOOR)}."
    )


def _constant(found: Guarantee, k: int) -> str:
    if bool(found.bound[k] == float("inf")):
        return "The map of the lead over the other class is exactly the same for every image."
    radius = _number(found.bound[k], ROUND_FLOOR)
    sentence = (
        f"The map of the lead over the other class is exactly the same for every image within an L2 norm of {radius}"
    )
    return f"{sentence}, which is less than one grey level of one pixel." if bool(found.vacuous[k]) else f"{sentence}."


def _ceiling(found: Guarantee, k: int) -> str:
    ratio = found.details["ratio"][k]
    used = float(ratio[~ratio.isnan()].mean()) if bool((~ratio.isnan()).any()) else 0.0
    safe = _percent(float(found.details["safe"][k]), down=True)
    sure = "no mask is" if bool(found.vacuous[k]) else f"{safe} of the masks are"
    return (
        "Hiding pixels changes the lead by no more than it changes the picture: "
        f"{sure} certain to leave the decision; on average the lead changed by {_percent(used)} of what it could."
    )


def _robustness(found: Guarantee, k: int) -> str:
    if bool(found.bound[k] == float("inf")):
        return "Whichever pixels are changed, the prediction stays: no change of the image alters it."
    upper = found.details["upper"][k].min()
    attacked = f"on the sets attacked, one of at most {_number(upper, ROUND_CEILING)} did"
    end = attacked if bool(upper < float("inf")) else found.reason[k]
    return (
        "Whichever pixels are changed, a change with an L2 norm below "
        f"{_number(found.bound[k], ROUND_FLOOR)} cannot alter the prediction; {end}."
    )


def _number(value: Tensor, rounding: str = ROUND_HALF_EVEN) -> str:
    """Three digits; a bound from below is rounded down, one from above up."""
    return f"{Context(prec=3, rounding=rounding).create_decimal(repr(float(value))).normalize():f}"


def _percent(share: float, *, down: bool = False, up: bool = False) -> str:
    """A whole percentage; down where the sentence says at least, up where it says at most."""
    percent = round(share * 100, 9)  # 0.07 * 100 is more than 7
    whole = math.floor(share * 100) if down else math.ceil(percent) if up else round(percent)
    return f"{whole} %"


_SENTENCES: dict[str, tuple[str, Callable[[Guarantee, int], str]]] = {
    "boundary_bracket": ("How far the boundary is", _bracket),
    "path_stability": ("How much the map turns on the way to the other class", _stability),
    "gradient_agreement": ("How far Integrated Gradients is from the map", _agreement),
    "certified_smoothgrad": ("Which pixels of the smoothed map matter most", _smoothing),
    "constant_saliency": ("Where the map is constant", _constant),
    "masking_ceiling": ("What hiding pixels can do", _ceiling),
    "robustness_sr": ("How far the pixels of a set must change", _robustness),
}
