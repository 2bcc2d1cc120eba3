"""What trainers are compared by: three steps on the CPU, and the losses that they log."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def three_steps() -> dict[str, Any]:
    """Arguments of any of TRL's trainers."""
    return {
        "max_steps": 3,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 3,
    }


@pytest.fixture
def train_and_log() -> Callable[[Any, Path], None]:
    """Train, and let the first process write what was logged at each step."""

    def write(trainer: Any, path: Path) -> None:
        trainer.train()
        if trainer.is_world_process_zero():
            path.write_text(json.dumps([entry for entry in trainer.state.log_history if "loss" in entry]))

    return write
