"""Soft labels: the probability that the chosen answer is preferred, in every loss on pairs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.losses import LOSSES, Loss, PairLogps, SequenceLogps, combine, dpo, find_loss, ipo, robust_dpo, slic

IPO = ["ipo", "ipo_per_token"]
PAIR = [info.name for info in LOSSES.values() if info.kind == "pair" and info.soft]
FORMULAS = {
    "logic": {"logic": "implies(and(Ref(w), M(l)), and(Ref(l), M(w)))"},
    "logic squared": {"logic": "and(M(w), not(M(l)))", "f": "squared", "beta": 0.5},
}
SOFT = [*(name for name in PAIR if name != "logic"), *FORMULAS]
probability = st.floats(0, 1)
total = st.floats(-40, -0.05)
length = st.integers(1, 9)


def pairs(chosen, rejected, chosen_length, rejected_length, *, dtype=torch.float64, grad=False) -> PairLogps:
    def one(value, length) -> SequenceLogps:
        return SequenceLogps(torch.tensor(value, dtype=dtype, requires_grad=grad), torch.tensor(length))

    return PairLogps(one(chosen, chosen_length), one(rejected, rejected_length))


def loss_of(name: str) -> Loss:
    return Loss(find_loss(name.split()[0]), FORMULAS.get(name, {}))


def label(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def exchanged(pair: PairLogps) -> PairLogps:
    return PairLogps(pair.rejected, pair.chosen)


def test_every_loss_on_two_answers_is_here():
    known = {"dpo", "ln_dpo", "robust_dpo", "slic", "slic_hf", "simpo", "cpo", "orpo", "dpop", "r_dpo", "sft", *IPO}
    assert {*known, "logic"} == set(PAIR)


def test_published_vectors():
    """Margin .7, p = .8, tau = 1: soft IPO (.7 - .3)^2 = .16; drawn labels .32; soft DPO .5431860488854579."""
    policy, reference = pairs([0.4], [-0.3], [2], [2]), pairs([0.0], [0.0], [2], [2])
    p = label(0.8)
    assert ipo(policy, reference, p, beta=1.0).loss.item() == pytest.approx(0.16, rel=1e-12)
    hard = ipo(policy, reference, beta=1.0).loss.item()
    other = ipo(exchanged(policy), reference, beta=1.0).loss.item()
    assert 0.8 * hard + 0.2 * other == pytest.approx(0.32, rel=1e-12)
    assert dpo(policy, reference, p, beta=1.0).loss.item() == pytest.approx(0.5431860488854579, rel=1e-12)
    # p max(0, 1 - .7) + (1 - p) max(0, 1 + .7) = .24 + .34
    assert slic(policy, reference, p, beta=1.0).loss.item() == pytest.approx(0.58, rel=1e-12)


@pytest.mark.parametrize("name", SOFT)
@given(w=total, l=total, rw=total, rl=total, n=length, m=length, p=probability)
def test_expectation_over_the_label(name, w, l, rw, rl, n, m, p):  # noqa: E741
    """The loss is p loss(w, l) + (1 - p) loss(l, w); IPO's forms lie p (1 - p) / beta^2 below. Rewards see none."""
    loss = loss_of(name)
    policy, reference = pairs([w], [l], [n], [m]), pairs([rw], [rl], [n], [m])
    one, other = loss(policy, reference), loss(exchanged(policy), exchanged(reference))
    soft = loss(policy, reference, label(p))
    expected = p * one.loss + (1 - p) * other.loss
    if name in IPO:
        expected = expected - p * (1 - p) / loss.settings["beta"] ** 2
    torch.testing.assert_close(soft.loss, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(soft.rewards, one.rewards)


@pytest.mark.parametrize("name", SOFT)
def test_certainty_is_a_sure_label(name):
    """At p = 1 it is the loss without labels, p = 0 that of the answers exchanged, row by row."""
    loss = loss_of(name)
    policy, reference = (
        pairs([-1.7, -7.0], [-4.1, -0.5], [3, 6], [5, 2]),
        pairs([-2.2, -6.0], [-3.8, -1.0], [3, 6], [5, 2]),
    )
    soft = loss(policy, reference, label(1.0, 0.0)).loss
    assert soft[0].item() == pytest.approx(loss(policy, reference).loss[0].item(), rel=1e-12)
    assert soft[1].item() == pytest.approx(loss(exchanged(policy), exchanged(reference)).loss[1].item(), rel=1e-12)


@pytest.mark.parametrize("name", IPO)
@given(w=total, l=total, p=probability)
def test_soft_ipo_has_the_gradient_of_the_expectation(name, w, l, p):  # noqa: E741
    """They differ by a constant, so nothing is lost but the variance of drawn labels."""
    loss, reference = loss_of(name), pairs([-3.0], [-2.0], [2], [5])

    def gradient(value) -> list[float]:
        policy = pairs([w], [l], [2], [5], grad=True)
        found = torch.autograd.grad(value(policy).sum(), [policy.chosen.total, policy.rejected.total])
        return [g.item() for g in found]

    def mean(policy: PairLogps) -> torch.Tensor:
        return p * loss(policy, reference).loss + (1 - p) * loss(exchanged(policy), exchanged(reference)).loss

    soft = gradient(lambda policy: loss(policy, reference, label(p)).loss)
    assert soft == pytest.approx(gradient(mean), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "margin"),
    [("dpo", math.log(4)), ("ln_dpo", math.log(4)), ("r_dpo", math.log(4)), ("ipo", 0.3), ("ipo_per_token", 0.3)],
)
def test_the_margin_aimed_at(name, margin):
    """At p = .8 the logistic losses aim at logit p = log 4, IPO at p - 1/2; no gradient there, and one beside it."""
    loss = loss_of(name)
    reference = pairs([0.0], [0.0], [2], [2])

    def slope(margin: float) -> float:
        policy = pairs([margin / loss.settings["beta"]], [0.0], [2], [2], grad=True)
        if name in ("ln_dpo", "ipo_per_token"):
            policy = pairs([2 * margin / loss.settings["beta"]], [0.0], [2], [2], grad=True)
        loss(policy, reference, label(0.8)).loss.sum().backward()
        return policy.chosen.total.grad.item()

    assert slope(margin) == pytest.approx(0.0, abs=1e-12)
    assert slope(margin - 0.1) < -1e-4
    assert slope(margin + 0.1) > 1e-4


