"""The page of methods: one row a loss, from the table of losses and nothing else.

``align recipes methods --markdown > docs/methods.md`` writes it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence

from align.losses import LOSSES
from align.losses.catalogue import KINDS, Kind, LossInfo
from align.losses.laws import LAWS

COLUMNS = ("loss", "formula", "reference", "soft labels", "beta", "settings", "paper", "what it is for")
NOTATION = (
    "`w` is the chosen answer, `l` the rejected one; `S` is the sum of an answer's token log-probs under the policy, "
    "`R` under the reference (nats), `n` its length in tokens, `r = S - R`, `sigma` the logistic function; the rest "
    "is said with each kind of loss.",
    "Reference: whether the loss compares the policy with a reference model; `previous` is the policy as it was when "
    "it gave the answers.",
    "Soft labels: whether the loss also takes the probability that the first answer is preferred, in place of a sure "
    "label. `beta` and the settings have the value that is taken where none is given.",
)
NOTATION_OF: dict[Kind, str] = {
    "pair": "`eps` is `label_smoothing`. In `logic`, `P` is the formula (`logic`), `C` its condition (`where`), `A` "
    "what counts above and below (`also`), `f` the outer function, and `WMC` the probability that a formula is true "
    "where the model accepts an answer with probability `exp(S/n)` (`exp(S)` with `norm` sum).",
    "thumbs": "`w_D`, `w_U` are `desirable_weight`, `undesirable_weight`; bco's `delta` is its reward shift and its "
    "`w` the weight that `match_prompts` gives; kto's `KL` is an estimate of the KL from policy to reference, the "
    "mean `r` of prompts with the answers of others, at least 0.",
    "selfplay": "`h` and `d` are log-ratios to the previous policy, `p` is the probability that an answer is "
    "preferred, `s` a score, `P` a win rate, `A` an advantage, `t` is `step_size`.",
    "reward": "`r` is a score, `m` a margin or strength, `s(w, l)` a preference score, `o` an output and `l` its "
    "rating, `y` a label of +1 (right) or -1 (left) and `delta` what speaks for the right answer.",
}
HEAD = """\
# Methods

Made from the table of losses by `align recipes methods --markdown`: edit the losses, not this page. [A loss of your
own](adding-a-loss.md) is a function with a decorator.
"""
TAIL = """
## Laws

Every loss is held to these on drawn inputs (`align.evals.exact.laws.check_laws`), as far as they can be put to it.
Where it says above that it breaks one, the same draws must show a counter-example.
"""


def methods_page() -> str:
    """The page as Markdown: a section for each kind of loss, then the laws."""
    lines = [*HEAD.splitlines(), "", *(f"- {line}" for line in NOTATION)]
    for kind, what in KINDS.items():
        rows = losses_of(kind)
        if rows:
            said = f"Computed on {what}. {NOTATION_OF.get(kind, '')}".rstrip()
            lines += ["", f"## {kind.capitalize()}", "", said, ""]
            lines += [_row(COLUMNS), _row(["---"] * len(COLUMNS)), *(_row(_cells(info)) for info in rows)]
            broken = [line for info in rows for line in _breaks(info)]
            lines += ["", "Laws that they break:", "", *broken] if broken else []
    lines += [*TAIL.splitlines(), "", *(f"- `{law}`: {statement}." for law, statement in LAWS.items())]
    return "\n".join(lines) + "\n"


def losses_of(kind: str) -> list[LossInfo]:
    """The losses of a kind in the order of the table, those that are many in one (``logic``) last."""
    return sorted((info for info in LOSSES.values() if info.kind == kind), key=lambda info: callable(info.reference))


def reference_of(info: LossInfo) -> str:
    """Whether a loss compares the policy with a reference: yes, no, as its settings have it, or with its previous."""
    if callable(info.reference):
        return "by formula"
    if "previous" in inspect.signature(info.function).parameters:
        return "previous"
    return "yes" if info.reference else "no"


def soft_labels_of(info: LossInfo) -> str:
    """Whether a loss takes the probability that the first answer is preferred: yes, no, or always."""
    if not info.soft:
        return "no"
    preference = inspect.signature(info.function).parameters["preference"]
    return "always" if preference.default is preference.empty else "yes"


def settings_of(info: LossInfo) -> list[tuple[str, str]]:
    """What a recipe may set beside beta, each with its default."""
    settings = [(name, p) for name, p in info.parameters.items() if name != "beta"]
    return [(name, "(to be given)" if p.default is p.empty else _value(p.default)) for name, p in settings]


def _value(default: object) -> str:
    return f"{default:g}" if isinstance(default, float) else str(default).lower()  # true, as in YAML


def _cells(info: LossInfo) -> list[str]:
    beta = "" if info.default_beta is None else f"{info.default_beta:g}"
    settings = ", ".join(f"`{name}` {default}" for name, default in settings_of(info))
    paper = re.sub(r"arXiv:(\d+\.\d+)", r"[\1](https://arxiv.org/abs/\1)", info.paper)
    facts = [reference_of(info), soft_labels_of(info), beta, settings, paper, info.purpose]
    return [f"`{info.name}`", f"`{info.formula}`", *facts]


def _breaks(info: LossInfo) -> list[str]:
    """What a loss breaks and why, laws with one reason together."""
    laws_of: dict[str, list[str]] = {}
    for law, why in (info.laws.fails if info.laws else {}).items():
        laws_of.setdefault(why, []).append(f"`{law}`")
    said = "; ".join(f"{', '.join(laws)} ({why})" for why, laws in laws_of.items())
    return [f"- `{info.name}`: {said}"] if said else []


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
