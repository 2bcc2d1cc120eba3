"""The facts about each loss, kept beside the loss: one table feeds recipes, the docs and the trainer."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from .types import LossOutput, PairLogps

PairwiseLoss = Callable[..., LossOutput]
F = TypeVar("F", bound=PairwiseLoss)


@dataclass(frozen=True)
class LossInfo:
    """One row of the table.

    Args:
        name: what recipes call the loss.
        function: ``f(policy, reference, *, beta, ...)``, or ``f(policy, *, ...)`` when ``reference`` is false.
        reference: whether the loss compares the policy with a reference.
        default_beta: ``beta`` where the user gives none; None for a loss that has no beta.
        paper: where it comes from, such as ``arXiv:2305.18290``.
        formula: one line, in the notation of the module's docstring.
        purpose: one line: what it is for.
        ranks: whether the loss compares the two answers. The rewards of one that does not (``sft``) stay out of a
            combination's rewards.
    """

    name: str
    function: PairwiseLoss
    reference: bool
    default_beta: float | None
    paper: str
    formula: str
    purpose: str
    ranks: bool = True

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The loss's own settings (``beta``, ``gamma``): its keyword-only parameters."""
        every = inspect.signature(self.function).parameters
        return {name: p for name, p in every.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


LOSSES: dict[str, LossInfo] = {}


def pairwise_loss(
    name: str,
    *,
    reference: bool,
    default_beta: float | None,
    paper: str,
    formula: str,
    purpose: str,
    ranks: bool = True,
) -> Callable[[F], F]:
    """Enter a loss in the table. The function itself stays as it is."""

    def enter(function: F) -> F:
        if name in LOSSES:
            raise ValueError(f"two losses are named {name!r}")
        LOSSES[name] = LossInfo(name, function, reference, default_beta, paper, formula, purpose, ranks)
        return function

    return enter


def find_loss(name: str) -> LossInfo:
    """The table's row for ``name``.

    Raises:
        ValueError: no loss has that name; the message offers the nearest.
    """
    if name not in LOSSES:
        near = difflib.get_close_matches(name, LOSSES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known losses: {', '.join(LOSSES)}"
        raise ValueError(f"no loss is named {name!r}; {hint}")
    return LOSSES[name]


@dataclass(frozen=True)
class Loss:
    """A loss of the table with its settings: what a trainer holds.

    Args:
        info: the table's row.
        settings: the loss's keyword arguments; ``beta`` falls back to the table's default.
        weight: factor in a combination.

    Raises:
        ValueError: a setting that the loss does not have, or one it needs and does not get.
    """

    info: LossInfo
    settings: Mapping[str, float] = field(default_factory=dict)
    weight: float = 1.0

    def __post_init__(self) -> None:
        settings = dict(self.settings)
        if "beta" in self.info.parameters and self.info.default_beta is not None:
            settings.setdefault("beta", self.info.default_beta)
        unknown = sorted(set(settings) - set(self.info.parameters))
        if unknown:
            has = ", ".join(self.info.parameters) or "none"
            raise ValueError(f"{self.info.name} has no setting {', '.join(unknown)}; it has: {has}")
        needed = [n for n, p in self.info.parameters.items() if p.default is p.empty and n not in settings]
        if needed:
            raise ValueError(f"{self.info.name} needs {', '.join(needed)}")
        object.__setattr__(self, "settings", settings)

    @classmethod
    def of(cls, loss: str | PairwiseLoss | Loss, *, weight: float | None = None, **settings: float) -> Loss:
        """A loss by name (``"ln_dpo"``) or by its function (``ln_dpo``), with its settings; weight 1 if none is given.

        A ``Loss`` comes back as it is: it has its weight and settings already.

        Raises:
            ValueError: an unknown name, a function that is not in the table, settings that do not fit, or a weight or
                settings given with a ``Loss``.
        """
        if isinstance(loss, Loss):
            if weight is not None or settings:
                given = ", ".join([*(["weight"] if weight is not None else []), *settings])
                raise ValueError(
                    f"this {loss.info.name} has its weight and settings already, and {given} came with it"
                )
            return loss
        weight = 1.0 if weight is None else weight
        if isinstance(loss, str):
            return cls(find_loss(loss), settings, weight)
        for info in LOSSES.values():
            if info.function is loss:
                return cls(info, settings, weight)
        name = getattr(loss, "__name__", repr(loss))
        raise ValueError(f"{name} is not in the table of losses; enter it with @pairwise_loss")

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        """The loss of B pairs.

        Raises:
            ValueError: the loss compares with a reference and there is none.
        """
        if not self.info.reference:
            return self.info.function(policy, **self.settings)
        if reference is None:
            raise ValueError(f"{self.info.name} compares the policy with a reference, and none was given")
        return self.info.function(policy, reference, **self.settings)
