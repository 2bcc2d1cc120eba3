"""BCO and KTO: vectors, the bound on DPO, identities, limits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from align.losses.binary import RewardShift, bco, kto, kto_kl
from align.losses.catalogue import Loss, find_loss
from align.losses.pairwise import dpo
from align.losses.types import PairLogps, SequenceLogps, UnpairedLogps

REWARDS = [0.8, -0.2, 1.5, -0.4, 0.3]
UP = [True, True, True, False, False]
reward = st.floats(-30, 30)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def sequence(total: torch.Tensor | list[float]) -> SequenceLogps:
    total = torch.as_tensor(total, dtype=None if isinstance(total, torch.Tensor) else torch.float64)
    return SequenceLogps(total, torch.full(total.shape, 3))


def thumbs(total: torch.Tensor | list[float], up: list[bool]) -> tuple[UnpairedLogps, SequenceLogps]:
    """A policy with these log-ratios, and a reference that gives every answer the log-prob 0."""
    policy = sequence(total)
    return UnpairedLogps(policy, torch.tensor(up)), sequence(torch.zeros_like(policy.total))


# BCO


def test_bco_at_shift_zero():
    """-log sigma(.8), -log sigma(-.2), -log sigma(1.5); down: -log sigma(.4), -log sigma(-.3)."""
    out = bco(*thumbs(REWARDS, UP), scalar(0.0), beta=1.0)
    expected = [0.371100665948, 0.798138869382, 0.201413277983, 0.5130152524, 0.854355244469]
    assert out.loss.tolist() == pytest.approx(expected, abs=1e-11)
    assert out.loss.mean().item() == pytest.approx(0.5476046620361203, rel=1e-12)
    assert out.rewards.tolist() == [[value] for value in REWARDS]


def test_bco_at_its_shifts():
    """The same rewards about .325 (the mean of the class means) and .4 (the mean of all five)."""
    out = bco(*thumbs(REWARDS, UP), scalar(0.325), beta=1.0)
    expected = [0.483589087871, 0.989711754673, 0.269125188357, 0.394959833065, 0.680725303526]
    assert out.loss.tolist() == pytest.approx(expected, abs=1e-11)
    assert out.loss.mean().item() == pytest.approx(0.5636222334982276, rel=1e-12)
    out = bco(*thumbs(REWARDS, UP), scalar(0.4), beta=1.0)
    assert out.loss.mean().item() == pytest.approx(0.5706671708045234, rel=1e-12)


def test_bco_weighs_thumbs_down_alone():
    """Weights 2 and .5 of the thumbs down; the 9 of a thumb up is not read. The mean is over five rows."""
    out = bco(*thumbs(REWARDS, UP), scalar(0.325), tensor(9, 9, 9, 2, 0.5), beta=1.0)
    assert out.loss.mean().item() == pytest.approx(0.5745416697587203, rel=1e-12)


def test_bco_gradients():
    """The slope in r is -sigma(-(r - delta)) up, w sigma(r - delta) down; times beta in the log-ratio.

    None to the shift and the weights: they are data.
    """
    ratio = tensor(0.9, -1.3).requires_grad_()
    shift, weight = scalar(0.2).requires_grad_(), tensor(1.0, 3.0).requires_grad_()
    policy, reference = thumbs(ratio, [True, False])
    bco(policy, reference, shift, weight, beta=2.0).loss.sum().backward()
    up = -2.0 / (1 + math.exp(1.8 - 0.2))
    down = 2.0 * 3.0 / (1 + math.exp(2.6 + 0.2))
    assert ratio.grad.tolist() == pytest.approx([up, down], rel=1e-12)
    assert shift.grad is None
    assert weight.grad is None


def test_bound_on_dpo():
    """Rewards 1.2 and -.3. DPO: -log sigma(1.5) = .2014. The terms of BCO at four shifts, least at the mean .45."""
    policy, reference = thumbs([1.2, -0.3], [True, False])
    pair = PairLogps(sequence([1.2]), sequence([-0.3]))
    zero = PairLogps(sequence([0.0]), sequence([0.0]))
    assert dpo(pair, zero, beta=1.0).loss.item() == pytest.approx(0.2014132779827524, rel=1e-12)
    expected = {-1.0: 1.208269368654154, 0.0: 0.8176377118065583, 0.45: 0.7737420122297999, 1.0: 0.8391473232145841}
    for shift, value in expected.items():
        assert bco(policy, reference, scalar(shift), beta=1.0).loss.sum().item() == pytest.approx(value, rel=1e-12)


@given(a=reward, b=reward, shift=reward)
def test_a_pair_bounds_its_dpo_loss_nearest_at_the_mean(a, b, shift):
    """The sum of the two terms is DPO's -log sigma(a - b) plus a gap that is least at d = (a + b)/2.

    The gap is log(1 + e^-(a-d) + e^(b-d) + e^(b-a)) - log(1 + e^(b-a)) >= 0.
    """
    policy, reference = thumbs([a, b], [True, False])

    def total(d: float) -> float:
        return bco(policy, reference, scalar(d), beta=1.0).loss.sum().item()

    loss = F.softplus(scalar(b - a)).item()
    gap = torch.logsumexp(tensor(0, shift - a, b - shift, b - a), 0).item() - loss
    assert gap >= -1e-12
    assert total(shift) == pytest.approx(loss + gap, rel=1e-9, abs=1e-9)
    assert total((a + b) / 2) <= total(shift) + 1e-9
    # The slope in d, sigma(-(a - d)) - sigma(b - d), is 0 there.
    middle = (a + b) / 2
    assert torch.sigmoid(scalar(middle - a)).item() == pytest.approx(torch.sigmoid(scalar(b - middle)).item())


def test_the_mean_over_rows_is_no_bound():
    """Rewards -5 (up) and 5 (down): each term is -log sigma(-5) = 5.0067, DPO is -log sigma(-10) = 10.00005.

    Their sum is above it, their mean is not.
    """
    policy, reference = thumbs([-5.0, 5.0], [True, False])
    loss = bco(policy, reference, scalar(0.0), beta=1.0).loss
    assert loss.tolist() == pytest.approx([5.006715348489118, 5.006715348489118], rel=1e-12)
    assert loss.mean().item() < math.log1p(math.exp(10)) < loss.sum().item()


@given(rewards=st.lists(reward, min_size=5, max_size=5), shift=reward, constant=reward)
def test_rewards_and_shift_move_together(rewards, shift, constant):
    moved = bco(*thumbs([r + constant for r in rewards], UP), scalar(shift + constant), beta=1.0).loss
    assert torch.allclose(moved, bco(*thumbs(rewards, UP), scalar(shift), beta=1.0).loss, rtol=1e-9, atol=1e-9)


@given(rewards=st.lists(reward, min_size=5, max_size=5), shift=reward)
def test_thumbs_swapped_and_signs_turned(rewards, shift):
    """At weight 1: -log sigma(r - d) of an up is -log sigma(-(-r + d)) of a down."""
    turned = bco(*thumbs([-r for r in rewards], [not up for up in UP]), scalar(-shift), beta=1.0).loss
    assert torch.equal(turned, bco(*thumbs(rewards, UP), scalar(shift), beta=1.0).loss)


def test_paired_data_at_shift_zero():
    """A pair's sum is -log sigma(beta r_w) - log sigma(-beta r_l), which TRL names bco_pair."""
    ratios = {True: tensor(0.8, -0.2, 4.0), False: tensor(0.5, -2.0, 0.1)}
    terms = [bco(*thumbs(ratios[up], [up] * 3), scalar(0.0), beta=0.7).loss for up in (True, False)]
    pair = -F.logsigmoid(0.7 * ratios[True]) - F.logsigmoid(-0.7 * ratios[False])
    assert torch.allclose(terms[0] + terms[1], pair, rtol=1e-14)


