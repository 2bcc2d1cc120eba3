"""What the model that is to be trained says of rows: log-probs, and how alike it sees the answers of a pair.

All columns come of one forward pass a batch, over the rows of training: the prompt of a pair is computed once for both
answers, and the head only where log-probs are asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch

from align.data.fields import FieldError
from align.data.rows import CompletionRow, PairRow
from align.data.tokenize import TokenizedPair, tokenize_completions, tokenize_pairs
from align.errors import AlignError
from align.losses.layouts import layout_of, why_not_shared_prompt
from align.losses.logprobs import token_logps
from align.losses.rows import Rows, answer_rows, pair_rows
from align.losses.similarity import AnswerStates, ches, ches_ln, edit_similarity, last_inner
from align.models.ends import end_tokens
from align.models.scoring import attach_scoring, final_states, head_of

from .rows import ONE_TOKEN, ScoreRow
from .scorers import Columns, Policy, Scored, by_answer

logger = logging.getLogger(__name__)

OF_STATES: dict[str, Callable[[AnswerStates, AnswerStates], torch.Tensor]] = {
    "ches": ches,
    "ches_ln": ches_ln,
    "last_inner": last_inner,
}
OF_PAIRS = (*OF_STATES, "edit")
"""Words whose column is one number a pair."""


class PolicyScorer:
    """Columns of what a model says.

    Prompts, answers and their end tokens are those of training, and so is the limit: an answer that is too long keeps
    its first tokens.

    Args:
        columns: names, and the words of ``OF_THE_MODEL`` that they stand for.
        policy: the model. Dropout is off while it scores.
    """

    def __init__(self, columns: Mapping[str, str], policy: Policy) -> None:
        self.name = ",".join(columns)
        self.columns = dict(columns)
        self.policy = policy
        given = policy.loaded.model
        if getattr(getattr(given, "active_peft_config", None), "is_prompt_learning", False):
            raise AlignError(
                f"{policy.spec}: an adapter of learnt prompts, which is not supported: merge it, or use LoRA"
            )
        self.model = given.get_base_model() if hasattr(given, "get_base_model") else given
        self.ends = end_tokens(self.model, policy.loaded.tokenizer)
        reason = why_not_shared_prompt(self.model)
        self.layout = layout_of(self.model)
        words = set(self.columns.values())
        if "logps" in words:
            attach_scoring(self.model)  # refuses a head that is more than a product, a bias, a scale and a cap
        if reason and words != {"edit"}:
            logger.warning("separate rows for chosen and rejected answers: %s", reason)

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        """The model, its weights and limit, and the words."""
        return {"columns": self.columns, "policy": self.policy.identity, **self.layout}

    def score(self, rows: Sequence[ScoreRow]) -> Scored:
        """The columns of pairs and of other rows come of a pass each: a pair's do not depend on what is beside it."""
        paired = ["rejected" in row.answers for row in rows]
        if len(set(paired)) < 2:
            return self._score(rows)
        parts = []
        for kind in (False, True):
            parts.append(self._score([row for row, is_pair in zip(rows, paired, strict=True) if is_pair is kind]))
        each = [iter(part.columns) for part in parts]
        columns = [next(each[is_pair]) for is_pair in paired]
        return Scored(columns, sum(part.cut for part in parts), sum(part.moved for part in parts))

    def _score(self, rows: Sequence[ScoreRow]) -> Scored:
        laid = self._lay_out(rows)
        if laid is None:
            return Scored([{} for _ in rows])
        found: list[Columns] = [{} for _ in rows]
        states = self._states(laid)
        pairs: tuple[AnswerStates, AnswerStates] | None = None
        if states is not None and not OF_STATES.keys().isdisjoint(self.columns.values()):
            pairs = self._summed(states, laid.rows)
        for name, word in self.columns.items():
            if word == "logps":
                assert states is not None  # the forward pass was made for it
                values = by_answer(rows, self._logps(name, states, laid))
            elif word == "edit":
                values = [{name: edit_similarity(pair.chosen_ids, pair.rejected_ids)} for pair in laid.pairs]
            else:
                assert pairs is not None
                values = [{name: value} for value in OF_STATES[word](*pairs).tolist()]
            for columns, new in zip(found, values, strict=True):
                columns |= new
        if {"ches", "ches_ln"} & set(self.columns.values()):
            for columns, pair in zip(found, laid.pairs, strict=True):
                columns[ONE_TOKEN] = all(self._content(ids) <= 1 for ids in (pair.chosen_ids, pair.rejected_ids))
        return Scored(found, laid.cut, laid.moved)

    def _states(self, laid: _Laid) -> torch.Tensor | None:
        if set(self.columns.values()) == {"edit"}:
            return None
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                return final_states(self.model, laid.rows)
        finally:
            self.model.train(training)

    def _summed(self, states: torch.Tensor, rows: Rows) -> tuple[AnswerStates, AnswerStates]:
        try:
            summed = AnswerStates.gather(states, rows.source, rows.answer, rows.answers).to("cpu")
        except ValueError as error:
            raise FieldError("model", str(error).partition(": ")[2]) from error
        half = rows.answers // 2
        return summed[:half], summed[half:]

    def _logps(self, name: str, states: torch.Tensor, laid: _Laid) -> dict[str, list[float]]:
        with torch.no_grad():
            logps = token_logps(states[laid.rows.source], laid.rows.target, head_of(self.model)).logps
        if not bool(logps.isfinite().all()):
            raise FieldError("model", "a log-prob is not finite")
        totals, lengths = laid.rows.totals(logps).tolist(), laid.rows.lengths().tolist()
        return {
            name: [totals[place] for place in laid.order],
            f"{name}_tokens": [lengths[place] for place in laid.order],
        }

    def _content(self, ids: Sequence[int]) -> int:
        """Tokens of an answer before what ends it: end tokens of text and of turns, and blanks between them."""
        tokenizer, count = self.policy.loaded.tokenizer, len(ids)
        for place in reversed(range(len(ids))):
            if ids[place] in self.ends:
                count = place
            elif tokenizer.decode(ids[place]).strip():
                break
        return count

    @property
    def _pad(self) -> int:
        """Asked once rows are tokenised, which needs an end token."""
        tokenizer = self.policy.loaded.tokenizer
        return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)

    def _lay_out(self, rows: Sequence[ScoreRow]) -> _Laid | None:
        """The rows of one forward pass; None where no row has an answer."""
        tokenizer, limit = self.policy.loaded.tokenizer, self.policy.max_length
        if all("rejected" in row.answers for row in rows):
            pairs = [PairRow(r.row_id, "", n, r.prompt, r.each[0], r.each[1]) for n, r in enumerate(rows)]
            done = tokenize_pairs(pairs, tokenizer, limit)
            _raise_fault(done.faults)
            prompts = [pair.prompt_ids for pair in done.rows]
            chosen, rejected = [p.chosen_ids for p in done.rows], [p.rejected_ids for p in done.rows]
            laid = pair_rows(prompts, chosen, rejected, pad_token_id=self._pad, **self.layout)
            cut = done.counts["truncated_chosen"] + done.counts["truncated_rejected"]
            order = [place + half * len(rows) for place in range(len(rows)) for half in (0, 1)]
            return _Laid(laid.to(self.model.device), order, done.rows, cut, done.counts["boundary_moved"])
        for name, word in self.columns.items():
            if word in OF_PAIRS:
                raise FieldError(name, f"{word} compares chosen with rejected, and this row has no pair")
        each = [CompletionRow(r.row_id, "", n, r.prompt, a) for n, r in enumerate(rows) for a in r.each]
        if not each:
            return None
        single = tokenize_completions(each, tokenizer, limit)
        _raise_fault(single.faults)
        starts = [row.completion_mask.index(1) for row in single.rows]
        prompts = [row.input_ids[:start] for row, start in zip(single.rows, starts, strict=True)]
        answers = [row.input_ids[start:] for row, start in zip(single.rows, starts, strict=True)]
        laid = answer_rows(prompts, answers, pad_token_id=self._pad, row_tokens=self.layout["row_tokens"])
        laid, counts = laid.to(self.model.device), single.counts
        return _Laid(laid, list(range(len(each))), [], counts["truncated_completion"], counts["boundary_moved"])


class _Laid(NamedTuple):
    """Rows of one forward pass.

    ``order``: where in them each answer is, in the order of ``ScoreRow.each``. ``pairs``: their tokens; empty unless
    all are pairs. ``cut`` and ``moved`` as in ``Scored``.
    """

    rows: Rows
    order: list[int]
    pairs: list[TokenizedPair]
    cut: int
    moved: int


def _raise_fault(faults: Sequence[Any]) -> None:
    if faults:
        raise FieldError(faults[0].field, faults[0].reason.replace("data.max_length", "--max-length"))
