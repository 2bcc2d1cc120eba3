"""Rewards with a trained backbone (LoRA), for ``reward_study.py``.

A step takes up to 16 arguments of one topic through the backbone, and all pairs of them that annotators compared: 16
forward passes for about a hundred pairs, where rows of pairs would take two passes each. The same arguments come in
the same order whatever is trained: a head from a random start on pairs by majority (Bradley-Terry, scaled
Bradley-Terry, GPM), or, on the judgements themselves, PAL from where the frozen backbone's PAL ended, as
``align train pal_lora`` does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from peft.helpers import disable_input_dtype_casting
from reward_data import Arguments, Further, JudgedSets, fold_sets, judged_sets, majority
from reward_heads import Loss, bt_loss, gpm_loss, right_or_tie
from reward_pal import Table, fitted_pal
from torch import Tensor

from align.losses.preference import gpm_score, scaled_bradley_terry
from align.models.load import locate
from align.rewards.batches import padded
from align.rewards.encoding import encode_answers
from align.rewards.models import RewardModel
from align.rewards.pal import Pal
from align.rewards.pal_model import PalRewardModel
from align.trainers.pal_backbone import RowwiseAdamW

ARGUMENTS_A_STEP = 16
# States of a step's arguments (B, H), and where in them each argument of the data is, -1 if nowhere, to a loss.
Step = Callable[[Tensor, np.ndarray], Tensor | None]


def strong_loss(preferred: Tensor, other: Tensor, strength: Tensor) -> Tensor:
    return scaled_bradley_terry(preferred[:, 0], other[:, 0], strength).loss


PAIRED: dict[str, tuple[Loss, dict[str, Any]]] = {
    "BT": (bt_loss, {}),
    "scaled BT, by agreement": (strong_loss, {}),
    "GPM, d = 4": (gpm_loss, {"kind": "gpm", "dimension": 4}),
}
TRAINED = (*PAIRED, "PAL-A, K = 1", "PAL-A, K = 2")


def train_lora(
    data: Arguments, further: Further, backbone: str, name: str, table: Table, fold: int, *, epochs: int
) -> dict[str, Any]:
    """Correctness on test pairs, test judgements and the further tests, seconds and steps; one setting, no search.

    Args:
        name: one of ``TRAINED``.
        table: the frozen backbone's embeddings, where PAL begins.
        epochs: passes over the arguments of training.
    """
    began = time.perf_counter()
    train, valid, test = fold_sets(data, fold)
    judged = judged_sets(data, fold)
    torch.manual_seed(0)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    options: dict[str, Any] = {"max_length": 1024, "dtype": torch.bfloat16}
    if name in PAIRED:
        loss, head = PAIRED[name]
        model = RewardModel.create(locate(backbone), lora=lora, **head, **options)
        step = on_pairs(data, model, loss, train | valid)
    else:
        model = PalRewardModel.create(locate(backbone), kind="pal", **options)
        parts = (table.judgements(data, rows, judged.names[rows]) for rows in (judged.fit, judged.valid))
        model.attach(fitted_pal(name, *parts)[0]).train_backbone(lora=lora)
        step = on_judgements(data, model.pal, judged)
    steps = fit(data, model.train(), step, train | valid, epochs)
    found = verdicts(data, further, model.eval(), test, judged)
    return {**found, "seconds": time.perf_counter() - began, "steps": steps}


def on_pairs(data: Arguments, model: RewardModel, loss: Loss, train: np.ndarray) -> Step:
    """Of the pairs by majority; strengths are divided by their mean over all of training."""
    preferred, other, margin = majority(data)
    rows = np.flatnonzero(train[preferred] & (margin != 0))
    strength = np.clip(abs(margin), 0, 5) / np.clip(abs(margin[rows]), 0, 5).mean()

    def step(states: Tensor, place: np.ndarray) -> Tensor | None:
        here = rows[(place[preferred[rows]] >= 0) & (place[other[rows]] >= 0)]
        if not len(here):
            return None
        values = model.read(states, None).values.reshape(len(states), -1)
        weights = torch.as_tensor(strength[here], dtype=torch.float32)
        return loss(values[place[preferred[here]]], values[place[other[here]]], weights).mean()

    return step


def on_judgements(data: Arguments, pal: Pal, judged: JudgedSets) -> Step:
    """Of the judgements themselves, each by its annotator."""
    rows = np.concatenate([judged.fit, judged.valid])

    def step(states: Tensor, place: np.ndarray) -> Tensor | None:
        here = rows[(place[data.left[rows]] >= 0) & (place[data.right[rows]] >= 0)]
        if not len(here):
            return None
        left, right = (states[place[side[here]]] for side in (data.left, data.right))
        return pal.losses(pal(left, right, judged.names[here].tolist()), torch.as_tensor(data.label[here])).mean()

    return step


def fit(data: Arguments, model: RewardModel, loss_of: Step, train: np.ndarray, epochs: int) -> int:
    """Train in place, and give the number of steps."""
    encoded = [
        encode_answers(model.tokenizer, [{"role": "user", "content": prompt}], [text])
        for prompt, text in zip(data.prompts, data.texts, strict=True)
    ]
    starts = [start for start, _ in encoded]
    ids = [
        [*start, *answer] for start, answer in zip(starts, model.fit(starts, [a[0] for _, a in encoded]), strict=True)
    ]
    topics = [np.flatnonzero(np.array(data.prompts) == topic) for topic in sorted(set(data.prompts))]
    topics = [rows for rows in topics if train[rows[0]]]
    rng = np.random.default_rng(0)
    plan = []
    for _ in range(epochs):
        for rows in topics:
            parts = np.array_split(rng.permutation(rows), -(-len(rows) // ARGUMENTS_A_STEP))
            plan += [part for part in parts if len(part) > 1]
    rng.shuffle(plan)
    named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    adapters = [weight for name, weight in named.items() if "lora_" in name]
    if isinstance(model, PalRewardModel):
        groups = [{"params": adapters, "lr": 2e-4}, *model.pal.parameter_groups()]
        optimizer: torch.optim.Optimizer = RowwiseAdamW(groups, model.pal.logits.weight)
    else:
        optimizer = torch.optim.AdamW(
            [{"params": adapters, "lr": 2e-4}, {"params": [model.carrier.score.weight], "lr": 1e-3}]
        )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 5) * (1 - step / len(plan)))
    began = time.perf_counter()
    for number, part in enumerate(plan, start=1):
        batch, mask = padded([ids[row] for row in part], model.tokenizer.pad_token_id)
        with torch.autocast("cpu", torch.bfloat16), disable_input_dtype_casting(model):
            states, _ = model.states(batch, mask)
        place = np.full(len(data.texts), -1)
        place[part] = np.arange(len(part))
        loss = loss_of(states, place)
        if loss is None:
            continue
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimizer.step()
        schedule.step()
        if number % 10 == 0:
            took = time.perf_counter() - began
            print(f"  LoRA: step {number} of {len(plan)}, loss {float(loss.detach()):.3f}, {took:.0f} s", flush=True)
    return len(plan)


@torch.no_grad()
def verdicts(
    data: Arguments, further: Further, model: RewardModel, test: np.ndarray, judged: JudgedSets
) -> dict[str, Any]:
    """1, 1/2 or 0 of each decided pair of the test debates, of each judgement, and of each row of the further tests.

    A PAL model judges by the mean of the known annotators' weights, but for judgements of those themselves.
    """

    def embedded(prompts: Sequence[str], answers: Sequence[str]) -> Tensor:
        asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
        return model.embed(asked, list(answers), batch_size=16)[0]

    def gap(left: Tensor, right: Tensor, weights: Tensor | None = None) -> Tensor:
        """By how much the answers of the right states are better."""
        if isinstance(model, PalRewardModel):
            weights = model.pal.prior("mean") if weights is None else weights
            return model.pal.reward(right, weights) - model.pal.reward(left, weights)
        ours, theirs = (model.read(states, None).values for states in (right, left))
        return gpm_score(ours, theirs) if ours.ndim == 2 else ours - theirs

    rows = np.flatnonzero(test)
    states = torch.zeros(len(data.texts), model.hidden_size)
    states[rows] = embedded([data.prompts[row] for row in rows], [data.texts[row] for row in rows])

    known = model.pal.weights(judged.names[judged.seen].tolist()) if isinstance(model, PalRewardModel) else None
    _, _, margin = majority(data)
    pairs = np.flatnonzero(test[data.ends[:, 0]] & (margin != 0))
    delta = gap(*states[torch.as_tensor(data.ends[pairs].T)])
    found: dict[str, Any] = {"pairs": right_or_tie(delta, np.sign(margin[pairs])).tolist(), "further": {}}
    for part, judgements, weights in (("judged", judged.seen, known), ("unseen", judged.unseen, None)):
        delta = gap(states[data.left[judgements]], states[data.right[judgements]], weights)
        found[part] = right_or_tie(delta, data.label[judgements]).tolist()
    for name, tests in further.items():
        began = time.perf_counter()
        prompts, first, second, label = zip(*tests, strict=True)
        delta = gap(embedded(prompts, first), embedded(prompts, second))
        found["further"][name] = right_or_tie(delta, np.array(label)).tolist()
        print(f"  {name}: {time.perf_counter() - began:.0f} s", flush=True)
    return found
