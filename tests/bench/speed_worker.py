"""One way in a process of its own, which trains a step whenever it reads a line, and answers in a line.

The parent holds one such process for each way and lets them take turns, so that what else the machine does meets all
alike, while each has a heap of its own: one trainer's freed memory, given back, would be missed by another's.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from speed_ways import ALL, Setup
from transformers import TrainerCallback

Answer = dict[str, Any]


class Worker:
    """The parent's end: start, wait until it is ready, take turns, stop.

    Attributes:
        ready: what it said when its trainer was made: ``built`` and ``reference`` in seconds, ``loaded`` in MiB.
    """

    def __init__(self, way: str, setup: Setup) -> None:
        self.way = way
        self._log = setup.output.with_suffix(".log")
        command = [sys.executable, __file__, way, setup.written()]
        pipe = subprocess.PIPE
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True)
        self.ready = self._answer()

    def turn(self) -> Answer:
        """One step: its ``seconds``, ``cpu`` seconds and ``loss``, and the ``peak`` of the process so far, MiB."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Answer:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.way} ended:\n{self._log.read_text()[-4000:]}")
        return dict(json.loads(line))

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()


class Turns(TrainerCallback):  # type: ignore[misc]
    """Answers after each step, and waits until it is asked for the next.

    A turn is from there to the end of the next step: the log of the last one, the batch, the step.
    """

    def __init__(self, trainer: Any, out: Any) -> None:
        self._out, self._loss = out, math.nan
        inner = trainer.training_step

        def training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
            loss: torch.Tensor = inner(*args, **kwargs)
            self._loss = float(loss)
            return loss

        trainer.training_step = training_step
        trainer.add_callback(self)

    def wait(self) -> None:
        """Until asked; ends with the parent."""
        if not sys.stdin.readline():
            raise SystemExit
        self._began = time.perf_counter(), time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Tell what the step took."""
        wall, cpu = time.perf_counter() - self._began[0], time.process_time() - self._began[1]
        answer = {"seconds": wall, "cpu": cpu, "loss": self._loss, "peak": resident("VmHWM")}
        print(json.dumps(answer), file=self._out, flush=True)
        self.wait()


def resident(field: str) -> float:
    """``VmRSS``, what this process has in memory, or ``VmHWM``, the most that it had; MiB, on Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def same_adapters(model: torch.nn.Module) -> None:
    """Adapters of all ways start alike: peft draws them, each after another number of draws."""
    draws = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_A" in name:
            torch.nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=draws)


def reference_seconds(trainer: Any) -> float:
    """What a pass of the reference took before training; 0 where it is scored in each step."""
    cache = getattr(trainer, "references", None)
    return float(getattr(trainer, "reference_seconds", 0.0) if cache is None else cache.seconds)


def main() -> None:
    """Make the trainer of a way, and train by turns."""
    out, sys.stdout = sys.stdout, sys.stderr
    began = time.perf_counter()
    way, setup = ALL[sys.argv[1]], Setup.read(sys.argv[2])
    os.environ["ALIGN_CACHE"] = str(setup.output / "cache")  # references of other runs are not read
    trainer = way.make(setup)
    same_adapters(trainer.model)
    reference = reference_seconds(trainer)
    ready = {"built": time.perf_counter() - began, "reference": reference, "loaded": resident("VmRSS")}
    print(json.dumps(ready), file=out, flush=True)
    turns = Turns(trainer, out)
    turns.wait()
    trainer.train()


if __name__ == "__main__":
    main()
