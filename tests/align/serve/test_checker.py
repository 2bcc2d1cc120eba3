"""Constraints are looked at elsewhere: hostile ones are stopped, and the next one is answered."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
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
        slow = asyncio.create_task(refusal(checker, SLOW))
        longest, last = 0.0, time.monotonic()
        while not slow.done():
            await asyncio.sleep(0.005)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        assert "takes over 0.3 s" in await slow
        assert longest < 0.25
        await checker.check({"regex": "[a-z]"})  # a new process has taken its place

    run(work, seconds=0.3)


def test_that_the_process_was_held_up_is_not_the_constraints_fault_for_good() -> None:
    """Stopped, then killed, it says nothing; asked again, it does. What it said is kept: it is not asked any more."""

    async def work(checker: Checker) -> None:
        for number, said in ((signal.SIGSTOP, "takes over 0.3 s"), (signal.SIGKILL, "more memory")):
            assert checker._process is not None
            os.kill(checker._process.pid, number)
            assert said in await refusal(checker, {"regex": "20[0-9]{2}"})
            await checker.start()
        await checker.check({"regex": "20[0-9]{2}"})
        assert "unclosed group" in await refusal(checker, {"regex": "("})
        os.kill(checker._process.pid, signal.SIGSTOP)
        await checker.check({"regex": "20[0-9]{2}"})
        assert "unclosed group" in await refusal(checker, {"regex": "("})

    run(work, seconds=0.3)


def test_only_so_many_may_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.serve.checker.WAITING", 2)

    async def work(checker: Checker) -> None:
        waiting = [asyncio.create_task(checker.check({"regex": f"[0-9]{{{number}}}"})) for number in (1, 2)]
        await asyncio.sleep(0)
        with pytest.raises(RefusedError, match="busy") as refused:
            await checker.check({"regex": "a"})
        assert refused.value.status == 429
        await asyncio.gather(*waiting)
        await checker.check({"regex": "a"})

    run(work)


def test_a_question_that_is_given_up_does_not_answer_the_next_one() -> None:
    async def work(checker: Checker) -> None:
        given_up = asyncio.create_task(checker.check(SLOW))
        await asyncio.sleep(0.05)
        given_up.cancel()
        await asyncio.gather(given_up, return_exceptions=True)
        await checker.check({"regex": "[0-9]"})
        assert "unclosed group" in await refusal(checker, {"regex": "("})

    run(work)
