"""The other losses on pairs by hand, at their limits and against TRL's: cDPO, SLiC-HF, CPO, ORPO, DPOP, R-DPO."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid

from align.losses import PairLogps, SequenceLogps, cpo, dpo, dpop, orpo, r_dpo, robust_dpo, sft, simpo, slic_hf

W, L, W_REF, L_REF = 0.3, 0.2, 0.25, 0.4  # the published example: probabilities of one-token answers
UNIT = st.floats(0.01, 0.99)


def pairs(chosen, rejected, chosen_length=1, rejected_length=1, *, grad=False, dtype=torch.float64) -> PairLogps:
    """One pair, or several where lists are given."""

    def one(total, length) -> SequenceLogps:
        total = torch.tensor(total if isinstance(total, list) else [total], dtype=dtype, requires_grad=grad)
        return SequenceLogps(total, torch.as_tensor(length).expand(len(total)))

    return PairLogps(one(chosen, chosen_length), one(rejected, rejected_length))


def zero(n: int = 1, m: int = 1) -> PairLogps:
    """A reference whose log-probs are 0, so that the policy's totals are log-ratios."""
    return pairs(0.0, 0.0, n, m)


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_the_published_example():
    """The margin is log 1.5 for CPO and SLiC, .8755 for DPO, log 12/7 for ORPO: (.3/.7) / (.2/.8)."""
    policy = pairs(math.log(W), math.log(L))
    assert cpo(policy, beta=1.0, sft_weight=0.0).loss.item() == pytest.approx(0.5108256238, abs=1e-10)
    assert cpo(policy, beta=0.1, sft_weight=0.0).loss.item() == pytest.approx(0.6730794135, abs=1e-10)
    assert orpo(policy, odds_weight=1.0, sft_weight=0.0).loss.item() == pytest.approx(0.4595323294, abs=1e-10)
    assert slic_hf(policy, delta=1.0, sft_weight=0.0).loss.item() == pytest.approx(0.5945348919, abs=1e-10)
    assert slic_hf(policy, delta=0.1, sft_weight=0.0).loss.item() == 0.0
    out = dpo(policy, pairs(math.log(W_REF), math.log(L_REF)), beta=1.0)
    assert (out.chosen_rewards - out.rejected_rewards).item() == pytest.approx(0.8754687373538994, rel=1e-14)
    out = orpo(policy)
    assert (out.chosen_rewards - out.rejected_rewards).item() == pytest.approx(0.5389965007, abs=1e-10)


def test_robust_and_conservative_dpo_by_hand():
    """Margin log 3, sigma 3/4, eps .1: cDPO .9 log(4/3) + .1 log 4; robust (.9 log(4/3) - .1 log 4) / .8."""
    policy = pairs(math.log(3), 0.0)
    right, wrong = math.log(4 / 3), math.log(4)
    conservative = dpo(policy, zero(), beta=1.0, label_smoothing=0.1).loss.item()
    assert conservative == pytest.approx(0.9 * right + 0.1 * wrong, rel=1e-12)
    robust = robust_dpo(policy, zero(), beta=1.0, label_smoothing=0.1).loss.item()
    assert robust == pytest.approx((0.9 * right - 0.1 * wrong) / 0.8, rel=1e-12)


@given(z=st.floats(-20, 20), eps=st.floats(0, 0.45))
def test_robust_dpo_undoes_the_flips_in_expectation(z, eps):
    """(1 - eps) robust(w, l) + eps robust(l, w) = DPO(w, l): unbiased under flips of known rate."""
    kept = robust_dpo(pairs(z, 0.0), zero(), beta=1.0, label_smoothing=eps).loss
    flipped = robust_dpo(pairs(0.0, z), zero(), beta=1.0, label_smoothing=eps).loss
    clean = dpo(pairs(z, 0.0), zero(), beta=1.0).loss
    torch.testing.assert_close((1 - eps) * kept + eps * flipped, clean, rtol=1e-9, atol=1e-9)


def test_conservative_dpo_aims_at_a_finite_margin():
    """The gradient of cDPO vanishes at sigma(z) = 1 - eps; eps .2: z = log 4."""
    policy = pairs(math.log(4), 0.0, grad=True)
    dpo(policy, zero(), beta=1.0, label_smoothing=0.2).loss.sum().backward()
    assert policy.chosen.total.grad.item() == pytest.approx(0.0, abs=1e-15)


