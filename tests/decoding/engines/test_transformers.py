"""The engine against a plain forward pass, in float32: forks, lengths, families of models, memory shared."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BloomConfig,
    FalconH1Config,
    Gemma3TextConfig,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    Mamba2Config,
    MistralConfig,
    OpenAIGPTConfig,
    Qwen2Config,
    RecurrentGemmaConfig,
    RobertaConfig,
    RwkvConfig,
)

from align.decoding.engines import TransformersEngine

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "mistral, window 6": MistralConfig(**SIZES, sliding_window=6),
    "gemma3, window 5 in two layers of three": Gemma3TextConfig(
        **SIZES, head_dim=8, sliding_window=5, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "gpt2": GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=4, n_positions=128, initializer_range=0.3),
    "bloom, ALiBi from the mask": BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4),
    "mamba2, recurrent": Mamba2Config(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_heads=4,
        head_dim=16,
        n_groups=1,
        state_size=8,
        chunk_size=8,
    ),
    "lfm2, convolutions and attention": Lfm2Config(
        **SIZES, layer_types=["conv", "full_attention", "conv"], conv_L_cache=3, block_multiple_of=8
    ),
    "falcon-h1, both in each layer": FalconH1Config(
        **{**SIZES, "num_hidden_layers": 1},
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_n_groups=1,
        mamba_d_state=8,
        mamba_chunk_size=8,
    ),
}


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[request.param]).eval()


def plain(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens])).logits[0, -1]


def test_any_course_of_events_gives_the_logits_of_a_plain_forward_pass(model: Any) -> None:
    """40 random events: open among others, extend, fork, close, ask for all or for some of the sequences."""
    rng = random.Random(1)
    engine = TransformersEngine(model)
    said: dict[int, list[int]] = {}
    extended: set[int] = set()
    compared = 0

    def ask(handles: list[int]) -> None:
        nonlocal compared
        logits, rows = engine.next_logits(handles)
        assert logits.dtype == torch.float32
        for handle, row in zip(handles, rows, strict=True):
            torch.testing.assert_close(logits[row], plain(model, said[handle]), atol=1e-4, rtol=0)
            compared += 1
        extended.difference_update(handles)

    for _ in range(40):
        if not said or rng.random() < 0.15:
            prompts = [[rng.randrange(50) for _ in range(rng.choice([1, 3, 9, 17]))] for _ in range(3)]
            said |= dict(zip(engine.open(prompts), prompts, strict=True))
        if rng.random() < 0.3:
            handle = rng.choice(list(said))
            fork = engine.fork(handle)
            said[fork] = list(said[handle])
            if handle in extended:
                extended.add(fork)
        if len(said) > 4 and rng.random() < 0.3:
            handle = rng.choice(list(said))
            engine.close(handle)
            del said[handle]
            extended.discard(handle)
        for handle in said:
            if handle not in extended and rng.random() < 0.8:
                token = rng.randrange(50)
                engine.extend(handle, token)
                said[handle].append(token)
                extended.add(handle)
        handles = list(said)
        ask(handles if rng.random() < 0.7 else rng.sample(handles, rng.randint(1, len(handles))))
    assert compared > 100


def test_equal_sequences_share_a_row_until_a_token_parts_them(model: Any) -> None:
    engine = TransformersEngine(model)
    first, second, other = engine.open([[1, 2, 3], [1, 2, 3], [4, 5]])
    fork = engine.fork(first)
    logits, rows = engine.next_logits([first, second, fork, other])
    assert rows == [0, 0, 0, 1]
    assert logits.shape == (2, 50)
    for handle, token in ((first, 7), (second, 7), (fork, 8), (other, 7)):
        engine.extend(handle, token)
    logits, rows = engine.next_logits([fork, other, first, second])
    assert rows[2] == rows[3]
    assert len(set(rows)) == 3
    assert len(logits) == 3


def test_what_a_sequence_cannot_be_asked(model: Any) -> None:
    engine = TransformersEngine(model)
    with pytest.raises(ValueError, match=r"prompts\[1\] has no tokens"):
        engine.open([[1], []])
    (handle,) = engine.open([[1]])
    engine.extend(handle, 2)
    with pytest.raises(ValueError, match="ask for next_logits first"):
        engine.extend(handle, 3)


BART: dict[str, Any] = {
    "vocab_size": 50,
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_ffn_dim": 48,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "max_position_embeddings": 64,
    "is_decoder": True,
}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BartConfig(**BART, encoder_layers=2), "BartForCausalLM gives a short row another law beside a longer one"),
        (BartConfig(**BART, encoder_layers=1), "BartForCausalLM cannot be run .* IndexError"),  # a cache of one layer
        (
            RobertaConfig(
                vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=64, is_decoder=True
            ),
            "RobertaForCausalLM gives a short row another law beside a longer one",
        ),
        (RwkvConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2), "RwkvForCausalLM takes no cache"),
        (OpenAIGPTConfig(vocab_size=50, n_embd=32, n_layer=2, n_head=4), "OpenAIGPTLMHeadModel takes no cache"),
        (
            RecurrentGemmaConfig(
                vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                lru_width=32,
            ),
            "RecurrentGemmaForCausalLM gives no cache back",
        ),
    ],
)  # fmt: skip
def test_models_that_would_be_wrong_are_refused_by_name(config: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        TransformersEngine(AutoModelForCausalLM.from_config(config).eval())


def test_half_precision_is_no_reason() -> None:
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"]).eval()
    assert TransformersEngine(model.to(torch.bfloat16)).context == 128


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel is in training mode.*call model.eval\(\) first"):
        TransformersEngine(AutoModelForCausalLM.from_config(FAMILIES["gpt2"]))


def test_the_context_is_the_models() -> None:
    assert TransformersEngine(AutoModelForCausalLM.from_config(FAMILIES["gpt2"]).eval()).context == 128
