"""Sampling from a mixture of policy and reference: the law, and one model with adapters against two models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from align.evals import sampling
from align.evals.sampling import Mixture, Sample, sample

PROMPTS = [[72, 105], [10, 20, 30, 40, 50, 60, 70], [99], [72, 105], [5, 4, 3], [200, 100, 50, 25], [8] * 12]
LORA = LoraConfig(r=2, lora_dropout=0.5, init_lora_weights=False, target_modules="all-linear")

Make = Callable[..., LlamaForCausalLM]
Draw = Callable[..., list[Sample]]


@pytest.fixture
def draw(tiny_tokenizer: PreTrainedTokenizerFast) -> Draw:
    eos = {tiny_tokenizer.eos_token_id, 65}
    return partial(
        sample, tokenizer=tiny_tokenizer, prompts=PROMPTS, eos_ids=eos, max_new_tokens=24, temperature=2.0, seed=3
    )


@pytest.fixture
def adapted(make_tiny_model: Make) -> PeftModel:
    """Two adapters that do something, ``default`` on, in training mode with dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = get_peft_model(make_tiny_model(), LORA)
        model.add_adapter("ref", LORA)
    return model.train()


def apart(adapted: PeftModel, name: str, make_tiny_model: Make) -> LlamaForCausalLM:
    """A plain model with the weights that an adapter makes."""
    weights = {}
    for key, value in adapted.get_base_model().state_dict().items():
        if key.endswith("base_layer.weight"):
            layer = adapted.get_base_model().get_submodule(key.removesuffix(".base_layer.weight"))
            value = value + layer.get_delta_weight(name)
        if "lora_" not in key:
            weights[key.replace(".base_layer", "")] = value
    model = make_tiny_model()
    model.load_state_dict(weights)
    return model


def rule_out(model: LlamaForCausalLM, tokens: list[int]) -> LlamaForCausalLM:
    def hook(module: Any, args: Any, output: Any) -> None:
        output.logits[..., tokens] = -torch.inf

    model.register_forward_hook(hook)
    return model


def not_run(model: LlamaForCausalLM) -> LlamaForCausalLM:
    def refuse(*args: object) -> None:
        raise AssertionError("this model has no weight in the mixture")

    model.register_forward_pre_hook(refuse)
    return model


@torch.no_grad()
def next_law(policy: Any, reference: Any, tokens: list[int], coefficient: float) -> Tensor:
    """``p^(1 - c) q^c / Z``, all tokens read anew and no padding."""
    ours, theirs = (model(torch.tensor([tokens])).logits[0, -1].double().softmax(0) for model in (policy, reference))
    product = ours ** (1 - coefficient) * theirs**coefficient
    return product / product.sum()


@pytest.mark.parametrize("coefficient", [0.125, 0.7])
def test_law_of_two_tokens(coefficient: float, make_tiny_model: Make, draw: Draw):
    """8,000 answers of at most two of 5 tokens, of which one ends: 21 answers, each with a probability by enumeration.

    Chi-square with 20 degrees of freedom passes 52.4 once in 10,000 times. A longer prompt pads the shorter one.
    """
    size: dict[str, Any] = {"vocab_size": 5, "bos_token_id": 0, "eos_token_id": 4, "pad_token_id": 4}
    policy, reference = make_tiny_model(0, **size), make_tiny_model(1, **size)
    prompt, count = [0, 2], 8000
    law: dict[tuple[int, ...], float] = {}
    for first, chance in enumerate(next_law(policy, reference, prompt, coefficient).tolist()):
        if first == 4:
            law[(4,)] = chance
            continue
        after = next_law(policy, reference, [*prompt, first], coefficient).tolist()
        law |= {(first, second): chance * each for second, each in enumerate(after)}
    answers = draw(
        policy,
        prompts=[prompt] * count + [[1, 2, 3, 0]],
        mixture=Mixture(reference, coefficient),
        max_new_tokens=2,
        temperature=1.0,
        eos_ids={4},
        batch_size=count + 1,
    )
    seen = Counter(tuple(answer.tokens) for answer in answers[:count])
    assert len(law) == 21
    assert seen.keys() <= law.keys()
    assert sum((seen[tokens] - count * p) ** 2 / (count * p) for tokens, p in law.items()) < 52.4


def test_every_step_is_the_mixture_of_the_answer_so_far(
    make_tiny_model: Make, draw: Draw, monkeypatch: pytest.MonkeyPatch
):
    """Logits of each draw against those without a cache or padding, while answers of other lengths end beside them."""
    policy, reference = make_tiny_model(0), make_tiny_model(1)
    laws: dict[int, list[Tensor]] = {}
    inner = sampling._draw

    def recorded(logits: Tensor, streams: Any, temperature: float) -> list[int]:
        for row, stream in zip(logits, streams, strict=True):
            laws.setdefault(id(stream), []).append(row.softmax(0))
        return inner(logits, streams, temperature)

    streams: list[Any] = []
    make_streams = sampling._streams
    monkeypatch.setattr(sampling, "_draw", recorded)
    monkeypatch.setattr(sampling, "_streams", lambda *args: streams.extend(make_streams(*args)) or streams)
    answers = draw(policy, mixture=Mixture(reference, 0.3), batch_size=4)
    assert {answer.finished for answer in answers} == {True, False}
    for prompt, stream, answer in zip(PROMPTS, streams, answers, strict=True):
        assert len(laws[id(stream)]) == len(answer.tokens)
        for place, law in enumerate(laws[id(stream)]):
            expected = next_law(policy, reference, prompt + answer.tokens[:place], 0.3)
            torch.testing.assert_close(law, expected, atol=1e-6, rtol=1e-4)


