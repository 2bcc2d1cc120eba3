"""A trainer from a recipe: model, adapter, reference, arguments; and the facts that the manifest states of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments
from trl import DPOConfig, GRPOConfig, KTOConfig, RewardConfig, SFTConfig, SFTTrainer
from trl.trainer.utils import use_adapter

from align.config.schema import BcoSpec, LoraSpec, ModelSpec, Recipe
from align.data.prompts import ROW_ID
from align.errors import AlignError
from align.losses import Loss
from align.models.fingerprint import weights_hash
from align.models.hardware import resolve_dtype
from align.models.load import load_model
from align.models.packaged import PUBLISHED, cache_folder
from align.models.scoring import attach_scoring
from align.rewards.named import load_function
from align.tracking.files import make_room
from align.tracking.run_folder import REFERENCES

from .build_online import online_trainer, rated_trainer
from .grpo import GroupTrainer, check_prompts, reward_function, with_references
from .matching import Encoder
from .memory import ReleaseFreed
from .pair import PairTrainer
from .thumbs import ThumbsTrainer

logger = logging.getLogger(__name__)

DATASETS = ("train_dataset", "eval_dataset")


@dataclass(frozen=True)
class Built:
    """A trainer ready to train.

    Attributes:
        trainer: TRL's, with our loss.
        untrained: context of the model as it was before training, for comparisons after it.
        facts: sections ``model`` and ``reference`` of the manifest.
        data: what building found out of ``train`` and ``eval``, for section ``data``.
    """

    trainer: Trainer
    untrained: Callable[[], AbstractContextManager[Any]]
    facts: dict[str, Any]
    data: dict[str, dict[str, int]] = field(default_factory=dict)


def losses_of(recipe: Recipe) -> list[Loss]:
    """The recipe's losses with their settings and weights; empty for ``method: sft``."""
    return [Loss.of(term.name, weight=term.weight, **term.settings) for term in recipe.terms]


def build(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, train: Dataset, held_out: Dataset | None, output: Path
) -> Built:
    """Load the model and set up its trainer.

    Args:
        train, held_out: tokenised rows, of the recipe's kind of data.
        output: the run folder; checkpoints go there.

    Raises:
        AlignError: the model or the adapter cannot be loaded, or an argument is refused by transformers.
    """
    if recipe.pal is not None:
        from .build_pal import build_pal  # it builds on this module, as does the next

        return build_pal(recipe, train, output)
    if recipe.reward is not None:
        from .build_reward import build_reward  # it builds on this module

        return build_reward(recipe, train, held_out, output)
    losses = losses_of(recipe)
    arguments = training_arguments(recipe, output, tokenizer)
    if recipe.grpo is not None:
        check_prompts(len(train), arguments, recipe.data.train)
    model, lora, facts = _policy(recipe.model)
    facts["reference"] = _reference_facts(recipe, model, losses, facts["model"]["weights_sha256"])
    common: dict[str, Any] = {
        "model": model,
        "args": arguments,
        "train_dataset": train,
        "eval_dataset": held_out,
        "processing_class": tokenizer,
        "peft_config": lora,
    }
    data: dict[str, dict[str, int]] = {}
    try:
        if recipe.data_kind == "thumbs":
            trainer: Trainer = _thumbs_trainer(recipe, losses[0], common)
        elif recipe.online is not None:
            trainer = online_trainer(recipe, losses[0], common, facts)
        elif recipe.data_kind == "groups":
            trainer = rated_trainer(recipe, losses[0], common)
        elif recipe.data_kind == "prompts":
            trainer, data = _group_trainer(recipe, common, output)
        elif losses:
            trainer = _pair_trainer(recipe, losses, common, facts)
        else:
            trainer = SFTTrainer(**common)
            inner = trainer.model.get_base_model() if isinstance(trainer.model, PeftModel) else trainer.model
            attach_scoring(inner)
    except ValueError as error:
        raise AlignError(f"the trainer refuses this set-up: {error}") from error
    kept: list[Any] = []
    return replace(built(trainer, lambda: _untrained(recipe, trainer, kept), **facts), data=data)


