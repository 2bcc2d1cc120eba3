"""The layout of pairs: by hand on one pair, and as a law against a model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align.losses.rows import FIRST, PADDING, PROMPT, SECOND, Rows, answer_rows, pair_rows


def test_one_shared_row_by_hand():
    """Prompt [7 8], chosen [1 2 3], rejected [4 5]: the rejected answer starts at position 2 again."""
    rows = pair_rows([[7, 8]], [[1, 2, 3]], [[4, 5]], pad_token_id=0, shared_prompt=True)
    assert rows.input_ids.tolist() == [[7, 8, 1, 2, 3, 4, 5]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3]]
    assert rows.segments.tolist() == [[PROMPT] * 2 + [FIRST] * 3 + [SECOND] * 2]
    assert rows.source.tolist() == [1, 2, 3, 1, 5]
    assert rows.target.tolist() == [1, 2, 3, 4, 5]
    assert rows.answer.tolist() == [0, 0, 0, 1, 1]
    assert rows.lengths().tolist() == [3, 2]
    seen = rows.attention_mask()[0, 0].int().tolist()
    assert seen[1] == [1, 1, 0, 0, 0, 0, 0]
    assert seen[4] == [1, 1, 1, 1, 1, 0, 0]
    assert seen[5] == [1, 1, 0, 0, 0, 1, 0]
    assert seen[6] == [1, 1, 0, 0, 0, 1, 1]


def test_separate_rows_by_hand():
    """Two pairs: four rows, chosen first; padding on the right is never a source or a target."""
    rows = pair_rows([[7], [8, 9]], [[1], [2]], [[3, 4], [5]], pad_token_id=0, shared_prompt=False)
    assert rows.input_ids.tolist() == [[7, 1, 0], [8, 9, 2], [7, 3, 4], [8, 9, 5]]
    assert rows.segments[0].tolist() == [PROMPT, FIRST, PADDING]
    assert rows.attention_mask().tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1]]
    assert rows.source.tolist() == [0, 4, 6, 7, 10]
    assert rows.target.tolist() == [1, 2, 3, 4, 5]
    assert rows.answer.tolist() == [0, 1, 2, 2, 3]


def test_padding_is_not_seen_and_sees_something():
    rows = pair_rows([[7], [8, 9]], [[1], [2]], [[3], [5, 6]], pad_token_id=0, shared_prompt=True)
    mask = rows.attention_mask()
    assert mask.shape == (2, 1, 5, 5)
    assert mask[0, 0, 3].int().tolist() == [0, 0, 0, 1, 0]
    assert not mask[0, 0, :3, 3:].any()


def test_totals_by_answer():
    rows = pair_rows([[7]], [[1, 2]], [[4]], pad_token_id=0, shared_prompt=True)
    assert rows.totals(torch.tensor([-1.0, -2.0, -4.0])).tolist() == [-3.0, -4.0]


@pytest.mark.parametrize(
    ("given", "summed"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_totals_are_float32_or_better(given, summed):
    """256 + 1 is 256 in bf16, and -1 - 2^-40 is -1 in float32: the sums keep what their dtype can hold."""
    rows = pair_rows([[7]], [[1, 2]], [[4, 5]], pad_token_id=0, shared_prompt=True)
    totals = rows.totals(torch.tensor([-256.0, -1.0, -1.0, -(2.0**-40)], dtype=given))
    assert totals.dtype == summed
    assert totals[0].item() == -257.0
    assert (totals[1].item() == -1.0 - 2.0**-40) == (given == torch.float64)


@pytest.mark.parametrize("empty", ["prompt", "chosen", "rejected"])
def test_empty_parts_are_refused(empty):
    parts = {"prompt": [7], "chosen": [1], "rejected": [2], empty: []}
    message = "the prompt is empty" if empty == "prompt" else "an answer is empty"
    with pytest.raises(ValueError, match=f"row 0: {message}"):
        pair_rows([parts["prompt"]], [parts["chosen"]], [parts["rejected"]], pad_token_id=0, shared_prompt=True)


def test_unequal_lists_are_refused():
    with pytest.raises(ValueError, match="2 prompts, 1 chosen"):
        pair_rows([[1], [2]], [[3]], [[4]], pad_token_id=0, shared_prompt=True)


def test_one_answer_a_row():
    rows = answer_rows([[7], [8, 9]], [[1, 2], [3]], pad_token_id=0)
    assert rows.input_ids.tolist() == [[7, 1, 2], [8, 9, 3]]
    assert rows.attention_mask().tolist() == [[1, 1, 1], [1, 1, 1]]
    assert rows.answer.tolist() == [0, 0, 1]
    assert not rows.masked
    with pytest.raises(ValueError, match="2 prompts and 1 answers"):
        answer_rows([[7], [8]], [[1]], pad_token_id=0)


# --- packing

IDS = st.lists(st.integers(1, 9), min_size=1, max_size=6)
PAIRS = st.lists(st.tuples(IDS, IDS, IDS), min_size=1, max_size=7)


def test_three_pairs_in_two_rows_by_hand():
    """Of 3, 6 and 3 tokens, at most 6 in a row: the longest first, then both short ones, in their order."""
    rows = pair_rows(
        [[7], [8, 8], [9]], [[1], [2, 2], [3]], [[4], [5, 5], [6]], pad_token_id=0, shared_prompt=True, row_tokens=0
    )
    assert rows.input_ids.tolist() == [[8, 8, 2, 2, 5, 5], [7, 1, 4, 9, 3, 6]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 2, 3], [0, 1, 1, 0, 1, 1]]
    assert rows.segments.tolist() == [[PROMPT, PROMPT, FIRST, FIRST, SECOND, SECOND], [PROMPT, FIRST, SECOND] * 2]
    assert rows.groups.tolist() == [[1] * 6, [0] * 3 + [2] * 3]
    assert rows.source.tolist() == [6, 6, 1, 2, 1, 4, 9, 9]
    assert rows.target.tolist() == [1, 4, 2, 2, 5, 5, 3, 6]
    assert rows.answer.tolist() == [0, 3, 1, 1, 4, 4, 2, 5]
    assert rows.padding == 0
    seen = rows.attention_mask()[1, 0].int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 1, 0, 1],
    ]


@pytest.mark.parametrize(
    ("budget", "widths"),
    [(None, [8, 5, 4, 3]), (0, [8, 8, 4]), (1, [8, 8, 4]), (9, [8, 8, 4]), (12, [11, 9]), (19, [11, 9]), (20, [20])],
)
def test_budgets(budget, widths):
    """Groups of 8, 5, 4 and 3 tokens; rows have room for the longest, and are filled alike where two are enough."""
    rows = answer_rows([[1]] * 4, [[2] * 7, [2] * 4, [2] * 3, [2] * 2], pad_token_id=0, row_tokens=budget)
    assert (rows.segments != PADDING).sum(1).tolist() == widths
    assert rows.input_ids.shape[1] == max(widths)
    assert rows.padding == pytest.approx(1 - 20 / rows.input_ids.numel())


@settings(deadline=None, max_examples=25)
@given(pairs=PAIRS, shared=st.booleans(), budget=st.integers(0, 40))
def test_packing_moves_groups_and_changes_nothing_else(pairs, shared, budget):
    """Tokens, their order and their answers stay; each group stands whole in a row of at most the budget."""
    parts = [list(part) for part in zip(*pairs, strict=True)]
    alone = pair_rows(*parts, pad_token_id=0, shared_prompt=shared)
    packed = pair_rows(*parts, pad_token_id=0, shared_prompt=shared, row_tokens=budget)
    assert torch.equal(packed.target, alone.target)
    assert torch.equal(packed.answer, alone.answer)
    assert len(packed.input_ids) <= len(alone.input_ids)
    assert packed.input_ids.shape[1] <= max(budget, alone.input_ids.shape[1])
    if budget <= alone.input_ids.shape[1]:
        assert packed.padding <= alone.padding + 1e-6
    for group in range(len(alone.input_ids)):
        for name in ("input_ids", "position_ids", "segments"):
            one, other = (getattr(rows, name)[rows.groups == group] for rows in (packed, alone))
            assert torch.equal(one, other)
        assert len(torch.nonzero((packed.groups == group).any(1))) == 1
    source = packed.input_ids.flatten()[packed.source]
    assert torch.equal(source, alone.input_ids.flatten()[alone.source])
    assert torch.equal(packed.groups.flatten()[packed.source], packed.answer % len(alone.input_ids))


@settings(deadline=None, max_examples=10)
@given(pairs=PAIRS, budget=st.integers(0, 40))
def test_the_mask_by_its_words(pairs, budget):
    """Not after the query, of its group, and the prompt or its own answer; by index, the same; never nothing."""
    rows = pair_rows(
        *[list(part) for part in zip(*pairs, strict=True)], pad_token_id=0, shared_prompt=True, row_tokens=budget
    )
    mask, (number, length) = rows.attention_mask(), rows.input_ids.shape
    assert mask.shape == (number, 1, length, length)
    assert mask.any(-1).all()
    where, allowed = torch.arange(number), rows.mask_mod()
    for query in range(length):
        for key in range(length):
            expected = [
                key <= query
                and rows.groups[row, key] == rows.groups[row, query]
                and rows.segments[row, key].item() in (PROMPT, rows.segments[row, query])
                for row in where
            ]
            assert mask[:, 0, query, key].tolist() == expected
            assert allowed(where, torch.tensor(0), torch.tensor(query), torch.tensor(key)).tolist() == expected


def test_a_batch_carries_rows():
    rows = pair_rows([[7], [8]], [[1, 2], [3]], [[4], [5]], pad_token_id=0, shared_prompt=True, row_tokens=9)
    again = Rows.of({"strength": torch.ones(2), **rows.tensors()}, 4)
    assert again.answers == rows.answers
    assert all(torch.equal(value, rows.tensors()[name]) for name, value in again.tensors().items())
