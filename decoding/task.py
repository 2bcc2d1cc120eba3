"""A request under way: its particles, and what they make of the laws that the engine gives them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from . import awrs, masking, rejection
from .constraints.memo import Memo
from .constraints.protocol import ConstraintError, Masking, Vocabulary
from .engines.protocol import Engine
from .lazy import Draw, Draws, Live
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
        self._constraint = request.constraint

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
        length, context = len(self.request.prompt), self.engine.context
        if not length:
            raise ConstraintError("prompt: it has no tokens")
        for token in self.request.prompt:
            try:
                known = 0 <= index(token) < self.vocabulary.size
            except TypeError:
                raise ConstraintError(f"prompt: {token!r} is no whole number; give the ids of its tokens") from None
            if not known:
                raise ConstraintError(
                    f"prompt: {token} is the id of no token, they are from 0 to {self.vocabulary.size - 1:,}; encode "
                    "it with the model's own tokenizer"
                )
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
        except (Exception, SystemExit) as error:  # a constraint is anyone's code
            raise ConstraintError(
                "; ".join([self._raised(error, particle), *getattr(error, "__notes__", [])])
            ) from error
        self._evaluations.append(draw.evaluations)
        self._masks += draw.masks
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

    def _raised(self, error: BaseException, particle: _Particle) -> str:
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

        def mask() -> NDArray[np.bool_] | None:
            allowed = constraint.allowed(state) if isinstance(constraint, Masking) else None
            if allowed is not None:
                allowed[list(ends)] = constraint.may_end(state)
            return allowed

        most = self.request.max_draws
        if len(particle.tokens) + 1 == self.request.max_new_tokens:
            return self._end(particle.tokens, logq, constraint.may_end(state), draws), None
        if method == "mask":
            draw = masking.sample(logq, accepts, draws, allowed=mask())
        elif method == "rejection":
            draw = rejection.sample(logq, accepts, draws, max_draws=most)
        else:
            draw = awrs.sample(logq, accepts, draws, max_draws=most, mask=mask)
        if draw.token is None:
            self._stuck = self._stuck or self._why_stuck(particle.tokens, logq, draw)
        elif draw.token not in ends and draw.token not in after and not accepts(draw.token):
            raise ConstraintError(
                f"its mask allows token {draw.token}, which it refuses when it is asked for that one"
            )
        return draw, after.get(draw.token) if draw.token is not None else None

    def _end(self, tokens: tuple[int, ...], logq: NDArray[np.float64], may_end: bool, draws: Draws) -> Draw:
        """At the last position an end token, or nothing: one question."""
        ends = np.zeros(logq.shape, dtype=bool)
        ends[list(self.vocabulary.ends)] = may_end
        draw = masking.sample(logq, lambda token: False, draws, allowed=ends)
        if draw.dead and may_end:
            self._stuck = self._stuck or self._why_stuck(tokens, logq, draw)
        self._cut += draw.dead and not may_end
        weight = 0.0 if self.request.method == "rejection" and not draw.dead else draw.log_weight
        return Draw(draw.token, weight, 1)

    def _why_stuck(self, tokens: tuple[int, ...], logq: NDArray[np.float64], draw: Draw) -> str:
        """Why there was no token in a dead end that is not the length limit's."""
        said, law, most = repr(self.vocabulary.text(tokens)), self.request.law, self.request.max_draws
        if draw.evaluations == most:
            return f"; after {said} there was no allowed token among the {most:,} of max_draws: raise it"
        changed = {"temperature": law.temperature != 1, "top_k": law.top_k, "top_p": law.top_p}
        settings = ", ".join(f"{name}={getattr(law, name)}" for name, is_set in changed.items() if is_set)
        left, size = int(np.count_nonzero(np.exp(logq))), self.vocabulary.size
        broken = (
            "either nothing satisfies the constraint, or it is not prefix-closed (constraints.conformance.check says "
            "more)"
        )
        if settings and left < size:
            return (
                f"; after {said} none of the {left:,} tokens (of {size:,}) to which {settings} leaves a probability "
                f"is allowed: loosen it; if that does not help, {broken}"
            )
        return f"; no token may follow {said}, nor may it end there: {broken}"

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
        try:
            values = [float(value) for value in found]
        except TypeError as error:
            raise ConstraintError(f"potential: it gave {found!r}; it must give a number for each sequence") from error
        if len(values) != len(asked):
            raise ConstraintError(f"potential: it gave {len(values)} numbers for {len(asked)} sequences")
        known = {event.particle: value for event, value in zip(asked, values, strict=True)}
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
            return Answer(result, evaluations, False, result.reason + self._why_nothing(), self._masks)
        valid = satisfies(self.request.constraint, result.drawn.tokens, self.vocabulary)
        said = self.vocabulary.text(result.drawn.tokens)
        refused = (
            f"the constraint took {said!r} token by token and refuses it when asked again from the start: it does not "
            "depend on the text alone (constraints.conformance.check says more)"
        )
        return Answer(result, evaluations, valid, "" if valid else refused, self._masks)

    def _why_nothing(self) -> str:
        why = ""
        if self._cut:
            why += (
                f"; {self._cut} could not end at the limit of {self.request.max_new_tokens:,} tokens: raise "
                "max_new_tokens, or bound the length in the constraint, if any finite text satisfies it at all"
            )
        return why + self._stuck

    def _fail(self, reason: str) -> None:
        self.close()
        self.answer = Answer(None, tuple(self._evaluations), False, reason, self._masks)

    def close(self) -> None:
        """Free what the particles hold."""
        for number in list(self.particles):
            self._close(number)

    def _close(self, number: int) -> None:
        self.engine.close(self.particles.pop(number).handle)
