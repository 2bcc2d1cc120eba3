"""Constraints are looked at elsewhere: hostile ones are stopped, and the next one is answered."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from align.decoding.constraints import ConstraintError
from align.serve.checker import Checker
from align.serve.errors import RefusedError

SLOW = {"json": {"allOf": [{"type": "string", "pattern": f".*{letter}.*"} for letter in "abcdefghijklmnopqrst"]}}
"""Seconds of compiling: a product of automata."""


def run(work: Callable[[Checker], Awaitable[None]], seconds: float = 5.0) -> None:
    async def main() -> None:
        checker = Checker(seconds, ["shop:price"])
        await checker.start()
        try:
            await work(checker)
        finally:
            await checker.close()

    asyncio.run(main())


async def refusal(checker: Checker, spec: Any) -> str:
    with pytest.raises(ConstraintError) as refused:
        await checker.check(spec)
    return str(refused.value)


async def put_off(checker: Checker, spec: Any) -> str:
    """What is said of one that did not get done, with the seconds after which to try again."""
    with pytest.raises(RefusedError) as refused:
        await checker.check(spec)
    assert refused.value.status == 400
    assert 1 <= int(refused.value.headers["Retry-After"]) <= 300
    return refused.value.message


def test_what_is_wrong_is_said_and_what_is_right_passes() -> None:
    async def work(checker: Checker) -> None:
        await checker.check({"regex": "[0-9]+"})
        await checker.check({"any_of": [{"words": ["yes"]}, {"python": "shop:price"}]})
        assert "unclosed group" in await refusal(checker, {"regex": "("})
        assert "may be called: shop:price" in await refusal(checker, {"python": "os:system"})
        assert len(await refusal(checker, {"regex": "(" + "a" * 100_000})) < 3000

    run(work)


def test_a_slow_one_is_stopped_while_the_loop_goes_on() -> None:
    async def work(checker: Checker) -> None:
        slow = asyncio.create_task(put_off(checker, SLOW))
        longest, last = 0.0, time.monotonic()
        while not slow.done():
            await asyncio.sleep(0.005)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        assert "takes over 0.3 s" in await slow
        assert longest < 0.25
        await checker.check({"regex": "[a-z]"})

    run(work, seconds=0.3)


def test_hostile_ones_do_not_stop_the_new_ones_of_others() -> None:
    """Six different ones take 2 s each, and come first: another one waits until each has had its 0.3 s."""

    async def work(checker: Checker) -> None:
        hostile = [
            asyncio.create_task(put_off(checker, {"json": {**SLOW["json"], "title": str(n)}})) for n in range(6)
        ]
        await asyncio.sleep(0.05)
        began = time.monotonic()
        await checker.check({"regex": "20[0-9]{2}"})
        assert time.monotonic() - began < 6 * 0.3 + 1.2
        assert not hostile[-1].done()
        for task in hostile:
            task.cancel()
        await asyncio.gather(*hostile, return_exceptions=True)

    run(work, seconds=2.0)


def test_one_that_did_not_get_done_is_tried_again_after_some_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until then it costs nothing, and who asks is told when."""

    async def work(checker: Checker) -> None:
        said = await put_off(checker, SLOW)
        assert "takes over 0.5 s to compile" in said
        assert "try again in 300 s" in said
        began = time.monotonic()
        for _ in range(3):
            assert "takes over 0.5 s to compile" in await put_off(checker, SLOW)
        assert time.monotonic() - began < 0.2
        later = time.monotonic() + 300
        monkeypatch.setattr("align.serve.checker.time", SimpleNamespace(monotonic=lambda: later))
        began = time.monotonic()
        await put_off(checker, SLOW)
        assert time.monotonic() - began > 0.5

    run(work, seconds=0.5)


def test_one_that_the_first_lane_was_too_short_for_goes_to_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the second had no room for it; and there it gets done."""
    monkeypatch.setattr("align.serve.checker.WAITING", (2, 1))
    monkeypatch.setattr("align.serve.checker.QUICK", 0.001)
    slower = {"regex": "20[0-9]{2}"}

    async def work(checker: Checker) -> None:
        async with checker.lanes[1]:
            with pytest.raises(RefusedError, match="busy"):
                await checker.check(slower)
        async with checker.lanes[0]:
            await asyncio.wait_for(checker.check(slower), 10)

    run(work, seconds=10.0)


def test_the_first_lane_is_passed_by_for_some_minutes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was late there once, on a busy machine, is begun there again."""
    monkeypatch.setattr("align.serve.checker.WAITING", (2, 1))
    monkeypatch.setattr("align.serve.checker.QUICK", 0.001)
    late = {"regex": "20[0-9]{2}"}

    async def work(checker: Checker) -> None:
        async with checker.lanes[1]:
            with pytest.raises(RefusedError, match="busy"):
                await checker.check(late)
            later = time.monotonic() + 300
            monkeypatch.setattr("align.serve.checker.time", SimpleNamespace(monotonic=lambda: later))
            checker.lanes[0].seconds = 10.0
            await checker.lanes[0].close()  # a process keeps the limit that it began with
            await asyncio.wait_for(checker.check(late), 10)

    run(work, seconds=10.0)


def test_one_that_takes_much_memory_ends_its_own_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(checker: Checker) -> None:
        process = checker.lanes[0].process
        said = await put_off(checker, {"regex": "[0-9]{3}"})
        assert "takes over 2 GiB to compile" in said
        assert checker.lanes[0].process is process

    died = "import os; from align.serve import checker; checker._problem = lambda *_: os.abort(); checker.main()"
    monkeypatch.setattr("align.serve.checker.COMMAND", died)
    run(work)


def test_what_is_known_is_not_asked_any_more_and_a_process_that_died_is_started_again() -> None:
    async def work(checker: Checker) -> None:
        assert "unclosed group" in await refusal(checker, {"regex": "("})
        process = checker.lanes[0].process
        assert process is not None
        process.kill()
        await process.wait()
        assert "unclosed group" in await refusal(checker, {"regex": "("})
        assert checker.lanes[0].process is process
        await checker.check({"regex": "20[0-9]{2}"})
        process = checker.lanes[0].process
        assert process is not None
        os.kill(process.pid, signal.SIGSTOP)
        asked = asyncio.create_task(checker.check({"regex": "a"}))
        await asyncio.sleep(0.1)
        process.kill()
        with pytest.raises(RefusedError, match="has ended; try again") as refused:
            await asked
        assert refused.value.status == 500
        await checker.check({"regex": "a"})

    run(work)


def test_only_so_many_may_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.serve.checker.WAITING", (2, 2))

    async def work(checker: Checker) -> None:
        waiting = [asyncio.create_task(checker.check({"regex": f"[0-9]{{{number}}}"})) for number in (1, 2)]
        await asyncio.sleep(0)
        with pytest.raises(RefusedError, match="busy") as refused:
            await checker.check({"regex": "a"})
        assert refused.value.status == 429
        await asyncio.gather(*waiting)
        await checker.check({"regex": "a"})

    run(work)


def test_questions_that_are_given_up_do_not_answer_the_next_one_nor_pile_up() -> None:
    async def work(checker: Checker) -> None:
        for number in range(20):
            given_up = asyncio.create_task(checker.check({"json": {**SLOW["json"], "title": str(number)}}))
            await asyncio.sleep(0.01)
            given_up.cancel()
            await asyncio.gather(given_up, return_exceptions=True)
        began = time.monotonic()
        await checker.check({"regex": "[0-9]"})
        assert time.monotonic() - began < 1.5
        assert "unclosed group" in await refusal(checker, {"regex": "("})

    run(work)
