"""The evaluations of a run, after training: held-out pairs or thumbs, and answers before and after.

Every suite writes ``eval/NAME.json`` once, whole. Answers are kept as they come, in ``eval/answers.jsonl``, so that an
interrupted evaluation goes on where it stopped.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from align.answering import BATCH, Answers, Kept
from align.config.schema import Recipe
from align.data.prompts import unpacked
from align.data.rows import CompletionRow, PairRow
from align.data.splits import Split
from align.data.tokenize import encode_prompt
from align.errors import AlignError
from align.evals.cycles import cycle_suite
from align.evals.displacement import displacement_suite, gained_tokens
from align.evals.generation import compare
from align.evals.goals import goals_suite
from align.evals.kl import LogRatios, log_ratios
from align.evals.preference import preference_suite
from align.evals.reward import ratings_suite, reward_suite
from align.evals.sampling import Sample
from align.evals.thumbs import thumbs_suite
from align.heldout import answer_logps, cycles_of, first_tokens, pair_logps
from align.losses import PairLogps, SequenceLogps, combine
from align.losses.general_preference import gpm_score
from align.losses.layouts import SEPARATE, Layout
from align.losses.rows import answer_rows
from align.losses.types import UnpairedLogps
from align.models.memory import release_freed
from align.models.scoring import sequence_logps
from align.rewards.encoding import as_answer, plain
from align.rewards.models import RewardOutput
from align.rewards.named import load_reward
from align.suites.pairs import texts_of
from align.tracking.files import write_json, write_text
from align.tracking.progress import progress
from align.trainers.build import Built, losses_of
from align.trainers.reward import RewardTrainer
from align.trainers.thumbs import ThumbsTrainer
from align.trainers.thumbs_loss import thumbs_rewards

SAMPLES_SHOWN = 20
TRAINED, UNTRAINED = "trained", "untrained"
"""Whose answers they are, of the generation suite."""
WITH_PROMPTS = ("generation", "goals")
"""Suites whose rows have prompts and answers."""
ANSWERS = ("chosen_ids", "rejected_ids", "completion_ids")


def evaluate(
    recipe: Recipe, built: Built, tokenizer: PreTrainedTokenizerBase, held_out: Split, run: Path
) -> dict[str, dict[str, Any]]:
    """Run the recipe's suites on the held-out data; results that are on disk already are taken from there.

    Returns:
        What ``eval/NAME.json`` holds, by name.
    """
    folder = run / "eval"
    folder.mkdir(exist_ok=True)
    pairs = _Pairs(recipe, built, tokenizer, held_out)
    suites: dict[str, Callable[[], dict[str, Any]]] = {
        "thumbs": lambda: _thumbs(recipe, built, tokenizer, held_out),
        "preference": pairs.preference,
        "displacement": pairs.displacement,
        "generation": lambda: _generation(recipe, built, tokenizer, held_out, run),
        "reward": lambda: _reward(recipe, built, held_out),
        "cycles": lambda: _cycles(recipe, built, held_out),
        "goals": lambda: _goals(recipe, built, tokenizer, run),
    }
    results: dict[str, dict[str, Any]] = {}
    for name in recipe.evals:
        path = folder / f"{name}.json"
        if path.exists():
            results[name] = json.loads(path.read_text(encoding="utf-8"))
            continue
        with built.trainer.accelerator.autocast():
            results[name] = suites[name]() | _about(name, held_out)
        write_json(path, results[name])
    return results


def _about(suite: str, held_out: Split) -> dict[str, Any]:
    """The data: source, digest, counts, and where the rows of the result do not have their texts, these."""
    rows: list[Any] = held_out.used
    texts: dict[str, Any] = {}
    if suite not in WITH_PROMPTS and isinstance(rows[0], PairRow):
        texts["pairs"] = texts_of(rows)
    elif suite not in WITH_PROMPTS and isinstance(rows[0], CompletionRow):
        fields = ("row_id", "prompt", "completion")
        texts["answers"] = [{name: getattr(row, name) for name in fields} for row in rows]
    return {"data": {**held_out.facts, **texts}}


def check_testable(recipe: Recipe, splits: dict[str, Split]) -> None:
    """Stop before training where the held-out data leave an evaluation nothing to be right or wrong about.

    Raises:
        AlignError: all labels are ties, no pairs run in a circle, or no annotator can be tested.
    """
    rows: list[Any] = splits["eval"].used
    source = recipe.data.eval
    if "cycles" in recipe.evals and not cycles_of(rows):
        raise AlignError(
            f"{source}: no pairs run in a circle (A over B, B over C, C over A, to one prompt): there is nothing for "
            "evals: [cycles] to test; leave it out"
        )
    if recipe.data_kind == "pairs" and {"preference", "reward"} & set(recipe.evals):
        if all(row.preference == 0.5 for row in rows):
            raise AlignError(f"{source}: all pairs are ties (preference 0.5): no ranking could be right or wrong")
    elif recipe.pal is not None and "pal" in recipe.evals:
        trained: list[Any] = splits["train"].used
        known = {row.annotator for row in trained}
        counts = Counter(row.annotator for row in rows)
        shots = max(recipe.pal.shots)
        if not any(name in known or count > shots for name, count in counts.items()):
            raise AlignError(
                f"{source}: none of its {len(counts)} annotators is in {recipe.data.train}, and none has more than "
                f"{shots} judgements (pal.shots), so nothing is left to test on: add judgements, set lower pal.shots, "
                "or leave out data.eval"
            )


class _Pairs:
    """The suites on held-out pairs; they share one pass of each model over them."""

    def __init__(self, recipe: Recipe, built: Built, tokenizer: PreTrainedTokenizerBase, held_out: Split) -> None:
        self.losses = losses_of(recipe)
        self.built = built
        self.pad_token_id = int(tokenizer.pad_token_id)
        self.decode = tokenizer.decode
        self.layout: Layout = getattr(built.trainer, "layout", SEPARATE)
        self.rows: Sequence[Any] = held_out.tokenized.rows
        self.ids = [row.row_id for row in held_out.tokenized.rows]
        self.groups = [json.dumps(row.prompt) for row in held_out.used]

    @cached_property
    def logps(self) -> tuple[PairLogps, PairLogps]:
        """Under the trained and under the untrained model."""
        policy = self._score(self.built.trainer.model, "trained")
        with self.built.untrained() as before:
            return policy, self._score(before, "untrained")

    def preference(self) -> dict[str, Any]:
        rewards = combine(self.losses, *self.logps).rewards
        ranking = [loss for loss in self.losses if loss.info.ranks] or self.losses
        settings = {"rewards": " + ".join(f"{loss.weight:g} * {loss.info.name}" for loss in ranking)}
        labels = [row.preference for row in self.rows]
        return preference_suite(
            rewards[:, 0], rewards[:, 1], self.ids, preference=labels, groups=self.groups, settings=settings
        )

    def displacement(self) -> dict[str, Any]:
        after = first_tokens(self.built.trainer.model, self.rows, pad_token_id=self.pad_token_id)
        with self.built.untrained() as untrained:
            before = first_tokens(untrained, self.rows, pad_token_id=self.pad_token_id)
        gained = gained_tokens(before, after, self.decode)
        return displacement_suite(*self.logps, self.ids, groups=self.groups, gained=gained)

    def _score(self, model: Any, name: str) -> PairLogps:
        return pair_logps(model, self.rows, f"{name} model", pad_token_id=self.pad_token_id, **self.layout)


def _thumbs(recipe: Recipe, built: Built, tokenizer: PreTrainedTokenizerBase, held_out: Split) -> dict[str, Any]:
    """The rewards of held-out answers, against BCO's shift as training left it, or against 0 for KTO."""
    data: Sequence[Any] = held_out.tokenized.rows
    pad = int(tokenizer.pad_token_id)

    def logps(model: Any, name: str) -> SequenceLogps:
        totals, lengths = answer_logps(
            model,
            data,
            [len(row.input_ids) for row in data],
            lambda part: answer_rows(
                [row.prompt_ids for row in part], [row.completion_ids for row in part], pad_token_id=pad
            ),
            1,
            f"scoring held-out answers, {name} model",
        )
        return SequenceLogps(totals[0], lengths[0])

    trainer: ThumbsTrainer = built.trainer
    (loss,) = losses_of(recipe)
    labels = torch.tensor([row.label for row in data])
    policy = UnpairedLogps(logps(trainer.model, "trained"), labels)
    with built.untrained() as before:
        reference = logps(before, "untrained")
    return thumbs_suite(
        thumbs_rewards(loss, policy, reference),
        labels,
        [row.row_id for row in data],
        threshold=0.0 if trainer.shift is None else float(trainer.shift.value),
        groups=[json.dumps(row.prompt) for row in held_out.used],
        settings={"rewards": loss.info.name, **loss.settings},
    )


