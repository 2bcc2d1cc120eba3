"""What a request passes before any route: key, body, and a server that is about to stop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from align.serve.gate import Drain, Gate


async def echo(request: Request) -> JSONResponse:
    return JSONResponse({"bytes": len(await request.body())})


async def plain(request: Request) -> PlainTextResponse:
    return PlainTextResponse("here")


class Place:
    """A small application behind the gate."""

    def __init__(self, keys: list[str]) -> None:
        self.drain, self.refused = Drain(), list[int]()
        paths = ("/", "/health", "/metrics", "/v1/models", "/tokenize")
        routes = [Route("/v1/echo", echo, methods=["POST"]), *(Route(path, plain) for path in paths)]
        settings: dict[str, Any] = {"keys": keys, "max_body": 100, "seconds": 1.0}
        app = Gate(Starlette(routes=routes), **settings, drain=self.drain, on_refused=self.refused.append)
        self.client = TestClient(app)


@pytest.fixture
def place() -> Place:
    return Place(["secret", "other"])


KEY = {"Authorization": "Bearer secret"}


@pytest.mark.parametrize("path", ["/", "/health", "/metrics"])
def test_what_says_how_the_server_is_needs_no_key(place: Place, path: str) -> None:
    assert place.client.get(path).text == "here"


@pytest.mark.parametrize("given", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}])
@pytest.mark.parametrize("path", ["/v1/models", "/tokenize", "/v1/none"])
def test_everything_else_needs_one(place: Place, path: str, given: dict[str, str]) -> None:
    reply = place.client.get(path, headers=given)
    assert reply.status_code == 401
    assert reply.json()["error"]["type"] == "AuthenticationError"
    assert "Authorization: Bearer KEY" in reply.json()["error"]["message"]
    assert place.refused == [401]


@pytest.mark.parametrize("key", ["secret", "other"])
def test_any_of_the_keys_will_do(place: Place, key: str) -> None:
    assert place.client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200


def test_without_keys_all_may_come() -> None:
    assert Place([]).client.get("/v1/models").status_code == 200


def parts(count: int) -> Iterator[bytes]:
    for _ in range(count):
        yield b"x" * 10


def test_a_body_up_to_the_limit_comes_through_whole_and_one_over_it_does_not(place: Place) -> None:
    assert place.client.post("/v1/echo", content=b"x" * 100, headers=KEY).json() == {"bytes": 100}
    assert place.client.post("/v1/echo", content=parts(10), headers=KEY).json() == {"bytes": 100}  # no length is said
    for content in (b"x" * 101, parts(11)):
        reply = place.client.post("/v1/echo", content=content, headers=KEY)
        assert reply.status_code == 413
        assert "--max-body" in reply.json()["error"]["message"]


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    said: list[dict[str, Any]] = []

    async def main() -> None:
        app = Gate(Starlette(), keys=[], max_body=100, seconds=0.05, drain=Drain())

        async def never() -> dict[str, Any]:
            await asyncio.sleep(60)
            raise AssertionError

        async def send(message: Any) -> None:
            said.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/echo", "headers": []}
        await asyncio.wait_for(app(scope, never, send), 5)

    asyncio.run(main())
    assert said[0]["status"] == 408


def test_a_stopping_server_takes_nothing_new_and_still_says_how_it_is(place: Place) -> None:
    place.drain.begun = True
    reply = place.client.post("/v1/echo", content=b"x", headers=KEY)
    assert reply.status_code == 503
    assert reply.headers["Retry-After"] == "10"
    assert place.client.get("/health").status_code == 200
    assert place.refused == [503]


def test_draining_waits_for_what_is_under_way_and_not_longer_than_its_grace() -> None:
    async def main() -> None:
        drain = Drain()
        assert await drain.finish(0.0)  # nothing is under way

        done = asyncio.Event()

        async def request() -> None:
            with drain.count():
                await done.wait()

        drain = Drain()
        tasks = [asyncio.create_task(request()) for _ in range(3)]
        await asyncio.sleep(0)
        assert drain.running == 3
        assert not await drain.finish(0.01)
        done.set()
        assert await drain.finish(5)
        await asyncio.gather(*tasks)
        assert drain.running == 0

    asyncio.run(main())


def test_streams_pass_as_they_come() -> None:
    """The first part is there before the second is made: nothing is gathered on the way."""
    made: list[int] = []
    sent: list[tuple[bytes, int]] = []

    async def stream(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})

        async def body() -> AsyncIterator[bytes]:
            for number in range(3):
                made.append(number)
                yield b"%d" % number

        async for part in body():
            await send({"type": "http.response.body", "body": part, "more_body": True})

    async def main() -> None:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                sent.append((message["body"], len(made)))

        gate = Gate(stream, keys=[], max_body=10, seconds=1, drain=Drain())
        await gate({"type": "http", "method": "POST", "path": "/x", "headers": []}, receive, send)

    asyncio.run(main())
    assert sent == [(b"0", 1), (b"1", 2), (b"2", 3)]
