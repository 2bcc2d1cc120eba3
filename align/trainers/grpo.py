"""Training on rewards of the policy's own answers: TRL's GRPOTrainer with any reward of the library.

What is TRL's: drawing the answers, advantages, the loss, the loop. What is ours: the reward function
(``align.rewards.functions``), its references by the starting policy (``references``), and the clock, the checkpoints
and the log-probs for evaluation that all trainers here have.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer

from align.data.prompts import ROW_ID, unpacked
from align.errors import AlignError, ConfigError
from align.losses.logprobs import TokenLogps
from align.models.memory import release_freed
from align.rewards.encoding import as_answer, plain
from align.rewards.expression import CannedReference, Part, PredictedReference, SampledReference
from align.rewards.functions import RewardFunction
from align.rewards.references import sampled_reference
from align.rewards.scorers import RewardError, RuleReward, Scorer
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

    Attributes:
        goals: the held-out prompts that the goals suite has answered, with their references; None where it is not
            asked for.
    """

    needs_reference = False  # TRL keeps its own, for the KL
    starts_at_reference = False
    samples = True
    goals: Dataset | None = None

    def __init__(self, model: Any, reward: RewardFunction, args: GRPOConfig | None = None, **kwargs: Any) -> None:
        self.reward = reward
        if args is not None:
            _check_share(reward, args)
        super().__init__(model=model, reward_funcs=reward, args=args, **kwargs)
        self.aux_loss_enabled = getattr(self, "aux_loss_enabled", False)
        self._attach_scoring()

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self._total_train_tokens = int(self.state.num_input_tokens_seen)
        return loss

    def _calculate_rewards(self, inputs: list[dict[str, Any]], *args: Any, **kwargs: Any) -> torch.Tensor:
        theirs = logging.getLogger(GRPOTrainer.__module__)
        theirs.addFilter(_is_not_of_none)
        try:
            found: torch.Tensor = super()._calculate_rewards([unpacked(row) for row in inputs], *args, **kwargs)
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


def _check_share(reward: RewardFunction, args: GRPOConfig) -> None:
    """Raise a ValueError where processes share the answers to a prompt, and a rule may give some of them None.

    Which rewards judge a prompt is told by all the answers to it, and a process sees its own.
    """
    share = int(args.generation_batch_size) // args.world_size
    rules = [name for name, scorer in reward.scorers.items() if isinstance(scorer, RuleReward)]
    if len(reward.expression.parts) > 1 and rules and share % args.num_generations:
        raise ValueError(
            f"a process has {share} answers at once, which is no multiple of num_generations {args.num_generations}: "
            f"where a rule ({rules[0]}) gives None, which rewards judge a prompt is told by all answers to it; make "
            "per_device_train_batch_size (times steps_per_generation) a multiple"
        )


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
    max_bad_fraction: float,
    training: bool,
) -> Dataset:
    """The prompts with the references that are made, without those of which none can be made.

    Of these, a canned answer's is scored with the answers; the others are columns, made here once. The
    rewards of sampled answers are kept in ``path`` as they come, so that an interrupted run goes on where it stopped,
    with the same references.

    Where a rule gives none of the sampled answers, or not the canned one, a reward, it does not judge the prompt. A
    prompt that no reward judges is set aside, and so is one where a single sampled answer has a reward.

    Args:
        prompts: as ``TokenizedPrompts.dataset`` gives them.
        model: the starting policy.
        max_bad_fraction: of the prompts that may be set aside.
        training: they are trained on, and a reward that judges none of them would teach nothing.

    Raises:
        AlignError: a reward cannot be had, or judges no prompt of training, too many prompts are set aside, or a
            regression has too little to go by.
    """
    parts = reward.expression.parts
    sampled = [(part, part.reference) for part in parts if isinstance(part.reference, SampledReference)]
    if sampled:
        scorers = {part.reward: reward.scorers[part.reward] for part, _ in sampled}
        draws = Draws(max(reference.samples for _, reference in sampled), max_new_tokens, seed)
        kept = _drawn(prompts, scorers, model, tokenizer, draws, path)
    made: dict[str, list[float | None]] = {}
    problems: dict[int, str] = {}
    for part, reference in sampled:
        rewards = [kept[name][part.reward][: reference.samples] for name in prompts[ROW_ID]]
        column = made[str(part.reference_column)] = [None] * len(rewards)
        for place, own in enumerate(rewards):
            try:
                column[place] = sampled_reference(own, reference.quantile)
            except ValueError as error:
                problems[place] = f"{part.reference_column}: {error}"
        if without := sum(one is None for own in rewards for one in own):
            total = sum(map(len, rewards))
            logger.warning("%s: %d of %d answers have no reward and are left out", part.name, without, total)
    _check_judged(prompts, parts, {**made, **_canned(prompts, reward)}, problems, training)
    prompts = _without(prompts, parts, problems, max_bad_fraction)
    for name, column in made.items():
        there = [one for place, one in enumerate(column) if place not in problems]
        prompts = prompts.add_column(name, there)
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
    several = "gradient_accumulation_steps"
    if arguments.steps_per_generation != arguments.gradient_accumulation_steps:
        several = "steps_per_generation"
    what = (
        f"{count:,} prompt{'s' * (count != 1)}, and a step takes {answers // of_one:,}: {answers:,} answers "
        f"(training.per_device_train_batch_size {arguments.per_device_train_batch_size:,}, "
        f"{several} {getattr(arguments, several):,}), {of_one} to a prompt "
        f"(grpo.num_generations); give more prompts, or set these to {count * of_one:,} answers or fewer"
    )
    raise ConfigError(source, [("data.train", what)])


