"""Pairwise losses: published vectors, closed forms and invariances of the standard ones, and laws for all."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.losses import (
    LOSSES,
    Loss,
    PairLogps,
    SequenceLogps,
    dpo,
    find_loss,
    ipo,
    ipo_per_token,
    ln_dpo,
    sft,
    simpo,
    slic,
)

POLICY = ([-0.5, -1.0, -0.2], [-0.9, -0.3, -1.5, -0.8, -0.6])
REFERENCE = ([-0.7, -1.1, -0.4], [-0.8, -0.4, -1.2, -0.9, -0.5])


def logps(chosen: list[float], rejected: list[float], dtype: torch.dtype = torch.float64) -> PairLogps:
    def one(values: list[float]) -> SequenceLogps:
        return SequenceLogps(torch.tensor([sum(values)], dtype=dtype), torch.tensor([len(values)]))

    return PairLogps(one(chosen), one(rejected))


def pairs(chosen, rejected, chosen_length, rejected_length, *, grad: bool = False) -> PairLogps:
    def one(total, length) -> SequenceLogps:
        return SequenceLogps(torch.tensor(total, dtype=torch.float64, requires_grad=grad), torch.tensor(length))

    return PairLogps(one(chosen, chosen_length), one(rejected, rejected_length))


@pytest.mark.parametrize(
    ("beta", "gamma", "dpo_loss", "ln_dpo_loss", "simpo_loss"),
    [
        (0.1, 0.0, 0.65394696731759, 0.6818780680740499, 0.680560733970391),
        (2.0, 1.0, 0.18390074088833896, 0.491952397335116, 0.9699324804445121),
        (2.5, 1.375, 0.1269280110429726, 0.44942691628062587, 1.1312187569379435),
        (10.0, 5.0, 0.00033540637289577, 0.09862932770761235, 2.5481243226470185),
    ],
)
def test_published_vectors(beta, gamma, dpo_loss, ln_dpo_loss, simpo_loss):
    """Log-ratios .5 over 3 tokens and -.3 over 5: DPO's margin is .8 beta, LN-DPO's (.5/3 + .3/5) beta."""
    policy, reference = logps(*POLICY), logps(*REFERENCE)
    assert dpo(policy, reference, beta=beta).loss.item() == pytest.approx(dpo_loss, rel=1e-12)
    assert ln_dpo(policy, reference, beta=beta).loss.item() == pytest.approx(ln_dpo_loss, rel=1e-12)
    assert simpo(policy, beta=beta, gamma=gamma).loss.item() == pytest.approx(simpo_loss, rel=1e-12)


@pytest.mark.parametrize(
    ("loss", "chosen", "rejected"),
    [
        (lambda p, r: dpo(p, r, beta=2.0), -0.33596322973215126, 0.33596322973215126),
        (lambda p, r: ln_dpo(p, r, beta=2.0), -0.2590456860619515, 0.1554274116371709),
        (lambda p, r: simpo(p, beta=2.0, gamma=1.0), -0.4139275770095046, 0.24835654620570277),
    ],
)
def test_gradient_per_token(loss, chosen, rejected):
    """D loss / d log pi of one token is d loss / d total. LN-DPO's: -beta sigma(-z)/n and +beta sigma(-z)/m."""
    policy = pairs([-1.7], [-4.1], [3], [5], grad=True)
    loss(policy, pairs([-2.2], [-3.8], [3], [5])).loss.sum().backward()
    assert policy.chosen.total.grad.item() == pytest.approx(chosen, rel=1e-12)
    assert policy.rejected.total.grad.item() == pytest.approx(rejected, rel=1e-12)


def test_ln_dpo_equals_dpo_at_equal_length():
    """N = m = 3, log-ratios .5 and -.4: LN-DPO(6) = DPO(6/3) = -log sigmoid(2 * .9) = 0.15297761052607414."""
    policy, reference = pairs([0.5], [-0.4], [3], [3]), pairs([0.0], [0.0], [3], [3])
    assert ln_dpo(policy, reference, beta=6.0).loss.item() == pytest.approx(0.15297761052607414, rel=1e-13)
    assert dpo(policy, reference, beta=2.0).loss.item() == pytest.approx(0.15297761052607414, rel=1e-13)


