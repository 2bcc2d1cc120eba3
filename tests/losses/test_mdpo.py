"""MDPO: the closed form of its step, its gradient where it starts, and its limits."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.losses.mirror_descent import mdpo


def f64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# A bandit of three arms: the policy that gave them, and their advantages.
PI_K = f64([0.5, 0.3, 0.2])
ADVANTAGE = f64([1.0, 0.0, -1.0])
STEPS = {
    0.1: [0.5346464958, 0.2902608929, 0.1750926113],
    0.5: [0.6617826348, 0.2408348748, 0.0973824903],
    5.0: [0.9959554963, 0.0040264172, 0.0000180865],
}


def expected_loss(log_pi: torch.Tensor, step_size: float, advantage: torch.Tensor = ADVANTAGE) -> torch.Tensor:
    """The loss on arms drawn from the previous policy, by enumeration."""
    return (PI_K * mdpo(log_pi, PI_K.log(), advantage, step_size=step_size).loss).sum()


@pytest.mark.parametrize("step_size", list(STEPS))
def test_the_closed_form_is_the_minimum(step_size):
    """Pi_k exp(t A) / Z: there the gradient vanishes, and the loss is -(1/t) log E_k exp(t A)."""
    theta = (PI_K.log() + step_size * ADVANTAGE).requires_grad_()
    torch.testing.assert_close(theta.softmax(0), f64(STEPS[step_size]), rtol=0, atol=1e-10)
    loss = expected_loss(theta.log_softmax(0), step_size)
    log_z = torch.log((PI_K * torch.exp(step_size * ADVANTAGE)).sum())
    assert loss.item() == pytest.approx(-log_z.item() / step_size, rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, theta)
    assert gradient.abs().max().item() < 1e-15


@pytest.mark.parametrize(("step_size", "kl"), [(0.1, 0.0029530631), (0.5, 0.0625291296)])
def test_expected_loss_is_the_objective(step_size, kl):
    """With A = 0 it is KL(pi || pi_k) / t. At t = .5 the whole objective is .4393418852."""
    log_pi = f64(STEPS[step_size]).log()
    assert step_size * expected_loss(log_pi, step_size, 0 * ADVANTAGE).item() == pytest.approx(kl, abs=1e-9)
    if step_size == 0.5:
        assert -expected_loss(log_pi, step_size).item() == pytest.approx(0.4393418852, abs=1e-9)


def test_inner_steps_reach_the_closed_form():
    """4000 steps of gradient descent from pi_k, t = .5: the published policy to 1e-10."""
    theta = PI_K.log().requires_grad_()
    for _ in range(4000):
        (gradient,) = torch.autograd.grad(expected_loss(theta.log_softmax(0), 0.5), theta)
        theta = (theta - 0.5 * gradient).detach().requires_grad_()
    torch.testing.assert_close(theta.softmax(0), f64(STEPS[0.5]), rtol=0, atol=1e-10)


def test_the_first_step_is_the_policy_gradient_and_ppos():
    """At pi_k the KL has no gradient: what is left is pi (A - E A), E A = .3: (.35, -.09, -.26), as in PPO."""
    theta = PI_K.log().requires_grad_()
    log_pi = theta.log_softmax(0)
    (ours,) = torch.autograd.grad(-expected_loss(log_pi, 0.5), theta, retain_graph=True)
    torch.testing.assert_close(ours, f64([0.35, -0.09, -0.26]), rtol=0, atol=1e-15)
    ratio = (log_pi - PI_K.log()).exp()
    ppo = (PI_K * torch.minimum(ratio * ADVANTAGE, ratio.clamp(0.8, 1.2) * ADVANTAGE)).sum()
    torch.testing.assert_close(torch.autograd.grad(ppo, theta)[0], ours, rtol=0, atol=1e-15)


@given(c=st.floats(-5, 5), step_size=st.floats(0.1, 2))
def test_a_constant_in_the_advantages_moves_nothing_in_expectation(c, step_size):
    """E_k[e^d] = 1, so that a constant adds -c to the loss of every normalised policy; single elements do change."""
    log_pi = f64([0.2, -0.4, 1.0]).log_softmax(0)
    moved = expected_loss(log_pi, step_size, ADVANTAGE + c)
    torch.testing.assert_close(moved, expected_loss(log_pi, step_size) - c, rtol=0, atol=1e-12)


def test_great_steps_take_the_best_arm_and_small_ones_stay():
    """The closed form's mean advantage grows with t, from pi_k's .3 to 1; gradient signs agree with it."""
    means = [float((PI_K.log() + t * ADVANTAGE).softmax(0) @ ADVANTAGE) for t in (1e-9, 0.1, 0.5, 5.0, 50.0)]
    assert means == sorted(means)
    assert means[0] == pytest.approx(0.3)
    assert means[-1] == pytest.approx(1.0)
    for t in (50.0, 1e6):
        theta = torch.log(f64([1 - 2e-9, 1e-9, 1e-9])).requires_grad_()
        (gradient,) = torch.autograd.grad(expected_loss(theta.log_softmax(0), t), theta)
        assert gradient[0].item() < 0


def test_each_iteration_improves():
    """Five iterations of 200 inner steps on fixed rewards: the mean reward rises each time."""
    log_previous, means = PI_K.log(), [0.3]
    for _ in range(5):
        theta = log_previous.clone().requires_grad_()
        for _ in range(200):
            loss = mdpo(theta.log_softmax(0), log_previous, ADVANTAGE, step_size=0.3).loss
            (gradient,) = torch.autograd.grad((log_previous.exp() * loss).sum(), theta)
            theta = (theta - 0.3 * gradient).detach().requires_grad_()
        log_previous = theta.detach().log_softmax(0)
        means.append(float(log_previous.exp() @ ADVANTAGE))
    assert all(a + 0.02 < b for a, b in itertools.pairwise(means))


def test_by_hand():
    """D = log 2, A = 3, t = .5: -2 * 3 + 2 (2 log 2 - 1) = -5.2274112777602189; the reward is log 2 / .5."""
    out = mdpo(f64([2.0]).log(), f64([0.0]), f64([3.0]), step_size=0.5)
    assert out.loss.item() == pytest.approx(-5.2274112777602189, rel=1e-14)
    assert out.rewards.tolist() == [[pytest.approx(1.3862943611198906, rel=1e-14)]]


@pytest.mark.parametrize("d", [0.0, 1e-6, -1e-5, 3e-4, -1e-3, 0.01])
def test_the_kl_term_survives_small_ratios_in_float32(d):
    """It is d^2/2 + d^3/3 + ...; e^d d - e^d + 1 in float32 would be rounding alone below 1e-3."""
    kl = mdpo(torch.tensor([d]), torch.tensor([0.0]), torch.tensor([0.0])).loss.item()
    assert kl == pytest.approx(d**2 / 2 + d**3 / 3 + d**4 / 8, rel=2e-2, abs=3e-13)
    assert kl >= 0


def test_ratios_are_clamped_at_twenty_nats():
    """Beyond e^20 nothing grows and nothing pulls; loss and gradient are finite in float32."""
    logps = torch.tensor([1e4, 20.0, -1e4], requires_grad=True)
    out = mdpo(logps, torch.zeros(3), torch.ones(3), step_size=0.1)
    out.loss.sum().backward()
    assert torch.isfinite(out.loss).all()
    assert out.loss[0].item() == out.loss[1].item()
    assert logps.grad[0].item() == logps.grad[2].item() == 0.0


def test_gradient_equals_finite_differences_and_flows_through_the_policy_alone():
    logps, previous, advantage = (
        f64(x).requires_grad_() for x in ([-1.0, -2.0, -0.5], [-1.3, -1.1, -0.5], [0.7, -1.2, 2.0])
    )
    assert torch.autograd.gradcheck(lambda x: mdpo(x, previous, advantage, step_size=0.7).loss, logps)
    out = mdpo(logps, previous, advantage, step_size=0.7)
    out.loss.sum().backward()
    assert previous.grad is None
    assert advantage.grad is None
    assert not out.rewards.requires_grad


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mdpo(f64([0.0]), f64([0.0]), f64([0.0]), step_size=0.0), "step_size is 0.0: it must be positive"),
        (lambda: mdpo(f64([0.0]), f64([0.0, 1.0]), f64([0.0])), r"previous has shape \(2,\) and must have \(1,\)"),
        (lambda: mdpo(f64([0.0]), f64([0.0]), f64([[0.0]])), r"advantage has shape \(1, 1\)"),
        (lambda: mdpo(f64([[0.0]]), f64([[0.0]]), f64([[0.0]])), r"logps has shape \(1, 1\) and must have \(N,\)"),
        (lambda: mdpo(f64([0.0, float("nan")]), f64([0.0] * 2), f64([0.0] * 2)), r"logps\[1\] is nan"),
        (lambda: mdpo(f64([0.0]), f64([-float("inf")]), f64([0.0])), r"previous\[0\] is -inf"),
        (lambda: mdpo(f64([0.0]), f64([0.0]), f64([float("inf")])), r"advantage\[0\] is inf"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
