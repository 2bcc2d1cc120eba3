"""A request of ours as requests of vLLM's, without input or output: events in, actions out.

Every particle is a request that runs free: it is not stopped at a resampling unless it dies, and a survivor may be
tokens ahead by then. Only copies are new requests; their prompt is the source's text, which vLLM's prefix cache holds.
What a stopped particle still reports is ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from align.decoding.constraints import Built, ConstraintError, Fault, Memo, Vocabulary
from align.decoding.drawing import check_prompt
from align.decoding.request import Answer, Request
from align.decoding.smc import SMC, Action, Copy, Extended, Finished, Result, Stop
from align.decoding.task import finished, with_potentials

from .settings import DEAD, FAILED


@dataclass(frozen=True)
class Add:
    """A new request: prompt, our settings (``extra_args["align"]``), how many tokens it may draw, where it ends."""

    particle: int
    prompt: tuple[int, ...]
    settings: Mapping[str, Any]
    max_tokens: int
    stops: frozenset[int]


@dataclass(frozen=True)
class Abort:
    """The request of a particle is not needed any more."""

    particle: int


@dataclass(frozen=True)
class Drawn:
    """A particle's request has drawn a token; the log-weight is what vLLM reports as its log-probability."""

    particle: int
    token: int
    log_weight: float


@dataclass(frozen=True)
class Lost:
    """vLLM has ended the request of a particle; its reason, which counts if the particle was not done."""

    particle: int
    reason: str


@dataclass(frozen=True)
class Refused:
    """Tokens that the constraint refused before a particle's token of that step was drawn; told after that one."""

    particle: int
    step: int
    tokens: tuple[int, ...]


Event = Action | Extended | Refused
Happened = Callable[[Event], None]


