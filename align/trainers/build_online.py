"""The trainer of a recipe with section ``online``, and that of a method that learns from groups of answers."""

from __future__ import annotations

from typing import Any

from align.config.schema import Recipe
from align.errors import AlignError
from align.losses import Loss
from align.models.ends import end_tokens
from align.models.load import locate
from align.rewards.annotators import annotator_of
from align.rewards.expression import ExpressionError

from .online import Drawing, OnlineTrainer
from .rated import RatedTrainer


def online_trainer(recipe: Recipe, loss: Loss, common: dict[str, Any], facts: dict[str, Any]) -> OnlineTrainer:
    """``common``: what all trainers are given. The annotator stands in ``facts``.

    Raises:
        AlignError: the annotator or the engine cannot be had. ValueError: the trainer refuses the set-up.
    """
    spec = recipe.online
    assert spec is not None
    try:
        annotator = annotator_of(spec.annotator)
    except ExpressionError as error:
        raise AlignError(f"online.annotator{'.' * bool(error.where)}{error.where}: {error.problem}") from error
    facts["annotator"] = {"name": annotator.name}
    held_out = common["eval_dataset"]
    if held_out is not None:
        held_out = held_out.select(range(min(spec.eval_prompts, len(held_out))))
    return OnlineTrainer(
        common["model"],
        common["args"],
        draw=_engine(recipe, common, facts) if spec.engine == "vllm" else None,
        loss=loss,
        annotator=annotator,
        drawing=Drawing(spec.answers, spec.mixture, spec.max_new_tokens),
        labels=spec.labels,
        inner_steps=spec.inner_steps,
        cut_penalty=spec.cut_penalty,
        annotator_seconds=spec.annotator_seconds,
        reference=spec.reference,
        decay=spec.decay,
        every=spec.every,
        kl_penalty=spec.kl_penalty,
        shared_prompt=recipe.data.shared_prompt,
        packing=recipe.data.packing,
        tokenizer=common["processing_class"],
        peft_config=common["peft_config"],
        train_dataset=common["train_dataset"],
        eval_dataset=held_out,
    )


def _engine(recipe: Recipe, common: dict[str, Any], facts: dict[str, Any]) -> Any:
    """A vLLM that draws answers with the policy's weights."""
    from .pushed import Pushed, start  # vLLM is imported by none that does not ask for it

    ends = end_tokens(common["model"], common["processing_class"])
    dtype = "bfloat16" if common["args"].bf16 else "float16" if common["args"].fp16 else "float32"
    # A prompt leaves room for its answer within data.max_length.
    engine = start(locate(recipe.model.name), dtype=dtype, ends=ends, max_model_len=recipe.data.max_length)
    facts["engine"] = {"name": "vllm", "dtype": dtype}
    return Pushed(engine)


def rated_trainer(recipe: Recipe, loss: Loss, common: dict[str, Any]) -> RatedTrainer:
    """On groups of the data.

    Raises:
        ValueError: the trainer refuses the set-up.
    """
    return RatedTrainer(
        common["model"],
        common["args"],
        loss=loss,
        shared_prompt=recipe.data.shared_prompt,
        packing=recipe.data.packing,
        tokenizer=common["processing_class"],
        peft_config=common["peft_config"],
        train_dataset=common["train_dataset"],
    )
