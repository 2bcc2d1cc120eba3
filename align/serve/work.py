"""One request, from its settings to its answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest

from align.data.rows import Content
from align.decoding.constraints import Built, ConstraintError, Vocabulary, build
from align.decoding.law import Law
from align.decoding.request import Request
from align.decoding.vllm.online import run
from align.decoding.vllm.particles import Happened

from .admission import Admission, Ticket
from .checker import Checker
from .errors import HungUpError, RefusedError, failed
from .metrics import Metrics, outcome_of
from .options import Options
from .replies import Json, answer_json, as_asked
from .rewards import Rewards
from .structured import checked
from .wire import KEY, LONGEST, Settings

KEPT = 64
"""Constraints that are kept as they were built."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn: what OpenAI's requests have names of their own for."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None


@dataclass(frozen=True)
class Job:
    """A request that was let in.

    Args:
        name: its id.
        request: what is drawn.
        settings: as they were sent.
        ticket: its place among the particles.
        deadline: when its time is up, by the loop's clock.
    """

    name: str
    request: Request
    settings: Settings
    ticket: Ticket
    deadline: float


@dataclass
class Costs:
    """What vLLM says of the requests that a job was made of."""

    requests: int = 0
    cached_tokens: int = 0


class Particles:
    """The engine's client for our own requests: counts them, and may send our settings, which nobody else may."""

    def __init__(self, client: Any, generate: Callable[..., AsyncIterator[Any]], costs: Costs) -> None:
        self._client, self._generate, self._costs = client, generate, costs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    async def generate(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        """As the client's."""
        self._costs.requests += 1
        first = True
        async with contextlib.aclosing(self._generate(*args, **kwargs)) as outputs:  # type: ignore[type-var]
            async for output in outputs:
                if first:
                    self._costs.cached_tokens += output.num_cached_tokens or 0
                    first = False
                yield output


class Service:
    """What the routes work with.

    Args:
        client: of the engine.
        vocabulary: of the model.
        options: limits and names.
        admission, metrics, checker, rewards: see there.
    """

    def __init__(
        self,
        client: Any,
        vocabulary: Vocabulary,
        options: Options,
        *,
        admission: Admission,
        metrics: Metrics,
        checker: Checker,
        rewards: Rewards,
    ) -> None:
        self.client, self.vocabulary, self.options = client, vocabulary, options
        self.admission, self.metrics, self.checker, self.rewards = admission, metrics, checker, rewards
        self._generate = guard(client, checker)
        self._built: OrderedDict[bytes, Built] = OrderedDict()

    async def admit(
        self, name: str, settings: Settings, drawing: Drawing, prompt: Sequence[int], said: Content, deadline: float
    ) -> Job:
        """Check everything that can be checked, and reserve places.

        Args:
            name: id of the request.
            settings: within the limits.
            drawing: law, seed and length.
            prompt: its tokens.
            said: the prompt as it was sent, for rewards.
            deadline: of the whole.

        Raises:
            RefusedError: it cannot be, or not now.
        """
        context = int(self.client.vllm_config.model_config.max_model_len)
        room = context - len(prompt)
        longest = drawing.max_tokens if drawing.max_tokens is not None else min(LONGEST, max(room, 1))
        if longest > room:
            raise RefusedError(
                400,
                f"max_tokens: a prompt of {len(prompt):,} tokens and an answer of {longest:,} are more than the "
                f"{context:,} that this server reads; shorten the prompt or lower max_tokens",
            )
        seed = drawing.seed if drawing.seed is not None else secrets.randbits(48)
        try:
            constraint = await self._constraint(settings.constraint) if settings.constraint is not None else None
            request = Request(
                prompt=tuple(prompt),
                constraint=constraint,
                method=settings.method,
                particles=settings.particles,
                law=Law(drawing.temperature, drawing.top_k, drawing.top_p),
                seed=seed,
                max_new_tokens=longest,
                potential=self.rewards.potential(settings.reward, settings.reward_strength, said, self.vocabulary)
                if settings.reward is not None
                else None,
                potential_every=settings.reward_every,
                threshold=settings.threshold,
                resampling=settings.resampling,
                max_draws=settings.max_draws,
            )
        except ConstraintError as error:
            raise failed(name, as_asked(str(error)), error.fault) from None
        except ValueError as error:
            raise RefusedError(400, as_asked(str(error))) from None
        return Job(name, request, settings, self.admission.reserve(settings.particles), deadline)

    async def answer(self, job: Job, happened: Happened | None = None) -> Json:
        """Draw it; ``replies.answer_json`` of what it came to.

        Raises:
            RefusedError: its time is up, or something failed that is not the client's.
        """
        costs = Costs()
        began = time.monotonic()
        arrived = job.deadline - self.options.timeout
        waited = self.options.timeout
        try:
            async with asyncio.timeout_at(job.deadline):
                await job.ticket.turn()
                waited = asyncio.get_running_loop().time() - arrived
                client = Particles(self.client, self._generate, costs)
                answer = await run(
                    client,
                    job.request,
                    self.vocabulary,
                    job.name,
                    trace=job.settings.trace,
                    happened=happened,
                    executor=self.rewards.thread(job.settings.reward) if job.settings.reward is not None else None,
                )
        except TimeoutError:
            raise RefusedError(
                504,
                f"the request took over {self.options.timeout:g} s and was stopped; "
                + (
                    f"{waited:.1f} s of that it waited, to have its constraint compiled and for a place; try again"
                    if waited > self.options.timeout / 2
                    else "ask for fewer particles or tokens, or a constraint that the model finds easier, or try "
                    "again when the server has less to do"
                ),
            ) from None
        except ConstraintError as error:
            raise failed(job.name, as_asked(str(error)), error.fault) from None
        finally:
            job.ticket.leave()
        self.metrics.answered(answer)
        if answer.fault:
            raise failed(job.name, answer.reason, answer.fault)
        self.admission.took(time.monotonic() - began)
        found = answer_json(answer, self.vocabulary, job.request)
        found["usage"] |= vars(costs)
        return found

    async def _constraint(self, spec: Mapping[str, Any]) -> Built:
        """The constraint, built once its compilation is known to be harmless, and outside of the loop even so."""
        digest = sha256(json.dumps(spec).encode()).digest()
        if digest not in self._built:
            await self.checker.check(spec)
            built = await asyncio.to_thread(self._build, spec)
            self._built[digest] = built
            if len(self._built) > KEPT:
                self._built.popitem(last=False)
        self._built.move_to_end(digest)
        return self._built[digest]

    def _build(self, spec: Mapping[str, Any]) -> Built:
        from vllm import SamplingParams

        from align.decoding.vllm.settings import validate

        built = build(spec, self.vocabulary, predicates=self.options.predicates)
        # vLLM's client checks parameters in the loop; what was looked at before costs it nothing.
        validate(SamplingParams(max_tokens=1, extra_args={KEY: {"constraint": spec, "seed": 0}}))
        return built


def guard(client: Any, checker: Checker) -> Callable[..., AsyncIterator[Any]]:
    """Let nobody else send our settings to the engine, which routes of vLLM's take too, unchecked; nor grammars that
    were not looked at.

    Returns:
        The client's own ``generate``.
    """
    inner: Callable[..., AsyncIterator[Any]] = client.generate

    def generate(prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        if KEY in (getattr(sampling_params, "extra_args", None) or {}):
            raise ValueError(
                f"{KEY}: settings of ours go to /v1/chat/completions and /v1/completions, as vllm_xargs.{KEY}, or to "
                "/v1/align/smc"
            )
        outputs = inner(prompt, sampling_params, *args, **kwargs)
        asked = getattr(sampling_params, "structured_outputs", None)
        return outputs if asked is None else checked(outputs, asked, checker)

    client.generate = generate
    return inner


async def unless_gone(http: HttpRequest, work: Coroutine[Any, Any, Result]) -> Result:
    """Do the work, and drop it where the client hangs up. The body must have been read.

    Raises:
        HungUpError: it did.
    """
    working = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(http))
    try:
        await asyncio.wait([working, gone], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise HungUpError
        return working.result()
    finally:
        gone.cancel()
        working.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _gone(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def outcome(error: BaseException | None) -> str:
    """What the metrics call it."""
    if error is None:
        return "ok"
    if isinstance(error, RefusedError):
        return outcome_of(error.status)
    return "hung_up" if isinstance(error, HungUpError | asyncio.CancelledError) else "error"
