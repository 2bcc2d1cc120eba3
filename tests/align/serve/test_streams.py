"""Events over plain ASGI: sent as they come, ended in words, and given up where nobody reads."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from align.serve.errors import HungUpError, RefusedError
from align.serve.streams import Events


class Client:
    """Reads so many events, and hangs up; None: all of them."""

    def __init__(self, most: int | None) -> None:
        self.most = most
        self.said: list[str] = []
        self.over: list[BaseException | None] = []
        self.stopped = False
        self._gone = asyncio.Event()

    async def lines(self, end: Exception | None) -> AsyncGenerator[dict[str, Any], None]:
        try:
            for number in range(5):
                yield {"number": number}
                await asyncio.sleep(0)
            if end is not None:
                raise end
        finally:
            self.stopped = True

    async def receive(self) -> dict[str, Any]:
        if self.most != 0:
            await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if body := message.get("body"):
            self.said.append(body.decode().removeprefix("data: ").strip())
        if len(self.said) == self.most:
            self._gone.set()
            await asyncio.sleep(10)  # the wire is dead

    async def read(self, end: Exception | None = None) -> None:
        scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
        await asyncio.wait_for(Events(self.lines(end), self.over.append)(scope, self.receive, self.send), 5)


def read(most: int | None, end: Exception | None = None) -> Client:
    async def main() -> Client:
        client = Client(most)
        await client.read(end)
        return client

    return asyncio.run(main())


def test_all_is_sent_in_order() -> None:
    client = read(None)
    assert [json.loads(line)["number"] for line in client.said[:-1]] == [0, 1, 2, 3, 4]
    assert client.said[-1] == "[DONE]"
    assert client.over == [None]
    assert client.stopped


def test_a_refusal_is_the_last_event() -> None:
    client = read(None, RefusedError(504, "too late"))
    last = json.loads(client.said[-2])
    assert (last["event"], last["message"], last["error"]["code"]) == ("error", "too late", 504)
    assert client.said[-1] == "[DONE]"
    (error,) = client.over
    assert isinstance(error, RefusedError)


@pytest.mark.parametrize("most", [1, 3])
def test_who_hangs_up_stops_what_makes_them(most: int) -> None:
    client = read(most)
    assert len(client.said) == most
    assert client.stopped
    (error,) = client.over
    assert isinstance(error, HungUpError)


def test_who_has_gone_before_the_first_is_told_of_too() -> None:
    """Nothing was begun, and the places that were reserved are given back all the same."""
    client = read(0)
    assert client.said == []
    (error,) = client.over
    assert isinstance(error, HungUpError)
