"""The audit in plain words: how far the maps and counterfactuals of a network may be read as optimal transport."""

import math
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from otnn.transport.audit import Audit, PotentialAudit

# Mean slackness from which on the plan counts as followed closely, fairly well, and in part.
CLOSE, FAIR, PART = 0.97, 0.85, 0.3

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
    sentences = [_gap(train, "training"), _followed(train), _direction(train), _cause(train), _propositions(train)]
    sentences.append(_coincident(train))
    if held_out is not None:
        sentences += [_gap(held_out, "held-out"), _bracket(held_out)]
    return [sentence for sentence in sentences if sentence]


def gaps(audit: Audit) -> list[tuple[float, PotentialAudit]]:
    """The gaps of all potentials that have one, smallest first."""
    found = [(entry.measures.gap, entry) for entry in audit.potentials if entry.measures.gap is not None]
    return sorted(found, key=lambda pair: pair[0])


def _gap(audit: Audit, data: str) -> str:
    found = gaps(audit)
    if not found:
        return f"On the {data} samples both classes are the same points: there is nothing to transport."
    worst = found[-1]
    if audit.exact:
        against = "the exact optimum of its own loss"
    else:
        against = "the exact optimum of each pair of classes" if len(found) > 1 else "an exact optimum"
    text = (
        f"On the {data} samples the network stays {_percent(median(gap for gap, _ in found))} of W1 short of {against}"
    )
    if len(found) > 1:
        text += f" in the median of {len(found)}, and {_percent(worst[0])} at the worst ({worst[1].name})"
    idle = [
        entry for gap, entry in found if entry.measures.constant_gap is not None and gap >= entry.measures.constant_gap
    ]
    if idle and len(found) == 1:
        text += ", no less than a constant score would"
    elif idle:
        text += f"; for {len(idle)} of them that is no less than for a constant score"
    return f"{text}."


def _followed(audit: Audit) -> str:
    slackness = [entry.measures.slackness.mean for entry in audit.potentials if entry.measures.slackness]
    if not slackness:
        return ""
    middle = median(slackness)
    grades = ((CLOSE, "closely"), (FAIR, "fairly well"), (PART, "in part only"), (-math.inf, "hardly at all"))
    how = next(word for least, word in grades if middle >= least)
    return f"It follows the transport plan {how}: it tells partners apart by {middle:.0%} of their distance."


def _direction(audit: Audit) -> str:
    known = [
        entry.measures for entry in audit.potentials if entry.measures.segment_cosine and entry.measures.segment_norm
    ]
    if not known:
        return ""
    cosine = median(found.segment_cosine.median for found in known if found.segment_cosine)
    norm = median(found.segment_norm.median for found in known if found.segment_norm)
    angle = math.degrees(math.acos(min(1.0, max(-1.0, cosine))))
    return (
        f"Between a sample and its partner the gradient points {angle:.0f} degrees away from the way (median), and has "
        f"{norm:.0%} of the norm that it has at the optimum."
    )


def _cause(audit: Audit) -> str:
    parts = [entry.measures.parts for entry in audit.potentials if entry.measures.parts]
    transport = sum(part.transport for part in parts)
    rest = sum(part.hinge_x + part.hinge_z + part.margin for part in parts)
    if transport + rest <= 1e-9:
        return ""
    share = transport / (transport + rest)
    if share >= 0.5:
        return f"{share:.0%} of the gap is transport: scores of partners differ by less than their distance."
    return f"{1 - share:.0%} of the gap is the hinge: other samples stand inside the margin than at the optimum."


def _propositions(audit: Audit) -> str:
    known = [entry.hypotheses for entry in audit.potentials if entry.hypotheses]
    if not known:
        return ""
    if len(known) > 1:
        separated = sum(facts.optimum_separates for facts in known)
        vanishing = sum(facts.hinge_can_vanish for facts in known)
        return (
            f"The optimum that was found separates the samples in {separated} of {len(known)} problems, so that "
            f"Proposition 2 holds for it, and in {vanishing} the hinge can vanish."
        )
    facts = known[0]
    where = (
        f"The classes, as drawn, are {facts.distance:.3g} apart, and the margin of the optimum is {facts.margin:.3g}"
    )
    hinge = "" if facts.hinge_can_vanish else ", more than half of that, so that the hinge cannot vanish"
    if facts.optimum_separates:
        return f"{where}{hinge}; the optimum separates all samples: Proposition 2 holds for it."
    return (
        f"{where}{hinge}; the optimum that was found has {_percent(facts.optimum_right)} of the signs right, so that "
        "Proposition 2 does not speak of it."
    )


def _coincident(audit: Audit) -> str:
    pairs = sum(entry.measures.coincident for entry in audit.potentials)
    if not pairs:
        return ""
    return f"{pairs} pairs of the plan are the same point in both classes; they have no direction."


def _bracket(audit: Audit) -> str:
    if len(audit.potentials) > 1 or audit.potentials[0].bracket is None:
        return ""
    bracket = audit.potentials[0].bracket
    low, high = bracket.kr, bracket.minibatch_w1
    return (
        f"W1 of the two classes as such lies between {low.mean:.3g} ({low.low:.3g} to {low.high:.3g}), what the "
        f"network shows of it, and {high.mean:.3g} ({high.low:.3g} to {high.high:.3g}), the mean over minibatches of "
        f"{bracket.minibatch}."
    )


def _percent(value: float) -> str:
    return f"{round(value, 9) + 0.0:.1%}"  # no -0.0 %


def _share(value: float | None) -> str:
    return "-" if value is None else _percent(value)


def _mean(summary: Mapping[str, Any] | None) -> str:
    return "-" if summary is None else f"{summary['mean']:.3f}"


def _middle(summary: Mapping[str, Any] | None) -> str:
    """The median, which stands in the middle of the quantiles."""
    return "-" if summary is None else f"{summary['quantiles'][2]:.3f}"
