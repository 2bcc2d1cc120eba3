"""BOS once, EOS once, one prompt for both answers, one limit for both answers.

The tiny tokenizer has one token per byte but for the merges th, the, in, an, er, "Ġa" and "Ġthe" (Ġ is the blank).
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from align.data.fields import EMPTY
from align.data.pairs import pair_table
from align.data.rows import PairRow, row_id
from align.data.tokenize import TokenizedPairs, encode_prompt, tokenize_pair, tokenize_pairs
from align.errors import AlignError

USER = [{"role": "user", "content": "Sky?"}]
SYSTEM = [{"role": "system", "content": "Be brief."}]


def pair(prompt: Any, chosen: Any, rejected: Any, row: int = 1) -> PairRow:
    return PairRow(row_id(prompt, chosen, rejected), "data.jsonl", row, prompt, chosen, rejected)


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def only(*rows: PairRow, tokenizer: Any, max_length: int | None = None) -> TokenizedPairs:
    return tokenize_pairs(rows, tokenizer, max_length)


def adding(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    """The tokenizer with specials that it adds by itself, such as "<|im_start|> $A <|im_end|>"."""
    changed = copy.deepcopy(tokenizer)
    specials = [(token, changed.convert_tokens_to_ids(token)) for token in ("<|im_start|>", "<|im_end|>")]
    changed.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=specials)
    return changed


def tokens(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    return list(tokenizer.convert_ids_to_tokens(ids))


def test_text_by_hand(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Prompt "Q:", answers " a." and " no": Ġa is a merge; each answer gets its end token."""
    result = tokenize_pair("Q:", " a.", " no", tiny_tokenizer, None)
    assert tokens(tiny_tokenizer, result.prompt_ids) == ["Q", ":"]
    assert tokens(tiny_tokenizer, result.chosen_ids) == ["Ġa", ".", "<|im_end|>"]
    assert tokens(tiny_tokenizer, result.rejected_ids) == ["Ġ", "n", "o", "<|im_end|>"]
    assert (result.strength, result.row_id) == (1.0, row_id("Q:", " a.", " no"))


@pytest.mark.parametrize("system", [[], SYSTEM])
def test_messages_by_hand(tiny_tokenizer: PreTrainedTokenizerFast, system: list[dict[str, str]]) -> None:
    """The template writes <|im_end|>\\n after a turn: the newline behind the answer's end is not learnt."""
    result = tokenize_pair(system + USER, assistant("Up"), "No", tiny_tokenizer, None)
    opening = "<|im_start|>system\nBe brief.<|im_end|>\n" if system else ""
    prompt = f"{opening}<|im_start|>user\nSky?<|im_end|>\n<|im_start|>assistant\n"
    assert tiny_tokenizer.decode(result.prompt_ids) == prompt
    assert tokens(tiny_tokenizer, result.chosen_ids) == ["U", "p", "<|im_end|>"]
    assert tokens(tiny_tokenizer, result.rejected_ids) == ["N", "o", "<|im_end|>"]
    assert encode_prompt(system + USER, tiny_tokenizer) == result.prompt_ids


