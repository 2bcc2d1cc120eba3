"""``align train --dry-run``: what a run would do, without doing it."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from align.config.schema import Recipe
from align.data.report import show_masks
from align.score.training import TrainingFilter
from align.trainers.build import training_arguments
from align.trainers.grpo import check_prompts
from align.trainers.plan import choose_checkpointing, rows_of

from .run import read_splits


def show_plan(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """Eight rows with their masks, the steps, and the memory that they would need; nothing is written."""
    split = read_splits(recipe, tokenizer, None)["train"]
    out = Console()
    if recipe.iterate is not None:
        out.print(f"{recipe.iterate.rounds} rounds of what follows, each from where the one before ends")
    out.print(show_masks(split.tokenized, tokenizer))
    chosen = TrainingFilter(recipe, split) if recipe.data.filter is not None else None
    if chosen is not None:
        out.print(chosen.describe(), highlight=False, soft_wrap=True)
    if recipe.pal is not None and recipe.pal.frozen:
        people = f"{split.table.counts['annotators']:,} annotators"
        epochs = f"{recipe.pal.epochs} epochs"
        count = (chosen and chosen.expected()) or len(split.tokenized.rows)
        out.print(f"{count:,} judgements of {people} · {epochs}", highlight=False)
        return
    arguments = training_arguments(recipe, Path(recipe.output), tokenizer)
    sizes = rows_of(recipe, split)
    rows = total = len(split.tokenized.rows)
    if chosen is not None:
        rows = chosen.expected() or total
        count = rows * (len(sizes) // total)  # in grpo a row has several answers
        sizes = [sizes[place * len(sizes) // count] for place in range(count)]
    if recipe.iterate is not None and recipe.iterate.prompts is not None:
        rows = recipe.iterate.prompts
        sizes = [sizes[place % total] for place in range(rows)]
    if recipe.grpo is not None:
        check_prompts(rows, arguments, recipe.data.train)
    checkpointing = choose_checkpointing(recipe, arguments, sizes)
    planned = checkpointing.plan
    out.print(
        f"{rows:,} rows · {planned.steps:,} steps of {planned.pairs_per_step} "
        f"({planned.epochs:.2g} epochs) · about {planned.tokens_per_step:,} tokens a step",
        f"{planned.parameters / 1e6:,.1f} M parameters, {planned.trainable / 1e6:,.1f} M trained",
        f"memory, estimated: {planned.peak_gb:.1f} GB = "
        + " + ".join(f"{name} {gb:.1f}" for name, gb in planned.memory.items() if gb >= 0.05),
        f"gradient checkpointing {checkpointing}",
        sep="\n",
        highlight=False,
        soft_wrap=True,
    )
