"""Constraints of requests, compiled first in a process that can be killed.

A regular expression, a schema or a grammar may be written so that compiling it takes minutes or gigabytes. That must
neither hold up the server nor reach the engine, so every new one is compiled in a process of its own first, which has
a time limit and a memory limit. There are two lanes: all begin in the first, where none has long, and what does not
get done there is begun anew in the second, which has the whole limit, and goes there at once when it is asked again.
So a stream of hostile ones holds up those that take long themselves, and others only for as long as the first lane
gives each.

What is said of a constraint is kept; that it did not get done is kept for some minutes only, as the machine may have
been busy.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Collection, Mapping
from hashlib import sha256
from typing import Any, Literal, NamedTuple

from align.decoding.constraints import ConstraintError

from .errors import RefusedError

KEPT = 4096
QUICK = 0.3
"""Seconds that a constraint has in the first lane."""
WAITING = (64, 16)
"""Constraints that may be in each lane, with the one that is compiled."""
REMEMBERED = 300.0
"""Seconds for which a constraint that did not get done is not tried again."""
START_SECONDS = 60.0
GRACE = 10.0
"""Seconds in which a process that keeps the limits says that one was over them."""
MEMORY = 2 << 30
LONGEST = 2000
"""Characters of what is said of one: it may quote it."""
COMMAND = "from align.serve.checker import main; main()"
Outcome = Literal["said", "late", "ended"]


class Checker:
    """Says whether a constraint can be compiled.

    Args:
        seconds: that it may take.
        predicates: Python functions that may be named.
    """

    def __init__(self, seconds: float, predicates: Collection[str] = ()) -> None:
        self.seconds = seconds
        limits = (min(QUICK, seconds), seconds)
        self.lanes = [Lane(limit, most, predicates) for limit, most in zip(limits, WAITING, strict=True)]
        self._known: OrderedDict[bytes, _Known] = OrderedDict()

    async def check(self, spec: Mapping[str, Any] | list[Any]) -> None:
        """Look at a constraint; a list is a structured output of vLLM's, see ``structured.problem``.

        Raises:
            ConstraintError: it is none.
            RefusedError: it does not get done within its limits: 400, with the seconds after which it may be tried
                again; or too many wait to be looked at: 429.
        """
        text = json.dumps(spec)
        digest = sha256(text.encode()).digest()
        for lane in self.lanes:
            if self._needs_no(lane, digest):
                continue
            async with lane:
                if self._needs_no(lane, digest):  # another request may have had the same
                    continue
                outcome, said = await lane.ask(text)
                if outcome == "said":
                    self._keep(digest, said, float("inf"))
                    continue
                over = f"{self.seconds:g} s" if outcome == "late" else f"{MEMORY >> 30} GiB"
                problem = f"constraint: it takes over {over} to compile, more than a request may"
                now = time.monotonic()
                last = outcome == "ended" or lane is self.lanes[-1]
                self._keep(digest, problem, now + (REMEMBERED if last else 0.0), now + REMEMBERED)
        known = self._known[digest]
        if known.until < float("inf"):
            after = max(1, round(known.until - time.monotonic()))
            raise RefusedError(
                400, f"{known.problem}; write a simpler one, or try again in {after} s", {"Retry-After": str(after)}
            )
        if known.problem:
            raise ConstraintError(known.problem)

    async def start(self) -> None:
        """Start the processes, so that the first requests need not wait for them.

        Raises:
            RefusedError: one does not come up: 500.
        """
        for lane in self.lanes:
            async with lane:
                await lane.start()

    async def close(self) -> None:
        """End the processes."""
        for lane in self.lanes:
            await lane.close()

    def _needs_no(self, lane: Lane, digest: bytes) -> bool:
        """Whether enough is known of a constraint; of one that was late, that the first lane was too short for it."""
        if (known := self._known.get(digest)) is None:
            return False
        return time.monotonic() < (known.too_short_until if lane is self.lanes[0] else known.until)

    def _keep(self, digest: bytes, problem: str, until: float, too_short_until: float = float("inf")) -> None:
        self._known[digest] = _Known(problem, until, too_short_until)
        if len(self._known) > KEPT:
            self._known.popitem(last=False)


class _Known(NamedTuple):
    """What is wrong with a constraint, or nothing; until when that holds, and until when the first lane is passed by.

    Both are times of the monotonic clock.
    """

    problem: str
    until: float
    too_short_until: float


class Lane:
    """Constraints that are compiled one after another; who is in it has entered it as a context.

    Its process forks another for each, which takes some milliseconds, and is there still when that is killed.

    Args:
        seconds: that each has.
        most: that may be in it.
        predicates: as the checker's.
    """

    def __init__(self, seconds: float, most: int, predicates: Collection[str]) -> None:
        self.seconds, self.most, self._predicates = seconds, most, list(predicates)
        self.process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._inside = 0
        self._owes = False

    async def __aenter__(self) -> None:
        if self._inside >= self.most:
            after = max(1, round(self._inside * self.seconds))
            raise RefusedError(
                429,
                f"busy: too many new constraints wait to be compiled; try again in {after} s",
                {"Retry-After": str(after)},
            )
        self._inside += 1
        try:
            await self._turn.acquire()
        except BaseException:
            self._inside -= 1
            raise

    async def __aexit__(self, *_: object) -> None:
        self._inside -= 1
        self._turn.release()

    async def ask(self, text: str) -> tuple[Outcome, str]:
        """What became of a constraint, and what is wrong with it, or nothing.

        Raises:
            RefusedError: the process is gone: 500.
        """
        process = await self.start()
        assert process.stdin is not None
        try:
            async with asyncio.timeout(2 * self.seconds + GRACE):
                if self._owes:  # to one that was given up
                    await self._answer(process)
                self._owes = True
                process.stdin.write(text.encode() + b"\n")
                await process.stdin.drain()
                outcome, said = await self._answer(process)
        except (TimeoutError, ConnectionError, ValueError):
            await self.close()
            raise RefusedError(500, "the process that compiles constraints has ended; try again") from None
        return outcome, said

    async def _answer(self, process: asyncio.subprocess.Process) -> list[Any]:
        assert process.stdout is not None
        answer = json.loads(await process.stdout.readline())
        self._owes = False
        return list(answer)

    async def start(self) -> asyncio.subprocess.Process:
        """The process, once it is ready.

        Raises:
            RefusedError: it does not come up: 500.
        """
        if self.process is not None and self.process.returncode is None:
            return self.process
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            COMMAND,
            json.dumps([self.seconds, self._predicates]),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the server
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path),
                "OMP_NUM_THREADS": "1",
            },
        )
        self.process, self._owes = process, False
        assert process.stdout is not None
        try:
            async with asyncio.timeout(START_SECONDS):
                ready = await process.stdout.readline()
        except TimeoutError:
            ready = b""
        except BaseException:
            await self.close()
            raise
        if not ready:
            await self.close()
            raise RefusedError(500, "the process that compiles constraints does not start; see the log")
        return process

    async def close(self) -> None:
        """End the process."""
        process, self.process, self._owes = self.process, None, False
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()


def main() -> None:
    """Answer lines of JSON on standard input, each a constraint, until it ends."""
    import resource

    seconds, predicates = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed must not get among the answers
    import align.decoding.constraints.wire
    import align.serve.structured  # noqa: F401  what is forked need not import them

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_forked(line, seconds, predicates)), file=answers, flush=True)


def _forked(text: str, seconds: float, predicates: Collection[str]) -> tuple[Outcome, str]:
    """What a child of this process says of a constraint; the kernel ends it when its time is up."""
    import signal

    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            with os.fdopen(write, "w", encoding="utf-8", errors="backslashreplace") as out:
                out.write(_problem(text, predicates))
            os._exit(0)
        finally:
            os._exit(1)
    os.close(write)
    with os.fdopen(read, encoding="utf-8") as said:
        problem = said.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return "said" if code == 0 else "late" if code == -signal.SIGALRM else "ended", problem


def _problem(text: str, predicates: Collection[str]) -> str:
    from align.decoding.constraints.wire import check

    from .structured import problem

    try:
        spec = json.loads(text)
        if isinstance(spec, list):
            return problem(*spec)[:LONGEST]
        check(spec, predicates=predicates)
    except ConstraintError as error:
        return str(error)[:LONGEST]
    except RecursionError:
        return "constraint: nested too deeply"
    except MemoryError:
        raise  # as where what is not Python's runs out of it: the process ends
    except Exception as error:
        return f"constraint: {type(error).__name__}: {error}"[:LONGEST]
    return ""
