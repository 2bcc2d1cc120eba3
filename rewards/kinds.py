"""Which kind of reward model a loss trains: what its arguments say."""

from __future__ import annotations

import inspect
from typing import Literal

from align.losses.catalogue import LossInfo

Kind = Literal["scalar", "attributes", "gpm"]
# The first argument of a loss that says what it is computed on.
_READS: dict[str, Kind] = {"predictions": "attributes", "chosen_embedding": "gpm", "chosen": "scalar"}


def kind_trained_by(info: LossInfo) -> Kind | None:
    """The kind of model; None for a loss that trains none by itself (``centering``; PAL's train models of users)."""
    first = next(iter(inspect.signature(info.function).parameters), "")
    kind = _READS.get(first) if info.kind == "reward" else None
    return kind if info.ranks or kind == "attributes" else None
