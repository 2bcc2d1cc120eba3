"""The law of the rows: shared prompt, separate rows and plain logits agree per token, for each supported family."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from align.losses.rows import answer_rows, pair_rows
from align.models.scoring import (
    SHARED_PROMPT_FAMILIES,
    attach_scoring,
    first_token_logps,
    score,
    sequence_logps,
    why_not_shared_prompt,
)

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
CONFIGS = {
    "gemma": GemmaConfig(**SIZES),
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**{**SIZES, "sliding_window": None}),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
}
PROMPTS = [[5, 6, 7, 8], [9], [11, 12, 13]]
CHOSEN = [[20, 21, 1], [22, 23, 24, 25, 1], [26]]
REJECTED = [[30, 1], [31, 32, 1], [33, 34, 35, 36, 1]]


def build(config, attention: str = "sdpa"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    return model


def by_plain_logits(model) -> list[float]:
    """Token log-probs of all answers, chosen first, one unpadded row at a time."""
    values = []
    with torch.no_grad():
        for answers in (CHOSEN, REJECTED):
            for prompt, answer in zip(PROMPTS, answers, strict=True):
                logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
                values += [logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer)]
    return values


def in_answer_order(rows, logps: torch.Tensor) -> torch.Tensor:
    return logps[torch.argsort(rows.answer, stable=True)]


def test_every_supported_family_is_here():
    assert set(CONFIGS) == SHARED_PROMPT_FAMILIES


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_shared_row_equals_separate_rows_equals_logits(family, attention):
    model = build(CONFIGS[family], attention)
    expected = torch.tensor(by_plain_logits(model))
    attach_scoring(model)
    assert why_not_shared_prompt(model) is None
    for shared in (True, False):
        rows = pair_rows(PROMPTS, CHOSEN, REJECTED, pad_token_id=0, shared_prompt=shared)
        with torch.no_grad():
            out = score(model, rows)
        torch.testing.assert_close(in_answer_order(rows, out.logps), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_gradients_agree_between_layouts(family):
    """Of a weighted sum of token log-probs, with respect to every weight, the head included."""
    gradients = []
    for shared in (True, False):
        model = build(CONFIGS[family])
        attach_scoring(model)
        rows = pair_rows(PROMPTS, CHOSEN, REJECTED, pad_token_id=0, shared_prompt=shared)
        logps = in_answer_order(rows, score(model, rows).logps)
        (logps * torch.linspace(-1, 2, len(logps))).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradient, gradients[1][name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_pair_is_untouched_by_its_neighbours():
    """Each pair alone, unpadded, gives what it gives in the padded batch."""
    model = build(CONFIGS["llama"])
    attach_scoring(model)
    rows = pair_rows(PROMPTS, CHOSEN, REJECTED, pad_token_id=0, shared_prompt=True)
    with torch.no_grad():
        together = rows.totals(score(model, rows).logps).view(2, -1)
        for i in range(3):
            alone = pair_rows([PROMPTS[i]], [CHOSEN[i]], [REJECTED[i]], pad_token_id=0, shared_prompt=True)
            torch.testing.assert_close(alone.totals(score(model, alone).logps), together[:, i], rtol=0, atol=1e-5)


def test_the_rejected_answer_does_not_see_the_chosen_one():
    """Another chosen answer leaves the rejected one's log-probs as they are, bit for bit."""
    model = build(CONFIGS["llama"])
    attach_scoring(model)
    values = []
    for chosen in ([20, 21, 1], [50, 51, 52]):
        rows = pair_rows([PROMPTS[0]], [chosen], [REJECTED[0]], pad_token_id=0, shared_prompt=True)
        with torch.no_grad():
            values.append(score(model, rows).logps[rows.answer == 1])
    assert torch.equal(*values)


def test_through_an_adapter_and_without_it():
    model = build(CONFIGS["llama"])
    expected = torch.tensor(by_plain_logits(model))
    attach_scoring(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    rows = pair_rows(PROMPTS, CHOSEN, REJECTED, pad_token_id=0, shared_prompt=True)
    with torch.no_grad():
        on = in_answer_order(rows, score(adapted, rows).logps)
        with adapted.disable_adapter():
            off = in_answer_order(rows, score(adapted, rows).logps)
    torch.testing.assert_close(off, expected, rtol=0, atol=1e-5)
    assert (on - off).abs().max() > 0.01


@pytest.mark.parametrize(
    ("config", "head"),
    [
        (CohereConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logit_scale=0.25), "logit scale"),
        (Gemma2Config(**SIZES, final_logit_softcapping=3.0, sliding_window=4), "soft cap"),
        (GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64), "other family"),
    ],
    ids=["cohere", "gemma2", "gpt2"],
)
def test_heads_and_families_that_take_separate_rows(config, head):
    model = build(config)
    expected = torch.tensor(by_plain_logits(model))
    attach_scoring(model)
    assert why_not_shared_prompt(model) is not None
    rows = pair_rows(PROMPTS, CHOSEN, REJECTED, pad_token_id=0, shared_prompt=False)
    with torch.no_grad():
        out = score(model, rows)
    torch.testing.assert_close(in_answer_order(rows, out.logps), expected, rtol=0, atol=1e-5)


def test_sliding_windows_and_other_kernels_say_why():
    windowed = build(MistralConfig(**{**SIZES, "sliding_window": 4}))
    assert "sliding window" in why_not_shared_prompt(windowed)
    other = build(CONFIGS["llama"])
    other.config._attn_implementation = "flash_attention_2"
    assert why_not_shared_prompt(other) == "flash_attention_2 takes no dense mask"


def test_sequence_logps():
    model = build(CONFIGS["llama"])
    expected = by_plain_logits(model)
    attach_scoring(model)
    logps = sequence_logps(model, PROMPTS, CHOSEN, pad_token_id=0)
    assert logps.length.tolist() == [3, 5, 1]
    torch.testing.assert_close(
        logps.total, torch.tensor([sum(expected[:3]), sum(expected[3:8]), expected[8]]), rtol=0, atol=1e-5
    )
    assert answer_rows(PROMPTS, CHOSEN, pad_token_id=0).answers == 3


@pytest.mark.parametrize("adapted", [False, True])
def test_first_tokens_are_those_of_the_logits(adapted):
    """Prompts of different lengths in one batch, each against its own logits; through an adapter too."""
    model = build(CONFIGS["llama"])
    if adapted:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in PROMPTS]
    attach_scoring(model.get_base_model() if adapted else model)
    found = first_token_logps(model, PROMPTS, pad_token_id=0)
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-5)
    assert not found.requires_grad
