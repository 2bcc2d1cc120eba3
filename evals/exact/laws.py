"""The law suite: every law of ``align.losses.laws``, checked on drawn inputs for a loss of any kind.

    from align.evals.exact.laws import check_laws

    for result in check_laws("dpo"):
        print(result)

A law that is declared to hold must hold on every draw; one that is declared to fail must be broken by one of them, and
the result carries that counter-example; one that does not apply carries its reason, and must be one that cannot be put
to the loss at all. A loss that declares no laws fails. No law passes for want of a case: one that found nothing to
compare in any draw (no row ranked right, no point away from a kink) fails as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator

from align.losses.catalogue import LOSSES, LossFunction, LossInfo, find_loss
from align.losses.laws import LAWS

from .drawn import LEVELS, Batch, Subject, draw
from .law_checks import CHECKS, Finding


@dataclass(frozen=True)
class LawResult:
    """Where a loss stands with one law, and whether the draws bear it out.

    Args:
        loss: the loss's name.
        law: the law's name, a key of ``LAWS``.
        standing: what is declared: holds, fails, not applicable, or undeclared.
        passed: whether the draws agree.
        detail: the declared reason, and what was seen.
        example: the drawn inputs that break the law, declared or not; None where none did.
    """

    loss: str
    law: str
    standing: str
    passed: bool
    detail: str
    example: Batch | None = None

    def __str__(self) -> str:
        return f"{'ok  ' if self.passed else 'MISS'} {self.loss} · {self.law} · {self.standing}: {self.detail}"


def check_laws(
    loss: LossInfo | LossFunction | str,
    *,
    settings: Mapping[str, Any] | None = None,
    only: Sequence[str] = tuple(LAWS),
    seed: int = 0,
    draws: int = 10,
) -> list[LawResult]:
    """Check laws on drawn inputs; one result a law, in the order given.

    Args:
        loss: a row of the table, or the name or the function of a loss that is in it.
        settings: the loss's settings; those not given are its defaults.
        only: the laws to check; every one when not given.
        seed: the draws are a function of it.
        draws: batches of five rows that each law is tried on.

    Raises:
        ValueError: no such loss, settings that do not fit, or a parameter that the suite cannot draw.
    """
    info = _info(loss)
    if info.laws is None:
        why = "declares no laws: give the decorator laws=Laws(...)"
        return [LawResult(info.name, law, "undeclared", False, why) for law in only]
    subject = Subject(info, settings or {})
    return [_result(subject, law, seed, draws) for law in only]


def check_law(subject: Subject, law: str, batch: Batch, generator: Generator) -> Finding:
    """One law on one batch: what ``check_laws`` does for each draw."""
    return CHECKS[law](subject, batch, generator)


def _info(loss: LossInfo | LossFunction | str) -> LossInfo:
    if isinstance(loss, str):
        return find_loss(loss)
    if isinstance(loss, LossInfo):
        return loss
    for info in LOSSES.values():
        if info.function is loss:
            return info
    raise ValueError(f"{getattr(loss, '__name__', loss)} is not in the table of losses: enter it with its decorator")


def _result(subject: Subject, law: str, seed: int, draws: int) -> LawResult:
    laws, name = subject.info.laws, subject.info.name
    assert laws is not None
    standing, why_not = laws.standing(law), _cannot_be_put(subject, law)
    if standing == "not applicable":
        applies = why_not is None and not _may_be_left_out(subject, law)
        reason = laws.not_applicable[law]
        seen = f"{reason}; but the law can be put to this loss: it holds or fails" if applies else reason
        return LawResult(name, law, standing, not applies, seen)
    if why_not is not None:
        return LawResult(name, law, standing, False, f"{why_not}: declare the law as not applicable")
    # A seed of its own for each law, the same whatever else is checked.
    generator = torch.Generator().manual_seed(seed * len(LAWS) + list(LAWS).index(law))
    compared, broken, example = 0, None, None
    for _ in range(draws):
        batch = draw(subject, generator)
        finding = check_law(subject, law, batch, generator)
        compared += finding.compared
        if finding.broken is not None:
            broken, example = finding.broken, batch
            break
    if standing == "holds":
        seen = broken or f"{compared} comparisons"
        passed = broken is None and compared > 0
        return LawResult(name, law, standing, passed, seen if compared else "nothing to compare in any draw", example)
    seen = broken or f"declared to fail, and it held in {compared} comparisons"
    return LawResult(name, law, standing, broken is not None, f"{laws.fails[law]}; {seen}", example)


def _cannot_be_put(subject: Subject, law: str) -> str | None:
    """Why the question makes no sense for this loss, from its signature; None where it does."""
    log_probs, names = bool(subject.policies), set(subject.leaves)
    lacks = {
        "reference_shift": (not (log_probs and subject.baselines), "there is no reference to shift with the policy"),
        "prompt_shift": (not (log_probs or names & {*LEVELS}), "there is nothing to shift"),
        "swap": (not subject.two_answers, "there are no two answers to exchange"),
        "small_beta": ("beta" not in subject.settings, "there is no beta"),
        "large_beta": ("beta" not in subject.settings, "there is no beta"),
        "duplication": (not log_probs, "there are no tokens"),
        "padding": (not subject.carries_lengths, "there are no sequences of tokens"),
    }
    missing, why = lacks.get(law, (False, ""))
    return why if missing else None


def _may_be_left_out(subject: Subject, law: str) -> bool:
    """Whether the question can be put and yet says little: the loss compares no answers, or sees no lengths, or is a
    family of which some obey and some do not.
    """
    one = subject.answers == 1 and not subject.two_answers
    return {
        "reference_shift": subject.family,
        "swap": subject.family or not subject.info.ranks,
        "prompt_shift": subject.family or one,
        "large_beta": one and not subject.thumbs,
        "duplication": not subject.carries_lengths,
    }.get(law, False)
