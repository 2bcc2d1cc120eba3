"""Particles as requests, on a scripted engine: the order in which tokens come has no say, and nothing is lost."""

from __future__ import annotations

import asyncio
import math
import random
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from align.decoding.constraints import ConstraintError, FunctionError, Vocabulary, build
from align.decoding.engines import TransformersEngine
from align.decoding.generate import generate
from align.decoding.request import Answer, Request
from align.decoding.smc import Copy, Extended, Finished, Stop
from align.decoding.vllm import online
from align.decoding.vllm.particles import Abort, Add, Drawn, Lost, Particles, Refused, merged
from align.decoding.vllm.rows import Record, Rows
from align.decoding.vllm.settings import FAILED, read

PROMPT = [0, 1, 2]


class Laws:
    """Logits of the next token, computed once for each sequence."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._known: dict[tuple[int, ...], torch.Tensor] = {}

    def __call__(self, tokens: Sequence[int]) -> torch.Tensor:
        key = tuple(tokens)
        if key not in self._known:
            with torch.no_grad():
                self._known[key] = self._model(torch.tensor([key])).logits[0, -1]
        return self._known[key]


@pytest.fixture(scope="module")
def laws(model: Any) -> Laws:
    return Laws(model)


class Drawing:
    """One request inside an engine: draws by ``Rows``, as the processor does."""

    def __init__(self, rows: Rows, laws: Laws, prompt: Sequence[int], own: Mapping[str, Any], stops: set[int]) -> None:
        params: Any = SimpleNamespace(extra_args={"align": dict(own)}, temperature=0.0, max_tokens=None, seed=None)
        found = read(params)
        assert found is not None
        self._row, self._rows, self._laws = rows.open(found, prompt), rows, laws
        self._prompt, self._stops, self._left = list(prompt), stops, 1 << 20
        self.tokens: list[int] = []
        self.over = False

    def limit(self, length: int) -> Drawing:
        self._left = length
        return self

    def draw(self) -> tuple[int, float]:
        logits = self._laws([*self._prompt, *self.tokens]).clone()[None]
        self._rows.draw(logits, {0: (self._row, list(self.tokens))})
        token = int(logits[0].argmax())
        self.tokens.append(token)
        self.over = token in self._stops or len(self.tokens) == self._left
        return token, float(logits[0, token])


def run(request: Request, vocabulary: Vocabulary, laws: Laws, pick: Callable[[int], int]) -> tuple[Answer, Rows]:
    """Run particles to the end; ``pick(n)`` says which of n runs next, and how many tokens are handed over at once."""
    rows, particles = Rows(vocabulary, None), Particles(request, vocabulary, 256, "test")
    running: dict[int, Drawing] = {}
    waiting: list[Drawn | Lost] = []

    def do(actions: Sequence[Add | Abort]) -> None:
        for action in actions:
            if isinstance(action, Add):
                made = Drawing(rows, laws, action.prompt, action.settings, set(action.stops))
                running[action.particle] = made.limit(action.max_tokens)
            else:
                running.pop(action.particle, None)

    do(particles.start())
    while not particles.done:
        if running:
            number = sorted(running)[pick(len(running))]
            waiting.append(Drawn(number, *running[number].draw()))
            if running[number].over:
                del running[number]
                waiting.append(Lost(number, "stop"))
        if not running or not pick(3):
            do(particles.receive(waiting))
            waiting.clear()
    assert not running
    return particles.answer(merged([rows.pop(particles.names)])), rows


def same(found: Answer, expected: Answer) -> None:
    assert found.reason == expected.reason
    assert found.valid == expected.valid
    assert (found.result is None) == (expected.result is None)
    if found.result is None or expected.result is None:
        return
    assert [sample.tokens for sample in found.result.samples] == [sample.tokens for sample in expected.result.samples]
    weights = [sample.log_weight for sample in expected.result.samples]
    assert [sample.log_weight for sample in found.result.samples] == pytest.approx(weights, abs=1e-5)
    assert found.result.resamplings == expected.result.resamplings


def ones(texts: Sequence[tuple[int, ...]]) -> list[float]:
    """A wish for the token a."""
    return [0.7 * text.count(0) for text in texts]


REQUESTS = [
    ({"regex": "(a|bb)*ab?"}, {}),
    ({"regex": "(a|bb)*ab?"}, {"threshold": 1.0, "resampling": "multinomial"}),
    ({"regex": "[ab]{2,}"}, {"potential": ones, "potential_every": 2, "threshold": 0.9}),
    ({"words": ["ab", "aab", "b"]}, {"max_new_tokens": 3}),
    ({"regex": "c"}, {}),
    (None, {"method": "awrs"}),
]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=st.sampled_from(REQUESTS), seed=st.integers(0, 50), order=st.integers(0, 1 << 30))
def test_the_order_of_events_has_no_say(
    case: Any, seed: int, order: int, model: Any, laws: Laws, vocabulary: Vocabulary
) -> None:
    """As the engine that goes in step, however far some particles are ahead of the others."""
    spec, changes = case
    constraint = None if spec is None else build(spec, vocabulary)
    request = Request(PROMPT, constraint, particles=5, seed=seed, **{"max_new_tokens": 8, **changes})
    found, rows = run(request, vocabulary, laws, random.Random(order).randrange)
    (expected,) = generate(TransformersEngine(model), [request], vocabulary)
    same(found, expected)
    assert not rows.records


def drawn(particle: int, *tokens: tuple[int, float]) -> list[Drawn | Lost]:
    return [Drawn(particle, token, weight) for token, weight in tokens]


def two(vocabulary: Vocabulary, **changes: Any) -> Particles:
    request = Request(PROMPT, build({"regex": ".*"}, vocabulary), particles=2, max_new_tokens=9, **changes)
    return Particles(request, vocabulary, None, "test")


def test_a_constraint_that_fails_ahead_counts_when_all_have_come_as_far(vocabulary: Vocabulary) -> None:
    """Particle 0 fails on its third token. It is stopped where the first weighs next to nothing, and counts else."""
    for weight, failed in ((-50.0, False), (0.0, True)):
        particles = two(vocabulary, threshold=0.9)
        particles.start()
        ahead = drawn(0, (0, weight), (0, 0.0), (4, FAILED))
        assert particles.receive([*ahead, Lost(0, "stop")]) == []
        assert not particles.done
        for _ in range(2):
            actions = particles.receive(drawn(1, (0, 0.0)))
        assert particles.done is failed
        if failed:
            records = [Record(error=error).plain() for error in ("no b", "")]
            assert particles.answer(records).reason == "no b"
            assert actions == [Abort(1)]


def test_an_engine_that_drops_a_request_ends_the_answer_with_the_reason(vocabulary: Vocabulary) -> None:
    particles = two(vocabulary)
    particles.start()
    assert particles.receive([*drawn(0, (0, 0.0), (4, 0.0)), Lost(0, "stop")]) == []
    assert particles.receive([*drawn(1, (0, 0.0)), Lost(1, "abort")]) == [Abort(1)]
    assert particles.answer([]).reason == "vLLM ended the request of a particle that was not done: abort"


def test_records_are_those_of_the_worker_that_samples() -> None:
    assert merged([[None, {"masks": 1}], [{"masks": 2}, None]]) == [{"masks": 2}, {"masks": 1}]


class Client:
    """What ``online.run`` uses of vLLM's client: requests in odd orders, several tokens at once, and records."""

    def __init__(self, vocabulary: Vocabulary, laws: Laws, order: int = 0) -> None:
        self.vllm_config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=256))
        self.rows, self._laws, self._random = Rows(vocabulary, None), laws, random.Random(order)
        self.running: set[str] = set()
        self.drawn = 0
        self.fails_after = math.inf
        self.dead = False

    async def generate(self, prompt: Any, params: Any, name: str) -> AsyncIterator[Any]:
        assert params.output_kind.name == "DELTA"
        own, stops = params.extra_args["align"], set(params.stop_token_ids)
        self.running.add(name)
        try:
            made = Drawing(self.rows, self._laws, prompt["prompt_token_ids"], own, stops).limit(params.max_tokens)
            while not made.over:
                for _ in range(self._random.randrange(4)):
                    await asyncio.sleep(0)
                if self.drawn >= self.fails_after:
                    self.dead = True
                    raise RuntimeError("the engine died")
                found = []
                while not made.over and (not found or self._random.randrange(2)):
                    found.append(made.draw())
                    self.drawn += 1
                one = SimpleNamespace(
                    token_ids=[token for token, _ in found],
                    logprobs=[{token: SimpleNamespace(logprob=weight)} for token, weight in found],
                    finish_reason="stop" if made.over else None,
                )
                yield SimpleNamespace(outputs=[one], finished=made.over)
        finally:
            self.running.discard(name)

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        if method == "align_refused":
            return [self.rows.refused(args[0])]
        assert method == "align_pop"
        assert not self.running  # all are aborted before it is asked what they took
        if self.dead:
            raise RuntimeError("the engine is dead")
        await asyncio.sleep(0)
        return [self.rows.pop(args[0])]