def _reward(recipe: Recipe, built: Built, held_out: Split) -> dict[str, Any]:
    """The trained reward model on held-out pairs, or on held-out ratings."""
    trainer: RewardTrainer = built.trainer
    model, kind = trainer.reward.eval(), trainer.reward.config.kind
    rows = list(held_out.tokenized.dataset())
    data: Sequence[Any] = held_out.tokenized.rows
    sizes = [max(len(row[name]) for name in row if name in ANSWERS) + len(row["prompt_ids"]) for row in rows]
    longest = sorted(range(len(rows)), key=lambda row: -sizes[row])
    values = torch.zeros(len(rows), model.config.width if kind == "attributes" else 3)
    with progress("scoring held-out answers", len(rows)) as advance, torch.no_grad():
        for start in range(0, len(rows), BATCH):
            part = longest[start : start + BATCH]
            batch = trainer.data_collator([rows[row] for row in part])
            batch = {name: value.to(trainer.args.device) for name, value in batch.items()}
            found = trainer.of_batch(batch)
            values[part] = found.values.cpu() if kind == "attributes" else _pair_scores(found).cpu()
            release_freed()
            advance(len(part))
    ids, prompts = [row.row_id for row in data], [json.dumps(row.prompt) for row in held_out.used]
    settings = {"model": kind, "method": recipe.method, "tau": model.config.tau}
    if kind == "attributes":
        names, ranking = model.config.attributes, model.config.ranking
        return ratings_suite(values, [row.ratings for row in data], names, ranking, ids, prompts, settings=settings)
    return reward_suite(
        values[:, 0] / model.config.tau,
        ids,
        preference=[row.preference for row in data],
        rewards=values[:, 1:] if kind == "scalar" else None,
        groups=prompts,
        settings=settings,
    )


