"""The facts about each loss, kept beside the loss: one table feeds recipes, the docs and the trainer."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

from torch import Tensor

from .checks import check_positive, check_settings, setting_hints
from .laws import Laws
from .types import LossOutput, PairLogps

LossFunction = Callable[..., LossOutput]
F = TypeVar("F", bound=LossFunction)

Kind = Literal["pair", "ranking", "thumbs", "selfplay", "reward"]
KINDS: dict[Kind, str] = {
    "pair": "a prompt, the answer that was preferred and the one that was not",
    "ranking": "K answers to a prompt, best first",
    "thumbs": "one answer with a thumb up or down",
    "selfplay": "answers that the policy itself gave, with the preferences or scores that they got",
    "reward": "scores or embeddings of a reward or preference model",
}


@dataclass(frozen=True)
class LossInfo:
    """One row of the table.

    Args:
        kind: what the loss is computed on; a key of ``KINDS``.
        name: what recipes call the loss.
        function: ``f(policy, reference, *, beta, ...)``, or ``f(policy, *, ...)`` when ``reference`` is false. Tensors
            come by position, settings by keyword alone. One that takes ``preference`` takes soft labels. Its settings
            are checked against their annotations (``align.losses.checks.check_settings``).
        reference: whether the loss compares the policy with a reference; a function of the settings where they decide.
        default_beta: ``beta`` where the user gives none; None for a loss that has no beta.
        paper: where it comes from, such as ``arXiv:2305.18290``.
        formula: one line, in the notation of the module's docstring.
        purpose: one line: what it is for.
        ranks: whether the loss compares the two answers. The rewards of one that does not (``sft``) stay out of a
            combination's rewards.
        laws: where the loss stands with the laws of ``align.losses.laws``; None declares nothing.
    """

    kind: Kind
    name: str
    function: LossFunction
    reference: bool | Callable[..., bool]
    default_beta: float | None
    paper: str
    formula: str
    purpose: str
    ranks: bool = True
    laws: Laws | None = None

    @property
    def soft(self) -> bool:
        """Whether the loss takes the probability that the first answer is preferred, in place of a sure label."""
        return "preference" in _parameters(self.function)

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The loss's own settings (``beta``, ``gamma``): its keyword-only parameters."""
        every = _parameters(self.function)
        return {name: p for name, p in every.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


@functools.cache
def _parameters(function: LossFunction) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters  # tens of microseconds, and each batch asks


LOSSES: dict[str, LossInfo] = {}


def _enter(
    kind: Kind,
    name: str,
    *,
    reference: bool | Callable[..., bool],
    default_beta: float | None,
    paper: str,
    formula: str,
    purpose: str,
    ranks: bool = True,
    laws: Laws | None = None,
) -> Callable[[F], F]:
    """Enter a loss in the table, with its settings checked against their annotations whenever it is called."""

    def enter(function: F) -> F:
        if name in LOSSES:
            raise ValueError(f"two losses are named {name!r}")
        setting_hints(function)  # raises here, and not when the loss is first called

        @functools.wraps(function)
        def checked(*tensors: Any, **keywords: Any) -> LossOutput:
            check_settings(function, keywords)
            return function(*tensors, **keywords)

        LOSSES[name] = LossInfo(
            kind, name, checked, reference, default_beta, paper, formula, purpose, ranks=ranks, laws=laws
        )
        # Listed by kind, whichever module is imported first.
        for row in sorted(LOSSES.values(), key=lambda row: [*KINDS].index(row.kind)):
            LOSSES[row.name] = LOSSES.pop(row.name)
        return cast(F, checked)

    return enter


pairwise_loss = functools.partial(_enter, "pair")
ranking_loss = functools.partial(_enter, "ranking")
thumbs_loss = functools.partial(_enter, "thumbs")
selfplay_loss = functools.partial(_enter, "selfplay")
reward_loss = functools.partial(_enter, "reward")


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
        weight: factor in a combination, positive.

    Raises:
        ValueError: a setting that the loss does not have, one it needs and does not get, or one (or a weight) that is
            out of its range or of another type.
    """

    info: LossInfo
    settings: Mapping[str, Any] = field(default_factory=dict)
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
        check_settings(self.info.function, settings)
        check_positive("weight", self.weight)
        object.__setattr__(self, "settings", settings)

    @classmethod
    def of(cls, loss: str | LossFunction | Loss, *, weight: float | None = None, **settings: Any) -> Loss:
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
        raise ValueError(
            f"{name} is not in the table of losses; enter it with the decorator of its kind (pairwise_loss, "
            "ranking_loss, thumbs_loss, selfplay_loss or reward_loss)"
        )

    @property
    def reference(self) -> bool:
        """Whether the loss, with these settings, compares the policy with a reference."""
        needs = self.info.reference
        return needs if isinstance(needs, bool) else needs(**self.settings)

    def __call__(self, policy: PairLogps, reference: PairLogps | None, preference: Tensor | None = None) -> LossOutput:
        """The loss of B pairs.

        Args:
            policy, reference: log-probs of B pairs.
            preference: probability that the chosen answer is preferred, (B,); None: it is.

        Raises:
            ValueError: the loss is not one on pairs, compares with a reference and there is none, or takes no
                preference probabilities and some are given.
        """
        if self.info.kind != "pair":
            raise ValueError(f"{self.info.name} is not a loss on pairs: it takes {KINDS[self.info.kind]}")
        if self.reference and reference is None:
            raise ValueError(f"{self.info.name} compares the policy with a reference, and none was given")
        if preference is not None and not self.info.soft:
            raise ValueError(f"{self.info.name} takes sure labels alone, and preference probabilities were given")
        models = (policy, reference) if self.info.reference is not False else (policy,)
        labels = {} if preference is None else {"preference": preference}
        return self.info.function(*models, **labels, **self.settings)
