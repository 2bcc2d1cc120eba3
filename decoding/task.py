"""A request under way: its particles, and what they make of the laws that the engine gives them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .constraints.memo import Memo
from .constraints.protocol import ConstraintError, FunctionError, Vocabulary
from .drawing import check_prompt, step
from .engines.protocol import Engine
from .lazy import Draws
from .request import Answer, Request, satisfies
from .smc import SMC, Action, Copy, Extend, Extended, Finished, Result, Stop


@dataclass
class _Particle:
    """Where a particle is: its sequence in the engine, the constraint's state, and what it has said."""

    handle: int
    state: Any
    tokens: tuple[int, ...] = ()


class Task:
    """A request under way."""

    def __init__(self, request: Request, vocabulary: Vocabulary, engine: Engine) -> None:
        self.request, self.vocabulary, self.engine = request, vocabulary, engine
        self.particles: dict[int, _Particle] = {}
        self.wanted: list[int] = []
        self.answer: Answer | None = None
        self._evaluations: list[int] = []
        self._masks = 0
        self._cut = 0
        self._stuck = ""
        self._smc = SMC(
            request.particles,
            seed=request.seed,
            threshold=request.threshold if request.method == "awrs-smc" else 0.0,
            resampling=request.resampling,
        )
        constraint = request.constraint
        if constraint is not None and not isinstance(constraint, Memo):
            constraint = Memo(constraint)  # particles that have said the same share its verdicts
        self._request = replace(request, constraint=constraint)

    def guard(self, work: Callable[[], None]) -> None:
        """What goes wrong in this request's own parts ends this request, and says so."""
        try:
            work()
        except ConstraintError as error:
            self._fail(str(error))
        except (Exception, SystemExit) as error:
            self._fail(f"{type(error).__name__}: {error}")

    def check(self) -> None:
        """The prompt is one of this model, and fits."""
        check_prompt(self.request, self.vocabulary, self.engine.context)

    def begin(self, handle: int) -> None:
        """The first actions, with the prompt computed."""
        self.particles = {-1: _Particle(handle, None)}

        def start() -> None:
            constraint = self._request.constraint
            state = constraint.start() if constraint is not None else None
            for number in range(self.request.particles):
                self.particles[number] = _Particle(self.engine.fork(handle), state)
            self._close(-1)
            self._act(self._smc.start())

        self.guard(start)

    def advance(self, rows: Sequence[tuple[int, NDArray[np.float64] | ValueError, Tensor]]) -> None:
        """A token for each particle, from its law."""
        self.wanted = []
        events = [self._extended(number, logq, logits) for number, logq, logits in rows]
        for event in with_potentials(self.request, {n: p.tokens for n, p in self.particles.items()}, events):
            self._act(self._smc.receive(event))

    def _extended(self, number: int, logq: NDArray[np.float64] | ValueError, logits: Tensor) -> Extended:
        if isinstance(logq, ValueError):
            raise logq
        particle, position = self.particles[number], len(self.particles[number].tokens)
        draws = Draws(self.request.seed, position, number)
        done = step(self._request, self.vocabulary, particle.tokens, particle.state, logq, draws)
        token = done.draw.token
        self._evaluations.append(done.draw.evaluations)
        self._masks += done.draw.masks
        self._cut += done.cut
        self._stuck = self._stuck or done.why
        if token is None:
            return Extended(number, position, None, -math.inf)
        particle.tokens, particle.state = (*particle.tokens, token), done.state
        if not done.ended:
            self.engine.extend(particle.handle, token)
        weight = done.draw.log_weight + self.request.law.log_correction(logits, token)
        return Extended(number, position, token, weight, done.ended)

    def _act(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Extend(number):
                    self.wanted.append(number)
                case Copy(source, target, _):
                    # All particles of a request are at the same step here, so a copy has all of its source's tokens.
                    one = self.particles[source]
                    self.particles[target] = _Particle(self.engine.fork(one.handle), one.state, one.tokens)
                case Stop(number):
                    self._close(number)
                case Finished(result):
                    evaluations = tuple(self._evaluations)
                    self.answer = finished(
                        self.request, self.vocabulary, result, evaluations, self._masks, self._cut, self._stuck
                    )

    def _fail(self, reason: str) -> None:
        self.close()
        self.answer = Answer(None, tuple(self._evaluations), False, reason, self._masks)

    def close(self) -> None:
        """Free what the particles hold."""
        for number in list(self.particles):
            self._close(number)

    def _close(self, number: int) -> None:
        self.engine.close(self.particles.pop(number).handle)


def with_potentials(
    request: Request, tokens: Mapping[int, tuple[int, ...]], events: Sequence[Extended]
) -> Sequence[Extended]:
    """The events with log-potentials, where the request has a potential and it is to be evaluated there.

    Args:
        request: what is wanted.
        tokens: of each particle, with those of the events.
        events: at most one a particle.

    Raises:
        FunctionError: the potential gave something else than a number for each sequence. What it raises goes
            through.
    """
    potential, every = request.potential, request.potential_every
    if potential is None:
        return events
    asked = [
        event
        for event in events
        if event.log_weight > -math.inf and (event.ended or (every and (event.step + 1) % every == 0))
    ]
    found = potential([tokens[event.particle] for event in asked]) if asked else []
    try:
        values = [float(value) for value in found]
    except TypeError as error:
        raise FunctionError(f"potential: it gave {found!r}; it must give a number for each sequence") from error
    if len(values) != len(asked):
        raise FunctionError(f"potential: it gave {len(values)} numbers for {len(asked)} sequences")
    known = {event.particle: value for event, value in zip(asked, values, strict=True)}
    return [Extended(e.particle, e.step, e.token, e.log_weight, e.ended, known.get(e.particle)) for e in events]


def finished(
    request: Request,
    vocabulary: Vocabulary,
    result: Result,
    evaluations: tuple[int, ...],
    masks: int,
    cut: int,
    stuck: str,
) -> Answer:
    """The answer that a result is; its drawn text is put to the constraint anew.

    Args:
        request, vocabulary, result: what was wanted of which model, and what it came to.
        evaluations, masks: see ``Answer``.
        cut: particles that the length limit ended.
        stuck: why another came to a dead end, if one did.
    """
    if result.drawn is None:
        limit = (
            f"; {cut} could not end at the limit of {request.max_new_tokens:,} tokens: raise max_new_tokens, or bound "
            "the length in the constraint, if any finite text satisfies it at all"
        )
        return Answer(result, evaluations, False, result.reason + (limit if cut else "") + stuck, masks)
    valid = satisfies(request.constraint, result.drawn.tokens, vocabulary)
    refused = (
        f"the constraint took {vocabulary.text(result.drawn.tokens)!r} token by token and refuses it when asked again "
        "from the start: it does not depend on the text alone (constraints.conformance.check says more)"
    )
    return Answer(result, evaluations, valid, "" if valid else refused, masks)
