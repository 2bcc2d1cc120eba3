"""The laws that a loss may obey, and how it declares where it stands with each.

Every law is a statement about all inputs. A loss that breaks one says why, and the law suite
(``align.evals.exact.laws``) checks both: what is declared to hold must hold on drawn inputs, what is declared to fail
must fail on one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

LAWS: dict[str, str] = {
    "reference_shift": "a constant added to an answer's log-prob under policy and reference alike changes nothing",
    "prompt_shift": "a constant added to every answer of a prompt (log-probs or rewards) changes nothing",
    "swap": "exchanging the answers negates the rewards' margin, and the loss is a function of that margin alone",
    "small_beta": "as beta goes to 0 the gradient vanishes",
    "large_beta": "as beta grows, the loss of answers that are ranked right goes to 0",
    "duplication": "every token said twice (log-probs and lengths doubled) changes nothing",
    "rows": "a row's loss does not depend on the other rows of its batch",
    "permutation": "rows in another order give the same losses in that order",
    "padding": "the side and amount of padding, and what stands in it, change nothing",
    "gradient": "the gradient agrees with finite differences in float64",
    "finite": "loss and gradient are finite at log-ratios, scores and embeddings of +-1e4, and at the bound of 1e6",
    "bf16": "bf16 inputs give the float64 loss of the same numbers to 1e-5 relative or 1e-6 absolute",
}


# Reasons that several losses share.
SUMS = "it is made of sums over tokens, which double"
MEANS = "the constant is divided by lengths that differ"
SINGLE = "one answer at a time: nothing is ranked"
SCORES = {
    "reference_shift": "no log-probs",
    "small_beta": "no beta",
    "large_beta": "no beta",
    "duplication": "no tokens",
    "padding": "no tokens",
}
"""Of losses on scores: the laws that do not apply."""


@dataclass(frozen=True)
class Laws:
    """Where a loss stands with each law: one that is not named here holds.

    Args:
        fails: law to reason, in one clause; the suite then looks for a counter-example and must find one.
        not_applicable: law to reason.

    Raises:
        ValueError: a law that does not exist, or one that is named twice.
    """

    fails: Mapping[str, str] = field(default_factory=dict)
    not_applicable: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = sorted({*self.fails, *self.not_applicable} - set(LAWS))
        if unknown:
            raise ValueError(f"no law is named {', '.join(unknown)}; the laws: {', '.join(LAWS)}")
        twice = sorted(set(self.fails) & set(self.not_applicable))
        if twice:
            raise ValueError(f"{', '.join(twice)}: a law fails or does not apply, not both")

    def standing(self, law: str) -> Literal["holds", "fails", "not applicable"]:
        """Where the loss stands with one law."""
        if law in self.fails:
            return "fails"
        return "not applicable" if law in self.not_applicable else "holds"
