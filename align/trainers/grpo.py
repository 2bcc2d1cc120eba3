"""Training on rewards of the policy's own answers: TRL's GRPOTrainer with any reward of the library.

What is TRL's: drawing the answers, advantages, the loss, the loop. What is ours: the reward function
(``align.rewards.functions``), its references by the starting policy (``references``), and the clock, the checkpoints
and the log-probs for evaluation that all trainers here have.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer

from align.errors import AlignError, ConfigError
from align.losses.logprobs import TokenLogps
from align.models.memory import release_freed
from align.rewards.encoding import plain
from align.rewards.expression import PredictedReference, SampledReference
from align.rewards.functions import RewardFunction
from align.rewards.references import sampled_reference
from align.rewards.scorers import RewardError, Scorer
from align.tracking.progress import progress

from .host import Hosted
from .references import Draws, drawn_rewards, fitted_reference, prompt_embeddings

logger = logging.getLogger(__name__)


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

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        theirs = logging.getLogger(GRPOTrainer.__module__)
        theirs.addFilter(_is_not_of_none)
        try:
            found: torch.Tensor = super()._calculate_rewards(*args, **kwargs)
        except RewardError as error:
            raise AlignError(f"grpo.rewards: {error}") from error
        finally:
            theirs.removeFilter(_is_not_of_none)
        return found

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


def _is_not_of_none(record: logging.LogRecord) -> bool:
    """Whether a warning is another than TRL's of answers without a reward: whole rows, and in every batch."""
    return "All reward functions returned None" not in str(record.msg)


def images_given(images: dict[str, Any]) -> bool:
    """Whether TRL gave anything of images."""
    return any(value is not None for value in images.values())


def with_references(
    prompts: Dataset,
    reward: RewardFunction,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    *,
    max_new_tokens: int,
    seed: int,
) -> Dataset:
    """The prompts with the references that are made.

    Of these, a canned answer's is scored with the answers; the others are columns, made here once. The
    rewards of sampled answers are kept in ``path`` as they come, so that an interrupted run goes on where it stopped,
    with the same references.

    Args:
        prompts: columns prompt, row_id, and what the reward reads of the data.
        model: the starting policy.

    Raises:
        AlignError: a reward cannot be had, or a quantile or regression has too little to go by.
    """
    parts = reward.expression.parts
    sampled = [(part, part.reference) for part in parts if isinstance(part.reference, SampledReference)]
    if sampled:
        scorers = {part.reward: reward.scorers[part.reward] for part, _ in sampled}
        draws = Draws(max(reference.samples for _, reference in sampled), max_new_tokens, seed)
        kept = _drawn(prompts, scorers, model, tokenizer, draws, path)
    for part, reference in sampled:
        rewards = [kept[name][part.reward][: reference.samples] for name in prompts["row_id"]]
        column: list[float | None] = []
        for prompt, own in zip(prompts["prompt"], rewards, strict=True):
            try:
                column.append(sampled_reference(own, reference.quantile))
            except ValueError as error:
                raise AlignError(
                    f"{part.reference_column} of prompt {plain(prompt, 'user')[:60]!r}: {error}"
                ) from error
        if without := sum(one is None for own in rewards for one in own):
            total = sum(map(len, rewards))
            logger.warning("%s: %d of %d answers have no reward and are left out", part.name, without, total)
        prompts = prompts.add_column(str(part.reference_column), column)
    for part in parts:
        if isinstance(part.reference, PredictedReference):
            fitted = fitted_reference(part.reference.source, str(part.reference_column), model, tokenizer)
            found = fitted.predict(prompt_embeddings(prompts["prompt"], model, tokenizer))
            prompts = prompts.add_column(str(part.reference_column), found.tolist())
    release_freed()
    return prompts


def check_prompts(count: int, arguments: GRPOConfig, source: str) -> None:
    """Stop where there are fewer prompts than one step takes: TRL drops a step that is not whole, without a word.

    Raises:
        ConfigError: there are.
    """
    answers, of_one = int(arguments.generation_batch_size), arguments.num_generations
    if count >= answers // of_one:
        return
    what = (
        f"{count:,} prompts, and a step takes {answers // of_one:,}: {answers:,} answers "
        f"(training.per_device_train_batch_size {arguments.per_device_train_batch_size:,}, "
        f"gradient_accumulation_steps {arguments.gradient_accumulation_steps:,}), {of_one} to a prompt "
        f"(grpo.num_generations); give more prompts, or set these to {count * of_one:,} answers or fewer"
    )
    raise ConfigError(source, [("data.train", what)])


def _drawn(
    prompts: Dataset,
    scorers: Mapping[str, Scorer],
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    draws: Draws,
    path: Path,
) -> dict[str, dict[str, list[float | None]]]:
    """By row id and reward, the rewards of the model's own answers."""
    kept = _read(path)
    missing = [row for row in prompts if row["row_id"] not in kept]
    with progress("references from the model's own answers", len(missing)) as advance, path.open("a") as file:
        for row in missing:
            try:
                kept[row["row_id"]] = drawn_rewards(row["prompt"], scorers, model, tokenizer, draws, row)
            except ValueError as error:
                raise AlignError(f"grpo.rewards: prompt {plain(row['prompt'], 'user')[:60]!r}: {error}") from error
            file.write(json.dumps({"row_id": row["row_id"], "rewards": kept[row["row_id"]]}) + "\n")
            file.flush()
            release_freed()
            advance(1)
    return kept


def _read(path: Path) -> dict[str, dict[str, list[float | None]]]:
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
