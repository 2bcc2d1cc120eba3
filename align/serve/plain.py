"""Requests without our settings, which vLLM's own handlers answer: how many there may be at a time, and for how long.

Those handlers stop what they do when the client hangs up, and not when their task is cancelled: so that of a request
whose time is up is told that its client has gone, and the client is told from here what happened.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, MutableMapping
from typing import Any

from .admission import Admission
from .errors import RefusedError
from .gate import App, Message, Receive, Send, given, reply
from .metrics import OUTCOMES
from .streams import DONE
from .wire import KEY

OURS = ("/v1/chat/completions", "/v1/completions")
"""Paths where the body says whose request it is."""
GRACE = 2.0
"""Seconds in which a handler ends by itself once it is told that its client has gone."""


class Plain:
    """Middleware behind the gate, which gives it whole bodies.

    Args:
        app: what comes after.
        most: requests under way.
        seconds: that one may take.
        done: told of each when it is over: what became of it, and its seconds.
    """

    def __init__(self, app: App, *, most: int, seconds: float, done: Callable[[str, float], None]) -> None:
        self.app, self.seconds, self._done = app, seconds, done
        self.admission = Admission(most, 0, "plain requests")

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"].startswith("/v1/align/"):
            await self.app(scope, receive, send)
            return
        body: bytes = (await receive())["body"]
        if scope["path"] in OURS and _is_ours(body):
            await self.app(scope, given(body, receive), send)
            return
        began, outcome = time.monotonic(), "hung_up"
        try:
            ticket = self.admission.reserve(1)
        except RefusedError as refused:
            self._done(OUTCOMES[refused.status], 0.0)
            await reply(send, refused)
            return
        try:
            outcome = await self._limited(scope, body, receive, send)
            self.admission.took(time.monotonic() - began)
        except Exception:
            outcome = "error"
            raise
        finally:
            ticket.leave()
            self._done(outcome, time.monotonic() - began)

    async def _limited(self, scope: MutableMapping[str, Any], body: bytes, receive: Receive, send: Send) -> str:
        """What became of it."""
        started: Message | None = None
        whole, over, hung_up = False, False, False
        gone = asyncio.Event()

        async def listen() -> None:
            nonlocal hung_up
            while (await receive())["type"] != "http.disconnect":
                pass
            hung_up = not whole  # after the whole reply a server says the same
            gone.set()

        async def until_gone() -> Message:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def say(message: Message) -> None:
            nonlocal started, whole
            if not over:
                started = message if message["type"] == "http.response.start" else started
                whole = message["type"] == "http.response.body" and not message.get("more_body", False)
                await send(message)

        working: asyncio.Future[None] = asyncio.ensure_future(self.app(scope, given(body, until_gone), say))
        listening = asyncio.create_task(listen())
        try:
            await asyncio.wait([working], timeout=self.seconds)
            if not working.done():
                over = True
                gone.set()
                await self._end(started, send)
                await asyncio.wait([working], timeout=GRACE)
                return "timeout"
            working.result()
        finally:
            for task in (working, listening):
                task.cancel()
            await asyncio.gather(working, listening, return_exceptions=True)
        if hung_up or started is None:
            return "hung_up"
        return "ok" if started["status"] < 400 else OUTCOMES.get(started["status"], "error")

    async def _end(self, started: Message | None, send: Send) -> None:
        """Tell the client that its time is up: as the reply, or as the last event of its stream."""
        refused = RefusedError(504, f"the request took over {self.seconds:g} s and was stopped; ask for fewer tokens")
        if started is None:
            await reply(send, refused)
        elif dict(started["headers"]).get(b"content-type", b"").startswith(b"text/event-stream"):
            last = f"data: {json.dumps({'event': 'error', 'message': refused.message, **refused.body})}\n\n{DONE}"
            await send({"type": "http.response.body", "body": last.encode()})


def _is_ours(body: bytes) -> bool:
    """Whether it has our settings, as the routes look for them."""
    if b"vllm_xargs" not in body:
        return False
    try:
        return KEY in (json.loads(body).get("vllm_xargs") or {})
    except (ValueError, RecursionError, AttributeError, TypeError):
        return False
