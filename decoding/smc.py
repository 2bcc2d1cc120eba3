"""Sequential Monte Carlo over sequences, without input or output: events in, actions out.

The engine may go in step, or let its particles run free: what a particle reports ahead of the others waits until they
have come as far, and the outcome is the same.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

from .lazy import Draws


@dataclass(frozen=True)
class Extended:
    """A particle has its next token, or has come to a dead end.

    Args:
        particle: its number.
        step: position of the token, from 0; a particle reports its steps in order.
        token: None in a dead end.
        log_weight: of the token, from a sampler that weights properly, plus ``Law.log_correction``; -inf kills.
        ended: whether the sequence is complete with this token. One that a length limit cuts is not: give its last
            token the log-weight -inf, unless cut sequences belong to the target.
        log_potential: log of the potential of the sequence up to here, where there is one and it was evaluated. The
            weight always carries the latest, in place of the one before: potentials at steps on the way guide (a
            twist), and the one at the end is the final weight; 0 at the end takes the guidance out of the target.
    """

    particle: int
    step: int
    token: int | None
    log_weight: float
    ended: bool = False
    log_potential: float | None = None


@dataclass(frozen=True)
class Extend:
    """The particle wants its next token. An engine that lets particles run free need not wait for it."""

    particle: int


@dataclass(frozen=True)
class Resampled:
    """The population was resampled after ``step``; what is to be done for it follows.

    Args:
        step: that all had come through.
        sources: for each place of the population the number of the particle that it goes on from.
        population: and its own number from now on.
    """

    step: int
    sources: tuple[int, ...]
    population: tuple[int, ...]


@dataclass(frozen=True)
class Copy:
    """A new particle, ``target``, begins with the tokens of ``source`` up to and including ``step``, and no more."""

    source: int
    target: int
    step: int


@dataclass(frozen=True)
class Stop:
    """The particle will not be asked for tokens nor be copied again: free what it holds. Late reports do no harm."""

    particle: int


@dataclass(frozen=True)
class Sample:
    """A sequence with its weight: the mean of ``exp(log_weight)`` over the samples estimates the normaliser.

    Args:
        tokens: ids, the end token included where there is one.
        log_weight: nats; -inf for a sequence that came to a dead end.
    """

    tokens: tuple[int, ...]
    log_weight: float


@dataclass(frozen=True)
class Result:
    """What the particles came to. ``sum_i w_i f(x_i) / N`` estimates ``sum_x f(x) target(x)`` without bias.

    Args:
        samples: one a particle, those of weight zero included.
        log_normaliser: log of an unbiased estimate of the target's mass; -inf if nothing survived.
        ess: effective sample size of the final weights, from 1 to the number of particles; 0 if nothing survived.
        drawn: one sample, drawn by weight; None if nothing survived.
        best: the sequence with the largest weight, equal sequences taken together; None if nothing survived.
        resamplings: how often the population was resampled.
        dead_ends: how many particles came to weight zero on the way.
        reason: why there is nothing, if so; else empty.
    """

    samples: tuple[Sample, ...]
    log_normaliser: float
    ess: float
    drawn: Sample | None
    best: Sample | None
    resamplings: int
    dead_ends: int
    reason: str


@dataclass(frozen=True)
class Finished:
    """There is nothing more to do, and all particles can be freed."""

    result: Result


Action = Resampled | Extend | Copy | Stop | Finished


@dataclass
class _Particle:
    """What a particle has reported. ``gains`` and ``potentials`` hold a number a step; ``over``: the last step, once
    it ended or its weight is zero.
    """

    number: int
    tokens: list[int] = field(default_factory=list)
    gains: list[float] = field(default_factory=list)
    potentials: list[float] = field(default_factory=list)
    over: int | None = None

    def is_over(self, step: int) -> bool:
        return self.over is not None and self.over <= step

    def fork(self, number: int, step: int) -> _Particle:
        cut, over = step + 1, self.over if self.is_over(step) else None
        return _Particle(number, self.tokens[:cut], self.gains[:cut], self.potentials[:cut], over)


class SMC:
    """A population of particles, resampled where its effective sample size falls.

    ``start`` gives the first actions, ``receive`` those that follow on an event; the last is ``Finished``. Particles
    have numbers that are never used again, the first ones from 0; a token's randomness should be a function of its
    particle's number and its position (``Draws(seed, position, stream=particle)``): then a run that is ahead, in step
    or repeated gives the same result.

    Args:
        particles: how many, 1 or more.
        seed: of all that is random here.
        threshold: the population is resampled when its effective sample size is under this share of it, from 0
            (never) to 1 (at every step with unequal weights).
        resampling: ``systematic`` (one uniform) or ``multinomial`` (one a particle).

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        particles: int,
        *,
        seed: int,
        threshold: float = 0.5,
        resampling: Literal["systematic", "multinomial"] = "systematic",
    ) -> None:
        if particles < 1:
            raise ValueError(f"particles is {particles}: it must be 1 or more")
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold is {threshold}: it must be from 0 to 1")
        if resampling not in ("systematic", "multinomial"):
            raise ValueError(f"resampling is {resampling!r}: it must be 'systematic' or 'multinomial'")
        self._seed, self._threshold, self._resampling = seed, threshold, resampling
        self._slots = [_Particle(number) for number in range(particles)]
        self._by_number = {particle.number: particle for particle in self._slots}
        self._known = particles  # numbers given away so far
        self._log_weights = [0.0] * particles  # since the population was last resampled
        self._log_mass = 0.0  # of the resamplings so far
        self._step = 0  # the first that is not complete
        self._resamplings = self._dead_ends = 0
        self._finished = False

    @property
    def step(self) -> int:
        """The first step that not all particles have come through."""
        return self._step

    def start(self) -> list[Action]:
        """The first actions."""
        return [Extend(particle.number) for particle in self._slots]

    def receive(self, event: Extended) -> list[Action]:
        """What follows on an event; nothing, while others are awaited.

        An event of a stopped particle, or after the end, is late and ignored; so is the repetition of a step.

        Raises:
            ValueError: a particle that never was, a step out of order, or a log-weight or log-potential that is NaN or
                +inf. The population is as it was before the event.
        """
        if not 0 <= event.particle < self._known:
            raise ValueError(f"particle {event.particle} reports step {event.step}: there is no such particle")
        particle = self._by_number.get(event.particle)
        if self._finished or particle is None or event.step < len(particle.gains):
            return []
        self._record(particle, event)
        actions: list[Action] = []
        while not self._finished and all(p.is_over(self._step) or len(p.gains) > self._step for p in self._slots):
            actions += self._complete()
        return actions

    def _record(self, particle: _Particle, event: Extended) -> None:
        where = f"particle {event.particle}, step {event.step}"
        if particle.over is not None or event.step != len(particle.gains):
            said = "it is over since" if particle.over is not None else "its last was"
            raise ValueError(f"{where}: the step is out of order, {said} step {len(particle.gains) - 1}")
        before = particle.potentials[-1] if particle.potentials else 0.0
        potential = before if event.log_potential is None else event.log_potential
        for name, value in (("log_weight", event.log_weight), ("log_potential", potential)):
            if not value < math.inf:
                raise ValueError(f"{where}: {name} is {value}: it must be a finite number or -inf")
        if event.token is None and event.log_weight != -math.inf:
            raise ValueError(f"{where}: there is no token, so log_weight must be -inf, not {event.log_weight}")
        gain = event.log_weight + potential - before
        if event.token is not None:
            particle.tokens.append(event.token)
        particle.gains.append(gain)
        particle.potentials.append(potential)
        if event.ended or gain == -math.inf:
            particle.over = event.step

    def _complete(self) -> list[Action]:
        """All have come through the step: weigh, resample if need be, go on."""
        step, actions = self._step, list[Action]()
        for slot, particle in enumerate(self._slots):
            if len(particle.gains) > step:
                self._log_weights[slot] += particle.gains[step]
            if particle.over == step and particle.number in self._by_number:
                self._dead_ends += particle.gains[step] == -math.inf
                actions.append(self._stop(particle))
        if all(particle.is_over(step) for particle in self._slots):
            self._finished = True
            return [*actions, Finished(self._result())]
        weights, log_mean = _normalised(self._log_weights)
        if _ess(weights) < self._threshold * len(weights) * (1 - 1e-9):
            self._resamplings += 1
            self._log_mass += log_mean
            self._log_weights = [0.0] * len(weights)
            actions += self._copy(self._ancestors(weights))
        self._step += 1
        waiting = (p for p in self._slots if not p.is_over(step) and len(p.gains) == step + 1)
        return [*actions, *(Extend(particle.number) for particle in waiting)]

    def _stop(self, particle: _Particle) -> Stop:
        del self._by_number[particle.number]
        return Stop(particle.number)

    def _ancestors(self, weights: Sequence[float]) -> list[int]:
        """Slot of the ancestor of each member of the next population, ascending."""
        draws = Draws(self._seed, self._step, "resampling")
        if self._resampling == "systematic":
            return systematic(weights, draws.uniform())
        return multinomial(weights, [draws.uniform() for _ in weights])

    def _copy(self, ancestors: list[int]) -> list[Action]:
        """A survivor stays what it is, ahead or not; its further offspring take the places of those that die."""
        chosen = set(ancestors)
        further = [slot for rank, slot in enumerate(ancestors) if rank and slot == ancestors[rank - 1]]
        stops, copies = list[Action](), list[Action]()
        sources = [particle.number for particle in self._slots]
        for slot in (slot for slot in range(len(self._slots)) if slot not in chosen):
            if self._slots[slot].number in self._by_number:
                stops.append(self._stop(self._slots[slot]))
            source = self._slots[further.pop(0)]
            sources[slot] = source.number
            copy = self._slots[slot] = source.fork(self._known, self._step)
            self._known += 1
            if copy.over is None:
                self._by_number[copy.number] = copy
                copies.append(Copy(source.number, copy.number, self._step))
        population = tuple(particle.number for particle in self._slots)
        return [Resampled(self._step, tuple(sources), population), *stops, *copies]

    def _result(self) -> Result:
        samples = tuple(
            Sample(tuple(particle.tokens), self._log_mass + log_weight)
            for particle, log_weight in zip(self._slots, self._log_weights, strict=True)
        )
        weights, log_mean = _normalised(self._log_weights)
        drawn = best = None
        if weights:
            drawn = samples[systematic(weights, Draws(self._seed, self._step, "result").uniform(), 1)[0]]
            mass: dict[tuple[int, ...], float] = {}
            for sample, weight in zip(samples, weights, strict=True):
                mass[sample.tokens] = mass.get(sample.tokens, 0.0) + weight
            best = max(samples, key=lambda sample: (mass[sample.tokens], sample.log_weight))
        return Result(
            samples=samples,
            log_normaliser=self._log_mass + log_mean,
            ess=_ess(weights) if weights else 0.0,
            drawn=drawn,
            best=best,
            resamplings=self._resamplings,
            dead_ends=self._dead_ends,
            reason="" if weights else f"all {len(samples)} particles came to dead ends, the last at step {self._step}",
        )


