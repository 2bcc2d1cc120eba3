"""The page of methods: one row a loss, from the table of losses and nothing else.

``align recipes methods --markdown > docs/methods.md`` writes it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from align.losses import LOSSES
from align.losses.catalogue import KINDS, LossInfo
from align.losses.laws import LAWS

COLUMNS = ("loss", "formula", "reference", "beta", "paper", "what it is for")
HEAD = """\
# Methods

Made from the table of losses by `align recipes methods --markdown`: edit the losses, not this page. [A loss of your
own](adding-a-loss.md) is a function with a decorator.

`w` is the chosen answer, `l` the rejected one; `S` is the sum of an answer's token log-probs under the policy and `R`
under the reference (nats), `n` its length in tokens, `r = S - R`, `sigma` the logistic function. `beta` is the one
that is taken where none is given. A loss marked `soft` also takes the probability that the first answer is preferred,
in place of a sure label.
"""
TAIL = """
## Laws

Every loss is held to these on drawn inputs (`align.evals.exact.laws.check_laws`), as far as they can be put to it.
Where it says above that it breaks one, the same draws must show a counter-example.
"""


def methods_page() -> str:
    """The page as Markdown: a section for each kind of loss, then the laws."""
    lines = HEAD.splitlines()
    for kind, what in KINDS.items():
        rows = losses_of(kind)
        if rows:
            lines += ["", f"## {kind.capitalize()}", "", f"Computed on {what}.", ""]
            lines += [_row(COLUMNS), _row(["---"] * len(COLUMNS)), *(_row(_cells(info)) for info in rows)]
            broken = [line for info in rows for line in _breaks(info)]
            lines += ["", "Laws that they break:", "", *broken] if broken else []
    lines += [*TAIL.splitlines(), "", *(f"- `{law}`: {statement}." for law, statement in LAWS.items())]
    return "\n".join(lines) + "\n"


def losses_of(kind: str) -> list[LossInfo]:
    """The losses of a kind in the order of the table, those that are many in one (``logic``) last."""
    return sorted((info for info in LOSSES.values() if info.kind == kind), key=lambda info: callable(info.reference))


def reference_of(info: LossInfo) -> str:
    """Whether a loss compares the policy with a reference: yes, no, or as its settings have it."""
    if callable(info.reference):
        return "by formula"
    return "yes" if info.reference else "no"


def _cells(info: LossInfo) -> list[str]:
    beta = "" if info.default_beta is None else f"{info.default_beta:g}"
    optional = info.soft and info.kind != "selfplay"
    name = f"`{info.name}`{' soft' if optional else ''}"
    paper = re.sub(r"arXiv:(\d+\.\d+)", r"[\1](https://arxiv.org/abs/\1)", info.paper)
    return [name, f"`{info.formula}`", reference_of(info), beta, paper, info.purpose]


def _breaks(info: LossInfo) -> list[str]:
    """What a loss breaks and why, laws with one reason together."""
    laws_of: dict[str, list[str]] = {}
    for law, why in (info.laws.fails if info.laws else {}).items():
        laws_of.setdefault(why, []).append(f"`{law}`")
    said = "; ".join(f"{', '.join(laws)} ({why})" for why, laws in laws_of.items())
    return [f"- `{info.name}`: {said}"] if said else []


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