def test_a_weight_of_nothing_or_all_is_one_model_alone(make_tiny_model: Make, draw: Draw):
    assert draw(make_tiny_model(0), mixture=Mixture(not_run(make_tiny_model(1)), 0)) == draw(make_tiny_model(0))
    assert draw(not_run(make_tiny_model(0)), mixture=Mixture(make_tiny_model(1), 1)) == draw(make_tiny_model(1))


def test_an_adapter_as_reference_is_a_model_apart(adapted: PeftModel, make_tiny_model: Make, draw: Draw):
    """Each adapter and no adapter, in one model and as plain models with their weights; the model stays as it was."""
    policy, other, base = (apart(adapted, name, make_tiny_model) for name in ("default", "ref", "default"))
    base.load_state_dict(make_tiny_model().state_dict())
    found = {}
    for name, reference in (("__base__", base), ("ref", other)):
        for coefficient in (0.0, 0.4, 1.0):
            found[name, coefficient] = draw(adapted, mixture=Mixture(name, coefficient))
            assert found[name, coefficient] == draw(policy, mixture=Mixture(reference, coefficient))
    assert found["__base__", 0.0] == found["ref", 0.0] == draw(adapted)
    assert found["__base__", 1.0] == draw(make_tiny_model())
    assert found["__base__", 0.4] == draw(adapted, mixture=Mixture(make_tiny_model(), 0.4))
    assert len({str(answers) for answers in found.values()}) == 5
    assert adapted.training
    assert adapted.active_adapters == ["default"]


def test_an_adapter_is_read_in_one_forward_pass(adapted: PeftModel, draw: Draw):
    """Seven prompts of which two are equal: they are read once, in six rows for each adapter, and then go apart."""
    rows: list[int] = []
    adapted.get_base_model().model.embed_tokens.register_forward_hook(lambda _, ids, out: rows.append(len(out)))
    draw(adapted, mixture=Mixture("__base__", 0.5), max_new_tokens=2, eos_ids={262})
    assert rows == [12, 14]
    rows.clear()
    draw(adapted, mixture=Mixture("__base__", 1.0), max_new_tokens=2, eos_ids={262})
    assert rows == [6, 7]


def test_batch_size_and_neighbours_change_nothing(make_tiny_model: Make, adapted: PeftModel, draw: Draw):
    for model, reference in ((make_tiny_model(0), make_tiny_model(1)), (adapted, "ref")):
        whole = draw(model, prompts=PROMPTS * 2, mixture=Mixture(reference, 0.5))
        assert draw(model, prompts=PROMPTS * 2, mixture=Mixture(reference, 0.5), batch_size=1) == whole
        assert draw(model, prompts=[PROMPTS[6], PROMPTS[1]], mixture=Mixture(reference, 0.5)) == [whole[6], whole[1]]


def test_a_token_that_either_rules_out_is_never_drawn(make_tiny_model: Make, draw: Draw):
    """Of 266 tokens the policy leaves the first hundred and the reference those from 50."""
    policy = rule_out(make_tiny_model(0), list(range(100, 266)))
    answers = draw(policy, mixture=Mixture(rule_out(make_tiny_model(1), list(range(50))), 0.5), temperature=8.0)
    assert all(50 <= token < 100 for answer in answers for token in answer.tokens)
    with pytest.raises(ValueError, match="leave no token that both allow"):
        draw(policy, mixture=Mixture(rule_out(make_tiny_model(1), list(range(100))), 0.5))


def test_refusals(make_tiny_model: Make, adapted: PeftModel, draw: Draw):
    with pytest.raises(ValueError, match=r"coefficient is 1\.5"):
        Mixture("ref", 1.5)
    with pytest.raises(ValueError, match="coefficient is nan"):
        Mixture("ref", float("nan"))
    refused: list[tuple[Any, Any, str]] = [
        (adapted, adapted.get_base_model(), "shares layers with the model"),
        (adapted, "reference", "no adapter 'reference'; it has default, ref, and '__base__' is none"),
        (make_tiny_model(), "__base__", "the model has none"),
        (make_tiny_model(), make_tiny_model(vocab_size=300), "266 tokens and the reference 300"),
    ]
    for model, reference, reason in refused:
        with pytest.raises(ValueError, match=reason):
            draw(model, mixture=Mixture(reference, 0.5))
    with adapted.disable_adapter(), pytest.raises(ValueError, match="adapters are off"):
        draw(adapted, mixture=Mixture("__base__", 0.5))
    adapted.base_model.set_adapter(["default", "ref"])
    with pytest.raises(ValueError, match="2 adapters are on at once"):
        draw(adapted, mixture=Mixture("__base__", 0.5))
    broken = make_tiny_model(1)
    broken.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="logits are NaN"):
        draw(make_tiny_model(), mixture=Mixture(broken, 0.5))
