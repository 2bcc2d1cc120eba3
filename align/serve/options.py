"""What the operator decides, on its way from the command line to the routes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Options:
    """Limits and names.

    Args:
        rewards: rewards that requests may use, by name: rules (``module:function``) or reward models.
        predicates: Python functions (``module:function``) that constraints of requests may call.
        max_particles: most particles of one request.
        max_running: particles that are drawn at a time; more wait.
        max_waiting: particles that may wait; a request over that is told to come back.
        max_plain: answers of requests without our settings that are drawn at a time; a request over that is told to
            come back.
        max_body: largest body of a request, bytes.
        timeout: seconds that a request may take, with its wait.
        compile_seconds: seconds that compiling a constraint may take.
        grace: seconds that running requests have to finish once the server is told to stop.
    """

    rewards: Mapping[str, str] = field(default_factory=dict)
    predicates: tuple[str, ...] = ()
    max_particles: int = 64
    max_running: int = 64
    max_waiting: int = 256
    max_plain: int = 32
    max_body: int = 1 << 20
    timeout: float = 120.0
    compile_seconds: float = 2.0
    grace: float = 25.0

    def to_json(self) -> dict[str, Any]:
        """As it goes to the server's process."""
        return asdict(self)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """The options that ``to_json`` wrote."""
        return cls(**{**given, "predicates": tuple(given.get("predicates", ()))})