# KTO


def test_kto_by_hand():
    """Log-ratios of 3 ln 3 against a KL of ln 3 at beta 1/2: margin ln 3, sigma 3/4.

    Up 1/4 and down 3/4, times the weights 2 and 3; the reward is 3/2 ln 3. At the KL itself: half the weight.
    """
    log3 = math.log(3)
    out = kto(
        *thumbs([3 * log3, 3 * log3, log3, log3], [True, False, True, False]),
        scalar(log3),
        beta=0.5,
        desirable_weight=2.0,
        undesirable_weight=3.0,
    )
    assert out.loss.tolist() == pytest.approx([0.5, 2.25, 1.0, 1.5], rel=1e-12)
    assert out.rewards[:, 0].tolist() == pytest.approx([1.5 * log3, 1.5 * log3, 0.5 * log3, 0.5 * log3], rel=1e-12)


def test_kto_gradient_saturates_on_both_sides():
    """The slope is beta sigma(z) sigma(-z), the same at z and -z, down for an up and up for a down; none to the KL."""
    ratio, kl = tensor(3.5, -2.5, 3.5).requires_grad_(), scalar(0.5).requires_grad_()
    policy, reference = thumbs(ratio, [True, True, False])
    kto(policy, reference, kl, beta=2.0).loss.sum().backward()
    slope = 2.0 * math.exp(-6) / (1 + math.exp(-6)) ** 2
    assert ratio.grad.tolist() == pytest.approx([-slope, -slope, slope], rel=1e-12)
    assert kl.grad is None


