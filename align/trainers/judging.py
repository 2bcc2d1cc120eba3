"""An annotator asked about a step's answers, and the labels that a loss learns from."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from align.data.prompts import unpacked
from align.losses.selfplay import argmax_labels, draw_labels
from align.rewards.annotators import Annotator, AnnotatorError, Verdicts
from align.rewards.encoding import as_answer

LABELS = ("soft", "drawn", "argmax")


def asked(
    annotator: Annotator, rows: Sequence[Mapping[str, Any]], answers: Sequence[Sequence[str]], seconds: float
) -> Verdicts | str:
    """Its verdicts, or why there are none. It may be anyone's code, and has a thread of its own to hang in.

    Args:
        rows: of ``TokenizedPrompts.dataset``, one a prompt.
        answers: K texts to each.
        seconds: how long it may take.
    """
    columns = [unpacked(row) for row in rows]
    prompts = [own.pop("prompt") for own in columns]
    given = {name: [own.get(name) for own in columns] for name in (columns[0] if columns else ())}
    said = [[as_answer(prompt, text) for text in own] for prompt, own in zip(prompts, answers, strict=True)]
    found: list[Verdicts | str] = []

    def ask() -> None:
        try:
            found.append(annotator(prompts, said, given))
        except AnnotatorError as error:
            found.append(str(error))
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")

    thread = threading.Thread(target=ask, name="annotator", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return f"it has not answered in {seconds:g} s (online.annotator_seconds), on {len(prompts)} prompts"
    return found[0]


def labelled(preference: Tensor, labels: str, name: str) -> Tensor:
    """The table that the loss sees, (K, K).

    Args:
        preference: probabilities, NaN where nobody said.
        labels: ``soft``, ``drawn`` or ``argmax``.
        name: seeds what is drawn, the same in every process and on every machine.
    """
    if labels == "soft":
        return preference
    count = len(preference)
    first, second = torch.triu_indices(count, count, offset=1)
    values = preference[first, second].clone()
    known = ~values.isnan()
    if labels == "drawn":
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big"))
        values[known] = draw_labels(values[known], generator).to(values.dtype)
    else:
        values[known] = argmax_labels(values[known]).to(values.dtype)
    table = torch.full_like(preference, 0.5)
    table[first, second], table[second, first] = values, 1 - values
    return table