def built(trainer: Trainer, untrained: Callable[[], AbstractContextManager[Any]], **facts: dict[str, Any]) -> Built:
    """The trainer, ready, with the sizes of its model among the facts."""
    trainer.add_callback(ReleaseFreed())
    parameters = list(trainer.model.parameters())
    facts["model"]["parameters"] = sum(p.numel() for p in parameters)
    facts["model"]["trainable"] = sum(p.numel() for p in parameters if p.requires_grad)
    return Built(trainer, untrained, facts)


def _pair_trainer(
    recipe: Recipe, losses: list[Loss], common: dict[str, Any], facts: dict[str, dict[str, Any]]
) -> PairTrainer:
    """The reference's log-probs are kept where the recipe does not say otherwise; ``facts`` say what it then is."""
    if common["args"].eval_strategy == "no" and not common["args"].eval_on_start:
        common = {**common, "eval_dataset": None}  # the suites read held-out rows themselves
    trainer = PairTrainer(
        loss=losses,
        shared_prompt=recipe.data.shared_prompt,
        packing=recipe.data.packing,
        reference_cache=_reference_folder(recipe),
        **common,
    )
    if facts["reference"]["kind"] == "frozen-copy" and trainer.keeps_no_reference:
        facts["reference"]["kind"] = "log-probs"
    return trainer


def _reference_folder(recipe: Recipe) -> Path | None:
    """Where the log-probs of references are kept; a run does without where nothing can be."""
    if not recipe.data.reference_cache:
        return None
    folder = cache_folder() / "references"
    try:
        make_room(folder / "context")
    except AlignError:
        logger.warning(
            "%s cannot be written, so the reference is scored with each batch; set ALIGN_CACHE to a folder that can",
            folder,
        )
        return None
    return folder


def _thumbs_trainer(recipe: Recipe, loss: Loss, common: dict[str, Any]) -> ThumbsTrainer:
    spec = recipe.bco or BcoSpec()
    if recipe.method == "kto":
        # Its mismatched answers come from the next rows, where the other answer of a pair would stand.
        seed = common["args"].seed
        shuffled = {name: common[name] and common[name].shuffle(seed=seed) for name in DATASETS}
        common = {**common, **shuffled}
    return ThumbsTrainer(
        loss=loss,
        shift=spec.shift,
        decay=spec.decay,
        match_prompts=spec.match_prompts and (_encoder(spec.encoder) or True),
        density_ratio=(spec.density_ratio[0], spec.density_ratio[1]),
        density_prompts=spec.density_prompts,
        **common,
    )


def _encoder(name: str | None) -> Encoder | None:
    return None if name is None else load_function(name, "encoder", "a list of texts")


def _group_trainer(
    recipe: Recipe, common: dict[str, Any], output: Path
) -> tuple[GroupTrainer, dict[str, dict[str, int]]]:
    """The trainer, and how many prompts of each data set have no reference, where references are made.

    Held-out prompts are given theirs before training too, so that what they lack is told then, and once.
    """
    assert recipe.grpo is not None  # the recipe's check: method grpo has its section
    reward, arguments, model = reward_function(recipe.grpo.rewards), common["args"], common["model"]
    model.to(arguments.device)
    referenced = partial(
        with_references,
        reward=reward,
        model=model,
        tokenizer=common["processing_class"],
        path=output / REFERENCES,
        max_new_tokens=recipe.grpo.max_completion_length,
        seed=arguments.seed,
        max_bad_fraction=recipe.data.max_bad_fraction,
    )
    given = {"train": common["train_dataset"]}
    prompts = {"train": referenced(given["train"], training=True)}
    check_prompts(len(prompts["train"]), arguments, recipe.data.train)
    held_out, evaluated = common["eval_dataset"], arguments.eval_strategy != "no"
    first = None
    if held_out is not None and "goals" in recipe.evals:
        first = held_out.select(range(min(recipe.generation.prompts, len(held_out))))
    if held_out is not None and (evaluated or first is not None):
        given["eval"] = held_out if evaluated else first
        prompts["eval"] = referenced(given["eval"], training=False)
    datasets = {"train_dataset": prompts["train"], "eval_dataset": prompts["eval"] if evaluated else None}
    trainer = GroupTrainer(reward=reward, **{**common, **datasets})
    if first is not None:
        trainer.goals = _among(prompts["eval"], first)
    made = any(part.is_made for part in reward.expression.parts)
    without = {name: {"without_reference": len(given[name]) - len(found)} for name, found in prompts.items()}
    return trainer, without if made else {}


