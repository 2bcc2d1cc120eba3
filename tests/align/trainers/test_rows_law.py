"""The law of the rows: all layouts and plain logits agree per token, for each family that takes a mask of ours.

Packed rows too, whatever the budget; and a pair is itself alone, whoever its neighbours are.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from align.losses.layouts import FLEX_ROW_TOKENS, SHARED_PROMPT_FAMILIES, layout_of, why_not_shared_prompt
from align.losses.rows import PADDING, Rows, answer_rows, group_rows, pair_rows
from align.models.scoring import attach_scoring, final_states, first_token_logps, score, sequence_logps

SIZES: dict[str, Any] = {
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
    "bos_token_id": 1,
    "eos_token_id": 1,
}
# What a family's own defaults make too large, or give windows.
MORE: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.25},
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    "granite": {"logits_scaling": 2.0, "residual_multiplier": 0.7},
    "granitemoe": {"num_local_experts": 4},
    "mistral": {"sliding_window": None},
    "mixtral": {"sliding_window": None, "num_local_experts": 4},
    "olmo3": {"layer_types": ["full_attention"] * 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48},
    "phi3": {"sliding_window": None},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "starcoder2": {"sliding_window": None},
}
FAMILIES = sorted(SHARED_PROMPT_FAMILIES)
# Five pairs of 9, 9, 9, 5 and 3 tokens: at a budget of 0 the last two do not share a row with the first three.
PROMPTS = [[5, 6, 7, 8], [9], [11, 12, 13], [14, 15], [16]]
CHOSEN = [[20, 21, 1], [22, 23, 24, 25, 1], [26], [40, 1], [42]]
REJECTED = [[30, 1], [31, 32, 1], [33, 34, 35, 36, 1], [41], [43]]
LAYOUTS = {
    "separate": {"shared_prompt": False},
    "separate packed": {"shared_prompt": False, "row_tokens": 14},
    "shared": {"shared_prompt": True},
    "packed tight": {"shared_prompt": True, "row_tokens": 0},
    "packed": {"shared_prompt": True, "row_tokens": 20},
    "packed loose": {"shared_prompt": True, "row_tokens": 1000},
}


def build(family: str, attention: str = "sdpa", **more: Any) -> PreTrainedModel:
    settings = {**SIZES, **MORE.get(family, {}), **more}
    config = AutoConfig.for_model(family, **settings)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def scored(family: str, attention: str = "sdpa", **more: Any) -> PreTrainedModel:
    model = build(family, attention, **more)
    attach_scoring(model)
    return model


def laid_out(layout: str, number: int = len(PROMPTS)) -> Rows:
    return pair_rows(PROMPTS[:number], CHOSEN[:number], REJECTED[:number], pad_token_id=0, **LAYOUTS[layout])


def by_plain_logits(model: PreTrainedModel) -> Tensor:
    """Token log-probs of all answers, chosen first, one unpadded row at a time."""
    values = []
    with torch.no_grad():
        for answers in (CHOSEN, REJECTED):
            for prompt, answer in zip(PROMPTS, answers, strict=True):
                logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
                values += [logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer)]
    return torch.tensor(values)


def in_answer_order(rows: Rows, logps: Tensor) -> Tensor:
    return logps[torch.argsort(rows.answer, stable=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layouts_equal_plain_logits(family: str) -> None:
    for attention in ("sdpa", "eager"):
        model = build(family, attention)
        expected = by_plain_logits(model)
        attach_scoring(model)
        assert why_not_shared_prompt(model) is None
        for layout in LAYOUTS:
            rows = laid_out(layout)
            with torch.no_grad():
                found = in_answer_order(rows, score(model, rows).logps)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5, msg=lambda m, w=layout: f"{w}: {m}")


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_agree_between_layouts(family: str) -> None:
    """Of a weighted mean of token log-probs, with respect to every weight, the head included."""
    model = scored(family)

    def gradients(layout: str) -> dict[str, Tensor]:
        model.zero_grad()
        rows = laid_out(layout)
        logps = in_answer_order(rows, score(model, rows).logps)
        (logps * torch.linspace(-1, 2, len(logps))).mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    separate = gradients("separate")
    assert len(separate) > 10
    for layout in ("shared", "packed tight", "packed"):
        for name, gradient in gradients(layout).items():
            torch.testing.assert_close(
                gradient, separate[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name, w=layout: f"{w} {n}: {m}"
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pair_is_untouched_by_its_neighbours(family: str) -> None:
    """The second of three pairs in a row: with other neighbours its log-probs and the gradient of its DPO loss with
    respect to every weight stay as they are, and of other pairs' embeddings its log-probs do not depend at all.
    """
    model = scored(family)
    embedded: list[Tensor] = []

    def keep(_: Any, __: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.retain_grad()
        embedded.append(output)

    model.get_input_embeddings().register_forward_hook(keep)
    found = []
    for others in (0, 10):  # added to the tokens of all pairs but the second
        texts = [
            [[token + others * (i != 1) for token in ids] for i, ids in enumerate(part)]
            for part in (PROMPTS, CHOSEN, REJECTED)
        ]
        rows = pair_rows(*texts, pad_token_id=0, shared_prompt=True, row_tokens=1000)
        assert len(rows.input_ids) == 1
        model.zero_grad()
        logps = score(model, rows).logps
        own = [logps[rows.answer == answer] for answer in (1, 6)]
        (-torch.nn.functional.logsigmoid(own[0].sum() - own[1].sum())).backward()
        outside = embedded[-1].grad.reshape(rows.groups.numel(), -1)[rows.groups.flatten() != 1]
        assert not outside.any()
        assert embedded[-1].grad.any()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((torch.cat(own).detach(), gradients))
    (values, one), (others_values, other) = found
    torch.testing.assert_close(values, others_values, rtol=0, atol=1e-6)
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, other[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_the_order_of_the_pairs_changes_nothing() -> None:
    model = scored("llama")
    order = [3, 0, 4, 2, 1]
    with torch.no_grad():
        rows = laid_out("packed")
        found = rows.totals(score(model, rows).logps).view(2, -1)
        parts = [[part[i] for i in order] for part in (PROMPTS, CHOSEN, REJECTED)]
        turned = pair_rows(*parts, pad_token_id=0, **LAYOUTS["packed"])
        torch.testing.assert_close(
            turned.totals(score(model, turned).logps).view(2, -1), found[:, order], rtol=0, atol=1e-5
        )


def test_padding_is_finite_and_says_nothing() -> None:
    """Hidden states and gradients at padding are numbers, and the padding token is of no account."""
    for attention in ("sdpa", "eager"):
        model = scored("llama", attention)
        found = []
        for pad in (0, 60):
            rows = pair_rows(PROMPTS, CHOSEN, REJECTED, pad_token_id=pad, **LAYOUTS["packed"])
            assert rows.padding > 0
            model.zero_grad()
            states = final_states(model, rows)
            assert states.isfinite().all()
            states[rows.source].sum().backward()
            assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
            found.append(states[rows.segments.flatten() != PADDING].detach())
        assert torch.equal(*found)


def test_a_pair_alone_is_the_pair_in_a_batch() -> None:
    """Each pair alone, unpadded, gives what it gives in the padded batch."""
    model = scored("llama")
    with torch.no_grad():
        for layout in LAYOUTS:
            rows = laid_out(layout)
            together = rows.totals(score(model, rows).logps).view(2, -1)
            for i in range(len(PROMPTS)):
                alone = pair_rows([PROMPTS[i]], [CHOSEN[i]], [REJECTED[i]], pad_token_id=0, **LAYOUTS[layout])
                torch.testing.assert_close(alone.totals(score(model, alone).logps), together[:, i], rtol=0, atol=1e-5)


def test_groups_of_three_packed() -> None:
    """Three answers to each of five prompts, in two rows, are what they are in fifteen."""
    model = scored("qwen2")
    answers = [[*both, [50, 51]] for both in zip(CHOSEN, REJECTED, strict=True)]
    totals = []
    for layout in ({"shared_prompt": False}, {"shared_prompt": True, "row_tokens": 30}):
        rows = group_rows(PROMPTS, answers, pad_token_id=0, **layout)
        with torch.no_grad():
            totals.append(rows.totals(score(model, rows).logps))
    assert len(rows.input_ids) == 2
    torch.testing.assert_close(totals[0], totals[1], rtol=0, atol=1e-5)


def test_the_rejected_answer_does_not_see_the_chosen_one() -> None:
    """Another chosen answer leaves the rejected one's log-probs as they are, bit for bit."""
    model = scored("llama")
    values = []
    for chosen in ([20, 21, 1], [50, 51, 52]):
        rows = pair_rows([PROMPTS[0]], [chosen], [REJECTED[0]], pad_token_id=0, shared_prompt=True)
        with torch.no_grad():
            values.append(score(model, rows).logps[rows.answer == 1])
    assert torch.equal(*values)


