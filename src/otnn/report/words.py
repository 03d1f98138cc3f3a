"""Numbers as a reader reads them: certificates are rounded down, bounds up, never past what is guaranteed."""

import math
from collections.abc import Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

_ATTACKS = {
    "step": "gradient step",
    "pgd": "PGD",
    "minimal": "minimal norm",
    "carlini_wagner": "C&W",
    "deepfool": "DeepFool",
    "ddn": "DDN",
    "fmn": "FMN",
    "fab": "FAB",
    "apgd": "APGD",
    "square": "Square",
}
_NETWORKS = {
    "otnn": "Optimal-transport network",
    "unconstrained": "Ordinary network",
    "adversarial": "Ordinary network, trained on attacks",
}
_METHODS = {
    "gradient_input": "Gradient × input",
    "integrated_gradients": "Integrated Gradients",
    "smoothgrad": "SmoothGrad",
    "squaregrad": "SquareGrad",
    "vargrad": "VarGrad",
    "gradcam": "Grad-CAM",
    "gradcam_pp": "Grad-CAM++",
    "guided_backprop": "Guided Backprop",
    "rise": "RISE",
    "lime": "LIME",
    "kernel_shap": "Kernel SHAP",
    "hsic": "HSIC",
    "forgrad": "FORGrad",
    "saliency-smoothgrad": "Saliency to SmoothGrad",
}


def percent(share: float) -> str:
    """A share in [0, 1] as a percentage; 100 and 0 stand for exactly all and none.

    Example:
        >>> percent(0.97777), percent(1.0), percent(0.9999), percent(0.99999)
        ('97.8 %', '100 %', '99.99 %', 'above 99.99 %')
    """
    if share in (0, 1):
        return f"{100 * share:.0f} %"
    text = f"{100 * share:.1f}"
    if text not in ("100.0", "0.0"):
        return f"{text} %"
    text = f"{100 * share:.2f}"
    return {"100.00": "above 99.99 %", "0.00": "below 0.01 %"}.get(text, f"{text} %")


def down(value: float, digits: int = 3) -> str:
    """A certified radius, rounded down: what is printed is still certified.

    Example:
        >>> down(0.2999), down(0.004567), down(0.0)
        ('0.299', '0.0045', '0')
    """
    if value == 0:
        return "0"
    if value < 0.01:
        digits = 1 - math.floor(math.log10(value))
    return str(Decimal(value).quantize(Decimal(1).scaleb(-digits), rounding=ROUND_FLOOR))


def up(value: float, digits: int = 6) -> str:
    """A Lipschitz bound, rounded up: what is printed still bounds.

    Example:
        >>> up(1.0000038), up(1.0)
        ('1.000004', '1')
    """
    text = str(Decimal(value).quantize(Decimal(1).scaleb(-digits), rounding=ROUND_CEILING))
    return text.rstrip("0").rstrip(".")


def evenly(radius: float, shape: Sequence[int]) -> str:
    """A radius as the change of every value, in grey levels of 255, when it is spread evenly; rounded down.

    Example:
        >>> evenly(0.5, (1, 8, 8))
        '15.9'
    """
    levels = radius / math.sqrt(math.prod(shape)) * 255
    return down(levels, 1 if levels >= 1 else 2)


def in_one_place(radius: float, channels: int) -> str:
    """A radius as pixels turned all the way from black to white, or as a part of that way for one pixel.

    Turning a pixel from black to white changes each of its channels by 1, an L2 norm of sqrt(channels).

    Example:
        >>> in_one_place(2.0, 1), in_one_place(1.0, 1), in_one_place(0.5, 1), in_one_place(1.5, 3)
        ('4.0 pixels', '1 pixel', '50 % of the way for 1 pixel', '86 % of the way for 1 pixel')
    """
    pixels = radius**2 / channels
    if 1 <= pixels < 1.05:
        return "1 pixel"
    if pixels >= 1:
        return f"{math.floor(pixels * 10) / 10:.1f} pixels"
    return f"{math.floor(100 * math.sqrt(pixels))} % of the way for 1 pixel"


def figure(value: float) -> str:
    """Three digits, with the signs of print.

    Example:
        >>> figure(-0.98801), figure(2.6), figure(1234.5), figure(-0.0000149), figure(0.0)
        ('−0.988', '2.60', '1230', '−1.49 × 10⁻⁵', '0')
    """
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    power = int(exponent)
    if -4 < power < 6:
        text = f"{float(f'{value:.2e}'):.{max(0, 2 - power)}f}"
    else:
        text = f"{mantissa} × 10{str(power).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"
    return text.replace("-", "−")


def method(name: str) -> str:
    """An explanation method as it is written in the literature.

    Example:
        >>> method("integrated_gradients"), method("smoothgrad")
        ('Integrated Gradients', 'SmoothGrad')
    """
    return _METHODS.get(name, name.replace("_", " ").capitalize())


def network(name: str) -> str:
    """A network in plain words."""
    return _NETWORKS.get(name, name)


def attack(name: str) -> str:
    """An attack as its authors write it."""
    return _ATTACKS.get(name, name)


def interval(share: float, count: int) -> str:
    """The 95 % Wilson interval of a share that was counted on `count` independent samples.

    Example:
        >>> interval(0.9, 100)
        '82.6 % to 94.5 %'
    """
    z = 1.959963984540054
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return f"{percent(round(max(0.0, centre - half), 12))} to {percent(round(min(1.0, centre + half), 12))}"


def margin(value: float | Sequence[float] | None) -> str:
    """A margin, or the range of margins per class.

    Example:
        >>> margin(0.5), margin([0.25, 0.5]), margin(None)
        ('0.5', '0.25 to 0.5, by class', '–')
    """
    if value is None:
        return "–"
    if isinstance(value, int | float):
        return f"{value:.4g}"
    return f"{min(value):.4g} to {max(value):.4g}, by class"


def seconds(value: float | None) -> str:
    """A duration.

    Example:
        >>> seconds(11.79), seconds(754.0), seconds(None)
        ('11.8 s', '12 min 34 s', '–')
    """
    if value is None:
        return "–"
    if value < 120:
        return f"{value:.1f} s"
    return f"{int(value) // 60} min {int(value) % 60} s"
