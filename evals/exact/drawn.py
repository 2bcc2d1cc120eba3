"""Drawn inputs for a loss of any kind: one adapter that the laws stand on.

A ``Batch`` holds tensors by the names of a loss's parameters, so that a law can move or exchange them without knowing
the loss; ``Subject`` puts them into the carriers of the loss's signature and calls it.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Generator, Tensor

from align.losses.catalogue import Loss, LossInfo
from align.losses.types import LARGEST, LossOutput, PairLogps, SequenceLogps, UnpairedLogps

POLICY = ("policy", "logps")
BASELINE = ("reference", "previous")
FIRST = {"chosen": "rejected", "chosen_embedding": "rejected_embedding"}
SIDES = ("delta", "logits")  # of a left and a right answer: their difference (B,), or both (B, 2)
LEVELS = ("chosen", "rejected", "logits", "predictions")  # scores of one answer each, which a constant can shift
SCORES = (*FIRST, *FIRST.values(), *SIDES, "predictions")
ATTRIBUTES, WIDTH = 4, 6  # of a regression's ratings, and of an embedding (even)


@dataclass(frozen=True)
class Batch:
    """Inputs of a loss, B rows.

    Args:
        values: by parameter name: log-probs of K answers a row (B, K), nats; scores (B,), embeddings (B, D) and what
            else a row has; scalars that all rows share. An optional parameter that is missing is not given.
        length: tokens of the answers, (B, K); of no meaning to a loss that takes no log-probs.
    """

    values: Mapping[str, Tensor]
    length: Tensor

    def map(self, change: Callable[[str, Tensor], Tensor]) -> Batch:
        """The batch with each value changed by ``change(name, value)``."""
        return replace(self, values={name: change(name, value) for name, value in self.values.items()})

    def put(self, **values: Tensor) -> Batch:
        """The batch with these values instead."""
        return replace(self, values={**self.values, **values})

    def drop(self, name: str) -> Batch:
        """The batch without an optional value."""
        return replace(self, values={k: v for k, v in self.values.items() if k != name})

    def rows(self, index: Tensor) -> Batch:
        """The rows at ``index``; scalars stay."""
        chosen = self.map(lambda _, value: value[index] if value.ndim else value)
        return replace(chosen, length=self.length[index])

    def to(self, dtype: torch.dtype) -> Batch:
        """The batch with its floating-point values in ``dtype``."""
        return self.map(lambda _, value: value.to(dtype) if value.is_floating_point() else value)

    def __len__(self) -> int:
        return len(self.length)


@dataclass(frozen=True)
class Subject:
    """A loss with its settings, called on batches.

    Args:
        info: the table's row.
        settings: the loss's settings; ``beta`` falls back to the table's default.

    Raises:
        ValueError: a setting is missing or unknown, or the suite does not know how to draw a parameter.
    """

    info: LossInfo
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", Loss(self.info, self.settings).settings)
        known = (*POLICY, *BASELINE, *_draws(self))
        for name, parameter in self.parameters.items():
            if name not in known and parameter.default is parameter.empty:
                raise ValueError(
                    f"{self.info.name}: the suite cannot draw {name}; it draws {', '.join(known)}, and "
                    "evals/exact/drawn.py is where another is added"
                )

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The parameters that take tensors: those that may come by position."""
        every = inspect.signature(self.info.function).parameters
        return {name: p for name, p in every.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY}

    @property
    def policies(self) -> list[str]:
        """Names of the parameters that hold log-probs under the policy."""
        return [name for name in self.parameters if name in POLICY]

    @property
    def baselines(self) -> list[str]:
        """Names of those under a reference or a previous policy, where the settings call for one."""
        needed = Loss(self.info, self.settings).reference
        return [name for name in self.parameters if name in BASELINE and (name != "reference" or needed)]

    @property
    def leaves(self) -> list[str]:
        """Names of the parameters that the loss is differentiated by: the policy's log-probs, or scores."""
        return self.policies or [name for name in self.parameters if name in SCORES]

    @property
    def answers(self) -> int:
        """K: answers of a row."""
        if self.info.kind == "selfplay":
            return 3 if {"scores", "win_rates"} & set(self.parameters) else 1
        return {"pair": 2, "ranking": 4}.get(self.info.kind, 1)

    @property
    def two_answers(self) -> bool:
        """Whether a row has a first and a second answer that can be exchanged."""
        return self.info.kind == "pair" or bool({*FIRST, *SIDES} & set(self.parameters))

    @property
    def family(self) -> bool:
        """Whether the loss is many, told apart by a setting that has no default, such as a formula."""
        every = self.info.parameters.items()
        return any(name != "beta" and p.default is p.empty for name, p in every)

    @property
    def thumbs(self) -> bool:
        """Whether the policy's log-probs come with thumbs, up or down."""
        return any(self._carrier(name) is UnpairedLogps for name in self.policies)

    @property
    def carries_lengths(self) -> bool:
        """Whether the log-probs come in carriers, with lengths."""
        return any(self._carrier(name) is not Tensor for name in self.policies)

    def arguments(self, batch: Batch) -> dict[str, Any]:
        """What the loss's function takes, by name: log-probs in their carriers, the rest as it is."""
        models = {*self.policies, *self.baselines}
        given = [name for name in self.parameters if name in models or name in batch.values]
        return {name: self._carry(name, batch) if name in models else batch.values[name] for name in given}

    def __call__(self, batch: Batch, **changed: Any) -> LossOutput:
        """The loss of the batch, with some settings changed."""
        return self.info.function(**self.arguments(batch), **{**self.settings, **changed})

    def _carrier(self, name: str) -> type:
        """What a parameter of log-probs is: by its annotation, or by the kind of the loss where it has none."""
        parameter = self.parameters[name]
        text = str(parameter.annotation)
        for carrier in (UnpairedLogps, PairLogps, SequenceLogps, Tensor):
            if parameter.annotation is not parameter.empty and carrier.__name__ in text:
                return carrier
        thumbs = UnpairedLogps if name in POLICY else SequenceLogps
        by_kind: dict[str, type] = {"pair": PairLogps, "thumbs": thumbs}
        return by_kind.get(self.info.kind, SequenceLogps)

    def _carry(self, name: str, batch: Batch) -> Any:
        total, length, carrier = batch.values[name], batch.length, self._carrier(name)
        if carrier is PairLogps:
            return PairLogps(SequenceLogps(total[:, 0], length[:, 0]), SequenceLogps(total[:, 1], length[:, 1]))
        if carrier is Tensor:
            return total.squeeze(1)
        sequence = (
            SequenceLogps(total.squeeze(1), length.squeeze(1)) if self.answers == 1 else SequenceLogps(total, length)
        )
        return UnpairedLogps(sequence, batch.values["label"]) if carrier is UnpairedLogps else sequence