def _cycles(recipe: Recipe, built: Built, held_out: Split) -> dict[str, Any]:
    """The trained reward model on the held-out pairs that run in a circle: an answer is read once."""
    model, cycles = built.trainer.reward.eval(), cycles_of(held_out.used)
    scores = []
    with progress("scoring held-out cycles", len(cycles)) as advance:
        for cycle in cycles:
            (matrix,) = model.score_groups([cycle.prompt], [cycle.answers], batch_size=BATCH)
            places = torch.arange(len(matrix))
            scores.append(matrix[places, (places + 1) % len(matrix)])
            release_freed()
            advance(1)
    settings = {"model": model.config.kind, "method": recipe.method, "tau": model.config.tau}
    return cycle_suite(scores, [cycle.row_ids for cycle in cycles], settings=settings)


def _pair_scores(found: RewardOutput) -> torch.Tensor:
    """Score of chosen over rejected, and the reward of either (0 where a gpm has none), (B, 3)."""
    chosen, rejected = found.values.chunk(2)
    if chosen.ndim == 1:
        return torch.stack([chosen - rejected, chosen, rejected], dim=1)
    scale = None if found.scale is None else (found.scale[: len(chosen)] + found.scale[len(chosen) :]) / 2
    score = gpm_score(chosen, rejected, scale)
    return torch.stack([score, torch.zeros_like(score), torch.zeros_like(score)], dim=1)


def _generation(
    recipe: Recipe, built: Built, tokenizer: PreTrainedTokenizerBase, held_out: Split, run: Path
) -> dict[str, Any]:
    """Answers of both models to the first held-out prompts, and the KL on answers drawn at temperature 1."""
    spec, prompts = recipe.generation, _asked(recipe, held_out)
    ids = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    answers = _answers(recipe, tokenizer, ids, run)
    model = built.trainer.model
    after = answers.of(TRAINED, model, spec.temperature)
    drawn = after if spec.temperature == 1.0 else answers.of("trained, for the KL", model, 1.0)
    with built.untrained() as untrained:
        before = answers.of(UNTRAINED, untrained, spec.temperature)
    pad = int(tokenizer.pad_token_id)
    result = compared_answers(recipe, prompts, before, after, _kl(ids, drawn, built, pad))
    if recipe.online is None:  # which keeps the answers that it learnt from there
        lines = [json.dumps(row, ensure_ascii=False) for row in result["rows"][:SAMPLES_SHOWN]]
        write_text(run / "samples.jsonl", "\n".join(lines) + "\n")
    return result