def test_ln_dpo_is_simpo_with_a_margin_of_its_own():
    """Identity: gamma = beta (R_w/n - R_l/m) = 2 (-2.2/3 + 3.8/5) = 0.0533...; SimPO with it is LN-DPO."""
    gamma = 2.0 * (-2.2 / 3 + 3.8 / 5)
    assert gamma == pytest.approx(0.05333333333333323, abs=1e-14)
    ours = ln_dpo(logps(*POLICY), logps(*REFERENCE), beta=2.0).loss.item()
    assert simpo(logps(*POLICY), beta=2.0, gamma=gamma).loss.item() == pytest.approx(ours, rel=1e-13)


def test_ipo_and_slic_by_hand():
    """H = .7: IPO(.1) = (.7 - 5)^2 = 18.49, IPO(1) = (.7 - .5)^2 = .04; the hinge: 1 - .07 = .93 and .3."""
    policy, reference = pairs([0.4], [-0.3], [2], [2]), pairs([0.0], [0.0], [2], [2])
    assert ipo(policy, reference, beta=0.1).loss.item() == pytest.approx(18.49, rel=1e-12)
    assert ipo(policy, reference, beta=1.0).loss.item() == pytest.approx(0.04, rel=1e-12)
    assert slic(policy, reference, beta=0.1).loss.item() == pytest.approx(0.93, rel=1e-12)
    assert slic(policy, reference, beta=1.0).loss.item() == pytest.approx(0.3, rel=1e-12)
    assert slic(policy, reference, beta=2.0).loss.item() == 0.0
    assert dpo(policy, reference, beta=0.1).loss.item() == pytest.approx(0.6587595555486971, rel=1e-12)
    assert dpo(policy, reference, beta=1.0).loss.item() == pytest.approx(0.4031860488854579, rel=1e-12)


def test_the_two_forms_of_ipo_differ_by_the_length():
    """Log-ratios .8 over 4 tokens and -.2 over 2, beta 1: sums give (1 - .5)^2 = .25, means (.2+.1-.5)^2 = .04."""
    policy, reference = pairs([0.8], [-0.2], [4], [2]), pairs([0.0], [0.0], [4], [2])
    assert ipo(policy, reference, beta=1.0).loss.item() == pytest.approx(0.25, rel=1e-12)
    assert ipo_per_token(policy, reference, beta=1.0).loss.item() == pytest.approx(0.04, rel=1e-12)


def test_sft_is_the_mean_nll_of_chosen():
    assert sft(logps(*POLICY)).loss.item() == pytest.approx(1.7 / 3, rel=1e-12)


def test_at_the_reference():
    """Policy = reference: DPO and LN-DPO are log 2, IPO is 1/(4 beta^2), the hinge is 1."""
    same = logps(*POLICY)
    assert dpo(same, same, beta=0.3).loss.item() == pytest.approx(math.log(2), rel=1e-12)
    assert ln_dpo(same, same, beta=3.0).loss.item() == pytest.approx(math.log(2), rel=1e-12)
    assert ipo(same, same, beta=0.25).loss.item() == pytest.approx(4.0, rel=1e-12)
    assert slic(same, same, beta=0.3).loss.item() == 1.0


def test_rewards_are_the_margin_of_the_loss():
    """LN-DPO's rewards are means times beta, not sums: -log sigmoid(reward gap) is the loss itself."""
    out = ln_dpo(logps(*POLICY), logps(*REFERENCE), beta=2.0)
    gap = out.chosen_rewards - out.rejected_rewards
    torch.testing.assert_close(out.loss, -torch.nn.functional.logsigmoid(gap))
    assert out.chosen_rewards.item() == pytest.approx(2 * 0.5 / 3, rel=1e-12)
    assert not out.rewards.requires_grad


def test_duplicated_tokens():
    """N -> 2n with S -> 2S leaves LN-DPO and SimPO as they are and doubles DPO's margin."""
    once, twice = logps(*POLICY), logps(POLICY[0] * 2, POLICY[1] * 2)
    ref_once, ref_twice = logps(*REFERENCE), logps(REFERENCE[0] * 2, REFERENCE[1] * 2)
    assert ln_dpo(twice, ref_twice, beta=2.0).loss.item() == pytest.approx(
        ln_dpo(once, ref_once, beta=2.0).loss.item(), rel=1e-12
    )
    assert simpo(twice, beta=2.0, gamma=1.0).loss.item() == pytest.approx(
        simpo(once, beta=2.0, gamma=1.0).loss.item(), rel=1e-12
    )
    assert dpo(twice, ref_twice, beta=2.0).loss.item() == pytest.approx(
        dpo(once, ref_once, beta=4.0).loss.item(), rel=1e-12
    )


