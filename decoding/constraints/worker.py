"""A process that runs a user's predicate, so that a call which takes too long can be stopped.

``python -m align.decoding.constraints.worker module:function`` answers lines of JSON on its standard input.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
import weakref
from typing import Any

from .protocol import ConstraintError

START_SECONDS = 60.0  # importing the function's module, which may import much


class Worker:
    """Calls ``module:function`` elsewhere, at most ``timeout`` seconds a call; killed and started anew after that."""

    def __init__(self, name: str, timeout: float) -> None:
        if not timeout > 0:
            raise ConstraintError(f"python:{name}: timeout is {timeout}; give seconds above zero")
        self.name, self.timeout = name, timeout
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self, text: str, complete: bool) -> Any:
        process = self._process or self._start()
        answer = self._exchange(process, {"text": text, "complete": complete}, self.timeout)
        if answer is None:
            code = process.poll()
            self._stop()
            reason = f"took over {self.timeout:g} s" if code is None else f"ended its process (exit code {code})"
            raise ConstraintError(f"{reason} on {text!r}, complete={complete}")
        if "error" in answer:
            raise ConstraintError(f"raised {answer['error']}; on {text!r}, complete={complete}")
        return answer["verdict"]

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, self.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)},
        )
        self._process = process
        weakref.finalize(self, _kill, process)
        ready = self._exchange(process, None, START_SECONDS)
        if ready is None or "error" in ready:
            self._stop()
            raise ConstraintError(ready["error"] if ready else f"did not start within {START_SECONDS:g} s")
        return process

    def _exchange(self, process: subprocess.Popen[bytes], request: Any, seconds: float) -> dict[str, Any] | None:
        """The answer, or None where none came in time."""
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if request is not None:
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
        except BrokenPipeError:
            return None
        end, answer = time.monotonic() + seconds, b""
        while not answer.endswith(b"\n"):
            if not select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
                return None
            part = os.read(process.stdout.fileno(), 65536)
            if not part:
                process.wait()
                return None
            answer += part
        return dict(json.loads(answer))

    def _stop(self) -> None:
        if self._process is not None:
            _kill(self._process)
        self._process = None


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def main(name: str) -> None:
    """Answer questions until the input ends."""
    from .predicate import load

    # What the function prints must not get among the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    try:
        function = load(name)
    except ConstraintError as error:
        say({"error": str(error)})
        return
    say({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            verdict: Any = function(request["text"], request["complete"])
            say({"verdict": verdict if isinstance(verdict, bool) else repr(verdict)})
        except Exception as error:
            say({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main(sys.argv[1])
