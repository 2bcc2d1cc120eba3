"""Plackett-Luce on rankings: by hand, against DPO at two answers, padding, and that it is a distribution."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.losses import Loss, PairLogps, SequenceLogps, dpo, plackett_luce


def answers(rows, *, lengths=None, grad=False, dtype=torch.float64) -> SequenceLogps:
    total = torch.tensor(rows, dtype=dtype, requires_grad=grad)
    return SequenceLogps(total, torch.ones(total.shape) if lengths is None else torch.tensor(lengths))


def flat(rows: int, answers_: int) -> SequenceLogps:
    return answers([[0.0] * answers_] * rows)


def test_three_answers_by_hand():
    """Rewards log 3, log 2, 0: the weights 3, 2, 1 give (3/6)(2/3) = 1/3 for this order, so the loss is log 3."""
    out = plackett_luce(answers([[math.log(3), math.log(2), 0.0]]), flat(1, 3), beta=1.0)
    assert out.loss.item() == pytest.approx(math.log(3), rel=1e-12)
    assert out.rewards[0].tolist() == pytest.approx([math.log(3), math.log(2), 0.0])
    turned = plackett_luce(answers([[0.0, math.log(2), math.log(3)]]), flat(1, 3), beta=1.0)
    assert turned.loss.item() == pytest.approx(math.log(6 * 5 / 2), rel=1e-12)  # (1/6)(2/5)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_at_the_reference_all_orders_are_alike(k):
    same = answers([[-3.0, -8.0, -1.0, -2.0, -9.0][:k]])
    assert plackett_luce(same, same, beta=0.7).loss.item() == pytest.approx(math.log(math.factorial(k)), rel=1e-12)


@given(rewards=st.lists(st.floats(-8, 8), min_size=3, max_size=4))
def test_probabilities_of_all_orders_add_up_to_one(rewards):
    orders = [list(order) for order in itertools.permutations(rewards)]
    loss = plackett_luce(answers(orders), flat(len(orders), len(rewards)), beta=1.0).loss
    assert torch.exp(-loss).sum().item() == pytest.approx(1.0, rel=1e-12)


number = st.floats(-1e4, 1e4)


@given(w=number, l=number, rw=number, rl=number, beta=st.floats(0.01, 2))
def test_two_answers_are_dpo(w, l, rw, rl, beta):  # noqa: E741
    """Loss, rewards and gradient, to the last bit that float64 has of them."""
    listed = answers([[w, l]], lengths=[[3, 5]], grad=True)
    ours = plackett_luce(listed, answers([[rw, rl]], lengths=[[3, 5]]), beta=beta)

    def one(value: float, length: int, *, grad: bool = False) -> SequenceLogps:
        return SequenceLogps(torch.tensor([value], dtype=torch.float64, requires_grad=grad), torch.tensor([length]))

    policy = PairLogps(one(w, 3, grad=True), one(l, 5, grad=True))
    theirs = dpo(policy, PairLogps(one(rw, 3), one(rl, 5)), beta=beta)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-12, atol=0)
    assert torch.equal(ours.rewards, theirs.rewards)
    ours.loss.sum().backward()
    theirs.loss.sum().backward()
    expected = torch.stack([policy.chosen.total.grad, policy.rejected.total.grad], 1)
    torch.testing.assert_close(listed.total.grad, expected, rtol=1e-12, atol=0)


@given(data=st.data(), real=st.integers(2, 4), width=st.integers(4, 6), junk=st.floats(-1e4, 1e4))
def test_padding_is_read_by_nothing(data, real, width, junk):
    """Loss and gradient are those of the real answers; padding has neither, and no reward."""
    policy = data.draw(st.lists(st.floats(-20, 20), min_size=real, max_size=real))
    short = answers([policy], grad=True)
    expected = plackett_luce(short, flat(1, real), beta=0.5)
    expected.loss.sum().backward()
    long = answers([[*policy, *[junk] * (width - real)]], grad=True)
    out = plackett_luce(long, flat(1, width), torch.tensor([real]), beta=0.5)
    out.loss.sum().backward()
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(long.total.grad[:, :real], short.total.grad, rtol=1e-12, atol=1e-15)
    assert long.total.grad[0, real:].tolist() == [0.0] * (width - real)
    assert out.rewards[0, real:].tolist() == [0.0] * (width - real)


def test_rows_of_different_numbers_of_answers():
    """2, 3 and 4 real answers at the reference: log 2, log 6, log 24."""
    loss = plackett_luce(flat(3, 4), flat(3, 4), torch.tensor([2, 3, 4]), beta=0.1).loss
    assert loss.tolist() == pytest.approx([math.log(2), math.log(6), math.log(24)], rel=1e-12)


def test_gradient_equals_finite_differences():
    total = torch.tensor([[-3.0, -5.0, -4.0], [-1.0, -2.0, 7.0]], dtype=torch.float64, requires_grad=True)

    def value(total: torch.Tensor) -> torch.Tensor:
        policy = SequenceLogps(total, torch.ones(2, 3))
        return plackett_luce(policy, flat(2, 3), torch.tensor([3, 2]), beta=0.7).loss

    assert torch.autograd.gradcheck(value, [total])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_far_out(dtype):
    """Log-ratios of 1e4 in the wrong order cost 1e4 each step; in the right one nothing."""
    far = answers([[1e4, 0.0, -1e4], [-1e4, 0.0, 1e4]], grad=True, dtype=dtype)
    out = plackett_luce(far, flat(2, 3), beta=1.0)
    assert out.loss.tolist() == [0.0, 3e4]
    out.loss.sum().backward()
    assert torch.isfinite(far.total.grad).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: plackett_luce(flat(1, 3), flat(1, 3), beta=0.0), "beta is 0.0"),
        (lambda: plackett_luce(flat(1, 1), flat(1, 1), beta=1.0), r"shape \(1, 1\): a ranking is \(B, K\)"),
        (lambda: plackett_luce(answers([-1.0, -2.0]), answers([-1.0, -2.0]), beta=1.0), r"shape \(2,\)"),
        (
            lambda: plackett_luce(flat(2, 3), flat(2, 2), beta=1.0),
            r"policy has shape \(2, 3\) and reference has shape \(2, 2\)",
        ),
        (
            lambda: plackett_luce(
                answers([[0.0, 0.0]], lengths=[[3, 4]]), answers([[0.0, 0.0]], lengths=[[3, 5]]), beta=1.0
            ),
            r"policy.length\[0, 1\] is 4 and reference.length\[0, 1\] is 5",
        ),
        (
            lambda: plackett_luce(flat(2, 3), flat(2, 3), torch.tensor([3, 1]), beta=1.0),
            r"answers\[1\] is 1: a row of 3",
        ),
        (lambda: plackett_luce(flat(2, 3), flat(2, 3), torch.tensor([4, 3]), beta=1.0), r"answers\[0\] is 4"),
        (lambda: plackett_luce(flat(2, 3), flat(2, 3), torch.tensor([3]), beta=1.0), r"answers has shape \(1,\)"),
        (lambda: plackett_luce(flat(1, 3), flat(1, 3), torch.tensor([3.0]), beta=1.0), "answers is torch.float32"),
        (lambda: plackett_luce(flat(1, 3), flat(1, 3), torch.tensor([True]), beta=1.0), "answers is torch.bool"),
        (lambda: Loss.of("plackett_luce")(None, None), "plackett_luce is not a loss on pairs"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
