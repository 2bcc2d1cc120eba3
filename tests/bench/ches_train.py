"""What the CHES study trains on and how: small sets of pairs, a LoRA adapter of its own for each, DPO with RMSprop."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import Tensor

from align.data.load import read_rows
from align.data.pairs import pair_table
from align.data.tokenize import TokenizedPair, tokenize_pairs
from align.losses import PairLogps, SequenceLogps, dpo
from align.losses.rows import Rows, pair_rows
from align.losses.similarity import AnswerStates, ches, ches_ln, edit_similarity, last_inner
from align.models.load import load_model, load_tokenizer
from align.models.scoring import attach_scoring, final_states, score

MODEL = "smollm2-135m-instruct"
BETA, LEARNING_RATE, BATCH, RANK = 0.1, 3e-5, 4, 16
LONGEST_PROMPT, LONGEST_ANSWER = 80, 64  # tokens: longer rows are left out, so that a training takes seconds


@dataclass(frozen=True)
class Policy:
    """The model that every training starts from, and its tokenizer."""

    model: Any
    tokenizer: Any

    @property
    def pad(self) -> int:
        return int(self.tokenizer.pad_token_id)


def load_policy() -> Policy:
    model, _ = load_model(MODEL)
    attach_scoring(model)
    return Policy(model.requires_grad_(False), load_tokenizer(MODEL))


def read_set(name: str, data: Path, policy: Policy) -> list[TokenizedPair]:
    """The short pairs of a set, in the order of the data."""
    if name == "quickstart":
        rows = [row for _, _, row in read_rows("align:quickstart/train")]
    elif name == "hh_harmless":
        rows = [_dialogue(row) for _, _, row in read_rows(str(data / "hh_harmless" / "part.jsonl.gz"))]
    else:
        rows = [
            {
                "prompt": [{"role": "user", "content": row["question"]}],
                "chosen": row["answer_matching_behavior"].strip(),
                "rejected": row["answer_not_matching_behavior"].strip(),
            }
            for row in personas(data)
        ]
    table = pair_table(((name, number, row) for number, row in enumerate(rows, 1)), name)
    found = tokenize_pairs(table.rows, policy.tokenizer, None).rows
    return [
        row
        for row in found
        if len(row.prompt_ids) <= LONGEST_PROMPT and max(len(row.chosen_ids), len(row.rejected_ids)) <= LONGEST_ANSWER
    ]


def personas(data: Path) -> list[dict[str, Any]]:
    path = data / "personas" / "ends-justify-means.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _dialogue(row: dict[str, Any]) -> dict[str, Any]:
    """``Human: ... Assistant: ...`` as chat messages."""
    return {side: _turns(row[side]) for side in ("chosen", "rejected")}


def _turns(text: str) -> list[dict[str, str]]:
    turns = []
    for part in text.split("\n\nHuman: ")[1:]:
        human, *answers = part.split("\n\nAssistant:")
        turns.append({"role": "user", "content": human.strip()})
        turns += [{"role": "assistant", "content": answer.strip()} for answer in answers]
    return turns


def _laid(rows: Sequence[TokenizedPair], pad: int) -> Rows:
    ids = ([getattr(row, name) for row in rows] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    return pair_rows(*ids, pad_token_id=pad, shared_prompt=True)


def logps(model: Any, rows: Sequence[TokenizedPair], pad: int) -> PairLogps:
    """Log-probs of pairs in one forward pass."""
    laid = _laid(rows, pad)
    with torch.autocast("cpu", torch.bfloat16):
        totals, lengths = laid.totals(score(model, laid).logps), laid.lengths()
    n = len(rows)
    return PairLogps(SequenceLogps(totals[:n], lengths[:n]), SequenceLogps(totals[n:], lengths[n:]))


def scores(policy: Policy, rows: Sequence[TokenizedPair]) -> dict[str, list[float]]:
    """Each measure of likeness, a row at a time."""
    found: dict[str, list[float]] = {"ches": [], "ches_ln": [], "last_inner": [], "edit": []}
    with torch.no_grad():
        for row in rows:
            laid = _laid([row], policy.pad)
            both = AnswerStates.gather(final_states(policy.model, laid), laid.source, laid.answer, laid.answers)
            for name, measure in (("ches", ches), ("ches_ln", ches_ln), ("last_inner", last_inner)):
                found[name].append(float(measure(both[:1], both[1:])))
            found["edit"].append(edit_similarity(row.chosen_ids, row.rejected_ids))
    return found


def totals(model: Any, rows: Sequence[TokenizedPair], pad: int) -> Tensor:
    """Log-probs of chosen and rejected, (N, 2): a row at a time, so that bf16 rounds it alike before and after."""
    model.eval()
    found = []
    with torch.no_grad():
        for row in rows:
            both = logps(model, [row], pad)
            found.append(torch.stack([both.chosen.total, both.rejected.total], dim=1))
    return torch.cat(found)


def adapted(policy: Policy, seed: int) -> PeftModel:
    """A fresh adapter on the model; ``unload()`` of it gives the model back as it was."""
    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(policy.model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def train(model: PeftModel, rows: Sequence[TokenizedPair], reference: Tensor, pad: int, seed: int) -> None:
    """One epoch of DPO; ``reference`` (N, 2) are the rows' log-probs before."""
    optimiser = torch.optim.RMSprop([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    model.train()
    with disable_input_dtype_casting(model, active=True):
        for start in range(0, len(order), BATCH):
            part = order[start : start + BATCH]
            policy = logps(model, [rows[i] for i in part], pad)
            lengths = policy.chosen.length, policy.rejected.length
            sides = [SequenceLogps(reference[part, side], lengths[side]) for side in (0, 1)]
            loss = dpo(policy, PairLogps(*sides), beta=BETA).loss.mean()
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
