"""Held-out rows: one pass of a model over them, what it would begin an answer with, and pairs that run in a circle."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from align.data.rows import Content
from align.data.tokenize import TokenizedPair
from align.evals.cycles import pure_cycles
from align.losses import PairLogps, SequenceLogps
from align.losses.rows import Rows, pair_rows
from align.models.memory import release_freed
from align.models.scoring import first_token_logps, score
from align.tracking.progress import progress

BATCH = 16


def answer_logps(
    model: Any, data: Sequence[Any], sizes: Sequence[int], lay_out: Callable[[Sequence[Any]], Rows], k: int, what: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and lengths of the k answers of each row of ``data``, (k, N) each; the largest rows go first.

    Args:
        model: a causal model that ``attach_scoring`` has seen, or what wraps it.
        sizes: of the rows, in tokens.
        lay_out: rows to the tensors of a forward pass.
        what: for the progress bar.
    """
    order = sorted(range(len(data)), key=lambda i: -sizes[i])
    totals = torch.zeros(k, len(data))
    lengths = torch.zeros(k, len(data), dtype=torch.long)
    model.eval()
    with progress(what, len(order)) as advance, torch.no_grad():
        for start in range(0, len(order), BATCH):
            part = order[start : start + BATCH]
            rows = lay_out([data[i] for i in part]).to(model.device)
            totals[:, part] = rows.totals(score(model, rows).logps).view(k, -1).cpu()
            lengths[:, part] = rows.lengths().view(k, -1).cpu()
            release_freed()
            advance(len(part))
    return totals, lengths


def pair_logps(
    model: Any,
    pairs: Sequence[TokenizedPair],
    name: str,
    *,
    pad_token_id: int,
    shared_prompt: bool,
    row_tokens: int | None = None,
) -> PairLogps:
    """Log-probs of both answers of each pair.

    Args:
        model: a causal model that ``attach_scoring`` has seen, or what wraps it.
        name: of the model, for the progress bar.
        shared_prompt: the prompt once for both answers, or once for each.
        row_tokens: budget of a row that holds several pairs; None packs none. ``layout_of`` names both.
    """

    def lay_out(part: Sequence[TokenizedPair]) -> Rows:
        return pair_rows(
            [row.prompt_ids for row in part],
            [row.chosen_ids for row in part],
            [row.rejected_ids for row in part],
            pad_token_id=pad_token_id,
            shared_prompt=shared_prompt,
            row_tokens=row_tokens,
        )

    sizes = [len(row.prompt_ids) + len(row.chosen_ids) + len(row.rejected_ids) for row in pairs]
    totals, lengths = answer_logps(model, pairs, sizes, lay_out, 2, f"scoring held-out pairs, {name}")
    return PairLogps(SequenceLogps(totals[0], lengths[0]), SequenceLogps(totals[1], lengths[1]))


def first_tokens(model: Any, pairs: Sequence[TokenizedPair], *, pad_token_id: int) -> torch.Tensor:
    """Probability of each token as an answer's first, the mean over the prompts, each counted once, (V,), float64.

    Args:
        model: a causal model that ``attach_scoring`` has seen, or what wraps it.
    """
    prompts = sorted({tuple(row.prompt_ids) for row in pairs}, key=lambda ids: (-len(ids), ids))
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(prompts), BATCH):
        logps = first_token_logps(model, prompts[start : start + BATCH], pad_token_id=pad_token_id)
        total = total + logps.exp().sum(dim=0).cpu().double()
        release_freed()
    return total / len(prompts)


@dataclass(frozen=True)
class Cycle:
    """Answers to a prompt of which each is preferred to the next, and the last to the first.

    Args:
        row_ids: of the pairs, the first one between the first and the second answer.
    """

    prompt: Content
    answers: list[Content]
    row_ids: list[str]


def cycles_of(rows: Sequence[Any]) -> list[Cycle]:
    """The pure cycles of three or more among pairs. Ties (preference 0.5) are none; below it the order is turned."""
    rows = [row for row in rows if row.preference != 0.5]
    turned = [row.preference is not None and row.preference < 0.5 for row in rows]
    sides = [
        (row.rejected, row.chosen) if other else (row.chosen, row.rejected)
        for row, other in zip(rows, turned, strict=True)
    ]
    found = pure_cycles(
        [json.dumps(row.prompt) for row in rows],
        [json.dumps(winner) for winner, _ in sides],
        [json.dumps(loser) for _, loser in sides],
    )
    return [
        Cycle(rows[pairs[0]].prompt, [sides[pair][0] for pair in pairs], [rows[pair].row_id for pair in pairs])
        for pairs in found
    ]
