"""An annotator asked about a step's answers, and the labels that a loss learns from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from align.data.prompts import unpacked
from align.losses.selfplay import argmax_labels, draw_labels
from align.rewards.annotators import Annotator, AnnotatorError, Verdicts
from align.rewards.encoding import as_answer
from align.rewards.patience import NoAnswerError, answer_within

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
    try:
        verdicts = answer_within(seconds, "online.annotator_seconds", lambda: annotator(prompts, said, given))
    except AnnotatorError as error:
        return str(error)
    except NoAnswerError as error:
        return f"{error}, on {len(prompts)} prompts"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return _problem(verdicts, len(prompts), len(said[0]) if said else 0) or verdicts


def _problem(verdicts: Any, prompts: int, answers: int) -> str:
    """What is wrong with verdicts, which may be of anyone's annotator; empty where nothing is."""
    if not isinstance(verdicts, Verdicts):
        return f"it gave a {type(verdicts).__name__}, not Verdicts"
    for name in ("preference", "scores"):
        table = getattr(verdicts, name)
        if tuple(table.shape) != (prompts, answers, answers):
            shape = f"({prompts}, {answers}, {answers})"
            return (
                f"its {name} has shape {tuple(table.shape)}, and {answers} answers to {prompts} prompts take {shape}"
            )
        if bool(table.isinf().any()):
            return f"its {name} is infinite in places"
    p, scores = verdicts.preference, verdicts.scores
    unknown = p.isnan()
    if bool((unknown != unknown.mT).any() or (unknown != scores.isnan()).any()):
        return "its verdicts are NaN in one order of two answers, or in one of preference and scores alone"
    if bool(((p < 0) | (p > 1)).any()) or not torch.allclose((p + p.mT)[~unknown], torch.ones(1).to(p), atol=1e-4):
        return "its preferences are no probabilities, or those of two orders are not 1 in sum"
    if not torch.allclose(scores[~unknown], -scores.mT[~unknown], rtol=1e-4, atol=1e-4):
        return "its scores are not antisymmetric"
    return ""


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
