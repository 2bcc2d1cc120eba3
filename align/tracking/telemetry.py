"""Usage reporting of dependencies: off, in one place."""

from __future__ import annotations

import os
import sys

OFF = {
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub; TRL reports the start of every trainer through it
    "DO_NOT_TRACK": "1",  # the common flag: huggingface_hub, vLLM and others
    "VLLM_NO_USAGE_STATS": "1",
    "WANDB_ERROR_REPORTING": "false",  # crash reports of the W&B client
}


def disable_telemetry() -> None:
    """Switch off the usage reporting of every dependency, for this process and those it starts.

    Call it before the libraries are imported: huggingface_hub reads the flag once, so where it is imported already
    its constant is set as well.
    """
    os.environ.update(OFF)
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None:
        constants.HF_HUB_DISABLE_TELEMETRY = True  # type: ignore[attr-defined]


def telemetry_flags() -> dict[str, str | None]:
    """The flags as they stand in this process, for the manifest."""
    return {name: os.environ.get(name) for name in OFF}
