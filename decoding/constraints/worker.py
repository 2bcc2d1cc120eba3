"""A process that runs a user's predicate, so that a call which takes too long can be stopped.

It answers lines of JSON on its standard input. It ends with the process that started it, however that ends.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from threading import TIMEOUT_MAX, Lock, local
from typing import Any

import numpy as np

from .protocol import ConstraintError, FunctionError, RestartingError, StoppedError, StoppedFunctionError

START_SECONDS = 60.0  # importing the function's module, which may import much
COMMAND = "import sys; from align.decoding.constraints import worker; worker.main(sys.argv[1], int(sys.argv[2]))"
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class _Waited(local):
    seconds = 0.0


_waited = _Waited()


def thread_seconds() -> float:
    """Seconds that this thread has taken: its computing, and its waits for what workers compute for it."""
    return time.thread_time() + _waited.seconds


class Worker:
    """Calls ``module:function`` elsewhere, at most ``timeout`` seconds a call; killed and started anew after that.

    Once it has been up, one that is not ``patient`` waits no longer for a new process than for an answer.
    """

    def __init__(self, name: str, timeout: float, *, patient: bool = True) -> None:
        if not 0 < timeout <= TIMEOUT_MAX:
            raise ConstraintError(f"python:{name}: timeout is {timeout}; give seconds above zero, and not for ever")
        self.name, self.timeout, self._patient, self._known = name, timeout, patient, False
        self._process: subprocess.Popen[bytes] | None = None
        self._began, self._loaded = 0.0, False
        self._unread, self._busy = b"", False

    def __call__(self, before: str, ends: Sequence[str], complete: bool) -> Iterator[Any]:
        """What the function says of ``before`` with each of the ends, up to the first that it does not refuse."""
        # Interrupted between a question and its answer, or gone: Linux ends it with the thread that started it.
        if self._busy or (self._process is not None and self._process.poll() is not None):
            self._stop()
        process = self.start()
        if not self._loaded:
            self._load(process)
        self._busy = True
        asked = self._write(process, {"text": before, "ends": ends, "complete": complete})
        for number, end in enumerate(ends, start=1):
            text = before + end
            answer = self._read(process, self.timeout) if asked else None
            if answer is None:
                reason = self._stop() or f"took over {self.timeout:g} s"
                raise StoppedFunctionError(f"{reason} on {text!r}, complete={complete}")
            self._busy = answer.get("verdict") is False and number < len(ends)
            if "error" in answer:
                raise FunctionError(f"raised {answer['error']}; on {text!r}, complete={complete}")
            yield answer["verdict"]

    def start(self) -> subprocess.Popen[bytes]:
        """The process, started where there is none; it imports the function's module, which nobody waits for here."""
        if self._process is not None:
            return self._process
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, self.name, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the process that asks
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)},
        )
        self._process, self._began, self._loaded = process, time.monotonic(), False
        self._unread, self._busy = b"", False
        weakref.finalize(self, _kill, process)
        return process

    def _load(self, process: subprocess.Popen[bytes]) -> None:
        """Wait until the function is there."""
        left = self._began + START_SECONDS - time.monotonic()
        patience = left if self._patient or not self._known else min(left, self.timeout)
        ready = self._read(process, patience)
        if ready is None and process.poll() is None and patience < left:
            raise RestartingError("its process was stopped and is starting again; try again in some seconds")
        if ready is None or "error" in ready:
            ended = self._stop()
            if ready is not None:
                raise FunctionError(ready["error"])
            late = f"its module took over {START_SECONDS:g} s to be imported"
            raise StoppedFunctionError(f"{ended} while its module was imported" if ended else late)
        self._loaded = self._known = True

    def _write(self, process: subprocess.Popen[bytes], request: dict[str, Any]) -> bool:
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            process.wait()
            return False
        return True

    def _read(self, process: subprocess.Popen[bytes], seconds: float) -> dict[str, Any] | None:
        """The next answer, or None where none came in time."""
        assert process.stdout is not None
        began = time.monotonic()
        try:
            while b"\n" not in self._unread:
                if not select.select([process.stdout], [], [], max(0.0, began + seconds - time.monotonic()))[0]:
                    return None
                part = os.read(process.stdout.fileno(), 65536)
                if not part:
                    process.wait()
                    return None
                self._unread += part
        finally:
            _waited.seconds += time.monotonic() - began
        answer, _, self._unread = self._unread.partition(b"\n")
        return dict(json.loads(answer))

    def _stop(self) -> str:
        """End the process; how it had ended by itself, if it had."""
        process, self._process = self._process, None
        code = process.poll() if process is not None else None
        if process is not None:
            _kill(process)
        return f"ended its process (exit code {code})" if code is not None else ""


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


@cache
def shared(name: str) -> tuple[Worker, Lock]:
    """The one process of a function that an operator named, and what its users take turns by; they may not keep it."""
    return Worker(name, TIMEOUT_MAX, patient=False), Lock()


def ask(name: str, timeout: float, before: str, ends: Sequence[str], complete: bool) -> Iterator[Any]:
    """As ``Worker(name, timeout)`` answers, from the function's shared process and in any thread.

    After a call that was stopped it is started again at once, and imports its module while other things are done.
    """
    worker, turn = shared(name)
    found: list[Any] = []
    with turn:
        worker.timeout = timeout
        try:
            for verdict in worker(before, ends, complete):
                found.append(verdict)
                if verdict is not False:  # a reader who stops here must not leave the turn taken
                    break
        except StoppedError:
            worker.start()
            raise
    yield from found


def prepare(names: Collection[str]) -> None:
    """Start the shared processes of these functions, so that constraints need not wait for their modules."""
    for name in names:
        worker, turn = shared(name)
        with turn:
            worker.start()


def main(name: str, parent: int) -> None:
    """Answer the questions of the process ``parent`` until it ends them."""
    from .predicate import load

    # What the function prints or reads must not get among the answers and the questions.
    questions, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    end_with(parent)

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    try:
        function = load(name)
    except ConstraintError as error:
        say({"error": str(error).removeprefix(f"python:{name}: ")})
        return
    say({"ready": True})
    for line in questions:
        request = json.loads(line)
        for end in request["ends"]:
            try:
                verdict: Any = function(request["text"] + end, request["complete"])
            except (Exception, SystemExit) as error:
                say({"error": f"{type(error).__name__}: {error}"})
                break
            refused = isinstance(verdict, bool | np.bool_) and not verdict
            say({"verdict": bool(verdict) if isinstance(verdict, bool | np.bool_) else repr(verdict)})
            if not refused:
                break


def end_with(parent: int) -> None:
    """Where ``parent`` is killed a call would go on without end: on Linux the kernel ends this process with it.

    Elsewhere it looks every second whether ``parent`` is still there, which a call that stays in C code puts off.
    """

    def look(*_: Any) -> None:
        if os.getppid() != parent:
            os._exit(1)

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        look()  # it may have gone before
    else:
        signal.signal(signal.SIGALRM, look)
        signal.setitimer(signal.ITIMER_REAL, 1.0, 1.0)
