"""``data.filter`` of a recipe: the rows that a run trains on, by columns of its data or by what its model scores.

A column that the data has is taken from there. ``ches_ln`` and its kin are otherwise scored before training, by the
model that training starts from, on the very tokens of training; scores are kept in the run folder under what decides
them, so that a run that goes on does not score again.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from align.config.explain import nearest
from align.config.schema import Recipe
from align.data.fields import FieldError
from align.data.load import Row, read_rows
from align.data.report import check_fraction, fault_report
from align.data.rows import Fault, PairRow
from align.data.splits import Split
from align.data.tokenize import TokenizedPair
from align.errors import ConfigError
from align.models.load import LoadedModel, load_policy
from align.tracking.progress import progress

from .filter import SHORT, Candidate, Rules, Table, labels_in
from .filtered import Filtered, facts, summary, write_filtered
from .policy import OF_PAIRS, PolicyScorer
from .rows import ONE_TOKEN
from .run import SHARD_ROWS, no_warning_of_batches, processes, score_rows
from .scorers import Policy
from .select import finite_number, places, rule_words
from .shards import Line, Shards

FOLDER = "filter"
"""Of a run folder: what the filter dropped, and why."""
BATCH = 8
"""Pairs of a forward pass where the recipe does not say per_device_eval_batch_size: the default of transformers."""


@dataclass(frozen=True)
class TrainingFilter:
    """``data.filter`` and the rows that it looks at.

    Args:
        recipe: the run.
        split: its training data.
    """

    recipe: Recipe
    split: Split

    @property
    def rules(self) -> Rules:
        """By column."""
        return self.recipe.data.filter or {}

    @cached_property
    def rows(self) -> list[tuple[Any, Any]]:
        """The usable rows, as read and as token ids."""
        read: Iterator[Any] = iter(self.split.table.rows)
        usable: list[Any] = list(self.split.tokenized.rows)
        # Tokenising keeps the order, and refuses all rows of one content or none.
        return [(next(row for row in read if row.row_id == ids.row_id), ids) for ids in usable]

    @cached_property
    def raw(self) -> dict[tuple[str, int], dict[str, Any]]:
        """The rows as they stand in the data, by file and number."""
        rows = read_rows(self.recipe.data.train)
        return {(file, number): row for file, number, row in rows if not isinstance(row, Fault)}

    @cached_property
    def scored(self) -> list[str]:
        """Columns that the data has not and that the model scores.

        Raises:
            ConfigError: a column that is neither.
        """
        known = {name for row in self.raw.values() for name in row}
        compares = can_score(self.recipe)
        problems, scored = [], []
        for column, rule in self.rules.items():
            if column not in known and column in OF_PAIRS and compares:
                scored.append(column)
            elif column not in known:
                problems.append((f"data.filter.{column}", self._unknown(column, known, compares)))
            if rule.group is not None and rule.group not in known:
                problems.append((f"data.filter.{column}.group", self._unknown(rule.group, known, False)))
        if problems:
            raise ConfigError("data.filter", problems)
        return scored

    def _unknown(self, column: str, known: set[str], compares: bool) -> str:
        if column in OF_PAIRS:
            return (
                f"{self.recipe.data.train} has no such column, and it is scored only where a policy learns from pairs"
            )
        near = nearest(column, [*known, *(OF_PAIRS if compares else ())])
        has = f"{self.recipe.data.train} has no column {column}"
        return f"{has}; did you mean {near}?" if near else f"{has}; it has {', '.join(sorted(known))}"

    def describe(self) -> str:
        """What the filter will do, without scoring."""
        if not self.scored:
            return summary(self.judged({}))
        lines = []
        for column, rule in self.rules.items():
            line = f"{column}: {rule_words(rule)}"
            if column in self.scored:
                line += f", scored with {self.recipe.model.name} before training"
            lines.append(line)
        count, total = self.expected(), len(self.rows)
        known = "how many stay is known once they are scored" if count is None else f"{count:,} will be trained on"
        lines.append(f"of {total:,} rows, {known}")
        return "\n".join(lines)

    def expected(self) -> int | None:
        """How many rows will stay, where that can be known without their scores."""
        if not self.scored:
            return len(self.judged({}).kept)
        (rule, *more) = self.rules.values()
        if more or rule.group is not None or (rule.keep is None and rule.window is None):
            return None
        start, stop = places(len(self.rows), rule)
        return stop - start

    def judged(self, scores: dict[str, Line]) -> Filtered:
        """The outcome.

        Args:
            scores: by row id, the line that scoring gave, where columns are scored.

        Raises:
            AlignError: no row is kept, or too many have no score.
        """
        table = Table(rows=len(self.rows), unit="tokens")
        groups = [rule.group for rule in self.rules.values() if rule.group is not None]
        scored = set(self.scored)
        for row, ids in self.rows:
            raw = self.raw.get((row.source, row.row), {})
            line = scores.get(row.row_id, {})
            found: dict[str, float] = {}
            shown = {**raw, "row_id": row.row_id}
            faults = [Fault(row.source, row.row, one["field"], one["reason"], shown) for one in line.get("faults", ())]
            for column in () if faults else self.rules:
                try:
                    given = line["columns"] if column in scored else raw
                    found[column] = finite_number(column, given.get(column))
                except FieldError as error:
                    faults.append(Fault(row.source, row.row, error.field, error.reason, shown))
            table.faults += faults
            if not faults:
                short = SHORT if (raw | line.get("columns", {})).get(ONE_TOKEN) is True else ""
                labels = labels_in(raw, groups)
                table.candidates.append(
                    Candidate(row.source, row.row, row.row_id, found, labels, _lengths(ids), short)
                )
        if table.faults:
            check_fraction(table.faults, table.rows, self.recipe.data.max_bad_fraction)
        return Filtered.of(self.recipe.data.train, self.rules, table)


def can_score(recipe: Recipe) -> bool:
    """Whether the run trains a policy on pairs, which is what similarity scores speak of."""
    return recipe.data_kind == "pairs" and recipe.reward is None


def _lengths(ids: Any) -> dict[str, int]:
    if isinstance(ids, TokenizedPair):
        return {"chosen": len(ids.chosen_ids), "rejected": len(ids.rejected_ids)}
    answer = sum(ids.completion_mask)
    return {"completion": answer} if answer else {}


def filter_training(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, split: Split, run: Path
) -> tuple[Split, dict[str, Any], str]:
    """Score what is to be scored, and keep rows; ``run/filter`` holds what was dropped, with reasons and a page.

    Returns:
        The split that is trained on; section ``filter`` of the manifest; the outcome in words.

    Raises:
        AlignError: a column is missing, too many rows have no score, or none is kept.
    """
    chosen = TrainingFilter(recipe, split)
    scores: dict[str, Line] = {}
    if chosen.scored:
        scores = _cached_scores(recipe, tokenizer, chosen, run)
    filtered = chosen.judged(scores)
    judged = {(one.source, one.row, one.row_id) for one in filtered.table.candidates}
    rows = [pair for pair in chosen.rows if (pair[0].source, pair[0].row, pair[0].row_id) in judged]

    def contents() -> Iterator[dict[str, Any]]:
        for (row, _), one, verdict in zip(rows, filtered.table.candidates, filtered.verdicts, strict=True):
            yield {**_content(row), **one.scores, "reason": verdict.reason}

    shutil.rmtree(run / FOLDER, ignore_errors=True)  # of this very run, before it was interrupted
    write_filtered(run / FOLDER, filtered, contents, parts=("dropped",))
    kept = [ids for (_, ids), verdict in zip(rows, filtered.verdicts, strict=True) if verdict.kept]
    words = summary(filtered)
    if filtered.table.faults:
        kept_in = run / FOLDER / "rejected_rows.jsonl"
        words = f"{fault_report(filtered.table.faults, filtered.table.rows, kept_in)}\n{words}"
    section = facts(filtered) | {"scored": chosen.scored, "kept_ids": [ids.row_id for ids in kept]}
    return only(split, kept, dropped=len(chosen.rows) - len(kept)), section, words


def only(split: Split, rows: list[Any], dropped: int | None = None) -> Split:
    """The split with some of its usable rows."""
    tokenized: Any = split.tokenized
    return replace(split, tokenized=replace(tokenized, rows=rows), dropped=dropped)


def _content(row: Any) -> dict[str, Any]:
    """The row as training reads it."""
    return {name: value for name, value in vars(row).items() if name not in ("source", "row") and value is not None}


def _cached_scores(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, chosen: TrainingFilter, run: Path
) -> dict[str, Line]:
    pairs = {row.row_id: row for row, _ in chosen.rows}
    scorer = policy_scorer(recipe, tokenizer, chosen.scored)
    identity = {"scorer": scorer.identity, "rows": list(pairs)}
    name = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8).hexdigest()
    shards = Shards(run / f"filter-scores-{name}", {"scorer": scorer.identity})
    found = score_pairs(scorer, list(pairs.values()), recipe, shards)
    del scorer
    gc.collect()  # the model is loaded anew for training
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def policy_scorer(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, columns: Sequence[str]) -> PolicyScorer:
    """The model that training starts from, ready to score.

    Raises:
        AlignError: it cannot be loaded, or cannot score.
    """
    spec = recipe.model
    model, reason = load_policy(
        spec.name, spec.adapter, dtype=spec.dtype, attention=spec.attention, trust_remote_code=spec.trust_remote_code
    )
    loaded = LoadedModel(model.to(processes().device), tokenizer, reason)
    policy = Policy.of(spec.name, loaded, recipe.data.max_length, _batch(recipe))
    return PolicyScorer({column: column for column in columns}, policy)


def _batch(recipe: Recipe) -> int:
    return int(recipe.training.get("per_device_eval_batch_size", BATCH))


def score_pairs(
    scorer: PolicyScorer, pairs: Sequence[PairRow], recipe: Recipe, shards: Shards | None = None
) -> dict[str, Line]:
    """By row id, the scores of pairs or why there are none; shards that are there are not scored again."""
    found: dict[str, Line] = {}
    starts = range(0, len(pairs), SHARD_ROWS)
    kept = {start: shards.read(start // SHARD_ROWS) for start in starts} if shards is not None else {}
    done = sum(len(lines) for lines in kept.values() if lines is not None)
    with progress(f"scoring with {recipe.model.name}", len(pairs), done) as advance, no_warning_of_batches():
        for start in starts:
            part = pairs[start : start + SHARD_ROWS]
            lines = kept.get(start)
            if lines is None:
                rows = [(start + n, _row(pair)) for n, pair in enumerate(part)]
                lines = score_rows([scorer], rows, _batch(recipe), advance)
                if shards is not None:
                    shards.write(start // SHARD_ROWS, lines)
            found |= {pair.row_id: line for pair, line in zip(part, lines, strict=True)}
    return found


def _row(pair: PairRow) -> Row:
    return pair.source, pair.row, {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
