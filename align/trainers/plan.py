"""What a run will do and need: its steps, its memory, and whether activations are computed again to save some.

The estimate counts what autograd keeps of a Transformer with gated layers under SDPA: inputs of norms and products,
queries, keys, values and a mask. It is for training on data; what sampling adds (``grpo``, ``online``) is not in it.
Of SmolLM2-135M in float32, by adapters and whole, with and without checkpointing, on batches of two and four pairs of
many widths, it is within an eighth of the peak that was measured on a CPU (``tests/align/trainers/test_plan.py`` has
both); of other models it was not measured.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM

from align.config.schema import Recipe
from align.data.groups import TokenizedGroups
from align.data.splits import Split
from align.data.tokenize import TokenizedCompletions
from align.errors import AlignError
from align.losses.layouts import SEPARATE, Layout, layout_of
from align.losses.logprobs import KEPT_ELEMENTS, TILE_ELEMENTS
from align.losses.rows import shape_of
from align.models.hardware import resolve_dtype
from align.models.load import load_config
from align.models.memory import free_memory

from .build import lora_config, losses_of, start_of
from .by_length import STRATEGY
from .reference_cache import sees_half

Row = tuple[int, ...]
"""Tokens of a prompt and of each of its answers."""

PROCESS = "process"
_PROCESS_GB = 0.85  # Python, torch, transformers and TRL once imported, with data and tokenizer
# Of batches that follow on each other. Glibc gives no aligned block the place of a freed one of its own size, so that
# what an adapter computes in between leaves holes among what is kept; and where each layer's activations are
# computed anew and freed, it is as if those of so many layers were there. Fitted to what was measured.
_HOLES = 0.9  # of the activations
_COMPUTED_ANEW = {"adapter": 18, "whole": 6}
_USABLE = 0.8  # of the memory that is free: the estimate may be too low
_FROZEN_AT_ONCE = 8  # answers whose states a frozen backbone computes together


@dataclass(frozen=True)
class Plan:
    """Steps and memory of a run; memory in GB (1e9 bytes), as an estimate.

    Attributes:
        memory: by what it is for; the sum is the estimate of the peak.
    """

    steps: int
    epochs: float
    pairs_per_step: int
    tokens_per_step: int
    parameters: int
    trainable: int
    memory: dict[str, float]

    @property
    def peak_gb(self) -> float:
        """Estimated peak: of the process, or of the GPU where there is one."""
        return sum(self.memory.values())

    @property
    def needed_gb(self) -> float:
        """What of it has yet to be allocated when training is set up."""
        return self.peak_gb - self.memory[PROCESS]


@dataclass(frozen=True)
class Checkpointing:
    """Whether activations are computed again in the backward pass, why, and what the run then needs."""

    on: bool
    reason: str
    plan: Plan

    def __str__(self) -> str:
        return f"{'on' if self.on else 'off'}: {self.reason}"

    @property
    def facts(self) -> dict[str, Any]:
        """For section ``speed`` of the manifest."""
        return {
            "checkpointing": {"on": self.on, "reason": self.reason},
            "estimated_peak_gb": round(self.plan.peak_gb, 2),
        }

    def applied(self, recipe: Recipe) -> Recipe:
        """The recipe with the decision in it."""
        return recipe.model_copy(update={"model": recipe.model.model_copy(update={"gradient_checkpointing": self.on})})


def choose_checkpointing(
    recipe: Recipe, arguments: Any, rows: Sequence[Row], before: Mapping[str, Any] | None = None
) -> Checkpointing:
    """What the recipe says; where it says auto, on if more memory would be needed without it than is free.

    Args:
        arguments, rows: as in ``plan``.
        before: section ``speed`` of the run that is gone on with: what it says under auto stays.

    Raises:
        AlignError: the model's configuration cannot be read.
    """
    asked = recipe.model.gradient_checkpointing
    if asked != "auto":
        return Checkpointing(asked, "the recipe says so", plan(recipe, arguments, rows))
    if known := (before or {}).get("checkpointing"):
        return Checkpointing(known["on"], known["reason"], plan(recipe, arguments, rows, checkpointing=known["on"]))
    free, what = free_memory()
    plain = plan(recipe, arguments, rows, checkpointing=False)
    there = f"{free:.1f} GB of {what} are free"
    if plain.needed_gb <= _USABLE * free:
        return Checkpointing(False, f"{plain.needed_gb:.1f} GB are needed, and {there}", plain)
    spared = plan(recipe, arguments, rows, checkpointing=True)
    reason = f"{plain.needed_gb:.1f} GB would be needed without it, {spared.needed_gb:.1f} GB with it; {there}"
    if spared.needed_gb > _USABLE * free:
        reason += (
            ": too little in either case; a smaller training.per_device_train_batch_size or data.max_length helps"
        )
    return Checkpointing(True, reason, spared)


def plan(recipe: Recipe, arguments: Any, rows: Sequence[Row], *, checkpointing: bool | None = None) -> Plan:
    """The plan of a recipe.

    Args:
        arguments: of ``training_arguments``.
        rows: of ``rows_of``.
        checkpointing: whether activations are computed again; as the recipe says when not given.

    Raises:
        AlignError: the model's configuration cannot be read.
    """
    per_batch = arguments.per_device_train_batch_size
    per_step = per_batch * arguments.gradient_accumulation_steps
    steps_per_epoch = math.ceil(len(rows) / per_step)
    if recipe.online is not None:  # windows that are full, each several times
        steps_per_epoch = max(1, len(rows) // per_step) * recipe.online.inner_steps
    steps = arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * steps_per_epoch)
    if checkpointing is None:
        checkpointing = recipe.model.gradient_checkpointing is True
    model = _on_paper(recipe)
    layout = _layout(recipe, model)
    reads = recipe.reward is not None or recipe.pal is not None  # states, without the head of a language model
    parameters = int((model.base_model if reads else model).num_parameters())
    trainable = _trainable(recipe, model, parameters)
    if arguments.train_sampling_strategy == STRATEGY:
        batches = [sorted(rows, key=sum)[-per_batch:]]
    else:
        drawn = random.Random(0).sample(list(rows), min(len(rows), steps * per_step))
        batches = [drawn[start : start + per_batch] for start in range(0, len(drawn), per_batch)]
    widest = max((_shape(batch, layout) for batch in batches), key=math.prod)
    size, compute = start_of(recipe.model, _frozen(recipe))[0].itemsize, resolve_dtype(recipe.model.dtype)[0].itemsize
    activations = _activations(recipe, model, rows, widest, checkpointing)
    memory = {
        PROCESS: 0.0 if torch.cuda.is_available() else _PROCESS_GB * 1e9,
        "weights": float(parameters * (size + (compute if compute < size else 0))),  # autocast keeps a second of each
        "reference": float(parameters * size) if _keeps_copy(recipe, arguments, len(rows)) else 0.0,
        "activations": activations,
        "holes": _HOLES * activations if _leaves_holes(recipe) and not checkpointing else 0.0,
        "head": 0.0 if reads else _of_head(recipe, model, max(sum(sum(row[1:] or row) for row in b) for b in batches)),
    }
    # Of an adapter also its own weights, which are not among the model's. Gradients come as activations go, but do not
    # find room where these were: the heap's holes have other sizes.
    memory["gradients and optimizer"] = trainable * (16.0 if _adapted(recipe) else 8.0 + size)
    return Plan(
        steps=steps,
        epochs=steps / steps_per_epoch,
        pairs_per_step=per_step,
        tokens_per_step=round(sum(_groups(rows, layout)) / len(rows) * per_step),
        parameters=parameters,
        trainable=trainable,
        memory={name: value / 1e9 for name, value in memory.items()},
    )


def rows_of(recipe: Recipe, split: Split) -> list[Row]:
    """What the run learns from, by length; answers that it will draw are as long as they may be."""
    tokenized = split.tokenized
    if not isinstance(tokenized, TokenizedCompletions):
        return [(len(row.prompt_ids), len(row.chosen_ids), len(row.rejected_ids)) for row in tokenized.rows]
    if isinstance(tokenized, TokenizedGroups):
        return [(len(row.input_ids), *map(len, row.answer_ids)) for row in tokenized.rows]
    lengths = [len(row.input_ids) for row in tokenized.rows]
    if spec := recipe.online or recipe.iterate:
        return [(length, *[spec.max_new_tokens] * spec.answers) for length in lengths]
    if recipe.grpo is None:
        return [(length,) for length in lengths]
    longest = recipe.grpo.max_completion_length
    return [(length, longest) for length in lengths for _ in range(recipe.grpo.num_generations)]


def _groups(rows: Sequence[Row], layout: Layout) -> list[int]:
    """Tokens of what stands together: a prompt with all its answers, or with each."""
    if layout["shared_prompt"]:
        return [sum(row) for row in rows]
    return [row[0] + answer for row in rows for answer in row[1:] or (0,)]


def _shape(rows: Sequence[Row], layout: Layout) -> tuple[int, int]:
    """Rows and positions of a batch."""
    return shape_of(_groups(rows, layout), layout["row_tokens"])


def _layout(recipe: Recipe, model: Any) -> Layout:
    ours = recipe.data_kind in ("pairs", "ratings", "groups", "judgements") or recipe.online or recipe.iterate
    if not ours or _frozen(recipe):
        return SEPARATE
    return layout_of(model, shared_prompt=recipe.data.shared_prompt, packing=recipe.data.packing)


def _on_paper(recipe: Recipe) -> Any:
    """The recipe's model without its weights."""
    spec = recipe.model
    with torch.device("meta"):
        config = load_config(spec.name, trust_remote_code=spec.trust_remote_code)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=spec.trust_remote_code)
    if spec.attention != "auto":
        model.config._attn_implementation = spec.attention
    return model


