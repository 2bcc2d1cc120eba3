"""Ctrl-C and SIGTERM end training after the step in hand, with a checkpoint of it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class SaveAndStop(TrainerCallback):  # type: ignore[misc]
    """Asks the trainer to save and stop once a signal has come."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save and stop where a signal has come."""
        if self.signal is not None:
            control.should_save = True
            control.should_training_stop = True


@contextmanager
def interruptible(trainer: Trainer) -> Iterator[None]:
    """Around ``trainer.train()``: the first signal saves and stops, a second one stops at once.

    Raises:
        KeyboardInterrupt: a signal has stopped the training; its checkpoint is complete.
    """
    callback = SaveAndStop()
    trainer.add_callback(callback)

    def handle(number: int, frame: FrameType | None) -> None:
        if callback.signal is not None:
            raise KeyboardInterrupt
        callback.signal = number
        print("stopping after this step, with a checkpoint; again to stop at once", file=sys.stderr, flush=True)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        trainer.remove_callback(callback)
    if callback.signal is not None:
        raise KeyboardInterrupt
