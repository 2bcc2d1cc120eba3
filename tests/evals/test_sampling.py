"""Sampling: the law of the answers, and what they may and may not depend on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from align.evals.sampling import Sample, sample

PROMPTS = [[72, 105], [10, 20, 30, 40, 50, 60, 70], [99], [72, 105], [5, 4, 3], [200, 100, 50, 25], [8] * 12]

Draw = Callable[..., list[Sample]]


@pytest.fixture
def draw(tiny_tokenizer: PreTrainedTokenizerFast) -> Draw:
    """``draw(model, prompts, ...)`` with settings at which some answers end by themselves and some do not."""
    eos = {tiny_tokenizer.eos_token_id, 65}
    return partial(sample, tokenizer=tiny_tokenizer, eos_ids=eos, max_new_tokens=24, temperature=2.0, seed=3)


def test_batch_size_changes_nothing(make_tiny_model: Callable[..., LlamaForCausalLM], draw: Draw):
    model = make_tiny_model()
    one = draw(model, prompts=PROMPTS * 3, batch_size=1)
    four = draw(model, prompts=PROMPTS * 3, batch_size=4)
    assert four == one
    assert len({answer.finished for answer in one}) == 2


def test_order_and_neighbours_change_nothing(make_tiny_model: Callable[..., LlamaForCausalLM], draw: Draw):
    model = make_tiny_model()
    whole = draw(model, prompts=PROMPTS)
    assert draw(model, prompts=[PROMPTS[6], PROMPTS[1]], batch_size=2) == [whole[6], whole[1]]


def test_a_prompt_listed_twice_gets_two_answers(make_tiny_model: Callable[..., LlamaForCausalLM], draw: Draw):
    answers = draw(make_tiny_model(), prompts=PROMPTS)
    assert PROMPTS[0] == PROMPTS[3]
    assert answers[0] != answers[3]


def test_prompts_do_not_share_their_noise(make_tiny_model: Callable[..., LlamaForCausalLM], draw: Draw):
    """With a head of zeros all tokens are equally likely and the noise alone decides."""
    model = make_tiny_model()
    model.lm_head.weight.data.zero_()
    answers = draw(model, prompts=[[1], [2], [3]], eos_ids={0})
    assert len({tuple(answer.tokens[:3]) for answer in answers}) == 3


def test_seed_and_temperature(make_tiny_model: Callable[..., LlamaForCausalLM], draw: Draw):
    model = make_tiny_model()
    assert draw(model, prompts=PROMPTS) == draw(model, prompts=PROMPTS)
    assert draw(model, prompts=PROMPTS, seed=4) != draw(model, prompts=PROMPTS)
    assert draw(model, prompts=PROMPTS, seed=4, temperature=0) == draw(model, prompts=PROMPTS, temperature=0)


def test_greedy_is_the_models_own_greedy(
    make_tiny_model: Callable[..., LlamaForCausalLM], draw: Draw, tiny_tokenizer: PreTrainedTokenizerFast
):
    """Temperature 0 against ``generate`` of transformers, one prompt at a time."""
    model = make_tiny_model()
    answers = draw(model, prompts=PROMPTS, temperature=0, eos_ids={tiny_tokenizer.eos_token_id})
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, len(prompt) :]
        assert answer.tokens == expected.tolist()


def test_law_of_the_first_token(make_tiny_model: Callable[..., LlamaForCausalLM], draw: Draw):
    """8,000 draws against softmax(logits / T): the chi-square of 5 tokens passes 23.5 once in 10,000 times."""
    model = make_tiny_model(vocab_size=5, bos_token_id=0, eos_token_id=4, pad_token_id=4)
    with torch.no_grad():
        law = torch.softmax(model(torch.tensor([[0, 2]])).logits[0, -1].double() / 0.7, dim=0)
    count = 8000
    drawn = draw(model, prompts=[[0, 2]] * count, max_new_tokens=1, temperature=0.7, eos_ids={4}, batch_size=1000)
    seen = Counter(answer.tokens[0] for answer in drawn)
    assert sum((seen[token] - count * float(p)) ** 2 / (count * float(p)) for token, p in enumerate(law)) < 23.5


def test_the_models_generation_settings_do_not_bend_the_law(
    make_tiny_model: Callable[..., LlamaForCausalLM], draw: Draw
):
    model = make_tiny_model()
    plain = draw(model, prompts=PROMPTS)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.top_k = 1
    assert draw(model, prompts=PROMPTS) == plain


def test_answers_end_at_eos(
    make_tiny_model: Callable[..., LlamaForCausalLM], draw: Draw, tiny_tokenizer: PreTrainedTokenizerFast
):
    eos = {tiny_tokenizer.eos_token_id, 65}
    for answer in draw(make_tiny_model(), prompts=PROMPTS * 3):
        assert answer.finished == (answer.tokens[-1] in eos)
        assert not eos & set(answer.tokens[:-1])
        assert answer.finished or len(answer.tokens) == 24
        assert answer.text == tiny_tokenizer.decode(answer.tokens, skip_special_tokens=True)


def test_adapters_off_is_the_untrained_model(make_tiny_model: Callable[..., LlamaForCausalLM], draw: Draw):
    """A LoRA that does something, in training mode with dropout: off, it is the base model; the mode is restored."""
    untrained = draw(make_tiny_model(), prompts=PROMPTS)
    model = get_peft_model(
        make_tiny_model(), LoraConfig(r=2, lora_dropout=0.5, init_lora_weights=False, target_modules="all-linear")
    )
    model.train()
    after = draw(model, prompts=PROMPTS)
    with model.disable_adapter():
        before = draw(model, prompts=PROMPTS)
    assert before == untrained
    assert after != untrained
    assert after == draw(model, prompts=PROMPTS)
    assert model.training


def test_ctrl_c_keeps_finished_batches(make_tiny_model: Callable[..., LlamaForCausalLM], draw: Draw):
    kept: dict[int, Sample] = {}

    def keep(batch: Mapping[int, Sample]) -> None:
        kept.update(batch)
        if len(kept) == 4:
            raise KeyboardInterrupt

    model = make_tiny_model().train()
    with pytest.raises(KeyboardInterrupt):
        draw(model, prompts=PROMPTS, batch_size=2, on_batch=keep)
    assert model.training
    whole = draw(model, prompts=PROMPTS)
    assert sorted(kept) == [1, 4, 5, 6]  # the four longest prompts
    assert all(whole[row] == answer for row, answer in kept.items())


def test_refusals(make_tiny_model: Callable[..., LlamaForCausalLM], draw: Draw):
    model = make_tiny_model()
    with pytest.raises(ValueError, match=r"prompts\[1\] has no tokens"):
        draw(model, prompts=[[1], []])
    with pytest.raises(ValueError, match="temperature >= 0"):
        draw(model, prompts=PROMPTS, temperature=-1.0)
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="logits are NaN"):
        draw(model, prompts=PROMPTS)