def draw(subject: Subject, generator: Generator, rows: int = 5) -> Batch:
    """Generic inputs in float64: unequal lengths, log-probs below 0, log-ratios of a few nats.

    What a loss may be given or not (soft labels, weights) is given by the toss of a coin.
    """
    shape = (rows, subject.answers)
    length = torch.randint(1, 13, shape, generator=generator)
    policy = -length * _uniform(generator, shape, 0.2, 2.5)
    values = dict.fromkeys(subject.policies, policy)
    for name in subject.baselines:
        values[name] = (policy + 2 * _normal(generator, shape)).clamp(max=-0.05)
    for name, make in _draws(subject).items():
        parameter = subject.parameters.get(name)
        needed = parameter is not None and (parameter.default is parameter.empty or bool(_coin(generator)))
        if needed or (name == "label" and subject.thumbs):
            values[name] = make(generator, rows)
    return Batch(values, length)


def extremes(subject: Subject, generator: Generator, size: float = 1e4) -> Batch:
    """Rows that hold log-ratios, scores or embeddings of +-size in every combination; log-probs stay below 0."""
    columns = max(subject.answers, 2) if subject.leaves else 1
    signs = torch.tensor(list(itertools.product([1.0, -1.0], repeat=columns)), dtype=torch.float64)
    batch = draw(subject, generator, len(signs))
    near, far = torch.full_like(signs, -1.0), torch.full_like(signs, max(-1.0 - size, -LARGEST))
    high = torch.where(signs > 0, near, far)[:, : subject.answers]
    low = torch.where(signs > 0, far, near)[:, : subject.answers]
    values = {**dict.fromkeys(subject.policies, high), **dict.fromkeys(subject.baselines, low)}
    for place, name in enumerate([] if subject.policies else subject.leaves):
        value, sign = batch.values[name], signs[:, place % 2]
        values[name] = size * (sign[:, None] * value.sign() if value.ndim == 2 else sign)
    return batch.put(**values)


def _draws(subject: Subject) -> dict[str, Callable[[Generator, int], Tensor]]:
    """How every other parameter is drawn, by name."""
    k = subject.answers
    draws: dict[str, Callable[[Generator, int], Tensor]] = {
        "preference": lambda g, b: _uniform(g, (b,), 0.0, 1.0),
        "answers": lambda g, b: torch.randint(2, k + 1, (b,), generator=g),
        "label": lambda g, b: _uniform(g, (b,), 0.0, 1.0) < 0.5,
        "shift": lambda g, b: 0.5 * _normal(g, ()),
        "kl": lambda g, b: _uniform(g, (), 0.1, 1.0),
        "weight": lambda g, b: _uniform(g, (b,), 0.5, 2.5),
        "scores": lambda g, b: _normal(g, (b, k)),
        "win_rates": lambda g, b: _uniform(g, (b, k), 0.0, 1.0),
        "advantage": lambda g, b: _normal(g, (b,)),
        "margin": lambda g, b: _uniform(g, (b,), 0.0, 2.0),
        "strength": lambda g, b: torch.randint(1, 4, (b,), generator=g).double(),
        "scale": lambda g, b: _uniform(g, (b, WIDTH // 2), 0.5, 1.5),
        "labels": _ratings,
        "predictions": lambda g, b: 2 * _normal(g, (b, ATTRIBUTES)),
        "logits": lambda g, b: 2 * _normal(g, (b, 2)),
    }
    for name in ("chosen", "rejected", "delta"):
        draws[name] = lambda g, b: 2 * _normal(g, (b,))
    for name in ("chosen_embedding", "rejected_embedding"):
        draws[name] = lambda g, b: 2 * _normal(g, (b, WIDTH))
    if {*SIDES} & set(subject.parameters):
        draws["label"] = lambda g, b: 2 * torch.randint(0, 2, (b,), generator=g) - 1
    return draws


def _ratings(generator: Generator, rows: int) -> Tensor:
    """Ratings 0 to 4 in which one attribute in four is missing (-100), never the first."""
    ratings = torch.randint(0, 5, (rows, ATTRIBUTES), generator=generator).double()
    missing = _uniform(generator, (rows, ATTRIBUTES), 0.0, 1.0) < 0.25
    missing[:, 0] = False
    return ratings.masked_fill(missing, -100.0)


def _normal(generator: Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _uniform(generator: Generator, shape: tuple[int, ...], low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


def _coin(generator: Generator) -> Tensor:
    return torch.rand((), generator=generator) < 0.5