@pytest.mark.parametrize("case", REQUESTS, ids=lambda case: f"{case[0]} {sorted(case[1])}")
def test_online_is_as_the_engine_that_goes_in_step(case: Any, model: Any, laws: Laws, vocabulary: Vocabulary) -> None:
    spec, changes = case
    constraint = None if spec is None else build(spec, vocabulary)
    request = Request(PROMPT, constraint, particles=6, **{"max_new_tokens": 8, **changes})
    requests = [replace(request, seed=seed) for seed in range(4)]

    expected = generate(TransformersEngine(model), requests, vocabulary)
    for order in range(3):
        clients = [Client(vocabulary, laws, order) for _ in requests]

        async def each(clients: list[Client] = clients) -> list[Answer]:
            return await asyncio.gather(
                *(
                    online.run(client, one, vocabulary, "r")  # type: ignore[arg-type]
                    for client, one in zip(clients, requests, strict=True)
                )
            )

        for found, other in zip(asyncio.run(each()), expected, strict=True):
            same(found, other)
        assert not any(client.running or client.rows.records for client in clients)


def request_of(vocabulary: Vocabulary, **changes: Any) -> Request:
    return Request(PROMPT, build({"regex": "[ab]{5,}"}, vocabulary), particles=4, max_new_tokens=60, **changes)


