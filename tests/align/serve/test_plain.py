"""Requests without our settings: how many there may be, how long they may take, and what became of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from align.serve.gate import Drain, Gate
from align.serve.plain import Plain, answers

OURS = {"vllm_xargs": {"align": "{}"}}
PATHS = ("/v1/completions", "/v1/responses", "/v1/align/smc")


class Place:
    """Handlers that take as long as ``free`` is not set, and note when their client has gone."""

    def __init__(self, most: int = 2, seconds: float = 30.0) -> None:
        self.free, self.outcomes = asyncio.Event(), list[str]()
        self.running, self.stopped = 0, 0
        routes = [Route(path, self.handle, methods=["POST"]) for path in PATHS]
        app = Plain(
            Starlette(routes=[*routes, Route("/v1/models", self.models)]),
            most=most,
            seconds=seconds,
            done=lambda outcome, took: self.outcomes.append(outcome),
        )
        self.app = Gate(app, keys=[], max_body=1000, seconds=5, drain=Drain())
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app=self.app), base_url="http://here")

    async def models(self, request: Request) -> Response:
        return JSONResponse({})

    async def handle(self, request: Request) -> Response:
        """As vLLM's handlers, which mind a hang-up alone."""
        try:
            asked = dict(await request.json())
        except (ValueError, TypeError):
            return JSONResponse({}, status_code=400)
        if asked.get("status"):
            return JSONResponse({}, status_code=asked["status"])
        if "said" in asked:
            return StreamingResponse(iter(asked["said"]), media_type="text/event-stream")
        if asked.get("stream"):
            return StreamingResponse(self.stream(), media_type="text/event-stream")
        self.running += 1
        gone, free = asyncio.create_task(request.receive()), asyncio.create_task(self.free.wait())
        await asyncio.wait([gone, free], return_when=asyncio.FIRST_COMPLETED)
        self.running -= 1
        self.stopped += not self.free.is_set()
        return JSONResponse(asked)

    async def stream(self) -> AsyncIterator[str]:
        try:
            yield 'data: {"text": "a"}\n\n'
            await self.free.wait()
            yield "data: [DONE]\n\n"
        finally:
            self.stopped += not self.free.is_set()

    async def until(self, running: int) -> None:
        while self.running != running:
            await asyncio.sleep(0.001)


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(work(), 20)

    asyncio.run(main())


def test_so_many_run_and_one_more_is_told_to_come_back() -> None:
    """On whatever route; ours are bounded elsewhere, and what is only asked for is not bounded."""

    async def work() -> None:
        place = Place(most=2)
        first = [asyncio.create_task(place.client.post(path, json={"a": 1})) for path in PATHS[:2]]
        await place.until(2)
        for path, body in ((PATHS[0], {}), (PATHS[1], OURS), (PATHS[0], {"vllm_xargs": {"other": "align"}})):
            busy = await place.client.post(path, json=body)
            assert busy.status_code == 429
            assert int(busy.headers["Retry-After"]) >= 1
            assert "2 plain answers are under way" in busy.json()["error"]["message"]
        ours = [asyncio.create_task(place.client.post(path, json=OURS)) for path in (PATHS[0], PATHS[2])]
        await place.until(4)
        assert (await place.client.get("/v1/models")).status_code == 200
        place.free.set()
        assert [(await reply).json() for reply in (*first, *ours)] == [{"a": 1}, {"a": 1}, OURS, OURS]
        assert (await place.client.post(PATHS[1], json={})).status_code == 200
        assert place.outcomes == ["busy"] * 3 + ["ok"] * 3

    run(work)


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ({"prompt": "a"}, 1),
        ({"prompt": [1, 2, 3]}, 1),
        ({"messages": [{"role": "user", "content": "a"}] * 5, "n": None}, 1),
        ({"prompt": "a", "n": 512}, 512),
        ({"prompt": "a", "n": "512"}, 512),
        ({"prompt": "a", "n": 2, "best_of": 7.0}, 7),
        ({"prompt": ["a", "b", "c"], "n": 4}, 12),
        ({"prompt": [[1], [2, 3]]}, 2),
        ({"prompt_embeds": ["", ""]}, 2),
        ({"messages": [[{"role": "user", "content": "a"}]] * 3, "n": 2}, 6),
        ({"items": ["a", "b"]}, 2),
        ({"token_ids": [1, 2], "sampling_params": {"n": 9}}, 9),
        ({"n": "many", "prompt": []}, 1),
        ({"n": float("inf")}, 1),
    ],
)
def test_what_is_counted_are_answers(body: dict[str, Any], wanted: int) -> None:
    assert answers(body) == wanted