class Particles:
    """The particles of one request.

    Args:
        request: what is wanted; its constraint is one of ``constraints.build``, or a ``Memo`` of it.
        vocabulary: of the model.
        context: most tokens of a sequence.
        name: of the request, different from that of any other that runs.
        trace: keep the tokens that were refused.
        happened: told of every event and action, in order, to show them.

    Raises:
        ConstraintError: the prompt cannot be used, or the constraint cannot be sent to the engine.
    """

    def __init__(
        self,
        request: Request,
        vocabulary: Vocabulary,
        context: int | None,
        name: str,
        *,
        trace: bool = False,
        happened: Happened | None = None,
    ) -> None:
        check_prompt(request, vocabulary, context)
        self._request, self._vocabulary, self._name, self._happened = request, vocabulary, name, happened
        self._settings = _settings(request, trace)
        self._smc = SMC(
            request.particles,
            seed=request.seed,
            threshold=request.threshold if request.method == "awrs-smc" else 0.0,
            resampling=request.resampling,
        )
        self._tokens: dict[int, tuple[int, ...]] = {}
        self._running: set[int] = set()
        self._broken: dict[int, int] = {}  # particles whose constraint failed, and at which step
        self._result: Result | None = None
        self._names: dict[int, str] = {}
        self._culprit: int | None = None
        self._known: dict[int, int] = {}  # of particles, the first step of which it is not known what was refused
        self.failed = ""
        self._fault: Fault = "function"

    @property
    def names(self) -> list[str]:
        """Names of all requests, under which the engine keeps what they took."""
        return list(self._names.values())

    @property
    def unknown(self) -> dict[str, int]:
        """Requests with tokens of which it is not known what was refused before them, and the first such step."""
        known = {number: self._known.get(number, 0) for number in self._names}
        return {self._names[number]: step for number, step in known.items() if step < len(self._tokens[number])}

    def refused(self, found: Sequence[tuple[str, int, Sequence[int]]]) -> None:
        """Tell what was refused: name, step and tokens, of each request in order; what comes too early is left."""
        numbers = {name: number for number, name in self._names.items()}
        for name, step, tokens in found:
            number = numbers[name]
            if self._known.get(number, 0) <= step < len(self._tokens[number]):
                self._known[number] = step + 1
                self._tell(Refused(number, step, tuple(tokens)))

    @property
    def done(self) -> bool:
        """Whether there is nothing more to be drawn."""
        return self._result is not None or bool(self.failed)

    def start(self) -> list[Add | Abort]:
        """The first requests."""
        self._smc.start()
        return [self._add(number, ()) for number in range(self._request.particles)]

    def receive(self, events: Sequence[Drawn | Lost]) -> list[Add | Abort]:
        """What follows on tokens that came together; potentials are evaluated here, for all of them at once.

        Where a constraint has failed, the request fails once all have come as far: a particle that was ahead may be
        stopped before, and then nothing is lost.
        """
        actions: list[Add | Abort] = []
        waiting = list(events)
        while waiting and not self.done:
            together: dict[int, Drawn | Lost] = {}  # one of each particle: a potential sees its text as it was then
            later: list[Drawn | Lost] = []
            for event in waiting:
                if event.particle in together:
                    later.append(event)
                elif event.particle in self._running:
                    together[event.particle] = event
            actions += self._together(list(together.values()))
            waiting = later
        return actions

    def _together(self, events: Sequence[Drawn | Lost]) -> list[Add | Abort]:
        actions: list[Add | Abort] = []
        drawn: list[Drawn] = []
        for event in events:
            if isinstance(event, Lost):
                return self._fail(f"vLLM ended the request of a particle that was not done: {event.reason}")
            if event.log_weight <= (DEAD + FAILED) / 2:
                self._running.discard(event.particle)
                self._broken[event.particle] = len(self._tokens[event.particle])
            else:
                drawn.append(event)
        extended = [self._extended(event) for event in drawn]
        try:
            for one in with_potentials(self._request, self._tokens, extended):
                self._tell(one)
                for action in self._smc.receive(one):
                    self._tell(action)
                    actions += self._act(action)
        except (Exception, SystemExit) as error:  # a potential is anyone's code
            if isinstance(error, ConstraintError):
                return [*actions, *self._fail(str(error), error.fault)]
            return [*actions, *self._fail(f"{type(error).__name__}: {error}")]
        culprits = [number for number, at in self._broken.items() if at == self._smc.step]
        if culprits and not self.done:
            self._culprit = min(culprits)
            return [*actions, *self._fail("the constraint failed")]
        return actions

    def stop(self, reason: str) -> list[Add | Abort]:
        """End it, with this reason in the answer."""
        return self._fail(reason)

    def answer(self, records: Sequence[Mapping[str, Any] | None]) -> Answer:
        """What it came to.

        Args:
            records: what the engine kept under ``names``, in their order; None where it has lost one, and none at all
                where it does not answer any more.
        """
        for number, record in zip(self._names, records, strict=False):
            for step, tokens in record["refused"] if record is not None else ():
                if step >= self._known.get(number, 0):
                    self._tell(Refused(number, step, tuple(tokens)))
        found = [record for record in records if record is not None]
        evaluations = tuple(count for record in found for count in record["evaluations"])
        masks = sum(record["masks"] for record in found)
        if self.failed:
            by = zip(self._names, records, strict=True) if records else ()
            said, fault = next(
                ((record["error"], record["fault"]) for number, record in by if number == self._culprit and record),
                ("", self._fault),
            )
            return Answer(None, evaluations, False, said or self.failed, masks, fault)
        assert self._result is not None
        cut = sum(bool(record["cut"]) for record in found)
        stuck = next((record["why"] for record in found if record["why"]), "")
        return finished(self._request, self._vocabulary, self._result, evaluations, masks, cut, stuck)

    def _add(self, number: int, tokens: tuple[int, ...], source: int | None = None) -> Add:
        self._tokens[number] = tokens
        self._running.add(number)
        self._names[number] = f"{self._name}-{number}"
        own = {"particle": number, "prefix": len(tokens), "name": self._names[number]}
        if source is not None:
            own["source"] = self._names[source]
        left = self._request.max_new_tokens - len(tokens)
        return Add(number, (*self._request.prompt, *tokens), {**self._settings, **own}, left, self._vocabulary.ends)

    def _extended(self, event: Drawn) -> Extended:
        before = self._tokens[event.particle]
        if event.log_weight <= DEAD / 2:
            self._running.discard(event.particle)
            return Extended(event.particle, len(before), None, -math.inf)
        self._tokens[event.particle] = (*before, event.token)
        last = self._request.constraint is None and len(before) + 1 == self._request.max_new_tokens
        ended = event.token in self._vocabulary.ends or last
        if ended:
            self._running.discard(event.particle)
        return Extended(event.particle, len(before), event.token, event.log_weight, ended)

    def _act(self, action: Action) -> list[Add | Abort]:
        match action:
            case Copy(source, target, at):
                return [self._add(target, self._tokens[source][: at + 1], source)]
            case Stop(number):
                self._broken.pop(number, None)
                if number in self._running:
                    self._running.discard(number)
                    return [Abort(number)]
            case Finished(result):
                self._result = result
                return self._abort()
        return []

    def _fail(self, reason: str, fault: Fault = "function") -> list[Add | Abort]:
        self.failed, self._fault = reason, fault
        return self._abort()

    def _abort(self) -> list[Add | Abort]:
        running, self._running = sorted(self._running), set()
        return [Abort(number) for number in running]

    def _tell(self, event: Event) -> None:
        if self._happened is not None:
            self._happened(event)


def _settings(request: Request, trace: bool) -> dict[str, Any]:
    """What all particles of a request have in common."""
    constraint = request.constraint
    constraint = constraint.constraint if isinstance(constraint, Memo) else constraint
    if constraint is not None and not isinstance(constraint, Built):
        raise ConstraintError(
            f"{type(constraint).__name__}: vLLM draws in another process, to which only constraints of "
            "align.decoding.constraints.build can be sent"
        )
    return {
        "constraint": None if constraint is None else constraint.spec,
        "method": "awrs" if request.method == "awrs-smc" else request.method,
        "law": asdict(request.law),
        "seed": int(request.seed),
        "max_new_tokens": int(request.max_new_tokens),
        "max_draws": None if request.max_draws is None else int(request.max_draws),
        "trace": trace,
    }


def merged(found: Sequence[Sequence[Mapping[str, Any] | None]]) -> list[Mapping[str, Any] | None]:
    """Records, of what each of the engine's workers says: those that sample have kept them."""
    return [next((record for record in one if record is not None), None) for one in zip(*found, strict=True)]
