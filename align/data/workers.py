"""Many rows to token ids in several processes: the same ids, faults and counts, in the same order, as in one.

The tokenizers library uses every processor by itself; what takes turns is the rest: templates, and cutting answers
from prompts. A process of its own takes seconds to start, and 80 MB, so that there are several for much text alone,
from some 30,000 pairs on. Each gets the encoder once and then parts of the rows, one at a time. It imports nothing of
the caller's script, leaves Ctrl-C to the caller, and ends when the caller does.
"""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import Any

from align.errors import AlignError

from .encode import Encoder, Question
from .encodings import Encodings

logger = logging.getLogger(__name__)

START = 3.2  # seconds of a processor, most of them for importing transformers
TAKES_TURNS = 0.23e-6  # seconds a character in this process's one Python thread: templates, and cutting
MOST = 8
PARTS_EACH = 8
COMMAND = "from align.data.workers import main; main()"

Process = subprocess.Popen[bytes]


def processes_for(size: int) -> int:
    """How many processes are of use for ``size`` characters on this machine; 1 is this one alone.

    Several are where they save twice what starting them takes: what takes turns is then done side by side.
    """
    from align.models.processors import usable

    count = min(usable(), MOST)
    saved = size * TAKES_TURNS * (1 - 1 / count)
    return count if saved > 2 * START and sys.executable else 1


def encode(encoder: Encoder, rows: Sequence[Question], processes: int) -> Encodings:
    """``encoder.encode(rows)``, by so many processes; by this one where there are fewer than two.

    Raises:
        AlignError: as ``encoder.encode``.
    """
    if processes < 2:
        return encoder.encode(rows)
    each = max(1, len(rows) // (processes * PARTS_EACH))
    starts = range(0, len(rows), each)
    try:
        packed = pickle.dumps(pickle.dumps(encoder))
        # The processes end before the threads are waited for, which wait for the processes.
        with ThreadPoolExecutor(processes) as threads, _started(packed, processes) as free:
            parts = list(threads.map(lambda start: _ask(free, rows[start : start + each]), starts))
    except AlignError:
        raise
    except Exception as error:  # of a process that was killed, or that could not take the tokenizer
        logger.warning("the processes that tokenise have ended (%r): this one does it alone", error)
        return encoder.encode(rows)
    return Encodings.joined(list(zip(starts, parts, strict=True)))


@contextmanager
def _started(packed: bytes, count: int) -> Iterator[SimpleQueue[Process]]:
    """Processes that hold the encoder, each free for a part."""
    from align.models.processors import usable

    threads = max(1, usable() // count)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path),
        "RAYON_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": str(threads > 1).lower(),
    }
    free: SimpleQueue[Process] = SimpleQueue()
    started: list[Process] = []
    try:
        for _ in range(count):
            process = subprocess.Popen(
                [sys.executable, "-c", COMMAND],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the caller, who ends them
            )
            started.append(process)
            free.put(process)
        for process in started:
            assert process.stdin is not None
            process.stdin.write(packed)
        yield free
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with suppress(OSError):  # what the pipe still holds
                    pipe.close()


def _ask(free: SimpleQueue[Process], rows: Sequence[Question]) -> Encodings:
    """One part, by the next process that is free."""
    process = free.get()
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        pickle.dump(rows, process.stdin)
        process.stdin.flush()
        answer = pickle.load(process.stdout)
    finally:
        free.put(process)  # also one that has ended: who takes it next is told so too
    if isinstance(answer, Exception):
        raise answer
    found: Encodings = answer
    return found


def main() -> None:
    """Answer parts of rows on standard input until it ends; before them comes the encoder."""
    parts, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed must not get among the answers
    problem: Exception | None = None
    encoder: Any = None
    packed = pickle.load(parts)
    try:
        encoder = pickle.loads(packed)
    except Exception as error:
        problem = error
    while True:
        try:
            rows = pickle.load(parts)
        except EOFError:
            return
        pickle.dump(problem or _encoded(encoder, rows), answers)
        answers.flush()


def _encoded(encoder: Encoder, rows: Sequence[Question]) -> Encodings | Exception:
    try:
        return encoder.encode(rows)
    except Exception as error:
        return error
