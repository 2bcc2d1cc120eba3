"""What a run would do and need, without doing it: ``align train --dry-run``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from align.config.schema import Recipe
from align.losses.logprobs import TILE_ELEMENTS
from align.models.hardware import resolve_dtype
from align.models.load import locate

from .build import lora_config, losses_of, start_of
from .reference_cache import sees_half

# Per token and layer, what the backward pass keeps, in units of the hidden and the intermediate size: inputs of the
# norms, projections, rotations and of the attention; gate, up, their product and the activation.
_HIDDEN_KEPT, _INTERMEDIATE_KEPT = 16, 5
_PROCESS_GB = 0.9  # Python, torch, transformers and TRL once imported


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
        """Estimated peak of the process."""
        return sum(self.memory.values())


def plan(recipe: Recipe, arguments: Any, row_lengths: list[int]) -> Plan:
    """The plan of a recipe.

    Args:
        arguments: of ``training_arguments``.
        row_lengths: tokens of each training row as it is laid out.
    """
    per_batch = arguments.per_device_train_batch_size
    per_step = per_batch * arguments.gradient_accumulation_steps
    steps_per_epoch = math.ceil(len(row_lengths) / per_step)
    if recipe.online is not None:  # windows that are full, each several times
        steps_per_epoch = max(1, len(row_lengths) // per_step) * recipe.online.inner_steps
    steps = arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * steps_per_epoch)
    mean_length = sum(row_lengths) / len(row_lengths)

    with torch.device("meta"):
        spec = recipe.model
        config = AutoConfig.from_pretrained(locate(spec.name), trust_remote_code=spec.trust_remote_code)
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=spec.trust_remote_code)
        parameters = sum(p.numel() for p in model.parameters())
        trainable = parameters
        if spec.lora is not None:
            model = get_peft_model(model, lora_config(spec.lora))
            trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        elif recipe.reward is not None and recipe.reward.frozen:
            trainable = config.get_text_config().hidden_size * (recipe.reward.dimension or 1)
    size = start_of(spec)[0].itemsize
    compute = resolve_dtype(spec.dtype)[0].itemsize
    text = config.get_text_config()
    # The longest rows of an epoch meet in some batch.
    tokens = sum(sorted(row_lengths)[-per_batch:])
    kept = _HIDDEN_KEPT * text.hidden_size + _INTERMEDIATE_KEPT * text.intermediate_size
    layers = 1 if recipe.model.gradient_checkpointing else text.num_hidden_layers
    memory = {
        "process": _PROCESS_GB * 1e9,
        "weights": parameters * size,
        "reference": parameters * size if _keeps_copy(recipe, arguments, len(row_lengths)) else 0,
        "gradients and optimizer": trainable * 12 if trainable < parameters else trainable * (size + 8),
        "activations": tokens * kept * layers * compute,
        "head": 3 * TILE_ELEMENTS * 4,
    }
    return Plan(
        steps=steps,
        epochs=steps / steps_per_epoch,
        pairs_per_step=per_step,
        tokens_per_step=round(mean_length * per_step),
        parameters=parameters,
        trainable=trainable,
        memory={name: value / 1e9 for name, value in memory.items()},
    )


def _keeps_copy(recipe: Recipe, arguments: Any, rows: int) -> bool:
    full = recipe.model.lora is None and recipe.model.adapter is None
    penalised = (recipe.grpo is not None and recipe.grpo.beta > 0) or recipe.online is not None
    if not full or not (penalised or any(loss.reference for loss in losses_of(recipe))):
        return False
    return not (recipe.data_kind == "pairs" and recipe.data.reference_cache and sees_half(arguments, rows))
