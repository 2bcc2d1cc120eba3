"""Token ids of prompts and answers: by the rules of training data, token for token."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from align.data.tokenize import tokenize_pair
from align.errors import AlignError
from align.rewards.encoding import encode_answers, ended_once

TEXT = st.text(alphabet="athe in\n<|m_d>", min_size=1, max_size=12)


def expected(tokenizer: Any, prompt: Any, first: Any, second: Any) -> tuple[list[int], list[list[int]]] | None:
    try:
        pair = tokenize_pair(prompt, first, second, tokenizer, None)
    except AlignError:
        return None
    return pair.prompt_ids, [pair.chosen_ids, pair.rejected_ids]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TEXT, TEXT, TEXT, st.sampled_from(["", "<|im_end|>", "<|im_end|>\n", "<|im_end|>\n<|im_end|>"]))
def test_text_as_in_training(tiny_tokenizer: PreTrainedTokenizerFast, prompt: str, one: str, two: str, end: str):
    wanted = expected(tiny_tokenizer, prompt, one + end, two)
    if wanted is not None:
        assert encode_answers(tiny_tokenizer, prompt, [one + end, two]) == wanted


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TEXT, TEXT, TEXT)
def test_messages_as_in_training(tiny_tokenizer: PreTrainedTokenizerFast, prompt: str, one: str, two: str):
    chat = [{"role": "user", "content": prompt}]
    answers = [[{"role": "assistant", "content": text}] for text in (one, two)]
    wanted = expected(tiny_tokenizer, chat, *answers)
    if wanted is not None:
        assert encode_answers(tiny_tokenizer, chat, answers) == wanted
        assert encode_answers(tiny_tokenizer, chat, [one, two]) == wanted


def test_answers_share_their_prompt(tiny_tokenizer: PreTrainedTokenizerFast):
    """A blank, t and he merge over the boundary into one token: the prompt of both answers ends before the blank."""
    prompt_ids, answers = encode_answers(tiny_tokenizer, "a t", ["he", "in"])
    alone, _ = encode_answers(tiny_tokenizer, "a t", ["in"])
    assert len(prompt_ids) == len(alone) - 2
    assert [tiny_tokenizer.decode(prompt_ids + ids) for ids in answers] == ["a the<|im_end|>", "a tin<|im_end|>"]


def test_ended_once():
    assert ended_once([1, 2], 9) == ended_once([1, 2, 9], 9) == ended_once([1, 2, 9, 9], 9) == [1, 2, 9]
    assert ended_once([1, 9, 2], 9) == [1, 9, 2, 9]


def test_a_tokenizer_that_adds_both_ends(tiny_tokenizer: PreTrainedTokenizerFast):
    """A beginning token stands once although the text brings its own; the prompt has no end token."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    ends = [(bos, tokenizer.bos_token_id), (eos, tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A {eos}", special_tokens=ends)
    prompt_ids, (ids,) = encode_answers(tokenizer, f"{bos}in", [" an"])
    assert tokenizer.decode(prompt_ids) == f"{bos}in"
    assert tokenizer.decode(ids) == f" an{eos}"
    assert (prompt_ids, [ids]) == encode_answers(tokenizer, "in", [" an"])


@pytest.mark.parametrize(
    ("prompt", "answer", "message"),
    [
        ("the", "", "answer 0 is empty"),
        ("the", [{"role": "assistant", "content": "an"}], "give both as messages"),
        ([{"role": "user", "content": "the"}], "", "the answer is empty"),
    ],
)
def test_what_cannot_be_encoded(tiny_tokenizer: PreTrainedTokenizerFast, prompt: Any, answer: Any, message: str):
    with pytest.raises(ValueError, match=message):
        encode_answers(tiny_tokenizer, prompt, [answer])


def test_messages_need_a_template(tiny_tokenizer: PreTrainedTokenizerFast):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        encode_answers(tokenizer, [{"role": "user", "content": "the"}], ["an"])
