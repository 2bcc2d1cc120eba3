"""A request under way: its particles, and what they make of the laws that the engine gives them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from . import awrs, masking, rejection
from .constraints.memo import Memo
from .constraints.protocol import Constraint, ConstraintError, Masking, Vocabulary
from .engines.protocol import Engine
from .lazy import Accepts, Draw, Draws, Live
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
        self._cut = 0
        self._stuck: tuple[int, ...] | None = None
        resampled = request.method == "awrs-smc"
        self._smc = SMC(request.particles, seed=request.seed, threshold=request.threshold if resampled else 0.0)
        self._constraint = request.constraint

    def guard(self, work: Callable[[], None]) -> None:
        """What goes wrong in this request's own parts ends this request, and says so."""
        try:
            work()
        except ConstraintError as error:
            self._fail(str(error))
        except Exception as error:
            self._fail(f"{type(error).__name__}: {error}")

    def check(self) -> None:
        """The prompt fits, and something satisfies the constraint."""
        length, context = len(self.request.prompt), self.engine.context
        if not length:
            raise ConstraintError("prompt: it has no tokens")
        if context is not None and length + self.request.max_new_tokens > context:
            raise ConstraintError(
                f"prompt: {length:,} tokens and an answer of {self.request.max_new_tokens:,} are more than the "
                f"{context:,} that the model reads; shorten the prompt or lower max_new_tokens"
            )
        if self._constraint is not None and not isinstance(self._constraint, Memo):
            self._constraint = Memo(self._constraint)  # particles that have said the same share its verdicts

    def begin(self, handle: int) -> None:
        """The first actions, with the prompt computed."""
        self.particles = {-1: _Particle(handle, None)}

        def start() -> None:
            state = self._constraint.start() if self._constraint is not None else None
            for number in range(self.request.particles):
                self.particles[number] = _Particle(self.engine.fork(handle), state)
            self._close(-1)
            self._act(self._smc.start())

        self.guard(start)

    def advance(self, rows: Sequence[tuple[int, NDArray[np.float64] | ValueError, Tensor]]) -> None:
        """A token for each particle, from its law."""
        self.wanted = []
        events = [self._extended(number, logq, logits) for number, logq, logits in rows]
        for event in self._with_potentials(events):
            self._act(self._smc.receive(event))

    def _extended(self, number: int, logq: NDArray[np.float64] | ValueError, logits: Tensor) -> Extended:
        if isinstance(logq, ValueError):
            raise logq
        particle, step = self.particles[number], len(self.particles[number].tokens)
        try:
            draw, state = self._draw(particle, logq, Draws(self.request.seed, step, number))
        except ConstraintError:
            raise
        except Exception as error:  # a constraint is anyone's code
            raise ConstraintError(
                "; ".join([self._raised(error, particle), *getattr(error, "__notes__", [])])
            ) from error
        self._evaluations.append(draw.evaluations)
        if draw.token is None:
            return Extended(number, step, None, -math.inf)
        particle.tokens, particle.state = (*particle.tokens, draw.token), state
        ended = draw.token in self.vocabulary.ends or (
            self._constraint is None and step + 1 == self.request.max_new_tokens
        )
        if not ended:
            self.engine.extend(particle.handle, draw.token)
        weight = draw.log_weight + self.request.law.log_correction(logits, draw.token)
        return Extended(number, step, draw.token, weight, ended)

    def _raised(self, error: Exception, particle: _Particle) -> str:
        constraint = self.request.constraint
        name = type(constraint.constraint if isinstance(constraint, Memo) else constraint).__name__
        return f"{name} raised {type(error).__name__}: {error}; after {self.vocabulary.text(particle.tokens)!r}"

    def _draw(self, particle: _Particle, logq: NDArray[np.float64], draws: Draws) -> tuple[Draw, Any]:
        """The next token, and the constraint's state after it."""
        constraint, method, ends = self._constraint, self.request.method, self.vocabulary.ends
        if constraint is None:
            return Draw(Live(logq).draw(draws.uniform()), 0.0, 0), None
        state, tokens = particle.state, self.vocabulary.tokens
        after: dict[int, Any] = {}

        def accepts(token: int) -> bool:
            if token in ends:
                return constraint.may_end(state)
            found = constraint.advance(state, token) if tokens[token] is not None else None
            if found is None:
                return False
            after[token] = found
            return True

        if len(particle.tokens) + 1 == self.request.max_new_tokens:
            draw = self._end(logq, constraint.may_end(state), draws)
        elif method == "mask":
            draw = self._masked(logq, accepts, draws, constraint, state)
            if draw.token is not None and draw.token not in ends:
                accepts(draw.token)
        elif method == "rejection":
            draw = rejection.sample(logq, accepts, draws)
        else:
            draw = awrs.sample(logq, accepts, draws)
        if draw.dead and self._stuck is None and len(particle.tokens) + 1 < self.request.max_new_tokens:
            self._stuck = particle.tokens
        return draw, after.get(draw.token) if draw.token is not None else None

    def _end(self, logq: NDArray[np.float64], may_end: bool, draws: Draws) -> Draw:
        """At the last position an end token, or nothing: one question."""
        ends = np.zeros(logq.shape, dtype=bool)
        ends[list(self.vocabulary.ends)] = may_end
        draw = masking.sample(logq, lambda token: False, draws, allowed=ends)
        self._cut += draw.dead
        weight = 0.0 if self.request.method == "rejection" and not draw.dead else draw.log_weight
        return Draw(draw.token, weight, 1)

    def _masked(
        self, logq: NDArray[np.float64], accepts: Accepts, draws: Draws, constraint: Constraint, state: Any
    ) -> Draw:
        """Token masking, by the constraint's own mask where it has one."""
        allowed = constraint.allowed(state) if isinstance(constraint, Masking) else None
        if allowed is None:
            return masking.sample(logq, accepts, draws)
        mask = allowed.copy()
        mask[list(self.vocabulary.ends)] = constraint.may_end(state)
        draw = masking.sample(logq, accepts, draws, allowed=mask)
        return Draw(draw.token, draw.log_weight, len(self.vocabulary.usable) + len(self.vocabulary.ends))

    def _with_potentials(self, events: Sequence[Extended]) -> Sequence[Extended]:
        potential, every = self.request.potential, self.request.potential_every
        if potential is None:
            return events
        asked = [
            event
            for event in events
            if event.log_weight > -math.inf and (event.ended or (every and (event.step + 1) % every == 0))
        ]
        found = potential([self.particles[event.particle].tokens for event in asked]) if asked else []
        known = {event.particle: float(value) for event, value in zip(asked, found, strict=True)}
        return [Extended(e.particle, e.step, e.token, e.log_weight, e.ended, known.get(e.particle)) for e in events]

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
                    self.answer = self._finished(result)

    def _finished(self, result: Result) -> Answer:
        evaluations = tuple(self._evaluations)
        if result.drawn is None:
            return Answer(result, evaluations, False, result.reason + self._why_nothing())
        valid = self.request.constraint is None or satisfies(
            self.request.constraint, result.drawn.tokens, self.vocabulary
        )
        said = self.vocabulary.text(result.drawn.tokens)
        refused = (
            f"the constraint took {said!r} token by token and refuses it when asked again from the start: it does not "
            "depend on the text alone (constraints.conformance.check says more)"
        )
        return Answer(result, evaluations, valid, "" if valid else refused)

    def _why_nothing(self) -> str:
        why = ""
        if self._cut:
            why += (
                f"; {self._cut} could not end at the limit of {self.request.max_new_tokens:,} tokens: raise "
                "max_new_tokens, or bound the length in the constraint"
            )
        if self._stuck is not None:
            why += (
                f"; no token may follow {self.vocabulary.text(self._stuck)!r}, nor may it end there: either nothing "
                "satisfies the constraint, or it is not prefix-closed (constraints.conformance.check says more)"
            )
        return why

    def _fail(self, reason: str) -> None:
        for number in list(self.particles):
            self._close(number)
        self.answer = Answer(None, tuple(self._evaluations), False, reason)

    def _close(self, number: int) -> None:
        self.engine.close(self.particles.pop(number).handle)
