"""What the trainer calls: the writer of ``metrics.jsonl`` and the progress lines of the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_callback import ProgressCallback as TransformersProgressCallback

from .run_folder import RunFolder, peak_rss_gb
from .wandb import WandbMirror

# The trainer's closing line describes the last process, not the run: after a resume its loss and times are wrong.
CLOSING = frozenset(
    {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "train_tokens_per_second"}
)


@contextmanager
def tracked(trainer: Trainer, run: RunFolder | None = None, mirror: WandbMirror | None = None) -> Iterator[None]:
    """Metrics to the run folder, if given, and progress to the terminal, around ``trainer.train()``.

    Takes the place of transformers' own printing. The terminal is given back also when training raises. What a trainer
    knows of its speed (``speed_facts``), and the peak of memory so far, go to the manifest.
    """
    progress = ProgressCallback()
    trainer.remove_callback(TransformersProgressCallback)
    trainer.remove_callback(PrinterCallback)
    if run is not None:
        trainer.add_callback(MetricsCallback(run, mirror))
    trainer.add_callback(progress)
    try:
        yield
    finally:
        progress.close()
        if run is not None:
            run.update_manifest(speed={**getattr(trainer, "speed_facts", {}), **peak_facts()})


def peak_facts() -> dict[str, float]:
    """Largest memory of this process so far, GB (10^9 bytes), and of the GPU, where there is one."""
    found = {"peak_rss_gb": peak_rss_gb()}
    if torch.cuda.is_available():
        found["peak_gpu_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    return found


class MetricsCallback(TrainerCallback):  # type: ignore[misc]
    """Writes every log of the main process to ``metrics.jsonl`` and to the mirror."""

    def __init__(self, run: RunFolder, mirror: WandbMirror | None = None) -> None:
        self.run = run
        self.mirror = mirror

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock of the column ``seconds``."""
        if state.is_world_process_zero:
            self.run.start_clock()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Write one line."""
        if not state.is_world_process_zero or not logs or CLOSING & logs.keys():
            return
        values = {name: value for name, value in logs.items() if name not in ("step", "total_flos")}
        self.run.log(state.global_step, values)
        if self.mirror is not None:
            self.mirror.log(state.global_step, values)


class ProgressCallback(TrainerCallback):  # type: ignore[misc]
    """A bar on a terminal; elsewhere one line per log, so that a log file stays readable.

    Args:
        stream: where to write; standard error, so that standard output stays free for results.
    """

    def __init__(self, stream: IO[str] | None = None) -> None:
        self.stream = stream or sys.stderr
        self.bar: Progress | None = None
        self._begun = 0.0
        self._first_step = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Open the bar at the step that training starts from."""
        if not state.is_local_process_zero:
            return
        self._begun, self._first_step = time.monotonic(), state.global_step
        if self.stream.isatty():
            self.bar = Progress(
                BarColumn(),
                TextColumn("{task.completed}/{task.total} steps{task.fields[train]}{task.fields[held_out]} ·"),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=Console(file=self.stream),
            )
            self.bar.add_task("train", total=state.max_steps, completed=state.global_step, train="", held_out="")
            self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Show loss and accuracy."""
        if not state.is_local_process_zero or not logs or CLOSING & logs.keys():
            return
        metrics = _summary(logs)
        if self.bar is not None and metrics:
            fields: dict[str, Any] = {"held_out" if metrics.startswith("held-out") else "train": f" · {metrics}"}
            self.bar.update(self.bar.task_ids[0], **fields)
        elif metrics:
            line = f"step {state.global_step}/{state.max_steps} · {metrics}{self._time_left(state)}"
            print(line, file=self.stream, flush=True)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Give the terminal back."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _time_left(self, state: TrainerState) -> str:
        done = state.global_step - self._first_step
        if done <= 0 or state.global_step >= state.max_steps:
            return ""
        seconds = (time.monotonic() - self._begun) / done * (state.max_steps - state.global_step)
        return f" · {_clock(seconds)} left"


def _summary(logs: Mapping[str, Any]) -> str:
    """``loss 0.612 · accuracy 71 % · margin 0.21``, of what the line has; held-out figures are named so."""
    held_out = any(name.startswith("eval_") for name in logs)
    prefix = "eval_" if held_out else ""
    parts = []
    if (loss := logs.get(f"{prefix}loss")) is not None:
        parts.append(f"loss {loss:.3f}")
    if (reward := logs.get(f"{prefix}reward")) is not None:
        parts.append(f"reward {reward:.3f}")
    accuracy = logs.get(f"{prefix}rewards/accuracies", logs.get(f"{prefix}thumbs/accuracy"))
    if accuracy is not None:
        parts.append(f"accuracy {100 * accuracy:.0f} %")
    if (margin := logs.get(f"{prefix}rewards/margins")) is not None:
        parts.append(f"margin {margin:.3f}")
    return ("held-out " if held_out and parts else "") + " · ".join(parts)


def _clock(seconds: float) -> str:
    """``1:05`` or ``2:03:09``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
