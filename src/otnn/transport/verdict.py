"""The audit in plain words: how far the maps and counterfactuals of a network may be read as optimal transport."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from otnn.transport.audit import Audit, PotentialAudit

# Gaps that count as near and as fair; beyond the second the plan is followed in part only.
NEAR, FAIR = 0.03, 0.15

# What tables show of a potential as audit.json tells of it: name, what it says, and the text of an entry.
FIGURES: tuple[tuple[str, str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("gap", "what the loss lacks to the exact optimum, as a share of W1", lambda entry: _share(entry["gap"])),
    (
        "slack.",
        "difference of the scores of partners over their distance, mean",
        lambda entry: _mean(entry["slackness"]),
    ),
    (
        "cos +",
        "of the gradient at positives with the way to the partner, median",
        lambda entry: _middle(entry["cosine_x"]),
    ),
    ("cos -", "of the gradient at negatives with that way, median", lambda entry: _middle(entry["cosine_z"])),
    (
        "cos in",
        "of the gradient inside the segments between partners, median",
        lambda entry: _middle(entry["segment_cosine"]),
    ),
    ("norm in", "of the gradient there, median", lambda entry: _middle(entry["segment_norm"])),
    (
        "zero",
        "samples that one gradient step brings to 5 % of their score or less",
        lambda entry: _share(entry["reached"]),
    ),
)


def verdict(train: Audit, held_out: Audit | None = None) -> list[str]:
    """Sentences on a network: its gap, its directions, where the loss lies, and what the theory allows to say.

    Args:
        train: the audit on the data of the training.
        held_out: the audit on other data.
    """
    sentences = [_gap(train, "training"), _direction(train), _cause(train), _propositions(train)]
    if held_out is not None:
        sentences += [_gap(held_out, "held-out"), *_bracket(held_out)]
    return [sentence for sentence in sentences if sentence]


def gaps(audit: Audit) -> list[tuple[float, PotentialAudit]]:
    """The gaps of all potentials that have one, smallest first."""
    found = [(entry.measures.gap, entry) for entry in audit.potentials if entry.measures.gap is not None]
    return sorted(found, key=lambda pair: pair[0])


def _gap(audit: Audit, data: str) -> str:
    found = gaps(audit)
    if not found:
        return f"On the {data} samples both classes are the same points: there is nothing to transport."
    middle, worst = found[len(found) // 2][0], found[-1]
    against = "the exact optimum of its own loss" if audit.exact else "the exact optimum of each pair of classes"
    text = f"On the {data} samples the network stays {middle:.1%} of W1 short of {against}"
    if len(found) > 1:
        text += f" in the median of {len(found)}, and {worst[0]:.1%} at the worst ({worst[1].name})"
    how = "closely" if middle <= NEAR else "fairly well" if middle <= FAIR else "in part only"
    return f"{text}: it follows the transport plan {how}."


def _direction(audit: Audit) -> str:
    cosines = [s.median for entry in audit.potentials for s in (entry.measures.cosine_x, entry.measures.cosine_z) if s]
    norms = [entry.measures.segment_norm.median for entry in audit.potentials if entry.measures.segment_norm]
    if not cosines:
        return ""
    angle = math.degrees(math.acos(min(1.0, max(-1.0, _median(cosines)))))
    text = f"The gradient at a sample points {angle:.0f} degrees away from the sample's partner under the plan (median)"
    if norms:
        text += f", and on the way between the two it has {_median(norms):.0%} of the norm that it has at the optimum"
    return text + "."


def _cause(audit: Audit) -> str:
    parts = [entry.measures.parts for entry in audit.potentials if entry.measures.parts]
    if not parts:
        return ""
    transport = sum(part.transport for part in parts)
    rest = sum(part.hinge_x + part.hinge_z + part.margin for part in parts)
    if transport + rest <= 1e-9:
        return ""
    share = transport / (transport + rest)
    if share >= 0.5:
        return f"{share:.0%} of the gap is transport: scores of partners differ by less than their distance."
    return (
        f"{1 - share:.0%} of the gap is the hinge: samples lie inside the margin that the optimum would keep outside."
    )


def _propositions(audit: Audit) -> str:
    hold = [entry for entry in audit.potentials if entry.hypotheses.hold]
    if len(audit.potentials) > 1:
        return (
            f"For {len(hold)} of {len(audit.potentials)} problems the exact optimum separates the samples with a "
            "margin of at most half their distance, as Proposition 2 asks."
        )
    facts = audit.potentials[0].hypotheses
    where = f"The classes are {facts.distance:.3g} apart, and the margin is {facts.margin:.3g}"
    if facts.hold:
        return f"{where}; the exact optimum separates all samples: Proposition 2 holds for it."
    why = [] if facts.margin_fits else ["the margin exceeds half that distance, so the hinge cannot vanish"]
    if not facts.optimum_separates:
        why.append(f"even the exact optimum has only {facts.optimum_right:.1%} of the signs right")
    return f"{where}; {' and '.join(why)}: Proposition 2 does not hold here."


def _bracket(audit: Audit) -> list[str]:
    if len(audit.potentials) > 1 or audit.potentials[0].bracket is None:
        return []
    bracket = audit.potentials[0].bracket
    low, high = bracket.kr, bracket.minibatch_w1
    return [
        f"W1 of the two classes as such lies between {low.mean:.3g} ({low.low:.3g} to {low.high:.3g}), what the "
        f"network shows of it, and {high.mean:.3g} ({high.low:.3g} to {high.high:.3g}), the mean over minibatches of "
        f"{bracket.minibatch}."
    ]


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _mean(summary: Mapping[str, Any] | None) -> str:
    return "-" if summary is None else f"{summary['mean']:.3f}"


def _middle(summary: Mapping[str, Any] | None) -> str:
    """The median, which stands in the middle of the quantiles."""
    return "-" if summary is None else f"{summary['quantiles'][2]:.3f}"
