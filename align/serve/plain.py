"""Requests without our settings, which vLLM's own handlers answer: how many answers may be drawn, and for how long.

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
from .metrics import outcome_of
from .streams import DONE
from .wire import KEY

OURS = ("/v1/chat/completions", "/v1/completions")
"""Paths where the body says whose request it is."""
ERROR = b'data: {"error"'
"""How vLLM begins the event of a stream that says what went wrong after the status 200."""
GRACE = 2.0
"""Seconds in which a handler ends by itself once it is told that its client has gone."""


class Plain:
    """Middleware behind the gate, which gives it whole bodies.

    Args:
        app: what comes after.
        most: answers under way.
        seconds: that one may take.
        done: told of each when it is over: what became of it, and its seconds.
    """

    def __init__(self, app: App, *, most: int, seconds: float, done: Callable[[str, float], None]) -> None:
        self.app, self.most, self.seconds, self._done = app, most, seconds, done
        self.admission = Admission(most, 0, "plain answers")

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"].startswith("/v1/align/"):
            await self.app(scope, receive, send)
            return
        body: bytes = (await receive())["body"]
        asked = _read(body)
        if scope["path"] in OURS and _is_ours(asked):
            await self.app(scope, given(body, receive), send)
            return
        began, outcome = time.monotonic(), "hung_up"
        try:
            if (wanted := answers(asked)) > self.most:
                raise RefusedError(
                    400,
                    f"n, prompt: {wanted:,} answers are over this server's limit of {self.most:,}; "
                    "send several requests",
                )
            ticket = self.admission.reserve(wanted)
        except RefusedError as refused:
            self._done(outcome_of(refused.status), 0.0)
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
        whole, over, hung_up, told = False, False, False, 0
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
            nonlocal started, whole, told
            if not over:
                started = message if message["type"] == "http.response.start" else started
                whole = message["type"] == "http.response.body" and not message.get("more_body", False)
                told = told or _told(message.get("body", b""))
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
        return outcome_of(told or started["status"])

    async def _end(self, started: Message | None, send: Send) -> None:
        """Tell the client that its time is up: as the reply, or as the last event of its stream."""
        refused = RefusedError(504, f"the request took over {self.seconds:g} s and was stopped; ask for fewer tokens")
        if started is None:
            await reply(send, refused)
        elif dict(started["headers"]).get(b"content-type", b"").startswith(b"text/event-stream"):
            last = f"data: {json.dumps({'event': 'error', 'message': refused.message, **refused.body})}\n\n{DONE}"
            await send({"type": "http.response.body", "body": last.encode()})


def _told(event: bytes) -> int:
    """The status that an event of a stream tells as an error; 0 where it tells none."""
    if not event.startswith(ERROR):
        return 0
    try:
        return int(json.loads(event.removeprefix(b"data: "))["error"]["code"])
    except (ValueError, TypeError, KeyError):
        return 500


def _read(body: bytes) -> dict[str, Any]:
    """The object that it is; empty where it is none, which vLLM's handlers will say."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return asked if isinstance(asked, dict) else {}


def _is_ours(asked: dict[str, Any]) -> bool:
    """Whether it has our settings, as the routes look for them."""
    xargs = asked.get("vllm_xargs")
    return isinstance(xargs, dict) and KEY in xargs


def answers(asked: dict[str, Any]) -> int:
    """How many answers the engine would draw at a time for it: those of each prompt, times its prompts.

    vLLM's routes name the first ``n`` (one of them in ``sampling_params``), OpenAI's older clients ``best_of`` too;
    prompts are lists of texts or of tokens in ``prompt``, embeddings, lists of messages, or ``items`` to be scored.
    """
    sampling = asked.get("sampling_params")
    places = (asked, sampling) if isinstance(sampling, dict) else (asked,)
    each = max(_count(place.get(name)) for place in places for name in ("n", "best_of"))
    lists = (asked.get("prompt"), asked.get("prompt_embeds"), asked.get("messages"), asked.get("items"))
    return each * max(_prompts(found) for found in lists)


def _count(given: Any) -> int:
    """As vLLM reads a number; what it would refuse counts once."""
    try:
        return max(1, int(given))
    except (TypeError, ValueError, OverflowError):
        return 1


def _prompts(given: Any) -> int:
    """Of a list, except that of one prompt's tokens or of one chat's messages."""
    if not isinstance(given, list):
        return 1
    return max(1, sum(not isinstance(one, int | dict) for one in given))