def test_a_request_takes_as_many_places_as_it_wants_answers() -> None:
    async def work() -> None:
        place = Place(most=8)
        large = await place.client.post(PATHS[0], json={"n": 9})
        assert large.status_code == 400
        assert "9 answers are over this server's limit of 8" in large.json()["error"]["message"]
        first = asyncio.create_task(place.client.post(PATHS[0], json={"n": 3, "prompt": ["a", "b"]}))
        await place.until(1)
        assert (await place.client.post(PATHS[0], json={"n": 3})).status_code == 429
        second = asyncio.create_task(place.client.post(PATHS[0], json={"n": 2}))
        await place.until(2)
        place.free.set()
        assert [(await one).status_code for one in (first, second)] == [200, 200]
        assert place.outcomes == ["bad", "busy", "ok", "ok"]

    run(work)


@pytest.mark.parametrize("stream", [False, True])
def test_one_that_takes_too_long_is_stopped_and_told_so(stream: bool) -> None:
    """Its handler hears a hang-up; the client gets 504, or an error as the last event of its stream."""

    async def work() -> None:
        place = Place(most=1, seconds=0.05)
        reply = await place.client.post(PATHS[0], json={"stream": stream})
        assert place.stopped == 1
        assert place.outcomes == ["timeout"]
        if stream:
            *_, error, done, _ = reply.text.split("\n\n")
            assert reply.text.startswith('data: {"text": "a"}\n\n')
            assert done == "data: [DONE]"
            said = json.loads(error.removeprefix("data: "))
            assert (said["event"], said["error"]["code"]) == ("error", 504)
        else:
            assert reply.status_code == 504
            said = reply.json()
        assert "took over 0.05 s" in said["error"]["message"]
        place.free.set()
        assert (await place.client.post(PATHS[0], json={})).status_code == 200  # its place is free

    run(work)


@pytest.mark.parametrize(("status", "outcome"), [(200, "ok"), (400, "bad"), (403, "bad"), (500, "error")])
def test_what_became_of_it_is_told(status: int, outcome: str) -> None:
    async def work() -> None:
        place = Place()
        await place.client.post(PATHS[0], json={"status": status})
        assert place.outcomes == [outcome]

    run(work)


@pytest.mark.parametrize(
    ("event", "outcome"),
    [
        ('{"text": "data: {\\"error\\""}', "ok"),
        ('{"error": {"message": "a", "code": 400}}', "bad"),
        ('{"error": {"message": "a", "code": 429}}', "busy"),
        ('{"error": {"message": "a", "code": 500}}', "error"),
        ('{"error": "a"}', "error"),
    ],
)
def test_an_error_in_a_stream_is_no_answer(event: str, outcome: str) -> None:
    async def work() -> None:
        place = Place()
        said = ['data: {"text": "a"}\n\n', f"data: {event}\n\n", "data: [DONE]\n\n"]
        reply = await place.client.post(PATHS[0], json={"said": said})
        assert (reply.status_code, reply.text) == (200, "".join(said))
        assert place.outcomes == [outcome]

    run(work)


def test_a_client_that_hangs_up_stops_it() -> None:
    """By plain ASGI: the body comes, and then that nobody listens any more."""

    async def work() -> None:
        place = Place(most=1)
        messages: list[Any] = [{"type": "http.request", "body": b"{}"}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await place.until(1)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            assert place.stopped == 1

        scope = {"type": "http", "method": "POST", "path": PATHS[0], "headers": [], "query_string": b""}
        await place.app(scope, receive, send)
        assert (place.stopped, place.running, place.outcomes) == (1, 0, ["hung_up"])

    run(work)


@pytest.mark.parametrize("body", [b'"vllm_xargs', b'["vllm_xargs"]', b'{"vllm_xargs": 3}', b"\xff vllm_xargs"])
def test_what_cannot_be_read_is_plain(body: bytes) -> None:
    async def work() -> None:
        place = Place()
        place.free.set()
        await place.client.post(PATHS[0], content=body)
        assert len(place.outcomes) == 1

    run(work)