@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_through_an_adapter_and_without_it(layout: str) -> None:
    model = build("llama")
    expected = by_plain_logits(model)
    attach_scoring(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    rows = laid_out(layout)
    with torch.no_grad():
        on = in_answer_order(rows, score(adapted, rows).logps)
        with adapted.disable_adapter():
            off = in_answer_order(rows, score(adapted, rows).logps)
    torch.testing.assert_close(off, expected, rtol=0, atol=1e-5)
    assert (on - off).abs().max() > 0.01


# --- FlexAttention


@pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")
def test_flex_attention_equals_sdpa() -> None:
    """Uncompiled, on the CPU: 39 pairs in rows of two blocks of 128, in a model with heads of 16, its smallest."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (3, 39), generator=generator).tolist()
    texts = [[torch.randint(2, 61, (n,), generator=generator).tolist() for n in part] for part in lengths]
    rows = pair_rows(*texts, pad_token_id=0, shared_prompt=True, row_tokens=200)
    assert rows.input_ids.shape[1] > 128
    assert rows.padding > 0
    values = []
    for attention in ("sdpa", "flex_attention"):
        model = scored("llama", attention, head_dim=16)
        assert why_not_shared_prompt(model) is None
        assert layout_of(model) == {"shared_prompt": True, "row_tokens": 0}  # on this device
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            values.append(score(model, rows).logps)
    torch.testing.assert_close(*values, rtol=0, atol=1e-5)
    on_a_gpu = SimpleNamespace(config=model.config, device=torch.device("cuda"))
    assert layout_of(on_a_gpu) == {"shared_prompt": True, "row_tokens": FLEX_ROW_TOKENS}
    assert layout_of(on_a_gpu, packing=False) == {"shared_prompt": True, "row_tokens": None}


# --- what takes separate rows

WINDOWS = {"sliding_window": 4}


@pytest.mark.parametrize(
    ("family", "more", "reason"),
    [
        ("gemma2", {"final_logit_softcapping": 3.0, **WINDOWS}, "gemma2 models are not known to take a mask of ours"),
        ("gemma3_text", WINDOWS, "gemma3_text models are not known to take a mask of ours"),
        ("mistral", WINDOWS, "it has layers with a sliding window or without attention"),
        ("olmo3", {**WINDOWS, "layer_types": ["sliding_attention", "full_attention"]}, "it has layers with a sliding"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "lfm2 models are not known to take a mask of ours"),
    ],
)
def test_families_that_take_separate_rows(family: str, more: dict[str, Any], reason: str) -> None:
    model = build(family, **more)
    expected = by_plain_logits(model)
    attach_scoring(model)
    assert (why_not_shared_prompt(model) or "").startswith(reason)
    assert layout_of(model) == {"shared_prompt": False, "row_tokens": None}
    rows = pair_rows(PROMPTS, CHOSEN, REJECTED, pad_token_id=0, **layout_of(model))
    with torch.no_grad():
        out = score(model, rows)
    torch.testing.assert_close(in_answer_order(rows, out.logps), expected, rtol=0, atol=1e-5)


def test_windows_that_are_none() -> None:
    """As long as the model's own limit, or switched off."""
    assert why_not_shared_prompt(build("phi3", sliding_window=64)) is None
    assert why_not_shared_prompt(build("qwen2", sliding_window=4, use_sliding_window=False)) is None
    assert why_not_shared_prompt(build("qwen2", sliding_window=4, use_sliding_window=True, max_window_layers=0))


def test_other_kernels_say_why() -> None:
    other = build("llama")
    other.config._attn_implementation = "flash_attention_2"
    assert why_not_shared_prompt(other) == "flash_attention_2 takes no mask of ours"


# --- answers alone


def test_sequence_logps() -> None:
    model = build("llama")
    expected = by_plain_logits(model).split([len(ids) for ids in CHOSEN + REJECTED])
    attach_scoring(model)
    logps = sequence_logps(model, PROMPTS, CHOSEN, pad_token_id=0)
    assert logps.length.tolist() == [len(ids) for ids in CHOSEN]
    torch.testing.assert_close(logps.total, torch.stack([part.sum() for part in expected[:5]]), rtol=0, atol=1e-5)
    packed = answer_rows(PROMPTS, CHOSEN, pad_token_id=0, row_tokens=0)
    assert len(packed.input_ids) < packed.answers == len(CHOSEN)
    with torch.no_grad():
        totals = packed.totals(score(model, packed).logps)
    torch.testing.assert_close(totals, logps.total, rtol=0, atol=1e-5)


@pytest.mark.parametrize("adapted", [False, True])
def test_first_tokens_are_those_of_the_logits(adapted: bool) -> None:
    """Prompts of different lengths in one batch, each against its own logits; through an adapter too."""
    model = build("llama")
    if adapted:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in PROMPTS]
    attach_scoring(model.get_base_model() if adapted else model)
    found = first_token_logps(model, PROMPTS, pad_token_id=0)
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-5)
    assert not found.requires_grad