def test_slic_hf_by_hand():
    """S -1.7 and -4.1, delta 3, weight .1: 3 - 2.4 + .17 = .77; the gap beyond delta 2 leaves .17."""
    policy = pairs(-1.7, -4.1, 3, 5)
    out = slic_hf(policy, delta=3.0)
    assert out.loss.item() == pytest.approx(0.77, rel=1e-12)
    assert out.rewards.tolist() == [[-1.7, -4.1]]
    assert slic_hf(policy, delta=2.0).loss.item() == pytest.approx(0.17, rel=1e-12)


def test_cpo_by_hand():
    """S -1.7 over 3 and -4.1 over 5, beta .5: log(1 + e^-1.2) + 1.7/3 on top, or half of that."""
    policy = pairs(-1.7, -4.1, 3, 5)
    out = cpo(policy, beta=0.5)
    assert out.loss.item() == pytest.approx(math.log1p(math.exp(-1.2)) + 1.7 / 3, rel=1e-12)
    assert out.rewards[0].tolist() == pytest.approx([-0.85, -2.05], rel=1e-12)
    halved = cpo(policy, beta=0.5, sft_weight=0.5).loss.item()
    assert halved == pytest.approx(math.log1p(math.exp(-1.2)) + 1.7 / 6, rel=1e-12)


def test_orpo_by_hand():
    """P .3 and .2 as means over 2 and 3 tokens: -log .3 + .1 log(1 + 7/12); rewards log(3/7) and log(1/4)."""
    out = orpo(pairs(2 * math.log(0.3), 3 * math.log(0.2), 2, 3))
    assert out.loss.item() == pytest.approx(-math.log(0.3) + 0.1 * math.log(19 / 12), rel=1e-12)
    assert out.rewards[0].tolist() == pytest.approx([math.log(3 / 7), math.log(1 / 4)], rel=1e-12)


def test_dpop_by_hand():
    """Log-ratios -.02 and -.3, beta .1, penalty 50: z = .1 (-.02 + .3 - 1) = -.072; at .02 no penalty."""
    out = dpop(pairs(-0.02, -0.3), zero(), beta=0.1)
    assert out.loss.item() == pytest.approx(math.log1p(math.exp(0.072)), rel=1e-12)
    assert out.rewards[0].tolist() == pytest.approx([-0.102, -0.03], rel=1e-12)
    up = pairs(0.02, -0.3)
    assert dpop(up, zero(), beta=0.1).loss.item() == dpo(up, zero(), beta=0.1).loss.item()


def test_dpop_pushes_a_falling_answer_up_harder():
    """The chosen answer's gradient, -sigma(-z) beta, is 1 + penalty times as large below the reference."""
    policy = pairs([-0.02, 0.02], [-0.3, -0.3], grad=True)
    out = dpop(policy, pairs([0.0, 0.0], [0.0, 0.0]), beta=0.1, penalty=5.0)
    out.loss.sum().backward()
    z = out.chosen_rewards - out.rejected_rewards
    expected = -torch.sigmoid(-z) * 0.1 * torch.tensor([6.0, 1.0])
    torch.testing.assert_close(policy.chosen.total.grad, expected.double(), rtol=1e-12, atol=0)
    torch.testing.assert_close(policy.rejected.total.grad, 0.1 * torch.sigmoid(-z), rtol=1e-12, atol=0)


def test_r_dpo_by_hand():
    """Log-ratios .5 over 3 tokens and -.3 over 5, beta .1, alpha -.01: z = .08 - .02, rewards .08 and .02."""
    out = r_dpo(pairs(0.5, -0.3, 3, 5), zero(3, 5), beta=0.1)
    assert out.loss.item() == pytest.approx(math.log1p(math.exp(-0.06)), rel=1e-12)
    assert out.rewards[0].tolist() == pytest.approx([0.08, 0.02], rel=1e-12)


@given(reward=st.tuples(st.floats(-3, 3), st.floats(-3, 3)), alpha=st.floats(-1, 1), n=st.integers(1, 9))
def test_the_stated_optimum_of_r_dpo_has_no_gradient(reward, alpha, n):
    """With labels of p = sigma(R_w - R_l), the policy mu exp((R + alpha n) / beta) / Z is stationary; m = 4."""
    beta = 0.3
    log_ratio = [(reward[0] + alpha * n) / beta, (reward[1] + alpha * 4) / beta]
    policy = pairs(log_ratio[0], log_ratio[1], n, 4, grad=True)
    label = torch.sigmoid(torch.tensor([reward[0] - reward[1]], dtype=torch.float64))
    r_dpo(policy, zero(n, 4), label, beta=beta, alpha=alpha).loss.sum().backward()
    assert policy.chosen.total.grad.item() == pytest.approx(0.0, abs=1e-12)
    assert policy.rejected.total.grad.item() == pytest.approx(0.0, abs=1e-12)


