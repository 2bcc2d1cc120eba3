"""CHES and its kin: the numbers of arXiv:2410.08847's definitions, and what must not change them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from align.losses import PairLogps, SequenceLogps
from align.losses.pairwise import dpo
from align.losses.rows import pair_rows
from align.losses.similarity import (
    TILE,
    AnswerStates,
    ches,
    ches_ln,
    edit_distance,
    edit_similarity,
    last_inner,
)


def waves(count: int, phase: float, width: int = 4) -> Tensor:
    """``sin(0.3 (t + 1) (d + 1) + phase)``, (count, width), float64."""
    t, d = torch.arange(1, count + 1, dtype=torch.float64), torch.arange(1, width + 1, dtype=torch.float64)
    return torch.sin(0.3 * t[:, None] * d + phase)


def states(*rows: Tensor) -> AnswerStates:
    """Of answers whose states are these, each (T, D)."""
    each = [AnswerStates.from_hidden(row[None], torch.ones(1, len(row), dtype=torch.bool)) for row in rows]
    return AnswerStates(*(torch.cat([getattr(one, name) for one in each]) for name in ("total", "last", "length")))


def both(chosen: Tensor, rejected: Tensor) -> tuple[float, float]:
    return float(ches(states(chosen), states(rejected))), float(ches_ln(states(chosen), states(rejected)))


def test_by_hand() -> None:
    """S+ = (1, 2), S- = (2, 2): 6 - 5 = 1. M+ = (1/2, 1), M- = (2/3, 2/3): 1 - 5/4 = -1/4."""
    chosen = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    rejected = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    assert both(chosen, rejected) == pytest.approx((1.0, -0.25), abs=1e-12)


def test_waves_and_the_order_of_the_two() -> None:
    one, other = waves(3, 0.0), waves(5, 0.5)
    assert both(one, other) == pytest.approx((-1.7945218535755743, -0.783369598098066), rel=1e-12)
    assert both(other, one) == pytest.approx((-13.453528761771118, -0.18775418185037673), rel=1e-12)


def test_equal_answers_are_0_and_so_are_single_states() -> None:
    """One state is the prompt's last, the same for both."""
    assert both(waves(4, 0.2), waves(4, 0.2)) == (0.0, 0.0)
    assert both(waves(1, 0.7), waves(1, 0.7)) == (0.0, 0.0)


def test_last_inner() -> None:
    found = last_inner(states(waves(4, 0.0)), states(waves(6, 0.5)))
    assert float(found) == pytest.approx(-0.6766198103593953, rel=1e-12)


@pytest.mark.parametrize(("rejected", "change"), [(1, -8.156250759081551e-4), (3, 6.086229342650906e-3)])
def test_what_ches_is_about(rejected: int, change: float) -> None:
    """One step of DPO on a hidden state h, over five tokens with rows of W, chosen token 0.

    At the reference the loss falls along beta / 2 (W+ - W-), so that beta .1 and a rate of .5 add .025 (W+ - W-) to h.
    Where the rejected row is like the chosen one, the chosen token falls too, and what gains is neither: token 3 most
    in log-prob, token 4 in probability.
    """
    head = torch.tensor([[1, 0], [1.3, 0.05], [0.2, -1], [-1, 0.2], [0.1, 0.9]], dtype=torch.float64)
    h = torch.tensor([1.2, 0.4], dtype=torch.float64, requires_grad=True)
    before = (head @ h).log_softmax(0)

    def pair(logps: Tensor) -> PairLogps:
        one = torch.ones(1)
        return PairLogps(SequenceLogps(logps[:1], one), SequenceLogps(logps[rejected : rejected + 1], one))

    dpo(pair(before), pair(before.detach()), beta=0.1).loss.sum().backward()
    after, before = (head @ (h - 0.5 * h.grad).detach()).log_softmax(0), before.detach()
    assert float((after - before)[0]) == pytest.approx(change, rel=1e-12)
    if change < 0:
        assert (int((after - before).argmax()), int((after.exp() - before.exp()).argmax())) == (3, 4)


@pytest.mark.parametrize(("left", "right"), [(0, 0), (3, 0), (0, 5), (2, 4)])
def test_whole_rows_with_padding_on_either_side(left: int, right: int) -> None:
    """Prompts of 3 tokens, the states at the end tokens left out, padding of NaN: the authors' function without it."""
    rows = [waves(6, 0.0), waves(8, 0.5)]
    width = left + right + 8
    hidden, mask = torch.full((2, width, 4), math.nan, dtype=torch.float64), torch.zeros(2, width, dtype=torch.bool)
    for index, row in enumerate(rows):
        hidden[index, left : left + len(row)] = row
        mask[index, left + 2 : left + len(row) - 1] = True
    found = AnswerStates.from_hidden(hidden, mask)
    assert found.length.tolist() == [3, 5]
    assert float(ches(found[:1], found[1:])) == pytest.approx(-3.760137667289147, rel=1e-12)
    assert float(ches_ln(found[:1], found[1:])) == pytest.approx(-0.895232369353919, rel=1e-12)