def _asked(recipe: Recipe, held_out: Split) -> list[Any]:
    """The prompts of the generation suite."""
    unique = {json.dumps(row.prompt): row.prompt for row in held_out.used}
    return list(unique.values())[: recipe.generation.prompts]


def compared_answers(
    recipe: Recipe,
    prompts: Sequence[Any],
    before: Sequence[Sample],
    after: Sequence[Sample],
    kl: LogRatios | None = None,
) -> dict[str, Any]:
    spec = recipe.generation
    assert spec.reward is not None  # the recipe's check: this suite has a reward
    settings = {**spec.model_dump(), "prompts": len(prompts)}
    asked = [plain(prompt, "user") for prompt in prompts]
    return compare(asked, before, after, load_reward(spec.reward), kl=kl, settings=settings)


def _answers(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, ids: Sequence[Sequence[int]], run: Path) -> Answers:
    spec = recipe.generation
    kept = Kept(run / "eval" / "answers.jsonl")
    return Answers(kept, tokenizer, ids, max_new_tokens=spec.max_new_tokens, seed=spec.seed)


def _kl(ids: Sequence[Sequence[int]], drawn: Sequence[Sample], built: Built, pad: int) -> LogRatios:
    """Log-ratios of answers that the trained model drew at temperature 1."""

    def policy_logps(p: Sequence[Sequence[int]], a: Sequence[Sequence[int]]) -> SequenceLogps:
        return sequence_logps(built.trainer.model, p, a, pad_token_id=pad)

    def reference_logps(p: Sequence[Sequence[int]], a: Sequence[Sequence[int]]) -> SequenceLogps:
        with built.untrained() as untrained:
            return sequence_logps(untrained, p, a, pad_token_id=pad)

    return log_ratios(ids, drawn, policy_logps, reference_logps, temperature=1.0)


def _goals(recipe: Recipe, built: Built, tokenizer: PreTrainedTokenizerBase, run: Path) -> dict[str, Any]:
    """Each reward of ``grpo.rewards`` on answers of both models to the first held-out prompts, at temperature 1.

    The two answers to a prompt are scored side by side: a preference model then says by how much one is better. Which
    rewards judge an answer is told by that answer alone.
    """
    assert recipe.grpo is not None
    spec, reward, pad = recipe.grpo, built.trainer.reward, int(tokenizer.pad_token_id)
    model, longest, data = built.trainer.model, spec.max_completion_length, built.trainer.goals
    ids = [encode_prompt(prompt, tokenizer) for prompt in data["prompt"]]
    answers = _answers(recipe, tokenizer, ids, run)
    after = answers.of("trained, for the goals", model, 1.0, longest)
    with built.untrained() as untrained:
        before = answers.of("untrained, for the goals", untrained, 1.0, longest)
    kl = _kl(ids, after, built, pad)
    prompts = [prompt for prompt in data["prompt"] for _ in range(2)]
    texts = [
        as_answer(prompt, answer.text)
        for prompt, *both in zip(data["prompt"], before, after, strict=True)
        for answer in both
    ]
    rows = [unpacked(row) for row in data]
    given = {name: [row[name] for row in rows] for name in rows[0]}
    both = {name: [value for value in values for _ in range(2)] for name, values in given.items()}
    columns = reward.columns(prompts, texts, both)
    rewards = {part.name: columns[part.name] for part in reward.expression.parts}
    # What an answer counts for does not hang on the other model's: each is judged as the only one to its prompt.
    good = [
        reward.good(data["prompt"], {name: values[side::2] for name, values in columns.items()}, given)
        for side in (0, 1)
    ]
    return goals_suite(
        [plain(prompt, "user") for prompt in data["prompt"]],
        before,
        after,
        {name: (values[::2].numpy(), values[1::2].numpy()) for name, values in rewards.items()},
        {name: (good[0][name].numpy(), good[1][name].numpy()) for name in good[0]},
        kl=kl,
        settings={**spec.model_dump(), "prompts": len(ids), "temperature": 1.0},
    )