# --- limits and edges ------------------------------------------------------------------------------------------------


@given(w=st.floats(-50, -0.01), l=st.floats(-50, -0.01), n=st.integers(1, 9), m=st.integers(1, 9))
def test_limits(w, l, n, m):  # noqa: E741
    """With their own term switched off, five losses are DPO; CPO's and ORPO's likelihood term alone is SFT."""
    policy, reference = pairs(w, l, n, m), pairs(-3.0, -2.0, n, m)
    same = dpo(policy, reference, beta=0.4).loss.item()
    assert robust_dpo(policy, reference, beta=0.4, label_smoothing=0.0).loss.item() == pytest.approx(same, rel=1e-12)
    assert dpop(policy, reference, beta=0.4, penalty=0.0).loss.item() == pytest.approx(same, rel=1e-12)
    assert r_dpo(policy, reference, beta=0.4, alpha=0.0).loss.item() == pytest.approx(same, rel=1e-12)
    uniform = dpo(policy, zero(n, m), beta=0.4).loss.item()
    assert cpo(policy, beta=0.4, sft_weight=0.0).loss.item() == pytest.approx(uniform, rel=1e-12)
    assert orpo(policy, odds_weight=0.0).loss.item() == pytest.approx(sft(policy).loss.item(), rel=1e-12)


