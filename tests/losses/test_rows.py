"""The layout of pairs: by hand on one pair, and as a law against a model."""

from __future__ import annotations

import pytest
import torch

from align.losses.rows import FIRST, PADDING, PROMPT, SECOND, answer_rows, pair_rows


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
    assert mask[0, 0, 3].int().tolist() == [1, 0, 0, 1, 0]
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
    assert not rows.shared_prompt
    with pytest.raises(ValueError, match="2 prompts and 1 answers"):
        answer_rows([[7], [8]], [[1]], pad_token_id=0)