def test_kto_keeps_its_digits_far_out():
    """1 - sigma(40) is 0 in float32; e^-40 / (1 + e^-40) is not."""
    policy, reference = thumbs(torch.tensor([40.0]), [True])
    assert kto(policy, reference, torch.tensor(0.0), beta=1.0).loss.item() == pytest.approx(math.exp(-40), rel=1e-5)


def test_kto_kl():
    """Mean of the log-ratios .7, -.1, .3 is .3; a mean below 0 is no KL."""
    ratio = tensor(0.7, -0.1, 0.3).requires_grad_()
    kl = kto_kl(sequence(ratio), sequence([0.0, 0.0, 0.0]))
    assert kl.item() == pytest.approx(0.3, rel=1e-12)
    assert (kl.shape, kl.dtype, kl.requires_grad) == ((), torch.float64, False)
    assert kto_kl(sequence([-1.0, 0.2]), sequence([0.0, 0.0])).item() == 0.0
    assert kto_kl(sequence(torch.tensor([-1.0])), sequence(torch.tensor([-2.0]))).dtype == torch.float32


# Both


LOSSES = {
    "bco": lambda policy, reference: bco(policy, reference, scalar(0.3), beta=0.1),
    "kto": lambda policy, reference: kto(policy, reference, scalar(0.3), beta=0.1),
}
both = pytest.mark.parametrize("name", LOSSES)


@both
def test_in_the_table(name):
    info = find_loss(name)
    assert (info.kind, info.reference, info.default_beta) == ("thumbs", True, 0.1)
    assert info.laws is not None
    assert Loss.of(name).settings == {"beta": 0.1}


@both
def test_at_the_reference(name):
    """Log-ratio, shift and KL 0: log 2, and half the weight."""
    policy, reference = thumbs([0.0, 0.0], [True, False])
    function = {"bco": bco, "kto": kto}[name]
    expected = {"bco": math.log(2), "kto": 0.5}[name]
    assert function(policy, reference, scalar(0.0), beta=0.1).loss.tolist() == pytest.approx([expected] * 2, rel=1e-15)


@both
def test_gradient_agrees_with_differences(name):
    ratio = tensor(0.8, -0.2, 15.0, -4.0, 0.3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](*thumbs(x, UP)).loss, (ratio,))


@both
@pytest.mark.parametrize("up", [True, False])
def test_one_class_far_out_is_finite(name, up):
    ratio = torch.tensor([1e4, -1e4, 0.0]).requires_grad_()
    out = LOSSES[name](*thumbs(ratio, [up] * 3))
    out.loss.mean().backward()
    assert bool(torch.isfinite(out.loss).all() and torch.isfinite(ratio.grad).all())


@both
def test_bf16_log_probs_are_computed_in_float32(name):
    """-300 nats have a spacing of 2 in bf16: the difference, beta and sigma are taken in float32."""
    total, other = torch.tensor([-300.0, -51.25]).bfloat16(), torch.tensor([-296.0, -50.0]).bfloat16()
    label, length = torch.tensor([True, False]), torch.tensor([90, 20])
    found = LOSSES[name](UnpairedLogps(SequenceLogps(total, length), label), SequenceLogps(other, length)).loss
    exact = LOSSES[name](
        UnpairedLogps(SequenceLogps(total.double(), length), label), SequenceLogps(other.double(), length)
    ).loss
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(exact.tolist(), rel=1e-6)