PAIR_LOSSES = [info.name for info in LOSSES.values() if info.kind == "pair" and isinstance(info.reference, bool)]
REFERENCED = [name for name in PAIR_LOSSES if LOSSES[name].reference]
finite = st.floats(-1e4, 1e4)
length = st.integers(1, 50)


@pytest.mark.parametrize("name", REFERENCED)
@given(sw=finite, sl=finite, rw=finite, rl=finite, n=length, m=length, shift=st.floats(-10, 10))
def test_shift_of_both_models_cancels(name, sw, sl, rw, rl, n, m, shift):
    """A constant added to policy and reference alike changes nothing; values and gradients stay finite at +-1e4."""
    loss = find_loss(name)
    policy = pairs([sw], [sl], [n], [m], grad=True)
    out = Loss(loss)(policy, pairs([rw], [rl], [n], [m]))
    moved = Loss(loss)(pairs([sw + shift], [sl + shift], [n], [m]), pairs([rw + shift], [rl + shift], [n], [m]))
    torch.testing.assert_close(out.loss.detach(), moved.loss, rtol=1e-6, atol=1e-6)
    out.loss.sum().backward()
    assert torch.isfinite(out.loss).all()
    assert torch.isfinite(policy.chosen.total.grad).all()


@pytest.mark.parametrize("name", ["dpo", "ln_dpo", "r_dpo"])
@given(rw=st.floats(-50, 50), rl=st.floats(-50, 50), n=length, m=length)
def test_swapping_the_answers(name, rw, rl, n, m):
    """loss(w, l) - loss(l, w) = -(reward gap): -log sigma(z) + log sigma(-z) = -z."""
    zero = pairs([0.0], [0.0], [n], [m])
    out = Loss(find_loss(name))(pairs([rw], [rl], [n], [m]), zero)
    swapped = Loss(find_loss(name))(pairs([rl], [rw], [m], [n]), pairs([0.0], [0.0], [m], [n]))
    gap = out.chosen_rewards - out.rejected_rewards
    torch.testing.assert_close(out.loss - swapped.loss, -gap, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_gradient_equals_finite_differences(name):
    loss = Loss(find_loss(name))

    def value(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        policy = PairLogps(SequenceLogps(chosen, torch.tensor([3, 6])), SequenceLogps(rejected, torch.tensor([5, 2])))
        return loss(policy, pairs([-2.2, -6.0], [-3.8, -1.0], [3, 6], [5, 2])).loss

    inputs = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in ([-1.7, -7.0], [-4.1, -0.5])]
    assert torch.autograd.gradcheck(value, inputs)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_rows_do_not_touch_each_other(name):
    """Loss and rewards of a row are the same alone, in a batch, and at another place of the batch."""
    loss = Loss(find_loss(name))
    columns = ([-1.7, -7.0, -2.0], [-4.1, -0.5, -9.0], [3, 6, 2], [5, 2, 7])
    base = ([-2.2, -6.0, -2.5], [-3.8, -1.0, -8.0], [3, 6, 2], [5, 2, 7])
    together = loss(pairs(*columns), pairs(*base))
    for row in range(3):
        alone = loss(pairs(*[[c[row]] for c in columns]), pairs(*[[c[row]] for c in base]))
        assert alone.loss.item() == together.loss[row].item()
        assert alone.rewards[0].tolist() == together.rewards[row].tolist()


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_bf16_inputs_compute_in_float32(name):
    """Halves are exact in bf16, so the loss from bf16 totals equals the float32 one exactly."""
    loss = Loss(find_loss(name))
    columns, base = ([[-1.5], [-4.0]], [[-2.0], [-3.5]])

    def at(dtype: torch.dtype) -> torch.Tensor:
        def two(values) -> PairLogps:
            return PairLogps(
                SequenceLogps(torch.tensor(values[0], dtype=dtype), torch.tensor([3])),
                SequenceLogps(torch.tensor(values[1], dtype=dtype), torch.tensor([5])),
            )

        return loss(two(columns), two(base)).loss

    assert at(torch.bfloat16).dtype == torch.float32
    assert torch.equal(at(torch.bfloat16), at(torch.float32))