def test_orpo_of_unlikely_answers_is_simpo():
    """1 - P is 1 at e^-300: the odds are the probabilities, and the term is SimPO's at beta 1, gamma 0."""
    policy = pairs(-300.0, -301.0)
    assert orpo(policy).rewards.tolist() == [[-300.0, -301.0]]
    ours = orpo(policy, odds_weight=1.0, sft_weight=0.0).loss.item()
    assert ours == pytest.approx(simpo(policy, beta=1.0, gamma=0.0).loss.item(), rel=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@given(exponent=st.floats(-5, 2.5))
def test_log_odds_are_exact_near_certainty_and_far_from_it(dtype, tolerance, exponent):
    """The log-odds log P - log(1 - P) from -1e-5 to -316 nats, against Python's expm1 in float64."""
    mean = torch.tensor([-(10.0**exponent)], dtype=dtype)
    out = orpo(PairLogps(SequenceLogps(mean, torch.ones(1)), SequenceLogps(mean, torch.ones(1))))
    exact = mean.item() - math.log(-math.expm1(mean.item()))
    assert out.chosen_rewards.item() == pytest.approx(exact, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_orpo_of_a_certain_answer(dtype):
    """A log-prob of 0 counts as -1e-7 (float32) or -1e-15 (float64), and if rejected is still pushed down.

    Its log-odds are -log(1e-7) = 16.1; the gradient of the loss by S_l is weight sigma(-z) / (n (1 - P)), not 0.
    """
    limit = 1e-7 if dtype == torch.float32 else 1e-15
    policy = pairs([0.0, -1.0], [-1.0, 0.0], 2, 2, grad=True, dtype=dtype)
    out = orpo(policy)
    assert out.chosen_rewards[0].item() == pytest.approx(-math.log(limit), rel=1e-6)
    assert torch.isfinite(out.loss).all()
    out.loss.sum().backward()
    z = out.chosen_rewards[1] - out.rejected_rewards[1]
    pushed = 0.1 * torch.sigmoid(-z).item() / (2 * limit)
    assert policy.rejected.total.grad[1].item() == pytest.approx(pushed, rel=1e-5)
    assert torch.isfinite(policy.chosen.total.grad).all()


@given(w=UNIT, l=UNIT)
def test_gradient_of_orpo(w, l):  # noqa: E741
    """By S_w: -weight sigma(-z) / (n (1 - P_w)) - 1/n, the paper's; by S_l: weight sigma(-z) / (m (1 - P_l))."""
    policy = pairs(2 * math.log(w), 5 * math.log(l), 2, 5, grad=True)
    out = orpo(policy, odds_weight=0.3)
    out.loss.sum().backward()
    weight = 0.3 * torch.sigmoid(out.rejected_rewards - out.chosen_rewards).item()
    assert policy.chosen.total.grad.item() == pytest.approx(-weight / (2 * (1 - w)) - 0.5, rel=1e-9)
    assert policy.rejected.total.grad.item() == pytest.approx(weight / (5 * (1 - l)), rel=1e-9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: dpo(p, p, beta=1.0, label_smoothing=0.5), r"label_smoothing is 0.5: .* in \[0, 0.5\)"),
        (lambda p: dpo(p, p, beta=1.0, label_smoothing=-0.1), "label_smoothing is -0.1"),
        (lambda p: robust_dpo(p, p, beta=1.0, label_smoothing=math.nan), "label_smoothing is nan"),
        (lambda p: robust_dpo(p, p, beta=-1.0), "beta is -1.0"),
        (lambda p: cpo(p, beta=0.0), "beta is 0.0"),
        (lambda p: cpo(p, beta=1.0, sft_weight=-1.0), "sft_weight is -1.0"),
        (lambda p: slic_hf(p, delta=-1.0), "delta is -1.0"),
        (lambda p: slic_hf(p, sft_weight=math.inf), "sft_weight is inf"),
        (lambda p: orpo(p, odds_weight=-0.1), "odds_weight is -0.1"),
        (lambda p: orpo(p, sft_weight=-0.1), "sft_weight is -0.1"),
        (lambda p: dpop(p, p, beta=1.0, penalty=-1.0), "penalty is -1.0"),
        (lambda p: dpop(p, p, beta=math.inf), "beta is inf"),
        (lambda p: r_dpo(p, p, beta=1.0, alpha=math.nan), "alpha is nan: it must be finite"),
        (lambda p: r_dpo(p, pairs([-1.0] * 2, [-1.0] * 2, 3, 5), beta=1.0), "policy.chosen has shape"),
        (
            lambda p: dpop(p, pairs(-1.0, -1.0, 3, 4), beta=1.0),
            r"policy.rejected.length\[0\] is 5 and reference.rejected.length\[0\] is 4",
        ),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(pairs(-1.7, -4.1, 3, 5))


# --- TRL's own functions, given log-probs ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trl_losses():
    """TRL's CPO and ORPO formulas; both are methods that read nothing but settings from their trainer."""
    import os

    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    def settings(**values) -> SimpleNamespace:
        return SimpleNamespace(**values, alpha=0.0, label_smoothing=0.0, accelerator=SimpleNamespace(device="cpu"))

    return SimpleNamespace(cpo=CPOTrainer.cpo_loss, orpo=ORPOTrainer.odds_ratio_loss, settings=settings)


@given(w=st.floats(-90, -0.1), l=st.floats(-90, -0.1), n=st.integers(1, 30), m=st.integers(1, 30))
def test_equal_to_trls(trl_losses, w, l, n, m):  # noqa: E741
    """CPO on sums, SimPO and ORPO on means; TRL adds CPO's and ORPO's NLL apart, and computes ORPO in float32."""
    policy = pairs(w, l, n, m)
    sums, means = (policy.chosen.total, policy.rejected.total), (policy.chosen.mean, policy.rejected.mean)
    theirs, _, _ = trl_losses.cpo(trl_losses.settings(loss_type="sigmoid", beta=0.2), *sums)
    torch.testing.assert_close(cpo(policy, beta=0.2, sft_weight=0.0).loss, theirs, rtol=1e-12, atol=0)
    torch.testing.assert_close(cpo(policy, beta=0.2).loss, theirs - w / n, rtol=1e-12, atol=0)
    theirs, _, _ = trl_losses.cpo(trl_losses.settings(loss_type="simpo", beta=2.5, simpo_gamma=1.375), *means)
    torch.testing.assert_close(simpo(policy, beta=2.5, gamma=1.375).loss, theirs, rtol=1e-9, atol=1e-15)
    theirs, *_ = trl_losses.orpo(trl_losses.settings(beta=0.1), *means)
    torch.testing.assert_close(orpo(policy).loss, (-w / n - theirs).double(), rtol=1e-5, atol=1e-6)


def test_loss_is_the_rewards_margin():
    """Of the losses that are a logistic of one margin, -log sigmoid(reward gap) is the loss itself."""
    policy, reference = pairs(-1.7, -4.1, 3, 5), pairs(-2.2, -3.8, 3, 5)
    outputs = [
        dpop(policy, reference, beta=0.3),
        r_dpo(policy, reference, beta=0.3),
        cpo(policy, beta=0.3, sft_weight=0),
    ]
    outputs.append(orpo(policy, odds_weight=1.0, sft_weight=0.0))
    for out in outputs:
        torch.testing.assert_close(
            out.loss, -logsigmoid(out.chosen_rewards - out.rejected_rewards), rtol=1e-12, atol=0
        )
        assert not out.rewards.requires_grad
