"""Server-sent events, and what becomes of who makes them when nobody reads on."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from .errors import HungUpError, RefusedError

DONE = "data: [DONE]\n\n"


class Events(StreamingResponse):  # type: ignore[misc]
    """Lines of JSON as events; a refusal on the way is the last of them.

    Args:
        lines: what is sent.
        over: called once, however it ends, also where the client had gone before the first line: with what ended
            it, None where all was sent.
    """

    def __init__(
        self, lines: AsyncGenerator[dict[str, Any], None], over: Callable[[BaseException | None], None]
    ) -> None:
        self._lines, self._over = lines, over
        self._error: BaseException | None = HungUpError()  # until all has been sent
        headers = {"Cache-Control": "no-cache"}
        super().__init__(self._body(), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._over(self._error)

    async def _body(self) -> AsyncIterator[str]:
        try:
            async for line in self._lines:
                yield f"data: {json.dumps(line)}\n\n"
            self._error = None
        except RefusedError as refused:
            self._error = refused
            yield f"data: {json.dumps({'event': 'error', 'message': refused.message, **refused.body})}\n\n"
        except Exception as error:
            self._error = error
            raise
        finally:
            await self._lines.aclose()
        yield DONE
