"""A training run's memory stays what its batches need."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.models.memory import release_freed

EVERY = 2  # steps


class ReleaseFreed(TrainerCallback):  # type: ignore[misc]
    """Gives freed memory back every few steps and after each evaluation."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Between batches: every ``EVERY`` steps."""
        if state.global_step % EVERY == 0:
            release_freed()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """After an evaluation, whose batches have other widths."""
        release_freed()
