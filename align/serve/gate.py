"""What every request passes first: the API key, the size of its body, and whether the server is about to stop.

Plain ASGI and no framework's base class, so that streams go through as they come and a client's hang-up is seen.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from .errors import RefusedError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

OPEN = ("/", "/health", "/ping", "/version", "/metrics", "/metrics/")
"""Paths that need no key: what says how the server is, and the page, which asks for the key itself."""


class Drain:
    """Requests under way, and the wait until they are done."""

    def __init__(self) -> None:
        self.running = 0
        self.begun = False
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def count(self) -> Iterator[None]:
        """A request, from here to its last byte."""
        self.running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.running -= 1
            if not self.running:
                self._idle.set()

    async def finish(self, grace: float) -> bool:
        """Take no more requests; whether those under way were done in so many seconds."""
        self.begun = True
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), grace)
        return not self.running


class Gate:
    """Middleware.

    Args:
        app: what comes after.
        keys: API keys, one of which a request must bear; none: all may come.
        max_body: most bytes of a body.
        seconds: in which the body must have come.
        drain: counts requests.
        on_refused: called with the status of every request that does not come through.
    """

    def __init__(
        self,
        app: App,
        *,
        keys: Sequence[str],
        max_body: int,
        seconds: float,
        drain: Drain,
        on_refused: Callable[[int], None] = lambda status: None,
    ) -> None:
        self.app, self.drain, self.max_body, self.seconds = app, drain, max_body, seconds
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._on_refused = on_refused

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        try:
            self._check_key(scope)
            if scope["type"] == "websocket" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
                await self.app(scope, receive, send)
                return
            if self.drain.begun:
                raise RefusedError(503, "the server is stopping; ask another one, or try again", {"Retry-After": "10"})
            body = await self._body(scope, receive)
        except RefusedError as refused:
            self._on_refused(refused.status)
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await reply(send, refused)
            return
        if body is None:  # the client has gone
            return
        with self.drain.count():
            await self.app(scope, given(body, receive), send)

    def _check_key(self, scope: MutableMapping[str, Any]) -> None:
        if not self._keys or scope["path"] in OPEN:
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.decode("latin-1").partition(" ")
        digest = hashlib.sha256(key.strip().encode("latin-1")).digest()
        known = [secrets.compare_digest(digest, other) for other in self._keys]
        if scheme.lower() != "bearer" or not any(known):
            what = "this API key is not known here" if given else "no API key"
            raise RefusedError(
                401, f"{what}; send the header 'Authorization: Bearer KEY'", {"WWW-Authenticate": "Bearer"}
            )

    async def _body(self, scope: MutableMapping[str, Any], receive: Receive) -> bytes | None:
        """The whole body; None where the client hung up."""
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if length.isdigit() and int(length) > self.max_body:
            raise self._too_large()
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.seconds):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self.max_body:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise RefusedError(408, f"the body did not come in {self.seconds:g} s") from None

    def _too_large(self) -> RefusedError:
        return RefusedError(
            413, f"the body is over {self.max_body:,} bytes; send less, or start the server with a larger --max-body"
        )


def given(body: bytes, receive: Receive) -> Receive:
    """Gives the body that was read, then what comes after it: the client's hang-up."""
    told = False

    async def first() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return first


async def reply(send: Send, refused: RefusedError) -> None:
    """Say it over plain ASGI."""
    body = json.dumps(refused.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **refused.headers}
    await send(
        {
            "type": "http.response.start",
            "status": refused.status,
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})
