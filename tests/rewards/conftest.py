"""Tiny backbones of several families, saved as causal models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
FAMILIES = {
    "llama": (LlamaConfig, SHAPE),
    "qwen2": (Qwen2Config, SHAPE),
    "gpt2": (GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.2}),
    "granite": (GraniteConfig, SHAPE),
}


@pytest.fixture(scope="session")
def backbone_dir(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Callable[[str], Path]:
    """``backbone_dir("llama")``: a folder with a random causal model of that family, and the tiny tokenizer."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            kind, shape = FAMILIES[family]
            config = kind(vocab_size=len(tiny_tokenizer), eos_token_id=tiny_tokenizer.eos_token_id, **shape)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(config)
            made[family] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[family])
            tiny_tokenizer.save_pretrained(made[family])
        return made[family]

    return make
