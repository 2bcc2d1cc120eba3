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
from align.losses.logprobs import TokenLogps
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
    samples = True

    def __init__(self, model: Any, reward: RewardFunction, args: GRPOConfig | None = None, **kwargs: Any) -> None:
        self.reward = reward
        super().__init__(model=model, reward_funcs=reward, args=args, **kwargs)
        self.aux_loss_enabled = getattr(self, "aux_loss_enabled", False)
        self._attach_scoring()

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self._total_train_tokens = int(self.state.num_input_tokens_seen)
        return loss

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **images: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """TRL's, by the library's own head: of completion tokens alone, where TRL on a CPU scores prompts and padding.

        TRL's own where a temperature, images, an entropy bonus or experts want more than log-probs.
        """
        if images_given(images) or compute_aux_loss or self.temperature != 1.0 or self._entropy_bonus_enabled:
            found: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
            found = super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy,
                compute_aux_loss,
                **images,
            )
            return found
        size = batch_size or len(input_ids)
        parts = [
            self._score_completions(model, input_ids[at : at + size], attention_mask[at : at + size], logits_to_keep)
            for at in range(0, len(input_ids), size)
        ]
        logps, entropies = (torch.cat(columns) for columns in zip(*parts, strict=True))
        return logps, entropies if compute_entropy else None, None

    def _score_completions(
        self, model: Any, ids: torch.Tensor, mask: torch.Tensor, kept: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies of the last ``kept`` tokens, (B, kept), 0 on padding."""
        width = ids.shape[1]
        rows, columns = mask[:, -kept:].nonzero(as_tuple=True)
        positions = columns + width - kept
        with self.accelerator.autocast():
            tokens = TokenLogps(
                *model(
                    input_ids=ids,
                    attention_mask=mask,
                    score_source=rows * width + positions - 1,
                    score_target=ids[rows, positions],
                )
            )
        empty = tokens.logps.new_zeros(len(ids), kept)
        return empty.index_put((rows, columns), tokens.logps), empty.index_put((rows, columns), tokens.entropy)


def images_given(images: dict[str, Any]) -> bool:
    """Whether TRL gave anything of images."""
    return any(value is not None for value in images.values())


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
