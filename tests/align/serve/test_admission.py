"""Places for particles: who is let in, who waits, who is told to come back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from align.serve.admission import Admission, Ticket
from align.serve.errors import RefusedError


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(work(), 5)

    asyncio.run(main())


async def has_turn(ticket: Ticket) -> bool:
    try:
        await asyncio.wait_for(ticket.turn(), 0.01)
    except TimeoutError:
        return False
    return True


def test_places_go_in_the_order_in_which_they_were_asked_for() -> None:
    async def work() -> None:
        admission = Admission(8, 100)
        first, large, small = (admission.reserve(count) for count in (6, 8, 1))
        assert await has_turn(first)
        assert not await has_turn(large)
        assert not await has_turn(small)  # there is room for it, but then the large one would never come
        assert (admission.running, admission.waiting) == (6, 9)
        first.leave()
        assert await has_turn(large)
        assert not await has_turn(small)
        large.leave()
        assert await has_turn(small)
        assert (admission.running, admission.waiting) == (1, 0)

    run(work)


def test_beyond_what_may_wait_it_says_when_to_come_back() -> None:
    async def work() -> None:
        admission = Admission(4, 4)
        admission.reserve(4)
        waits = admission.reserve(4)
        admission.took(21.0)  # 0.8 * 1 s + 0.2 * 21 s = 5 s a request, and two rounds are ahead
        with pytest.raises(RefusedError) as refused:
            admission.reserve(1)
        assert refused.value.status == 429
        assert refused.value.headers == {"Retry-After": "10"}
        waits.leave()
        assert not await has_turn(admission.reserve(4))

    run(work)


def test_what_is_given_back_twice_or_never_came_is_counted_once() -> None:
    async def work() -> None:
        admission = Admission(2, 10)
        running, waiting = admission.reserve(2), admission.reserve(2)
        waiting.leave()  # its client has gone
        waiting.leave()
        assert (admission.running, admission.waiting) == (2, 0)
        running.leave()
        running.leave()
        assert (admission.running, admission.waiting) == (0, 0)
        assert await has_turn(admission.reserve(2))

    run(work)


def test_a_cancelled_wait_does_not_lose_the_place_of_others() -> None:
    async def work() -> None:
        admission = Admission(1, 10)
        running, gone, patient = (admission.reserve(1) for _ in range(3))
        task = asyncio.create_task(gone.turn())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        gone.leave()
        running.leave()
        assert await has_turn(patient)
        assert (admission.running, admission.waiting) == (1, 0)

    run(work)
