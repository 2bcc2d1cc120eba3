"""The PAL model of a recipe, fitted to embeddings of its backbone; and the trainer of both, where both are trained."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import set_seed

from align.config.schema import PalSpec, Recipe
from align.errors import AlignError
from align.models.embeddings import EmbeddingCache
from align.models.load import LOAD_ERRORS, locate
from align.models.packaged import cache_folder
from align.rewards.pal import Pal, PalA, PalB
from align.rewards.pal_model import PalRewardModel
from align.tracking.progress import progress

from .build import Built, backbone_options, built, lora_config, start_of, training_arguments
from .pal import Judgements, train_pal
from .pal_backbone import PalTrainer

Log = Callable[[int, dict[str, float]], None]


def build_pal(recipe: Recipe, train: Dataset, output: Path, *, groups: int | None = None) -> Built:
    """Load the backbone, fit a PAL model to its embeddings, and set up the trainer of both.

    Args:
        train: tokenised judgements, with their annotators.
        groups: prototypes, where not those of the recipe.

    Raises:
        AlignError: the backbone cannot be loaded, or an argument is refused.
    """
    assert recipe.pal is not None
    spec, seed = recipe.pal, int(recipe.training.get("seed", 42))
    try:
        model, facts = backbone_of(recipe)
        arguments = training_arguments(recipe, output, model.tokenizer)
        cache = embedding_cache(spec, model.to(arguments.device))
        facts["weights_sha256"] = cache.weights_sha256
        judgements = embedded(train, cache, "train")
        model.attach(trained(spec, judgements, groups or spec.groups, seed))
        model.train_backbone(lora=None if recipe.model.lora is None else lora_config(recipe.model.lora))
        model.choose("uniform")  # as good as any to see what merging does
        trainer = PalTrainer(
            model,
            arguments,
            train_dataset=train,
            shared_prompt=recipe.data.shared_prompt,
            packing=recipe.data.packing,
        )
        trainer.judgements = judgements
    except LOAD_ERRORS as error:
        raise AlignError(f"{recipe.model.name}: the PAL model cannot be set up: {error}") from error
    reference = {"kind": "none", "weights_sha256": None}
    return built(trainer, contextlib.nullcontext, model=facts, reference=reference)


def backbone_of(recipe: Recipe) -> tuple[PalRewardModel, dict[str, Any]]:
    """The recipe's backbone without a PAL model yet, and facts about it.

    Raises:
        LOAD_ERRORS: it cannot be loaded.
    """
    spec, frozen = recipe.model, recipe.pal is None or recipe.pal.frozen
    dtype, facts = start_of(spec, frozen)
    options = backbone_options(spec, dtype)
    set_seed(recipe.training.get("seed", 42))  # a resumed run draws the same maps and adapters
    model = PalRewardModel.create(
        locate(spec.name), kind="pal", frozen=frozen, max_length=recipe.data.max_length, **options
    )
    return model, facts


def embedding_cache(spec: PalSpec, model: PalRewardModel) -> EmbeddingCache:
    """Where the recipe keeps embeddings by this backbone."""
    return EmbeddingCache(Path(spec.cache or cache_folder() / "embeddings"), model)


def embedded(rows: Dataset, cache: EmbeddingCache, name: str) -> Judgements:
    """Tokenised judgements on a table with each answer to each prompt once; the preferred answer is the right one."""
    place: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    sides = {
        side: [
            place.setdefault((tuple(prompt), tuple(answer)), len(place))
            for prompt, answer in zip(rows["prompt_ids"], rows[f"{side}_ids"], strict=True)
        ]
        for side in ("rejected", "chosen")
    }
    with progress(f"embeddings, {name} data", len(place)) as advance:
        states = cache.embed_ids([prompt for prompt, _ in place], [answer for _, answer in place], advance=advance)
    left, right = torch.tensor(sides["rejected"]), torch.tensor(sides["chosen"])
    return Judgements(*states, left, right, torch.ones(len(rows)), list(rows["annotator"]))


def judged(model: PalRewardModel, dataset: Dataset) -> Judgements:
    """Tokenised judgements as the model's backbone sees them now; the preferred answer is the right one."""
    rows, count = dataset[:], len(dataset)
    states = model.embed_ids(rows["prompt_ids"] * 2, [*rows["rejected_ids"], *rows["chosen_ids"]])
    left = torch.arange(count)
    return Judgements(*states, left, left + count, torch.ones(count), rows["annotator"])


def trained(spec: PalSpec, data: Judgements, groups: int, seed: int, log: Log | None = None) -> Pal:
    """A model of this many groups, trained on the judgements."""
    torch.manual_seed(seed)
    width, users = data.answers.shape[1], sorted(set(data.users))
    sizes: dict[str, Any] = {"groups": groups, "dimension": spec.dimension, "depth": spec.depth}
    model = PalA(width, users, loss=spec.loss, **sizes) if spec.variant == "a" else PalB(width, users, **sizes)
    with progress(f"training, {groups} group{'s' * (groups > 1)}", spec.epochs) as advance:

        def after_epoch(epoch: int, loss: float) -> bool:
            if log is not None:
                log(epoch, {"loss": loss, "epoch": float(epoch)})
            advance(1)
            return False

        train_pal(
            model,
            data,
            epochs=spec.epochs,
            batch_size=spec.batch_size,
            projectors=spec.learning_rate,
            users=spec.users_learning_rate,
            seed=seed,
            after_epoch=after_epoch,
        )
    return model