@given(z=st.floats(-15, 15), eps=st.floats(0, 0.45), p=probability)
def test_smoothing_and_its_inverse_meet_soft_labels(z, eps, p):
    """Smoothed DPO is soft DPO at q = p (1 - eps) + (1 - p) eps, and robust DPO takes q back to p."""
    policy, reference = pairs([z], [0.0], [3], [2]), pairs([0.0], [0.0], [3], [2])
    q = p * (1 - eps) + (1 - p) * eps
    smoothed = dpo(policy, reference, label(p), beta=1.0, label_smoothing=eps).loss
    torch.testing.assert_close(smoothed, dpo(policy, reference, label(q), beta=1.0).loss, rtol=1e-9, atol=1e-12)
    back = robust_dpo(policy, reference, label(q), beta=1.0, label_smoothing=eps).loss
    torch.testing.assert_close(back, dpo(policy, reference, label(p), beta=1.0).loss, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", SOFT)
def test_labels_take_the_losses_precision_and_no_gradient(name):
    """float64 labels beside bf16 log-probs: a float32 loss; labels that require a gradient get none."""
    loss = loss_of(name)
    policy, reference = (
        pairs([a], [b], [3], [5], dtype=torch.bfloat16, grad=True) for a, b in ((-1.5, -4.0), (-2.0, -3.5))
    )
    p = label(0.75).requires_grad_()
    out = loss(policy, reference, p).loss
    assert out.dtype == torch.float32
    out.sum().backward()
    assert p.grad is None


@pytest.mark.parametrize("name", SOFT)
@pytest.mark.parametrize(
    ("preference", "message"),
    [
        ([0.5, 1.1], r"preference\[1\] is 1.1.*: a probability is in \[0, 1\]"),
        ([-0.1, 0.5], r"preference\[0\] is -0.1"),
        ([0.5, math.nan], r"preference\[1\] is nan"),
        ([0.5], r"preference has shape \(1,\) and must have \(2,\): one probability a pair"),
    ],
)
def test_bad_labels_are_named(name, preference, message):
    policy = pairs([-1.7, -7.0], [-4.1, -0.5], [3, 6], [5, 2])
    with pytest.raises(ValueError, match=message):
        loss_of(name)(policy, policy, label(*preference))


def test_a_combination_passes_them_on():
    """0.8 soft DPO + 0.2 soft SFT; margin log 3, p = .75: .75 log(4/3) + .25 log 4, and .75 * 2 + .25 * 1."""
    policy = pairs([math.log(3) - 2.0], [-1.0], [1], [1])
    reference = pairs([-2.0], [-1.0], [1], [1])
    out = combine([Loss.of("dpo", beta=1.0), Loss.of("sft", weight=0.5)], policy, reference, label(0.75))
    soft_dpo = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    assert out.metrics["loss/dpo"].item() == pytest.approx(soft_dpo, rel=1e-12)
    assert out.metrics["loss/sft"].item() == pytest.approx(0.75 * (2 - math.log(3)) + 0.25, rel=1e-12)
    assert out.loss.item() == pytest.approx(soft_dpo + 0.5 * out.metrics["loss/sft"].item(), rel=1e-12)
