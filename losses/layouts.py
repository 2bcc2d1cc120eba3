"""Which layouts of ``rows`` a Hugging Face model takes, and what its forward pass is given of them.

Rows of several answers need a mask of ours: dense for SDPA and eager attention, on any device, and a block mask for
FlexAttention, which skips what is masked and trains on CUDA alone. The block mask's rule is tested against the dense
mask, and FlexAttention on a CPU, uncompiled, against SDPA; on a GPU it has not been run.
"""

from __future__ import annotations

import math
from typing import Any, TypedDict

import torch
from torch.nn.attention.flex_attention import create_block_mask

from .rows import Rows

# Families whose attention takes a mask of ours and whose positions are ours to give, each in the tests.
SHARED_PROMPT_FAMILIES = frozenset(
    (
        *("apertus", "arcee", "cohere", "ernie4_5", "exaone4", "gemma", "glm", "glm4", "gpt2", "gpt_neox", "granite"),
        *("helium", "hunyuan_v1_dense", "llama", "ministral3", "mistral", "nemotron", "olmo", "olmo2", "olmo3", "opt"),
        *("phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm", "starcoder2"),
        *("granitemoe", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"),
    )
)
FLEX_ROW_TOKENS = 8192


class Layout(TypedDict):
    """How the functions of ``align.losses.rows`` lay rows out; their arguments of these names."""

    shared_prompt: bool
    row_tokens: int | None


SEPARATE: Layout = {"shared_prompt": False, "row_tokens": None}


def why_not_shared_prompt(model: Any) -> str | None:
    """Why this model cannot take several answers in one row; None when it can."""
    config = model.config.get_text_config()
    if config.model_type not in SHARED_PROMPT_FAMILIES:
        return f"{config.model_type} models are not known to take a mask of ours"
    if config._attn_implementation not in ("sdpa", "eager", "flex_attention"):
        return f"{config._attn_implementation} takes no mask of ours"
    if _has_windows(config):
        return "it has layers with a sliding window or without attention"
    return None


def _has_windows(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return set(kinds) != {"full_attention"}
    window = getattr(config, "sliding_window", None)
    if window is None or not getattr(config, "use_sliding_window", True):
        return False
    return bool(window < (getattr(config, "max_position_embeddings", None) or math.inf))


def layout_of(model: Any, *, shared_prompt: bool = True, packing: bool = True) -> Layout:
    """The layout that suits a model: shared prompts, packed, where its architecture allows that.

    A dense mask costs the square of a row's length, so that no row is made wider than the longest of a batch; a block
    mask costs what it lets through.

    Args:
        shared_prompt: False leaves each answer its own row.
        packing: False leaves each prompt its own row.
    """
    if not shared_prompt or why_not_shared_prompt(model) is not None:
        return SEPARATE
    flex = model.config.get_text_config()._attn_implementation == "flex_attention"
    budget = FLEX_ROW_TOKENS if flex and model.device.type == "cuda" else 0
    return {"shared_prompt": True, "row_tokens": budget if packing else None}


def model_inputs(model: Any, rows: Rows) -> dict[str, Any]:
    """What a forward pass over ``rows`` is given.

    Args:
        model: a Hugging Face model, or what wraps it.
    """
    inner = getattr(model, "module", model)  # DistributedDataParallel hides the model's own attributes
    if not rows.masked:
        # Such rows count their own positions, so that models without position ids need not know the argument.
        return {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask()}
    return {"input_ids": rows.input_ids, "attention_mask": _mask(inner, rows), "position_ids": rows.position_ids}


def _mask(model: Any, rows: Rows) -> Any:
    attention = model.config.get_text_config()._attn_implementation
    if attention == "flex_attention":
        number, length = rows.input_ids.shape
        device = rows.input_ids.device
        # Compiled, as transformers does it, so that the dense mask is never built.
        compiled = device.type == "cuda"
        return create_block_mask(rows.mask_mod(), number, None, length, length, device=str(device), _compile=compiled)
    mask = rows.attention_mask()
    if attention != "eager":
        return mask
    # Eager attention adds its mask to the scores instead of selecting by it.
    lowest = torch.finfo(model.dtype).min
    return torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(~mask, lowest)
