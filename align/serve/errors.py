"""What is refused, said as OpenAI's clients and vLLM say it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from align.decoding.constraints import Fault

logger = logging.getLogger(__name__)

TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    408: "TimeoutError",
    413: "RequestTooLargeError",
    422: "NoValidAnswerError",
    429: "TooManyRequestsError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
    504: "TimeoutError",
}


class HungUpError(Exception):
    """The client has gone."""


class RefusedError(Exception):
    """A request that gets no answer.

    Args:
        status: of HTTP.
        message: what is wrong, and what to do.
        headers: such as Retry-After.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the reply."""
        kind = TYPES.get(self.status, "InternalServerError")
        return {"error": {"message": self.message, "type": kind, "param": None, "code": self.status}}


def failed(name: str, reason: str, fault: Fault) -> RefusedError:
    """What a request gets where its constraint, a function or a reward failed; the operator's failures are logged.

    Args:
        name: of the request.
        reason: of the failure.
        fault: whose it is.
    """
    if fault == "later":
        return RefusedError(503, reason, {"Retry-After": "5"})
    if fault == "function":
        logger.error("%s: %s", name, reason)
        return RefusedError(500, f"this server's function, reward or engine failed, tell its operator: {reason}")
    return RefusedError(400, reason)
