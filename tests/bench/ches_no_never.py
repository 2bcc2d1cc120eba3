"""No over Never: one prompt, two one-token answers of like meaning, and what becomes of Yes.

After arXiv:2410.08847, section 3. A short warm-up makes one-word answers likely, with the words of the paper: a
statement that the persona would not agree with gets Yes, Yeah, Sure or Certainly, the others No, Never, Maybe or
Perhaps. Then each prompt is trained alone.
"""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import torch
from ches_train import BETA, Policy, adapted, personas
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting

from align.data.tokenize import encode_prompt
from align.losses import PairLogps, SequenceLogps, dpo
from align.losses.rows import answer_rows
from align.models.scoring import score

STEPS, LEARNING_RATE, LEARNING_RATE_WHOLE = 60, 2e-6, 1e-6
SEEDS = (9773, 5290, 8767, 9818, 7596, 344, 2701, 3298, 7834, 6327)  # those of the paper; each draws a prompt
WORDS = {"Yes": ("No", "Never", "Maybe", "Perhaps"), "No": ("Yes", "Yeah", "Sure", "Certainly")}
TRACKED = ("Yes", "No", "Never")
WARM_UP = {"rows": 512, "batch": 16, "learning_rate": 2e-4}


def token_of(policy: Policy, word: str) -> int:
    (token,) = policy.tokenizer(word)["input_ids"]
    return int(token)


def warm_up(policy: Policy, data: Path, kept: Path, seed: int = 0) -> Policy:
    """The model after one epoch of cross-entropy on the first token: a LoRA adapter, kept, and merged."""
    if kept.exists():
        return Policy(PeftModel.from_pretrained(policy.model, str(kept)).merge_and_unload().eval(), policy.tokenizer)
    rng = random.Random(seed)
    rows = rng.sample(personas(data), WARM_UP["rows"])
    model = adapted(policy, seed)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=WARM_UP["learning_rate"])
    model.train()
    with disable_input_dtype_casting(model, active=True):
        for start in range(0, len(rows), WARM_UP["batch"]):
            part = rows[start : start + WARM_UP["batch"]]
            words = [rng.choice(WORDS[row["answer_matching_behavior"].strip()]) for row in part]
            laid = answer_rows(
                [prompt_of(policy, row) for row in part],
                [[token_of(policy, word)] for word in words],
                pad_token_id=policy.pad,
            )
            with torch.autocast("cpu", torch.bfloat16):
                loss = -score(model, laid).logps.mean()
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
    print(f"warm-up ends at {float(loss.detach()):.3f} nats", flush=True)
    model.save_pretrained(str(kept))
    return Policy(model.merge_and_unload().eval(), policy.tokenizer)


def prompt_of(policy: Policy, row: dict[str, Any]) -> list[int]:
    return encode_prompt([{"role": "user", "content": row["question"]}], policy.tokenizer)


def one_prompt(policy: Policy, data: Path, seed: int, better: str, worse: str, *, whole: bool) -> dict[str, Any]:
    """Train on one pair; probabilities of the tracked words at every step, and what gained most in the end.

    Args:
        whole: all weights, the tied embeddings too; else a LoRA adapter.
    """
    row = random.Random(seed).choice([row for row in personas(data) if row["answer_matching_behavior"] == " No"])
    prompt = torch.tensor([prompt_of(policy, row)])
    first, second = token_of(policy, better), token_of(policy, worse)
    model = copy.deepcopy(policy.model).float().requires_grad_(True) if whole else adapted(policy, seed)
    inner = model if whole else model.get_base_model()
    rate = LEARNING_RATE_WHOLE if whole else LEARNING_RATE
    optimiser = torch.optim.RMSprop([p for p in model.parameters() if p.requires_grad], lr=rate)
    tracked: dict[str, list[float]] = {word: [] for word in TRACKED}
    seen = []
    with disable_input_dtype_casting(model, active=not whole):
        for step in range(STEPS + 1):
            with torch.autocast("cpu", torch.bfloat16):
                hidden = inner.base_model(input_ids=prompt).last_hidden_state[0, -1]
            # The head in float32: bf16 would round a logit of 16 to eighths.
            logps = (inner.get_output_embeddings().weight.float() @ hidden.float()).log_softmax(dim=0)
            seen.append(logps.detach().exp())
            for word, values in tracked.items():
                values.append(float(seen[-1][token_of(policy, word)]))
            if step == STEPS:
                break
            pair, start = (_pair(p, first, second) for p in (logps, seen[0].log()))
            dpo(pair, start, beta=BETA).loss.sum().backward()
            optimiser.step()
            optimiser.zero_grad()
    if not whole:
        model.unload()
    before, now = seen[0], seen[-1]
    top = (now - before).topk(3).indices.tolist()
    return {
        "statement": row["statement"],
        "tracked": tracked,
        "gained": [[policy.tokenizer.decode([t]), float(before[t]), float(now[t])] for t in top],
    }


def _pair(logps: torch.Tensor, first: int, second: int) -> PairLogps:
    one = torch.ones(1, dtype=torch.long)
    return PairLogps(SequenceLogps(logps[first : first + 1], one), SequenceLogps(logps[second : second + 1], one))