@both
def test_a_bf16_shift_or_kl_is_computed_in_float32(name):
    """.1 * .30078125 rounded to bf16 is off by 5e-5, which would show in the loss at 2e-5."""
    function, point = {"bco": bco, "kto": kto}[name], torch.tensor(0.30078125).bfloat16()
    found, exact = (function(*thumbs(REWARDS, UP), value, beta=0.1).loss for value in (point, point.double()))
    assert found.tolist() == pytest.approx(exact.tolist(), rel=1e-8)


@both
def test_a_row_is_alone_in_its_batch(name):
    whole = LOSSES[name](*thumbs(REWARDS, UP)).loss.tolist()
    alone = [LOSSES[name](*thumbs([r], [up])).loss.item() for r, up in zip(REWARDS, UP, strict=True)]
    assert whole == pytest.approx(alone, rel=1e-14)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p, r: bco(p, r, scalar(0), beta=0.0), "beta is 0.0: it must be positive"),
        (lambda p, r: bco(p, r, scalar(math.nan), beta=0.1), "shift is nan: it must be finite"),
        (lambda p, r: bco(p, r, tensor(0.1, 0.2), beta=0.1), "shift has shape (2,)"),
        (lambda p, r: bco(p, r, scalar(0), tensor(1, -2), beta=0.1), "weight[1] is -2.0: it must not be negative"),
        (lambda p, r: bco(p, r, scalar(0), tensor(math.inf, 1), beta=0.1), "weight[0] is inf: it must be finite"),
        (lambda p, r: bco(p, r, scalar(0), tensor(1), beta=0.1), "weight has shape (1,) and must have (2,)"),
        (
            lambda p, r: bco(p, sequence([1.0]), scalar(0), beta=0.1),
            "policy.sequence has shape (2,) and reference has",
        ),
        (lambda p, r: kto(p, r, scalar(0), beta=-1.0), "beta is -1.0: it must be positive"),
        (lambda p, r: kto(p, r, scalar(-0.1), beta=0.1), "kl is -0.1: it must not be negative"),
        (lambda p, r: kto(p, r, scalar(math.inf), beta=0.1), "kl is inf: it must be finite"),
        (lambda p, r: kto(p, r, scalar(0), beta=0.1, desirable_weight=0.0), "desirable_weight is 0.0"),
        (lambda p, r: kto(p, r, scalar(0), beta=0.1, undesirable_weight=math.nan), "undesirable_weight is nan"),
        (lambda p, r: kto_kl(p.sequence, sequence([1.0])), "policy has shape (2,) and reference has shape (1,)"),
        (lambda p, r: kto_kl(sequence(torch.zeros(0)), sequence(torch.zeros(0))), "policy has no row"),
        (lambda p, r: UnpairedLogps(p.sequence, torch.tensor([1, 0])), "label is torch.int64: a thumb is up"),
    ],
)
def test_bad_input(call, words):
    policy, reference = thumbs([0.5, -0.5], [True, False])
    with pytest.raises(ValueError) as error:
        call(policy, reference)
    assert words in str(error.value)


@pytest.mark.parametrize("size", [1e5, 1e6])
def test_what_the_log_probs_give_the_losses_take(size):
    """Log-ratios +-2e6 at most: their KL goes into kto, their rewards into the shift, and that into bco."""
    log_probs = SequenceLogps(torch.tensor([size, -size]), torch.ones(2))
    policy = UnpairedLogps(log_probs, torch.tensor([True, False]))
    reference = SequenceLogps(-log_probs.total, log_probs.length)
    up = torch.tensor([0, 0])
    kl = kto_kl(SequenceLogps(log_probs.total[up], torch.ones(2)), SequenceLogps(-log_probs.total[up], torch.ones(2)))
    assert kl.item() == 2 * size
    for beta in (1e-12, 0.1, 101.0, 1e12):
        assert torch.isfinite(kto(policy, reference, kl, beta=beta).loss).all()
        rewards = bco(policy, reference, scalar(0), beta=beta).rewards[:, 0]
        for mode in ("balanced_ema", "pooled"):
            shift = RewardShift(mode)
            shift.update(rewards[:1], policy.label[:1])
            out = bco(policy, reference, shift.value, torch.full((2,), 1e6), beta=beta)
            assert shift.value.item() == pytest.approx(2 * size * beta)
            assert torch.isfinite(out.loss).all()