def test_a_cancelled_request_leaves_nothing_in_the_engine(laws: Laws, vocabulary: Vocabulary) -> None:
    client: Any = Client(vocabulary, laws)

    async def cancelled() -> None:
        task = asyncio.create_task(online.run(client, request_of(vocabulary), vocabulary, "r"))
        while client.drawn < 9:
            await asyncio.sleep(0)
        assert client.running
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert not client.running
    assert not client.rows.records
    client.dead = True  # where it does not answer any more, it is a cancellation all the same
    client.drawn = 0
    asyncio.run(cancelled())


def test_an_engine_that_dies_is_the_reason(laws: Laws, vocabulary: Vocabulary) -> None:
    client: Any = Client(vocabulary, laws)
    client.fails_after = 5
    answer = asyncio.run(online.run(client, request_of(vocabulary), vocabulary, "r"))
    assert (answer.result, answer.valid, answer.reason) == (None, False, "RuntimeError: the engine died")
    assert not client.running
    client = Client(vocabulary, laws)
    client.dead = True  # it dies after the last token
    answer = asyncio.run(online.run(client, request_of(vocabulary), vocabulary, "r"))
    assert answer.reason == "RuntimeError: the engine is dead"


@pytest.mark.parametrize(
    "executor", [None, ThreadPoolExecutor(1, thread_name_prefix="potentials")], ids=["asyncio", "own"]
)
def test_a_potential_does_not_hold_up_the_loop_and_who_watches_is_in_it(
    executor: Executor | None, laws: Laws, vocabulary: Vocabulary
) -> None:
    """The potential waits until the loop has gone on: it would wait for ever if it were called in the loop."""
    told: list[Any] = []
    threads: list[threading.Thread] = []

    async def main() -> Answer:
        going = threading.Event()

        def potential(texts: Sequence[tuple[int, ...]]) -> list[float]:
            assert going.wait(10)
            assert threading.current_thread().name.startswith("potentials" if executor else "asyncio")
            going.clear()
            return ones(texts)

        def happened(event: Any) -> None:
            threads.append(threading.current_thread())
            told.append(event)

        async def ticks() -> None:
            while True:
                going.set()
                await asyncio.sleep(0.001)

        ticking = asyncio.create_task(ticks())
        request = request_of(vocabulary, potential=potential, potential_every=3, threshold=0.95)
        client: Any = Client(vocabulary, laws)
        try:
            return await online.run(client, request, vocabulary, "r", happened=happened, executor=executor)
        finally:
            ticking.cancel()

    answer = asyncio.run(main())
    assert answer.valid
    assert answer.result is not None
    assert set(threads) == {threading.main_thread()}
    assert isinstance(told[-1], Finished)
    assert {Copy, Stop, Extended} <= {type(event) for event in told}