def _among(prompts: Dataset, first: Dataset) -> Dataset:
    """Those of ``prompts`` that are among the ``first`` of them.

    Raises:
        AlignError: none is.
    """
    asked = set(first[ROW_ID])
    found = prompts.select([place for place, name in enumerate(prompts[ROW_ID]) if name in asked])
    if not len(found):
        raise AlignError(
            f"grpo.rewards: no reference can be made for any of the first {len(first):,} held-out prompts, which "
            "evals: [goals] has answered: set a larger generation.prompts, or leave such prompts out"
        )
    return found


def training_arguments(recipe: Recipe, output: Path, tokenizer: PreTrainedTokenizerBase) -> TrainingArguments:
    """``training:`` with what the rest of the recipe decides, and defaults that suit a run folder.

    Raises:
        AlignError: transformers or TRL refuses an argument.
    """
    try:
        return _arguments(recipe, output, tokenizer)
    except ValueError as error:
        raise AlignError(f"training: {error}") from error


def _arguments(recipe: Recipe, output: Path, tokenizer: PreTrainedTokenizerBase) -> TrainingArguments:
    compute, _ = resolve_dtype(recipe.model.dtype)
    accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
    decided: dict[str, Any] = {
        "output_dir": str(output),
        "max_length": recipe.data.max_length,
        "gradient_checkpointing": recipe.model.gradient_checkpointing is True,
        "bf16": compute == torch.bfloat16,
        "fp16": compute == torch.float16,
        "use_cpu": not accelerated,
        "report_to": recipe.tracking.integrations or "none",
    }
    defaults: dict[str, Any] = {
        "logging_steps": 1,
        "logging_first_step": True,
        "save_strategy": "steps",
        "save_steps": 0.2,
        "save_total_limit": 2,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    if recipe.online is not None or recipe.iterate is not None or recipe.data_kind == "groups":
        del decided["max_length"]
        return TrainingArguments(**{**defaults, **recipe.training, **decided})
    if recipe.grpo is not None:
        del decided["max_length"]  # the limit of prompts is applied where they are read
        decided |= recipe.grpo.model_dump(include={"num_generations", "max_completion_length", "beta"})
        return GRPOConfig(**{**defaults, **recipe.training, **decided})
    if recipe.reward is not None or recipe.pal is not None:
        return RewardConfig(**{**defaults, **recipe.training, **decided})
    if recipe.data_kind == "thumbs":
        # KTO's rows keep their order; without its mismatched answers they need not.
        order = "sequential" if recipe.method == "kto" else "random"
        return KTOConfig(**{"train_sampling_strategy": order, **defaults, **recipe.training, **decided})
    if recipe.terms:
        return DPOConfig(**{**defaults, **recipe.training, **decided})
    # The rows are token ids and labels already, by the rules of align.data.
    return SFTConfig(
        **{**defaults, **recipe.training, **decided},
        eos_token=tokenizer.eos_token,
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def _policy(spec: ModelSpec) -> tuple[Any, LoraConfig | None, dict[str, Any]]:
    """The model to train, the adapter to add to it, and the facts so far."""
    _, facts = start_of(spec)
    model, _ = load_model(
        spec.name, dtype=facts["dtype"], attention=spec.attention, trust_remote_code=spec.trust_remote_code
    )
    facts["weights_sha256"] = weights_hash(model.state_dict().items())
    facts["attention"] = model.config._attn_implementation
    if spec.adapter is not None:
        try:
            model = PeftModel.from_pretrained(model, spec.adapter, is_trainable=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise AlignError(f"model.adapter {spec.adapter}: not an adapter of {spec.name}: {error}") from error
        return model, None, {"model": facts}
    if spec.lora is None:
        return model, None, {"model": facts}
    return model, lora_config(spec.lora), {"model": facts}


def start_of(spec: ModelSpec, frozen: bool = False) -> tuple[torch.dtype, dict[str, Any]]:
    """The dtype that the weights are held in, and the facts that are known before they are loaded.

    Raises:
        AlignError: the attention asked for computes no gradients here.
    """
    if spec.attention == "flex_attention" and not frozen and not torch.cuda.is_available():
        raise AlignError("model.attention: flex_attention computes gradients on CUDA alone; say sdpa, or leave it out")
    dtype, reason = _weights_dtype(spec, frozen)
    name = str(dtype).removeprefix("torch.")
    return dtype, {"name": spec.name, **PUBLISHED.get(spec.name, {}), "dtype": name, "dtype_reason": reason}


def backbone_options(spec: ModelSpec, dtype: torch.dtype) -> dict[str, Any]:
    """The recipe's model in the terms of ``from_pretrained``."""
    options: dict[str, Any] = {"dtype": dtype}
    if spec.attention != "auto":
        options["attn_implementation"] = spec.attention
    if spec.trust_remote_code:
        options["trust_remote_code"] = True
    return options


def _weights_dtype(spec: ModelSpec, frozen: bool) -> tuple[torch.dtype, str]:
    dtype, reason = resolve_dtype(spec.dtype)
    if not frozen and spec.lora is None and spec.adapter is None and dtype != torch.float32:
        if spec.dtype == "auto":
            # A step of 1e-6 is lost in a bf16 weight; products still run in bf16, under autocast.
            return torch.float32, f"{reason}; weights in float32, as full training needs"
        logger.warning("full training of %s weights loses small steps to rounding; dtype: auto does not", spec.dtype)
    return dtype, reason


def lora_config(spec: LoraSpec) -> LoraConfig:
    """The recipe's adapter in peft's terms."""
    alpha = 2 * spec.r if spec.alpha is None else spec.alpha
    return LoraConfig(r=spec.r, lora_alpha=alpha, target_modules=spec.target_modules, task_type="CAUSAL_LM")


def _reference_facts(recipe: Recipe, model: Any, losses: list[Loss], weights: str) -> dict[str, Any]:
    """Which weights the policy is compared with. A continued adapter's copy is hashed with its base.

    Args:
        weights: hash of the model without an adapter.
    """
    penalised = (recipe.grpo is not None and recipe.grpo.beta > 0) or recipe.online is not None
    if not penalised and not any(loss.reference for loss in losses):
        return {"kind": "none", "weights_sha256": None}
    if isinstance(model, PeftModel):
        weights = weights_hash(model.state_dict().items())
    if recipe.online is not None and recipe.online.reference != "fixed":
        return {"kind": recipe.online.reference, "weights_sha256": weights}
    kind = "adapters-off" if recipe.model.lora is not None and recipe.model.adapter is None else "frozen-copy"
    return {"kind": kind, "weights_sha256": weights}


@contextmanager
def _untrained(recipe: Recipe, trainer: Trainer, kept: list[Any]) -> Iterator[Any]:
    """``kept``: the untrained model once it has been loaded anew."""
    model = trainer.model
    moving = recipe.online is not None and recipe.online.reference != "fixed"  # the reference is not the start then
    own = "ref" if isinstance(model, PeftModel) and "ref" in model.peft_config and not moving else None
    if isinstance(model, PeftModel) and (recipe.model.adapter is None or own is not None):
        with use_adapter(model, own):
            yield model
    elif getattr(trainer, "ref_model", None) is not None and not moving:
        yield trainer.ref_model
    else:
        # Nothing of the start was kept: full training without a reference, or SFT of a continued adapter.
        if not kept:
            fresh, _, _ = _policy(recipe.model)
            fresh = fresh.to(trainer.accelerator.device).eval()
            attach_scoring(fresh.get_base_model() if isinstance(fresh, PeftModel) else fresh)
            kept.append(fresh)
        yield kept[0]
