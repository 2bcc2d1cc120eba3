"""Which tokens end an answer."""

from __future__ import annotations

from typing import Any


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The tokenizer's end token and those of the model's generation settings (a chat model may end turns by its own).

    Args:
        model: a causal model, or what wraps it.
    """
    named = getattr(model.generation_config, "eos_token_id", None)
    more = named if isinstance(named, list) else [named]
    return {int(token) for token in [tokenizer.eos_token_id, *more] if token is not None}