def test_scale_rotation_and_the_other_form() -> None:
    """``CHES(cH) = c^2 CHES``; a rotation changes nothing; ``CHES = -<S+, S+ - S->``."""
    one, other = waves(7, 0.1, 6), waves(5, 0.9, 6)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    for scored in (both(3 * one, 3 * other)[0] / 9, both(one @ rotation, other @ rotation)[0]):
        assert scored == pytest.approx(both(one, other)[0], rel=1e-10)
    assert both(one, other)[0] == pytest.approx(-float(one.sum(0) @ (one.sum(0) - other.sum(0))), rel=1e-12)


@pytest.mark.parametrize("shared", [True, False])
def test_rows_of_a_forward_pass(shared: bool) -> None:
    """States that are gathered by where tokens are predicted, over several tiles, are those of the mask."""
    lengths = [(3, 400, 5), (2, 90, 300)]
    rows = pair_rows(
        *([[1] * length[part] for length in lengths] for part in range(3)), pad_token_id=0, shared_prompt=shared
    )
    flat = waves(rows.input_ids.numel(), 0.3, 5).float()
    found = AnswerStates.gather(flat, rows.source, rows.answer, rows.answers)
    assert len(rows.source) > TILE
    for answer in range(4):
        own = flat[rows.source[rows.answer == answer]].double()
        assert found.total[answer].tolist() == pytest.approx(own.sum(0).tolist(), rel=1e-12)
        assert found.last[answer].tolist() == own[-1].tolist()
        assert int(found.length[answer]) == len(own)


def test_bf16_states_are_summed_wide() -> None:
    """200 states of 2048 near one another: 19,200 - 19,200 where sums are bf16, and 6.3 in truth."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(2048, generator=generator) * 3
    hidden = base + torch.randn(2, 200, 2048, generator=generator) * 0.5
    exact = states(*hidden.double())
    rounded = states(*hidden.bfloat16())
    assert rounded.total.dtype == torch.float64
    wanted = float(ches_ln(exact[:1], exact[1:]))
    assert float(ches_ln(rounded[:1], rounded[1:])) == pytest.approx(wanted, rel=0.05)
    narrow = hidden.bfloat16().mean(1)
    assert float((narrow[0] * narrow[1]).sum() - (narrow[0] ** 2).sum()) == 0 < wanted - 6


@pytest.mark.parametrize(
    ("one", "other", "distance", "longest"),
    [("kitten", "sitting", 3, 7), ([5, 6, 7], [5, 7], 1, 3), ([4, 4], [4, 4], 0, 2), ([1], [2, 3, 4], 3, 3)],
)
def test_edit_distances(one: list[int], other: list[int], distance: int, longest: int) -> None:
    """kitten, sitten, sittin, sitting; without the 6; nothing; 1 -> 2 and two more."""
    assert edit_distance(one, other) == edit_distance(other, one) == distance
    assert edit_similarity(one, other) == -distance / longest


def table_distance(one: list[int], other: list[int]) -> int:
    """By the usual table."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        above, row = row, [i]
        for j, b in enumerate(other, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return row[-1]


tokens = st.lists(st.integers(0, 4), max_size=80)


@given(tokens, tokens)
def test_edit_distance_is_that_of_the_table(one: list[int], other: list[int]) -> None:
    assert edit_distance(one, other) == table_distance(one, other)


def test_bad_input_is_named() -> None:
    hidden = waves(4, 0.0).reshape(2, 2, 4)
    mask = torch.tensor([[True, True], [True, False]])
    with pytest.raises(ValueError, match="row 1: the answer is empty"):
        AnswerStates.from_hidden(hidden, torch.tensor([[True, True], [False, False]]))
    with pytest.raises(ValueError, match="row 0: a hidden state is not finite"):
        AnswerStates.from_hidden(hidden.index_fill(1, torch.tensor(0), math.inf), mask)
    with pytest.raises(ValueError, match=r"mask is torch.int64: it must be torch.bool"):
        AnswerStates.from_hidden(hidden, mask.long())
    with pytest.raises(ValueError, match=r"hidden \(B, T, D\) and mask \(B, T\)"):
        AnswerStates.from_hidden(hidden, mask[:1])
    with pytest.raises(ValueError, match="as many of either"):
        ches(states(waves(2, 0.0)), states(waves(2, 0.0), waves(3, 0.0)))
    with pytest.raises(ValueError, match="the rejected answer is empty"):
        edit_similarity([1], [])
    with pytest.raises(ValueError, match="the chosen answer is empty"):
        edit_similarity([], [1])
