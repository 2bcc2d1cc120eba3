"""Bradley-Terry with a trained backbone (LoRA), for ``reward_study.py``.

A step takes up to 16 arguments of one topic through the backbone, and all pairs of them that annotators compared: 16
forward passes for about a hundred pairs, where rows of pairs would take two passes each.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from peft.helpers import disable_input_dtype_casting
from reward_data import Arguments
from reward_heads import right_or_tie

from align.losses.preference import bradley_terry
from align.models.load import locate
from align.rewards.batches import padded
from align.rewards.encoding import encode_answers
from align.rewards.models import RewardModel

ARGUMENTS_A_STEP = 16


def train_lora(data: Arguments, name: str, train: np.ndarray, test: np.ndarray, *, epochs: int) -> dict[str, Any]:
    """Correctness on the decided pairs of test arguments, seconds and steps; one setting, no search.

    Args:
        train, test: masks over arguments.
        epochs: passes over the arguments of training.
    """
    began = time.perf_counter()
    torch.manual_seed(0)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    model = RewardModel.create(locate(name), lora=lora, max_length=512, dtype=torch.bfloat16).train()
    encoded = [
        encode_answers(model.tokenizer, [{"role": "user", "content": prompt}], [text])
        for prompt, text in zip(data.prompts, data.texts, strict=True)
    ]
    starts = [start for start, _ in encoded]
    ids = [
        [*start, *answer] for start, answer in zip(starts, model.fit(starts, [a[0] for _, a in encoded]), strict=True)
    ]
    margin = data.votes[:, 1] - data.votes[:, 0]
    better = {(int(a), int(b)): m for (a, b), m in zip(data.ends, margin, strict=True) if m}
    topics = [np.flatnonzero(np.array(data.prompts) == topic) for topic in sorted(set(data.prompts))]
    topics = [rows for rows in topics if train[rows[0]]]
    rng = np.random.default_rng(0)
    plan = []
    for _ in range(epochs):
        for rows in topics:
            parts = np.array_split(rng.permutation(rows), -(-len(rows) // ARGUMENTS_A_STEP))
            plan += [part for part in parts if len(part) > 1]
    rng.shuffle(plan)
    head = [
        p for p in model.parameters() if p.requires_grad and p.dtype == torch.float32 and p.ndim == 2 and len(p) == 1
    ]
    others = [p for p in model.parameters() if p.requires_grad and all(p is not h for h in head)]
    optimizer = torch.optim.AdamW([{"params": others, "lr": 2e-4}, {"params": head, "lr": 1e-3}])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 5) * (1 - step / len(plan)))
    for step, part in enumerate(plan, start=1):
        pairs = [
            (i, j) if better[a, b] < 0 else (j, i)
            for i, a in enumerate(part.tolist())
            for j, b in enumerate(part.tolist())
            if (a, b) in better
        ]
        if not pairs:
            continue
        batch, mask = padded([ids[row] for row in part], model.tokenizer.pad_token_id)
        with torch.autocast("cpu", torch.bfloat16), disable_input_dtype_casting(model):
            values = model(batch, mask).values
        chosen, rejected = (values[torch.tensor(side)] for side in zip(*pairs, strict=True))
        loss = bradley_terry(chosen, rejected).loss.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*others, *head], 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 0:
            took = time.perf_counter() - began
            print(f"  LoRA: step {step} of {len(plan)}, loss {float(loss.detach()):.3f}, {took:.0f} s", flush=True)
    tested = np.flatnonzero(test)
    scores = torch.zeros(len(data.texts))
    prompts = [[{"role": "user", "content": data.prompts[row]}] for row in tested]
    scores[tested] = model.rewards(prompts, [data.texts[row] for row in tested], batch_size=16)
    rows = np.flatnonzero(test[data.ends[:, 0]] & (margin != 0))
    delta = scores[data.ends[rows, 1]] - scores[data.ends[rows, 0]]
    return {
        "right": right_or_tie(delta, np.sign(margin[rows])).tolist(),
        "debate": data.debate[data.ends[rows, 0]].tolist(),
        "seconds": time.perf_counter() - began,
        "steps": len(plan),
    }