def systematic(weights: Sequence[float], uniform: float, count: int | None = None) -> list[int]:
    """Indices of ``count`` draws (as many as there are weights, by default) at equal distances, ascending.

    Args:
        weights: not negative, with a positive sum.
        uniform: over 0 and under 1: where in its cell every draw lies.
    """
    count = count or len(weights)
    return _at(weights, [(rank + uniform) / count for rank in range(count)])


def multinomial(weights: Sequence[float], uniforms: Sequence[float]) -> list[int]:
    """Indices of independent draws by weight, one for each uniform, ascending."""
    return _at(weights, sorted(uniforms))


def _at(weights: Sequence[float], places: Sequence[float]) -> list[int]:
    """Where these shares of the whole weight fall. Never on a weight of zero."""
    upto = list(accumulate(weights))
    last = max(index for index, weight in enumerate(weights) if weight > 0)
    return [min(bisect_right(upto, place * upto[-1]), last) for place in places]


def _normalised(log_weights: Sequence[float]) -> tuple[list[float], float]:
    """The weights as shares, none if all are zero, and the log of their mean."""
    most = max(log_weights)
    if most == -math.inf:
        return [], -math.inf
    weights = [math.exp(log_weight - most) for log_weight in log_weights]
    total = math.fsum(weights)
    return [weight / total for weight in weights], most + math.log(total / len(weights))


def _ess(weights: Sequence[float]) -> float:
    return 1 / math.fsum(weight * weight for weight in weights)