@pytest.mark.parametrize("every", [0.0, math.inf])
def test_refused_tokens_are_told_while_particles_grow(
    every: float, laws: Laws, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every token once, and after it; all but the last ones before the end, where they are asked for."""
    monkeypatch.setattr(online, "REFUSED_EVERY", every)
    client: Any = Client(vocabulary, laws)
    request = replace(request_of(vocabulary, threshold=0.9), constraint=build({"regex": "(a|bb){20,}"}, vocabulary))
    told: list[Any] = []
    answer = asyncio.run(online.run(client, request, vocabulary, "r", trace=True, happened=told.append))
    assert answer.valid
    assert not client.rows.records
    (end,) = [place for place, event in enumerate(told) if isinstance(event, Finished)]
    tokens: set[tuple[int, int]] = set()
    refused: list[tuple[int, int]] = []
    for place, event in enumerate(told):
        if isinstance(event, Extended) and event.token is not None:
            tokens.add((event.particle, event.step))
        elif isinstance(event, Refused):
            assert (event.particle, event.step) in tokens or place > end
            refused.append((event.particle, event.step))
    assert len(set(refused)) == len(refused)
    assert set(refused) >= tokens
    assert any(isinstance(event, Refused) and event.tokens for event in told)
    early = sum(isinstance(event, Refused) for event in told[:end])
    assert early == 0 if every else early > len(refused) / 2


@pytest.mark.parametrize("value", [math.nan, math.inf, "x", None])
def test_a_potential_that_gives_no_numbers_ends_its_request(value: Any, laws: Laws, vocabulary: Vocabulary) -> None:
    client: Any = Client(vocabulary, laws)
    request = request_of(vocabulary, potential=lambda texts: [value for _ in texts])
    answer = asyncio.run(online.run(client, request, vocabulary, "r"))
    assert answer.result is None
    assert answer.reason
    assert answer.fault == "function"
    assert not client.running


@pytest.mark.parametrize("error", [ConstraintError("no"), FunctionError("no"), RuntimeError("no")])
def test_a_potential_that_raises_says_whose_fault_it_is(error: Exception, laws: Laws, vocabulary: Vocabulary) -> None:
    def potential(texts: Sequence[tuple[int, ...]]) -> list[float]:
        raise error

    client: Any = Client(vocabulary, laws)
    answer = asyncio.run(online.run(client, request_of(vocabulary, potential=potential), vocabulary, "r"))
    assert answer.result is None
    assert answer.fault == getattr(error, "fault", "function")
