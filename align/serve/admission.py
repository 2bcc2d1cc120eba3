"""How many particles are drawn at a time, who waits, and who is told to come back later. Knows no server."""

from __future__ import annotations

import asyncio
import math
from collections import deque

from .errors import RefusedError

MEMORY = 0.8
"""Share that the seconds of earlier requests keep in the mean when one more is done."""


class Admission:
    """Places for particles, in the order in which they were asked for.

    Args:
        running: places.
        waiting: particles that may wait for one.
        of: what takes places.
    """

    def __init__(self, running: int, waiting: int, of: str = "particles") -> None:
        self.places, self.most_waiting, self.of = running, waiting, of
        self.running = 0
        self.waiting = 0
        self._queue: deque[Ticket] = deque()
        self._seconds = 1.0

    def reserve(self, particles: int) -> Ticket:
        """A ticket, whose turn may come later.

        Raises:
            RefusedError: too many wait already: 429, with the seconds after which to try again.
        """
        ticket = Ticket(self, particles)
        if not self._queue and self.running + particles <= self.places:
            self.running += particles
            ticket._turn.set_result(None)
        elif self.waiting + particles > self.most_waiting:
            after = self.retry_after
            raise RefusedError(
                429,
                f"busy: {self.running:,} {self.of} are under way and {self.waiting:,} wait, and {particles:,} more "
                f"would be over the limit; try again in {after} s{', or ask for fewer' if particles > 1 else ''}",
                {"Retry-After": str(after)},
            )
        else:
            self.waiting += particles
            self._queue.append(ticket)
        return ticket

    @property
    def retry_after(self) -> int:
        """Whole seconds in which those who are before one will be done, by what requests have taken."""
        rounds = 1 + self.waiting / self.places
        return min(60, max(1, math.ceil(rounds * self._seconds)))

    def took(self, seconds: float) -> None:
        """A request is done, which took so long."""
        self._seconds = MEMORY * self._seconds + (1 - MEMORY) * seconds

    def _leave(self, ticket: Ticket) -> None:
        if ticket._turn.done() and not ticket._turn.cancelled():
            self.running -= ticket.particles
        else:
            self._queue.remove(ticket)
            self.waiting -= ticket.particles
            ticket._turn.cancel()
        while self._queue and self.running + self._queue[0].particles <= self.places:
            first = self._queue.popleft()
            self.waiting -= first.particles
            self.running += first.particles
            first._turn.set_result(None)


class Ticket:
    """The right to so many particles, once its turn has come. ``leave`` gives it back, whatever became of it."""

    def __init__(self, admission: Admission, particles: int) -> None:
        self.particles = particles
        self._admission = admission
        self._turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._left = False

    async def turn(self) -> None:
        """Wait for it."""
        await asyncio.shield(self._turn)

    def leave(self) -> None:
        """Make room; more than once does no harm."""
        if not self._left:
            self._left = True
            self._admission._leave(self)
