"""Constraints of requests, compiled first in a process that can be killed.

A regular expression, a schema or a grammar may be written so that compiling it takes minutes or gigabytes. That must
neither hold up the server nor reach the engine, so every new one goes through a process of its own first, which has a
time limit and a memory limit; what it says of one is kept. That it did not say anything is not kept: the machine may
have been busy.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import OrderedDict
from collections.abc import Collection, Mapping
from hashlib import sha256
from typing import Any

from align.decoding.constraints import ConstraintError

from .errors import RefusedError

KEPT = 4096
WAITING = 64
"""Constraints that may wait for those before them."""
START_SECONDS = 60.0
MEMORY = 2 << 30
LONGEST = 2000
"""Characters of what is said of one: it may quote it."""
COMMAND = "from align.serve.checker import main; main()"


class Checker:
    """Says whether a constraint can be compiled.

    Args:
        seconds: that it may take.
        predicates: Python functions that may be named.
    """

    def __init__(self, seconds: float, predicates: Collection[str] = ()) -> None:
        self.seconds, self.predicates = seconds, tuple(predicates)
        self._known: OrderedDict[bytes, str] = OrderedDict()
        self._one = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._waiting = 0

    async def check(self, spec: Mapping[str, Any]) -> None:
        """Look at a constraint.

        Raises:
            ConstraintError: it is none, or is not compiled within its limits.
            RefusedError: too many wait to be looked at: 429.
        """
        text = json.dumps(spec)
        digest = sha256(text.encode()).digest()
        if digest not in self._known:
            if self._waiting >= WAITING:
                raise RefusedError(429, "busy: too many new constraints wait to be compiled", {"Retry-After": "5"})
            self._waiting += 1
            try:
                async with self._one:
                    if digest not in self._known:
                        self._known[digest] = await self._asked(text)
                        if len(self._known) > KEPT:
                            self._known.popitem(last=False)
            finally:
                self._waiting -= 1
        if problem := self._known[digest]:
            raise ConstraintError(problem)

    async def start(self) -> None:
        """Start the process, so that the first request need not wait for it.

        Raises:
            ConstraintError: it does not come up.
        """
        async with self._one:
            await self._started()

    async def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()

    async def _asked(self, text: str) -> str:
        """What the process says: what is wrong, or nothing.

        Raises:
            ConstraintError: it says nothing within its limits, and was ended.
        """
        process = await self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            async with asyncio.timeout(self.seconds):
                process.stdin.write(text.encode() + b"\n")
                await process.stdin.drain()
                answer = await process.stdout.readline()
        except (TimeoutError, ConnectionError):
            answer = b""
        except BaseException:  # cancelled: its answer would be taken for that to the next question
            await self.close()
            raise
        if answer.endswith(b"\n"):
            return str(json.loads(answer))
        ended = process.returncode is not None or process.stdout.at_eof()
        await self.close()
        what = "takes more memory than" if ended else f"takes over {self.seconds:g} s to compile, more than"
        raise ConstraintError(f"constraint: it {what} a request may; write a simpler one")

    async def _started(self) -> asyncio.subprocess.Process:
        if self._process is not None and self._process.returncode is None:
            return self._process
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            COMMAND,
            json.dumps([self.seconds, self.predicates]),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the server
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path),
                "OMP_NUM_THREADS": "1",
            },
        )
        self._process = process
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
            raise ConstraintError("constraint: the process that compiles constraints does not start; see the log")
        return process


def main() -> None:
    """Answer lines of JSON on standard input, each a constraint, until it ends."""
    import resource
    import signal

    seconds, predicates = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed must not get among the answers
    from align.decoding.constraints.wire import check

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, seconds + 1)  # the server may have gone; the signal ends this process
        try:
            check(json.loads(line), predicates=predicates)
            said = ""
        except ConstraintError as error:
            said = str(error)
        except RecursionError:
            said = "constraint: nested too deeply"
        except Exception as error:
            said = f"constraint: {type(error).__name__}: {error}"
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(said[:LONGEST]), file=answers, flush=True)
