"""An annotator asked about a step's answers, and the labels that a loss learns from."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from align.data.prompts import unpacked
from align.errors import AlignError
from align.losses.selfplay import argmax_labels, draw_labels
from align.rewards.annotators import Annotator, AnnotatorError, Problem, Verdicts
from align.rewards.encoding import as_answer
from align.rewards.patience import NoAnswerError, answer_within

from .kept import SAMPLES, has_verdicts

if TYPE_CHECKING:
    from .online import OnlineTrainer

logger = logging.getLogger(__name__)

LABELS = ("soft", "drawn", "argmax")
SILENT = 20
"""Steps in a row without a verdict on any pair that end a run."""


class Jury:
    """The annotator of a trainer. Where it fails the run ends, on every process, with a checkpoint to go on from."""

    def __init__(self, trainer: OnlineTrainer) -> None:
        self.trainer = trainer
        self._silent = 0

    def of_step(self, rows: Sequence[Mapping[str, Any]], answers: Sequence[Sequence[str]]) -> Verdicts:
        """Verdicts on the answers that a step learns from.

        A step without any is told of and has no gradient. How many came in a row is counted from where the process
        began, so that a run that is gone on with gets past the step where it ended.

        Raises:
            AlignError: it fails, takes too long, or had nothing to say in ``SILENT`` steps, or all of a shorter run.
        """
        state = self.trainer.state
        where = f"at step {state.global_step + 1}"
        found, pairs = self._asked(rows, answers, where)
        self._silent = 0 if pairs else self._silent + 1
        if self._silent:
            why = f": {found.problems[0].reason}" if found.problems else ""
            often = f", {self._silent} times in a row" * (self._silent > 1)
            said = f"it has nothing to say of any pair{often}{why}"
            last = state.global_step + self.trainer.inner_steps >= state.max_steps
            if last and not has_verdicts(Path(self.trainer.args.output_dir) / SAMPLES):
                self._end(where, f"{said}, nor had it at any step of this run, which has learnt nothing")
            if self._silent >= min(SILENT, math.ceil(state.max_steps / self.trainer.inner_steps)):
                self._end(where, said)
            logger.warning("online.annotator, %s: %s", where, said)
        return found

    def of_evaluation(self, rows: Sequence[Mapping[str, Any]], answers: Sequence[Sequence[str]]) -> Verdicts:
        """Verdicts on held-out answers.

        Raises:
            AlignError: it fails or takes too long; where the run is gone on with this evaluation is made up.
        """
        where = f"in the evaluation at step {self.trainer.state.global_step}"
        found, pairs = self._asked(rows, answers, where)
        if not pairs:
            logger.warning("online.annotator, %s: it has nothing to say of any pair", where)
        return found

    def _asked(
        self, rows: Sequence[Mapping[str, Any]], answers: Sequence[Sequence[str]], where: str
    ) -> tuple[Verdicts, int]:
        """Its verdicts, and how many pairs of all processes have one."""
        trainer = self.trainer
        found = asked(trainer.annotator, rows, answers, trainer.annotator_seconds)
        failed, judged = 1, 0
        if isinstance(found, Verdicts):
            failed, judged = 0, int((~found.preference.isnan()).triu(1).sum())
        told = torch.tensor([failed, judged], device=trainer.args.device)
        failures, pairs = trainer.accelerator.reduce(told, reduction="sum").tolist()
        if isinstance(found, str) or failures:
            self._end(where, found if isinstance(found, str) else "it failed on another process")
        return found, pairs

    def _end(self, where: str, why: str) -> NoReturn:
        raise AlignError(f"online.annotator, {where}: {why}{self._kept()}")

    def _kept(self) -> str:
        """Write a checkpoint of the steps so far; how the run can go on."""
        trainer = self.trainer
        if not trainer.is_in_train:
            return ""
        step = trainer.state.global_step
        if trainer.args.save_strategy == "no":
            return ". No checkpoint is kept (save_strategy: no)"
        if step > trainer.began:
            trainer._save_checkpoint(trainer.model, trial=None)
        return f". Nothing is lost: the same command goes on from step {step}"


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
        return _problem(verdicts, len(prompts), len(said[0]) if said else 0) or verdicts
    except AnnotatorError as error:
        return str(error)
    except NoAnswerError as error:
        return f"{error}, on {len(prompts)} prompts"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _problem(verdicts: Any, prompts: int, answers: int) -> str:
    """What is wrong with verdicts, which may be of anyone's annotator; empty where nothing is."""
    if not isinstance(verdicts, Verdicts):
        return f"it gave a {type(verdicts).__name__}, not Verdicts"
    for name in ("preference", "scores"):
        table = getattr(verdicts, name)
        if not isinstance(table, Tensor) or not table.is_floating_point():
            kind = table.dtype if isinstance(table, Tensor) else type(table).__name__
            return f"its {name} must be a tensor of a floating type, and is of {kind}"
        if tuple(table.shape) != (prompts, answers, answers):
            shape = f"({prompts}, {answers}, {answers})"
            return (
                f"its {name} has shape {tuple(table.shape)}, and {answers} answers to {prompts} prompts take {shape}"
            )
        if bool(table.isinf().any()):
            return f"its {name} {'are' if name == 'scores' else 'is'} infinite in places"
        own, value = table.diagonal(dim1=1, dim2=2), 0.5 if name == "preference" else 0.0
        if not bool((own - value).abs().le(1e-4).all()):
            return f"its {name} of an answer against itself must be {value:g}"
    if not isinstance(verdicts.problems, list):
        return f"its problems are a {type(verdicts.problems).__name__}, and no list"
    for one in verdicts.problems:
        if not isinstance(one, Problem) or not (0 <= one.prompt < prompts and 0 <= one.first < one.second < answers):
            return f"{one} is no problem of two of {answers} answers to one of {prompts} prompts, counted from 0"
    p, scores = verdicts.preference, verdicts.scores
    unknown = p.isnan()
    if bool((unknown != unknown.mT).any() or (unknown != scores.isnan()).any()):
        return "its verdicts are NaN in one order of two answers, or in one of preference and scores alone"
    if bool(((p < 0) | (p > 1)).any()) or not torch.allclose((p + p.mT)[~unknown], torch.ones(1).to(p), atol=1e-4):
        return "its preferences are no probabilities, or those of two orders are not 1 in sum"
    if not torch.allclose(scores[~unknown], -scores.mT[~unknown], rtol=1e-4, atol=1e-4):
        return "its scores are not antisymmetric"
    return ""


def less_cut(verdicts: Verdicts, cut: Tensor, penalty: float) -> Verdicts:
    """Verdicts in which an answer that was cut has ``penalty`` less in log-odds against one that has ended.

    Of a sure verdict the log-odds are those of its scores.

    Args:
        cut: which answers ``max_new_tokens`` cut, (B, K).
    """
    off = penalty * (cut[:, None].double() - cut[:, :, None].double())
    scores = verdicts.scores + off
    preference = torch.where(off == 0, verdicts.preference, torch.sigmoid(scores))
    return Verdicts(preference, scores, verdicts.problems)


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