def _canned(prompts: Dataset, reward: RewardFunction) -> dict[str, list[float | None]]:
    """References by canned answers, by column: of rules, since a reward model gives every answer a reward."""
    found = {}
    for part in reward.expression.parts:
        rule = reward.scorers[part.reward]
        if isinstance(part.reference, CannedReference) and isinstance(rule, RuleReward):
            rows = [unpacked(row) for row in prompts]
            answers = [as_answer(row["prompt"], part.reference.answer) for row in rows]
            columns = {name: [row[name] for row in rows] for name in rows[0]}
            try:
                found[str(part.reference_column)] = rule(columns["prompt"], answers, columns)
            except RewardError as error:
                raise AlignError(f"grpo.rewards: {part.reward}: the canned answer: {error}") from error
    return found


def _check_judged(
    prompts: Dataset,
    parts: Sequence[Part],
    made: Mapping[str, list[float | None]],
    problems: dict[int, str],
    training: bool,
) -> None:
    """Say which rewards do not judge which prompts, and add to ``problems`` the prompts that none judges.

    Raises:
        AlignError: a reward judges none of the prompts of training that are left.
    """
    lacking = {name: {row for row, one in enumerate(column) if one is None} for name, column in made.items()}
    if all(part.reference_column in made for part in parts):
        for row in set.intersection(*lacking.values()) - problems.keys():
            problems[row] = f"{', '.join(made)}: no answer that it is made of has a reward"
    left = len(prompts) - len(problems)
    for part in parts:
        if not (rows := lacking.get(str(part.reference_column), set()) - problems.keys()):
            continue
        which = f"any of {left:,} prompts" if len(rows) == left else f"{len(rows):,} of {left:,} prompts"
        what = (
            f"grpo.rewards: no {part.reference_column} can be made for {which}; the first, "
            f"{_quoted(prompts, min(rows))}: {part.reward} gives no answer that it is made of a reward"
        )
        if training and len(rows) == left:
            raise AlignError(f"{what}; {_remedy([part])}, or take the reward out")
        logger.warning("%s; the other rewards alone judge them: if all should, %s", what, _remedy([part]))


def _remedy(parts: Sequence[Part]) -> str:
    """What makes references where these parts have none."""
    kinds = {type(part.reference) for part in parts}
    ways = {
        SampledReference: "sample more answers (reference.samples)",
        CannedReference: "choose another canned answer",
    }
    return ", ".join([*(way for kind, way in ways.items() if kind in kinds), "or give the reference as a number"])


def _quoted(prompts: Dataset, row: int) -> str:
    return repr(plain(prompts[row]["prompt"], "user")[:60])


def _without(prompts: Dataset, parts: Sequence[Part], problems: Mapping[int, str], max_bad_fraction: float) -> Dataset:
    """The prompts without those of which no reference can be made.

    Raises:
        AlignError: none is left, or they are more than ``max_bad_fraction`` of all.
    """
    if not problems:
        return prompts
    first, bad, count = min(problems), len(problems), len(prompts)
    what = (
        f"grpo.rewards: no reference can be made for {bad:,} of {count:,} prompts; the first, "
        f"{_quoted(prompts, first)}: {problems[first]}"
    )
    remedy = f"leave such prompts out, {_remedy(parts)}"
    if bad == count or bad > max_bad_fraction * count:
        raise AlignError(f"{what}; over data.max_bad_fraction {max_bad_fraction:g}: {remedy}")
    logger.warning("%s; they are set aside: %s", what, remedy)
    return prompts.select([place for place in range(count) if place not in problems])


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
    missing = [(row[ROW_ID], unpacked(row)) for row in prompts if row[ROW_ID] not in kept]
    with progress("references from the model's own answers", len(missing)) as advance, path.open("a") as file:
        for name, row in missing:
            try:
                kept[name] = drawn_rewards(row["prompt"], scorers, model, tokenizer, draws, row)
            except ValueError as error:
                raise AlignError(f"grpo.rewards: prompt {plain(row['prompt'], 'user')[:60]!r}: {error}") from error
            file.write(json.dumps({"row_id": name, "rewards": kept[name]}) + "\n")
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