def test_answer_of_several_turns(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tool = [{"role": "tool", "content": "3"}]
    row = pair(USER, assistant("?") + tool + assistant("Up"), assistant("No"))
    result = only(row, tokenizer=tiny_tokenizer)
    assert tiny_tokenizer.decode(result.rows[0].chosen_ids) == (
        "?<|im_end|>\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\nUp<|im_end|>"
    )
    assert result.counts["eos_inside"] == 0


@pytest.mark.parametrize(
    "answer", [" up", " up<|im_end|>", " up<|im_end|><|im_end|>", " up<|im_end|>\n", " up<|im_end|>\n<|im_end|> \n"]
)
@pytest.mark.parametrize("template", ["$A", "$A <|im_end|>", "<|im_start|> $A", "<|im_start|> $A <|im_end|>"])
def test_end_token_once(tiny_tokenizer: PreTrainedTokenizerFast, answer: str, template: str) -> None:
    tokenizer = adding(tiny_tokenizer, template)
    result = tokenize_pair("Q", answer, " no", tokenizer, None)
    assert tokens(tokenizer, result.chosen_ids) == ["Ġ", "u", "p", "<|im_end|>"]
    assert tokens(tokenizer, result.prompt_ids) == (["<|im_start|>"] if "start" in template else []) + ["Q"]


def test_blanks_of_an_answer_without_end_token_stay(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    result = tokenize_pair("Q", "up \n", "no", tiny_tokenizer, None)
    assert tokens(tiny_tokenizer, result.chosen_ids) == ["u", "p", "Ġ", "Ċ", "<|im_end|>"]


def test_end_token_inside_an_answer_is_counted(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    result = only(pair("Q", " up<|im_end|>more", " no"), tokenizer=tiny_tokenizer)
    assert result.counts["eos_inside"] == 1
    assert tiny_tokenizer.decode(result.rows[0].chosen_ids) == " up<|im_end|>more<|im_end|>"


@pytest.mark.parametrize("prompt", ["Q", "<|im_start|>Q"])
@pytest.mark.parametrize("template", ["<|im_start|> $A", "<|im_start|> $A <|im_end|>"])
def test_beginning_token_once(tiny_tokenizer: PreTrainedTokenizerFast, prompt: str, template: str) -> None:
    """Also where the text begins with it and the tokenizer adds one; none stands before the answers."""
    tokenizer = adding(tiny_tokenizer, template)
    result = tokenize_pair(prompt, "up", "no", tokenizer, None)
    assert tokens(tokenizer, result.prompt_ids) == ["<|im_start|>", "Q"]
    assert tokenizer.bos_token_id not in result.chosen_ids + result.rejected_ids
    assert encode_prompt(prompt, tokenizer) == result.prompt_ids


def test_chat_template_gets_no_tokens_beside_its_own(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = adding(tiny_tokenizer, "<|im_start|> $A <|im_end|>")
    assert tokenize_pair(USER, "Up", "No", tokenizer, None) == tokenize_pair(USER, "Up", "No", tiny_tokenizer, None)


def test_boundary_moves_for_both_answers(
    tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """The text "Say t" + "he" has the token "Ġthe", so that prompt and answer agree on S, a, y alone.

    "Say t" + "is" would agree up to the "t", but both answers must follow the same prompt ids.
    """
    rows = [pair("Say t", "he", "is"), pair("Say t", "is", "oe"), pair("Go th", "is", "e")]
    with caplog.at_level(logging.WARNING, logger="align.data.encode"):
        result = only(*rows, tokenizer=tiny_tokenizer)
    first, second, third = result.rows
    assert tokens(tiny_tokenizer, first.prompt_ids) == ["S", "a", "y"]
    assert tokens(tiny_tokenizer, first.chosen_ids) == ["Ġthe", "<|im_end|>"]
    assert tokens(tiny_tokenizer, first.rejected_ids) == ["Ġ", "t", "i", "s", "<|im_end|>"]
    assert tokens(tiny_tokenizer, second.prompt_ids) == ["S", "a", "y", "Ġ", "t"]
    assert tokens(tiny_tokenizer, third.prompt_ids) == ["G", "o"]
    assert tokens(tiny_tokenizer, third.chosen_ids) == ["Ġ", "th", "i", "s", "<|im_end|>"]
    assert result.counts["boundary_moved"] == 2
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "In 2 of 3 rows" in caplog.text
    assert "(first: ' t')" in caplog.text


def test_template_that_writes_the_prompt_otherwise(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """A generation prompt that opens a thought which no answer has: the answers begin before it."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = tiny_tokenizer.chat_template.replace(
        "assistant\n{% endif %}", "assistant\n<t>{% endif %}"
    )
    result = only(pair(USER, assistant("Up"), assistant("No")), tokenizer=tokenizer)
    assert result.counts["boundary_moved"] == 1
    assert tiny_tokenizer.decode(result.rows[0].prompt_ids).endswith("<|im_start|>assistant\n")
    assert tokens(tokenizer, result.rows[0].chosen_ids) == ["U", "p", "<|im_end|>"]


def test_prompt_that_vanishes_is_a_fault(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    result = only(pair("t", "he", "is"), tokenizer=tiny_tokenizer)
    assert [(fault.field, fault.reason[:36]) for fault in result.faults] == [
        ("prompt", "no token of it is left before the an")
    ]


def test_one_limit_for_both_answers(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Prompt of 3 tokens, limit 6: 3 tokens for an answer. "up" + end just fits; "down" loses "n" and its end."""
    row = pair("Q1:", "down", "up")
    result = only(row, pair("Q1:", "up", "down"), pair("Q1:", "a", "b"), tokenizer=tiny_tokenizer, max_length=6)
    assert tokens(tiny_tokenizer, result.rows[0].chosen_ids) == ["d", "o", "w"]
    assert tokens(tiny_tokenizer, result.rows[0].rejected_ids) == ["u", "p", "<|im_end|>"]
    assert result.rows[1].chosen_ids == result.rows[0].rejected_ids
    assert result.rows[1].rejected_ids == result.rows[0].chosen_ids
    assert (result.counts["truncated_chosen"], result.counts["truncated_rejected"]) == (1, 1)
    assert (result.counts["pairs"], result.counts["set_aside"]) == (3, 0)
    assert tokenize_pairs([row], tiny_tokenizer, None).counts["truncated_chosen"] == 0


@pytest.mark.parametrize(("max_length", "usable"), [(3, False), (4, True), (2, False)])
def test_prompt_that_leaves_no_room(tiny_tokenizer: PreTrainedTokenizerFast, max_length: int, usable: bool) -> None:
    result = only(pair("Q1:", "up", "do", row=7), tokenizer=tiny_tokenizer, max_length=max_length)
    assert len(result.rows) == usable
    if not usable:
        fault = result.faults[0]
        assert (fault.source, fault.row, fault.field) == ("data.jsonl", 7, "prompt")
        assert fault.reason == (
            f"3 tokens, over data.max_length {max_length} before any answer: raise it or shorten the prompt"
        )
        assert fault.content == {"prompt": "Q1:", "chosen": "up", "rejected": "do", "strength": 1.0}


def test_answers_that_become_equal(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [pair("Q1:", "down", "dove"), pair("Q", "up", "up<|im_end|>"), pair("Q", "<|im_end|>", "up")]
    result = only(*rows, tokenizer=tiny_tokenizer, max_length=5)
    assert [(fault.field, fault.reason) for fault in result.faults] == [
        ("chosen", "equal to rejected in the 2 tokens that data.max_length leaves: raise it"),
        ("chosen", "equal to rejected in tokens"),
        ("chosen", EMPTY),
    ]
    assert (result.counts["pairs"], result.counts["set_aside"], result.counts["truncated_chosen"]) == (0, 3, 0)


def test_template_that_refuses_a_row_costs_that_row(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        + tiny_tokenizer.chat_template
    )
    rows = [
        pair(SYSTEM + USER, assistant("Up"), assistant("No")),
        pair("Q", "a", "b"),
        pair(USER, *map(assistant, "ab")),
    ]
    result = only(*rows, tokenizer=tokenizer)
    assert [(fault.field, fault.reason) for fault in result.faults] == [
        ("prompt", "refused by the chat template: no system turns")
    ]
    assert [row.row_id for row in result.rows] == [row.row_id for row in rows[1:]]
    with pytest.raises(AlignError, match="no system turns"):
        encode_prompt(SYSTEM + USER, tokenizer)


def test_tokenizers_that_cannot_serve(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    plain = copy.deepcopy(tiny_tokenizer)
    plain.chat_template = None
    with pytest.raises(AlignError, match="no chat template: use a chat model, set"):
        tokenize_pair(USER, "a", "b", plain, None)
    assert tokenize_pair("Q", "a", "b", plain, None).prompt_ids
    plain.eos_token = None
    with pytest.raises(AlignError, match="no end token"):
        tokenize_pair("Q", "a", "b", plain, None)


def test_one_pair_that_cannot_be_used_raises(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(AlignError, match="rejected: empty completion"):
        tokenize_pair("Q", "a", " ", tiny_tokenizer, None)
    with pytest.raises(AlignError, match=r"prompt: 2 tokens, over data\.max_length 1"):
        tokenize_pair("QQ", "a", "b", tiny_tokenizer, 1)
    with pytest.raises(AlignError, match="empty prompt"):
        encode_prompt("", tiny_tokenizer)


def test_a_row_does_not_depend_on_its_neighbours(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Text and messages mixed, over more rows than one batch holds."""
    rows = [
        pair(f"Q{n}", " the one", " an") if n % 3 else pair(USER, assistant(f"A{n}"), assistant("the"))
        for n in range(1_100)
    ]
    result = only(*rows, tokenizer=tiny_tokenizer, max_length=64)
    assert [row.row_id for row in result.rows] == [row.row_id for row in rows]
    for index in (0, 1, 511, 512, 1_099):
        row = rows[index]
        assert result.rows[index] == tokenize_pair(row.prompt, row.chosen, row.rejected, tiny_tokenizer, 64)


def test_dataset_columns(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    table = pair_table([("a", 1, {"prompt": "Q", "chosen": "a", "rejected": "b", "strength": 0.5})])
    result = tokenize_pairs(table.rows, tiny_tokenizer, None)
    dataset = result.dataset()
    assert dataset.column_names == ["prompt_ids", "chosen_ids", "rejected_ids", "strength", "row_id"]
    assert {**dataset[0], "preference": None, "margin": None} == vars(result.rows[0])
    assert dataset[0]["strength"] == 0.5


def test_soft_labels_are_a_column_where_any_pair_has_one(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "Q", "chosen": "a", "rejected": "b", "preference": 0.75}, {**SURE, "preference": None}, SURE]
    table = pair_table(("a", number, row) for number, row in enumerate(rows, 1))
    dataset = tokenize_pairs(table.rows, tiny_tokenizer, None).dataset()
    assert dataset["preference"][:] == [0.75, None, None]
    fault = tokenize_pairs(table.rows[:1], tiny_tokenizer, 1).faults[0]
    assert fault.content["preference"] == 0.75


SURE = {"prompt": "Q", "chosen": "a", "rejected": "c"}
TEXT = st.text(alphabet="the anier\n<Q", min_size=1, max_size=12)


@given(prompt=TEXT, chosen=TEXT, rejected=TEXT, max_length=st.none() | st.integers(2, 20))
def test_laws(
    tiny_tokenizer: PreTrainedTokenizerFast, prompt: str, chosen: str, rejected: str, max_length: int | None
) -> None:
    """Prompt and answer together say what the data said; the limit holds; the end token ends what was not cut."""
    eos = tiny_tokenizer.eos_token_id
    result = only(pair(prompt, chosen, rejected), tokenizer=tiny_tokenizer, max_length=max_length)
    assert len(result.rows) + len(result.faults) == 1
    for row in result.rows:
        for ids, text in ((row.chosen_ids, chosen), (row.rejected_ids, rejected)):
            whole = tiny_tokenizer.decode(row.prompt_ids + [token for token in ids if token != eos])
            assert ids
            assert max_length is None or len(row.prompt_ids) + len(ids) <= max_length
            assert eos not in ids[:-1]
            assert (prompt + text).startswith(whole)
            assert (ids[-1] == eos) == (whole == prompt + text) or len(row.prompt_ids) + len(ids) == max_length
        assert row.chosen_ids != row.rejected_ids
