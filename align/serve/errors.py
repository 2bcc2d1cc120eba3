"""What is refused, said as OpenAI's clients and vLLM say it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
