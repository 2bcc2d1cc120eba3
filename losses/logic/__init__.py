"""Losses from logical formulas (arXiv:2412.17696): a statement about what the model accepts, compiled into a loss.

- ``parse``      formulas, and errors that point at the column.
- ``structure``  worlds: which of them a loss raises and which it lowers; from a loss back to its formula.
- ``compile``    weighted model counting in log space.
- ``known``      names of known losses, closed forms, entailment, monotonicity.

    from align.losses.logic import LogicLoss

    loss = LogicLoss("implies(M(l), M(w))", where="xor(M(l), M(w))")   # ORPO without its NLL term

``M(w)`` has the probability ``W = exp(norm of the chosen answer's log-probs)``, ``M(l)`` the rejected one's ``L``,
``Ref(w)`` and ``Ref(l)`` the same under the reference. The loss is ``f(rho)`` with ``rho = log WMC(top)/WMC(bottom)``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from align.losses.catalogue import Loss, find_loss, pairwise_loss
from align.losses.checks import Positive, check_log_probs, log_ratio, log_ratios, wide
from align.losses.laws import Laws
from align.losses.soft_labels import expected
from align.losses.types import LossOutput, PairLogps, SequenceLogps, check_type

from .compile import directions, log_odds
from .known import Report, closed_form, has_negations, known_name, not_monotone, relation, report
from .parse import FormulaError, parse
from .structure import Structure, decompile, structure

__all__ = [
    "FormulaError",
    "LogicLoss",
    "Report",
    "Structure",
    "closed_form",
    "decompile",
    "known_name",
    "logic",
    "parse",
    "relation",
    "report",
    "structure",
]

Outer = Literal["logistic", "squared", "hinge", "rrhf"]
Norm = Literal["mean", "sum"]
FORMULA = "it depends on the formula: DPO's obeys it, unCPO's does not"


def names_reference(*, logic: str, where: str = "true", also: str = "false", **_: object) -> bool:
    """Whether a formula has Ref atoms."""
    return any(atom.model == "Ref" for atom in structure(logic, where, also).atoms)


@pairwise_loss(
    "logic",
    reference=names_reference,
    default_beta=1.0,
    paper="arXiv:2412.17696",
    formula="f(rho), rho = log WMC((P or A) and C) / WMC((not P or A) and C)",
    purpose="a loss of your own: a formula over what the model accepts (align recipes logic)",
    laws=Laws(not_applicable={"reference_shift": FORMULA, "prompt_shift": FORMULA, "swap": FORMULA}),
)
def logic(
    policy: PairLogps | SequenceLogps,
    reference: PairLogps | SequenceLogps | None = None,
    preference: Tensor | None = None,
    *,
    logic: str,
    where: str = "true",
    also: str = "false",
    f: Outer = "logistic",
    beta: Positive,
    norm: Norm = "mean",
) -> LossOutput:
    """The loss that a formula compiles to (arXiv:2412.17696).

    ``rho = log WMC((P or P_A) and P_C) / WMC((not P or P_A) and P_C)``; the loss is, by ``f``:

    - logistic: ``-log sigmoid(beta * rho)``; at beta 1 without P_C and P_A this is ``-log WMC(P)``, semantic loss;
    - squared: ``(rho - 1 / (2 * beta))^2``;
    - hinge: ``max(0, beta - rho)``, where beta is the margin in nats;
    - rrhf: ``max(0, -rho)``, which has no use for beta.

    Args:
        policy: log-probs of B pairs, or (B, K) of K answers to a prompt, which the formula then numbers from 1.
        reference: the same under the reference, for formulas with Ref atoms; no gradient flows into it.
        preference: probability that the chosen answer is preferred, (B,); None: it is. The loss is then its
            expectation, with the answers the other way round for the other label. Of pairs alone: the numbered
            answers of (B, K) have no other way round.
        logic: P, such as ``implies(M(l), M(w))``.
        where: P_C; worlds outside do not count.
        also: P_A; worlds inside count above and below.
        f: outer function.
        beta: see ``f``.
        norm: an answer's probability is ``exp(mean log-prob per token)``, or ``exp(sum)``. On sums ``1 - P`` is 1 to
            all digits, so that formulas whose rho has negations see one answer alone, or none: a warning says so.

    Returns:
        Unreduced loss (B,). The rewards' margin is ``beta * rho`` (``rho`` for hinge and rrhf): what rho says of each
        answer where it is such a sum (CPO, ORPO, DPO), else the logarithms of the two counts, (B, 2). For (B, K):
        each answer's normalised log-prob, or its log-ratio for formulas with Ref atoms, scaled alike.

    Raises:
        FormulaError: the formula cannot be read, or gives no loss (a ValueError).
        ValueError: beta is not positive, f or norm is unknown, the reference is missing or scores other completions,
            a log-prob is over 0, the formula names an answer that is not there, or numbered answers come with a
            preference.
    """
    worlds = _checked(logic, where, also, norm)
    models = {"M": _answers("policy", policy)}
    if preference is not None and not isinstance(policy, PairLogps):
        raise ValueError("preference: soft labels are of pairs, and these are numbered answers to a prompt")
    if any(atom.model == "Ref" for atom in worlds.atoms):
        if reference is None:
            raise ValueError("reference: the formula has Ref atoms, and no reference log-probs were given")
        models["Ref"] = _answers("reference", reference)
        compare: Callable[..., object] = log_ratios if isinstance(policy, PairLogps) else log_ratio
        compare(policy, reference)  # for its checks: the same completions
    _check_answers(worlds, len(models["M"]))

    values = {
        model: [wide(one.total) / one.length if norm == "mean" else wide(one.total) for one in answers]
        for model, answers in models.items()
    }
    if "Ref" in values:
        values["Ref"] = [value.detach() for value in values["Ref"]]
    loss, plus, minus = _compiled(worlds, values, f, beta)
    scale = beta if f in ("logistic", "squared") else 1.0
    if isinstance(policy, PairLogps):
        if preference is not None:
            exchanged, *_ = _compiled(worlds, {model: each[::-1] for model, each in values.items()}, f, beta)
            loss = expected(loss, exchanged, preference)
        return LossOutput.from_rewards(loss, scale * plus, scale * minus)
    rewards = scale * torch.stack(values["M"], dim=1).detach()
    return LossOutput(loss, rewards - scale * torch.stack(values["Ref"], dim=1) if "Ref" in values else rewards)


def _compiled(
    worlds: Structure, values: Mapping[str, list[Tensor]], f: Outer, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and the two parts of rho; ``values`` are normalised log-probs of each answer, by model."""
    rho, plus, minus = log_odds(worlds, [values[atom.model][atom.position] for atom in worlds.atoms])
    loss = {
        # The scaled parts are subtracted, as in the losses written by hand.
        "logistic": lambda: -F.logsigmoid(beta * plus - beta * minus),
        "squared": lambda: (rho - 0.5 / beta) ** 2,
        "hinge": lambda: F.relu(beta - rho),
        "rrhf": lambda: F.relu(-rho),
    }[f]()
    return loss, plus, minus


