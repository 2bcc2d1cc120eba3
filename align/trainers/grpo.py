"""Training on rewards of the policy's own answers: TRL's GRPOTrainer with any reward of the library.

What is TRL's: drawing the answers, advantages, the loss, the loop. What is ours: the reward function
(``align.rewards.functions``), references that are quantiles of the starting policy's rewards, and the clock, the
checkpoints and the log-probs for evaluation that all trainers here have.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer

from align.data.tokenize import encode_prompt
from align.errors import AlignError
from align.evals.sampling import sample
from align.models.ends import end_tokens
from align.models.memory import release_freed
from align.rewards.expression import SampledReference
from align.rewards.functions import RewardFunction
from align.rewards.references import quantile_reference
from align.tracking.progress import progress

from .host import Hosted

BATCH = 32  # answers sampled together


class GroupTrainer(Hosted, GRPOTrainer):  # type: ignore[misc]
    """TRL's GRPOTrainer on one reward function.

    Args:
        reward: what is rewarded.
        args: TRL's ``GRPOConfig``.
        kwargs: as in ``GRPOTrainer``, without ``reward_funcs``.
    """

    needs_reference = False  # TRL keeps its own, for the KL
    starts_at_reference = False

    def __init__(self, model: Any, reward: RewardFunction, args: GRPOConfig | None = None, **kwargs: Any) -> None:
        self.reward = reward
        super().__init__(model=model, reward_funcs=reward, args=args, **kwargs)
        self.aux_loss_enabled = getattr(self, "aux_loss_enabled", False)
        self._attach_scoring()

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self._total_train_tokens = int(self.state.num_input_tokens_seen)
        return loss


def with_sampled_references(
    prompts: Dataset,
    reward: RewardFunction,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    *,
    max_new_tokens: int,
    seed: int,
) -> Dataset:
    """The prompts with the references that are quantiles of the starting policy's rewards, a column each.

    Answers are drawn at temperature 1. The rewards are kept in ``path`` as they come, so that an interrupted run goes
    on where it stopped, with the same references.

    Args:
        prompts: columns prompt, row_id, and the references of the data.
        model: the starting policy.
    """
    sampled = [part for part in reward.expression.parts if isinstance(part.reference, SampledReference)]
    if not sampled:
        return prompts
    count = max(part.reference.samples for part in sampled if isinstance(part.reference, SampledReference))
    kept = _read(path)
    missing = [row for row in prompts if row["row_id"] not in kept]
    at_once = max(1, BATCH // count)
    with progress("references from the model's own answers", len(missing)) as advance, path.open("a") as file:
        for start in range(0, len(missing), at_once):
            rows = missing[start : start + at_once]
            repeated = [row for row in rows for _ in range(count)]
            answers = sample(
                model,
                tokenizer,
                [encode_prompt(row["prompt"], tokenizer) for row in repeated],
                eos_ids=end_tokens(model, tokenizer),
                max_new_tokens=max_new_tokens,
                temperature=1.0,
                seed=seed,
                batch_size=BATCH,
            )
            texts = [as_answer(row["prompt"], answer.text) for row, answer in zip(repeated, answers, strict=True)]
            names = dict.fromkeys(part.reward for part in sampled)
            scores = {name: reward.scorers[name]([row["prompt"] for row in repeated], texts) for name in names}
            for number, row in enumerate(rows):
                own = slice(number * count, (number + 1) * count)
                kept[row["row_id"]] = {name: found[own].tolist() for name, found in scores.items()}
                file.write(json.dumps({"row_id": row["row_id"], "rewards": kept[row["row_id"]]}) + "\n")
            file.flush()
            release_freed()
            advance(len(rows))
    for part in sampled:
        assert isinstance(part.reference, SampledReference)
        drawn = [torch.tensor(kept[name][part.reward][: part.reference.samples]) for name in prompts["row_id"]]
        column = quantile_reference(drawn, quantile=part.reference.quantile).tolist()
        prompts = prompts.add_column(str(part.reference_column), column)
    return prompts


def as_answer(prompt: Any, text: str) -> Any:
    """An answer in its prompt's form: text, or a message."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _read(path: Path) -> dict[str, dict[str, Sequence[float]]]:
    kept = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line that a kill has torn; its prompt is answered again
        kept[row["row_id"]] = row["rewards"]
    return kept


def reward_function(given: Any) -> RewardFunction:
    """A recipe's ``grpo.rewards`` as a function.

    Raises:
        AlignError: a reward that cannot be loaded.
    """
    try:
        return RewardFunction.of(given)
    except (ValueError, OSError) as error:
        raise AlignError(f"grpo.rewards: {error}") from error
