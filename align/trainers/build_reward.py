"""The reward model of a recipe and its trainer."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import set_seed

from align.config.kinds import reward_kind
from align.config.schema import Recipe
from align.errors import AlignError
from align.losses import Loss
from align.models.fingerprint import weights_hash
from align.models.load import LOAD_ERRORS, locate
from align.rewards.models import CONFIG_FILE, RewardModel

from .build import Built, backbone_options, built, lora_config, losses_of, start_of, training_arguments
from .reward import RewardTrainer, start_at_mean_ratings

logger = logging.getLogger(__name__)


def build_reward(recipe: Recipe, train: Dataset, held_out: Dataset | None, output: Path) -> Built:
    """Load the backbone, or the reward model to go on from, and set up its trainer.

    Raises:
        AlignError: the model cannot be loaded or does not fit the method, or an argument is refused.
    """
    assert recipe.reward is not None
    (loss,) = losses_of(recipe)
    try:
        model, facts = _model(recipe, loss, train)
        if "tau" in loss.info.parameters:
            loss = replace(loss, settings={**loss.settings, "tau": model.config.tau})
            facts["tau"] = model.config.tau
        arguments = training_arguments(recipe, output, model.tokenizer)
        trainer = RewardTrainer(
            model,
            arguments,
            loss=loss,
            centering=recipe.reward.centering,
            shared_prompt=recipe.data.shared_prompt,
            packing=recipe.data.packing,
            train_dataset=train,
            eval_dataset=held_out,
        )
    except LOAD_ERRORS as error:
        raise AlignError(f"{recipe.model.name}: the reward model cannot be set up: {error}") from error
    reference = {"kind": "none", "weights_sha256": None}
    return built(trainer, contextlib.nullcontext, model=facts, reference=reference)


def _model(recipe: Recipe, loss: Loss, train: Dataset) -> tuple[RewardModel, dict[str, Any]]:
    """The model to train, and the facts about what it starts from."""
    spec, reward = recipe.model, recipe.reward
    assert reward is not None
    path = locate(spec.name)
    dtype, facts = start_of(spec, reward.frozen)
    options = backbone_options(spec, dtype)
    training: dict[str, Any] = {"frozen": reward.frozen}
    if spec.lora is not None:
        training["lora"] = lora_config(spec.lora)
    # What training set aside, scoring refuses.
    limit: dict[str, Any] = {
        "max_length": recipe.data.max_length,
        "over_long": "cut" if reward.over_long == "cut" else "error",
    }
    set_seed(recipe.training.get("seed", 42))  # a resumed run draws the same head and adapters
    if (Path(path) / CONFIG_FILE).is_file():
        model = _continued(recipe, RewardModel.from_pretrained(path, **options))
        if loss.settings.get("tau", model.config.tau) != model.config.tau:
            was, now = model.config.tau, loss.settings["tau"]
            logger.warning("%s: its tau goes from %g to %g, as the recipe says", spec.name, was, now)
            model.config = replace(model.config, tau=now)
        hashed = weights_hash(model.state_dict().items())
        model.config = replace(model.config, **limit)
        model.train_backbone(**training)
    else:
        model = RewardModel.create(
            path,
            kind=str(reward_kind(recipe.method)),
            dimension=reward.dimension,
            attributes=reward.attributes,
            ranking=reward.ranking,
            tau=loss.settings.get("tau"),
            unit_norm=reward.unit_norm,
            gate=reward.gate,
            **limit,
            **training,
            **options,
        )
        # Adapters and head are drawn by the seed: what the run starts from is the backbone.
        weights = model.carrier.base_model.state_dict().items()
        hashed = weights_hash((name, weight) for name, weight in weights if "lora_" not in name)
        if model.config.kind == "attributes":
            start_at_mean_ratings(model, train)
    facts["weights_sha256"] = hashed
    facts["attention"] = model.carrier.config._attn_implementation
    facts["reward"] = model.config.kind
    return model, facts


def _continued(recipe: Recipe, model: RewardModel) -> RewardModel:
    """A reward model to go on from; one of attributes becomes the scalar that ranks alike, where that is asked."""
    spec, kind = recipe.reward, reward_kind(recipe.method)
    assert spec is not None
    name, found = recipe.model.name, model.config
    if kind == "scalar" and found.kind == "attributes":
        return model.make_scalar()
    if found.kind != kind:
        raise AlignError(
            f"{name}: a reward model of kind {found.kind}, and method {recipe.method} trains one of {kind}"
        )
    given: dict[str, Any] = {"dimension": spec.dimension, "gate": spec.gate, "unit_norm": spec.unit_norm}
    has: dict[str, Any] = {"dimension": found.width, "gate": found.gate, "unit_norm": found.unit_norm}
    if kind == "attributes":
        given, has = {"attributes": tuple(spec.attributes)}, {"attributes": found.attributes}
    for key, value in given.items() if kind != "scalar" else ():
        if value is not None and value != has[key]:
            raise AlignError(f"{name}: its {key} is {has[key]}, and reward.{key} says {value}")
    return model
