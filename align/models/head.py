"""The head of a causal model, and a forward pass that scores given tokens instead of building logits."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from transformers import PreTrainedModel

from align.losses.logprobs import Head, TokenLogps, token_logps

# Families whose attention takes a mask of ours and whose positions are ours to give, each in the tests.
SHARED_PROMPT_FAMILIES = {"gemma", "llama", "mistral", "qwen2", "qwen3"}


def head_of(model: PreTrainedModel) -> Head:
    """The last layer of a Hugging Face causal model, with its logit scale and soft cap."""
    layer = model.get_output_embeddings()
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None)
    if scale is None:
        divisor = getattr(config, "logits_scaling", None)
        scale = 1.0 if divisor is None else 1.0 / divisor
    return Head(layer.weight, layer.bias, scale, getattr(config, "final_logit_softcapping", None))


def attach_scoring(model: PreTrainedModel) -> None:
    """Let ``model(..., score_source=, score_target=)`` return ``TokenLogps`` of those tokens.

    ``score_source`` (N,) indexes the flattened (rows * positions) hidden states and ``score_target`` (N,) names the
    tokens predicted there. Without them the forward is the original one. It goes through the model's own ``forward``,
    so that wrappers (PEFT, DDP, autocast, gradient checkpointing) see an ordinary call.

    Args:
        model: a causal model, the inner one where PEFT wraps it.
    """
    original = model.forward

    # The wrapped signature is the class's: `generate` checks its arguments against it.
    @functools.wraps(type(model).forward)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        score_source: torch.Tensor | None = None,
        score_target: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if score_source is None or score_target is None:
            return original(*args, **kwargs)
        states = self.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state
        hidden = states.reshape(-1, states.shape[-1])[score_source]
        return token_logps(hidden, score_target, head_of(self))

    model.forward = types.MethodType(forward, model)


def why_not_shared_prompt(model: PreTrainedModel) -> str | None:
    """Why this model cannot take a pair in one row; None when it can."""
    config = model.config.get_text_config()
    if config.model_type not in SHARED_PROMPT_FAMILIES:
        return f"{config.model_type} models are not known to take a mask of ours"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"{config._attn_implementation} takes no dense mask"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or (
        getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    ):
        return "it has layers with a sliding window or without attention"
    return None


def model_mask(model: PreTrainedModel, mask: torch.Tensor) -> torch.Tensor:
    """The (R, 1, T, T) Boolean mask in the form that the model's attention takes: eager attention adds it."""
    if mask.ndim != 4 or model.config.get_text_config()._attn_implementation != "eager":
        return mask
    return torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(
        ~mask, torch.finfo(model.dtype).min
    )


__all__ = ["TokenLogps", "attach_scoring", "head_of", "model_mask", "why_not_shared_prompt"]