def _trainable(recipe: Recipe, model: Any, parameters: int) -> int:
    spec = recipe.model
    if _frozen(recipe):
        return int(model.config.get_text_config().hidden_size * ((recipe.reward and recipe.reward.dimension) or 1))
    if not _adapted(recipe):
        return parameters
    try:
        adapter = lora_config(spec.lora) if spec.lora is not None else PeftConfig.from_pretrained(spec.adapter)
    except (OSError, ValueError) as error:
        raise AlignError(f"model.adapter {spec.adapter}: not an adapter of {spec.name}: {error}") from error
    adapter.inference_mode = False
    with torch.device("meta"):
        return int(get_peft_model(model, adapter).num_parameters(only_trainable=True))


def _activations(
    recipe: Recipe, model: Any, rows: Sequence[Row], widest: tuple[int, int], checkpointing: bool
) -> float:
    """Bytes that the backward pass finds, and what it takes itself in one layer.

    Args:
        widest: rows and positions of the largest batch.
    """
    config = model.config.get_text_config()
    hidden, inner, layers = config.hidden_size, _inner(config), config.num_hidden_layers
    size = resolve_dtype(recipe.model.dtype)[0].itemsize
    forward = 4 * hidden + 3 * inner  # of a layer whose inputs nothing keeps
    if _frozen(recipe):
        states = sum(max(1, len(row) - 1) for row in rows) * 2 * hidden * 4
        return float(states + _FROZEN_AT_ONCE * max(_groups(rows, SEPARATE)) * forward * size)
    # Inputs of two norms, of the products, queries, keys, values and what attention gives; gate, its activation, up,
    # their product. Training all weights keeps what a norm multiplies with its weight, too.
    heads = config.num_attention_heads
    attention = heads * (getattr(config, "head_dim", None) or hidden // heads)
    kept = (4 if _adapted(recipe) else 6) * hidden + 4 * attention + 4 * inner + heads
    if recipe.model.lora is not None:
        kept += 7 * recipe.model.lora.r
    kept += widest[1]  # SDPA makes a float mask of a bool one, in each layer
    elements = layers * kept + forward
    if checkpointing:
        anew = 1 if torch.cuda.is_available() else _COMPUTED_ANEW["adapter" if _adapted(recipe) else "whole"]
        elements = min(elements, layers * hidden + anew * (kept + forward))
    return float(math.prod(widest) * elements * size)


def _of_head(recipe: Recipe, model: Any, tokens: int) -> float:
    """A few tiles of logits; of a trained head also its gradient, summed in float32, and the tiles that it keeps.

    Args:
        tokens: of answers in a batch.
    """
    weight = model.get_output_embeddings().weight
    logits = tokens * len(weight)
    if recipe.method == "sft":  # TRL's own loss has all of them, and their gradient
        return float(4 * 2 * logits)
    tiles = 4.0 * 3 * min(TILE_ELEMENTS, logits)
    if _adapted(recipe):
        return tiles
    kept = logits * resolve_dtype(recipe.model.dtype)[0].itemsize if logits <= KEPT_ELEMENTS else 0
    return float(tiles + 4 * weight.numel() + kept)


def _inner(config: Any) -> int:
    """Width of the layer between; of experts, of all that a token meets."""
    names = ("moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner")
    width = next((found for name in names if (found := getattr(config, name, None))), 4 * config.hidden_size)
    return int(width * (getattr(config, "num_experts_per_tok", None) or 1))


def _frozen(recipe: Recipe) -> bool:
    return recipe.reward is not None and recipe.reward.frozen


def _adapted(recipe: Recipe) -> bool:
    return recipe.model.lora is not None or recipe.model.adapter is not None


def _leaves_holes(recipe: Recipe) -> bool:
    return _adapted(recipe) and not _frozen(recipe) and not torch.cuda.is_available()


def _keeps_copy(recipe: Recipe, arguments: Any, rows: int) -> bool:
    penalised = (recipe.grpo is not None and recipe.grpo.beta > 0) or recipe.online is not None
    if _adapted(recipe) or not (penalised or any(loss.reference for loss in losses_of(recipe))):
        return False
    return not (recipe.data_kind == "pairs" and recipe.data.reference_cache and sees_half(arguments, rows))
