"""The table of the attacks: what each is, which norms it knows and where it comes from."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version

from torch import Tensor

from otnn.attacks.autoattack_attacks import apgd, fab, square
from otnn.attacks.foolbox_attacks import carlini_wagner, ddn, deepfool, fmn
from otnn.attacks.minimal import minimal_norm
from otnn.attacks.objective import NORMS
from otnn.attacks.pgd import pgd
from otnn.attacks.step import gradient_step


@dataclass(frozen=True)
class Attack:
    """One attack.

    Attributes:
        function: `(model, inputs, labels, radius, ...)`, or without the radius if `minimal`; returns the points
            (n, ...), a failure being any point that `evaluate` does not count.
        minimal: whether it looks for the nearest adversarial point, instead of one within a radius.
        norms: those that it knows.
        source: the library that it comes from.
        draws: whether it draws random numbers, from the `generator` that every attack takes.
        passes: forwards and backwards in words, as run by default.
    """

    function: Callable[..., Tensor]
    minimal: bool
    norms: tuple[str, ...]
    source: str
    draws: bool
    passes: str


OWN: Mapping[str, Attack] = {
    "step": Attack(gradient_step, False, NORMS, "otnn", False, "1 forward, 1 backward"),
    "pgd": Attack(pgd, False, NORMS, "otnn", True, "up to 42 forwards, 41 backwards"),
    "minimal": Attack(minimal_norm, True, NORMS, "otnn", False, "some 100 forwards, 35 backwards on ten classes"),
}
# Those of foolbox and pyautoattack import their library when they are called
RIVALS: Mapping[str, Attack] = {
    "carlini_wagner": Attack(carlini_wagner, True, ("l2",), "foolbox", False, "1,800 forwards and backwards"),
    "deepfool": Attack(
        deepfool,
        True,
        NORMS,
        "foolbox",
        False,
        "at most 50 forwards and backwards for each of 9 rivals",
    ),
    "ddn": Attack(ddn, True, ("l2",), "foolbox", True, "100 forwards and backwards"),
    "fmn": Attack(fmn, True, NORMS, "foolbox", False, "100 forwards and backwards"),
    "fab": Attack(fab, True, NORMS, "pyautoattack", False, "200 forwards, 100 backwards for each class"),
    "apgd": Attack(apgd, False, NORMS, "pyautoattack", True, "101 forwards and backwards"),
    "square": Attack(square, False, NORMS, "pyautoattack", True, "1,001 forwards"),
}
ATTACKS: Mapping[str, Attack] = {**OWN, **RIVALS}


def libraries(names: Iterable[str]) -> dict[str, str]:
    """The versions of the installed libraries that attacks come from, beside otnn itself.

    Example:
        >>> libraries(["step", "pgd"])
        {}
    """
    return {source: version(source) for source in sorted({ATTACKS[name].source for name in names} - {"otnn"})}