class LogicLoss(Loss):
    """A formula as a loss that ``PairTrainer(loss=...)`` and ``combine`` take; the arguments are those of ``logic``.

    Raises:
        FormulaError: the formula cannot be read, or gives no loss (a ValueError).
        ValueError: f or norm is unknown, or beta is not positive.
    """

    def __init__(
        self,
        logic: str,
        *,
        where: str = "true",
        also: str = "false",
        f: Outer = "logistic",
        beta: float = 1.0,
        norm: Norm = "mean",
        weight: float = 1.0,
    ) -> None:
        settings = {"logic": logic, "where": where, "also": also, "f": f, "beta": beta, "norm": norm}
        super().__init__(find_loss("logic"), settings, weight)
        _checked(logic, where, also, norm)

    def __call__(
        self,
        policy: PairLogps | SequenceLogps,
        reference: PairLogps | SequenceLogps | None,
        preference: Tensor | None = None,
    ) -> LossOutput:
        """The loss of B pairs, or of (B, K) answers."""
        return super().__call__(policy, reference, preference)  # type: ignore[arg-type]

    def report(self) -> Report:
        """Truth table, closed form, name and entailments."""
        return report(self.settings["logic"], self.settings["where"], self.settings["also"])


@lru_cache(maxsize=256)
def _checked(logic: str, where: str, also: str, norm: Norm) -> Structure:
    """The worlds of a formula, with warnings said once: the cache remembers."""
    found = structure(logic, where, also)
    moves = dict(zip(found.atoms, directions(found), strict=True))
    if reason := not_monotone(moves):
        warnings.warn(f"logic {logic!r} is not monotone: {reason}; training can lower the winner", stacklevel=3)
    if norm == "sum" and has_negations(found):
        form = closed_form(found) or "rho"
        warnings.warn(
            f"logic {logic!r} with norm sum: {form} has probabilities 1 - P, which are 1 to all digits for a whole "
            "answer; use norm mean",
            stacklevel=3,
        )
    return found


def _answers(model: str, given: PairLogps | SequenceLogps) -> list[SequenceLogps]:
    if isinstance(given, PairLogps):
        for side, answers in vars(given).items():
            check_log_probs(f"{model}.{side}", answers)
        return [given.chosen, given.rejected]
    check_type(model, given, SequenceLogps)
    check_log_probs(model, given)
    if given.total.ndim != 2:
        raise ValueError(f"answers to a prompt have log-probs of shape (B, K), not {tuple(given.total.shape)}")
    return [SequenceLogps(given.total[:, k], given.length[:, k]) for k in range(given.total.shape[1])]


def _check_answers(worlds: Structure, count: int) -> None:
    last = max(worlds.atoms, key=lambda atom: atom.position)
    if last.position >= count:
        raise ValueError(f"the formula names {last}, and there are {count} answers to a prompt")
    if last.answer in ("w", "l") and count > 2:
        raise ValueError(f"the formula names {last}, and there are {count} answers to a prompt; number them from 1")
