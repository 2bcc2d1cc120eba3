"""GPM: published vectors, the symmetries of its score, and that cycles are learnt."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.losses.preference import bradley_terry, gpm, gpm_scale, gpm_score, unit_norm


def f64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_score_in_one_block():
    """A = (.6, .8), b = (-.8, .6): .36 + .64 = 1, and -1 the other way; (1.3, 2) and (.4, 2): 2.6 - .8 = 1.8."""
    a, b = f64([[0.6, 0.8]]), f64([[-0.8, 0.6]])
    assert gpm_score(a, b).item() == pytest.approx(1.0, rel=1e-12)
    assert gpm_score(b, a).item() == pytest.approx(-1.0, rel=1e-12)
    assert gpm_score(f64([1.3, 2.0]), f64([0.4, 2.0])).item() == pytest.approx(1.8, rel=1e-12)


def test_bradley_terry_is_a_special_case():
    """V = (r, c): s = c (r_i - r_j)."""
    rewards, c = f64([1.3, 0.4, -2.0]), 2.0
    v = torch.stack([rewards, torch.full_like(rewards, c)], -1)
    torch.testing.assert_close(gpm_score(v[:, None], v[None]), c * (rewards[:, None] - rewards))


def test_score_and_loss_in_two_blocks():
    """Blocks .5 * .4 + .2 * .1 = .22 and .3 * .2 + .7 * .6 = .48: s = .7; scales (.5, 1.5) give .11 + .72 = .83.

    At tau .1 the probability is sigma(7) = .99909, and the loss log(1 + e^-7).
    """
    chosen, rejected = f64([[0.5, -0.2, 0.3, 0.7]]), f64([[0.1, 0.4, -0.6, 0.2]])
    assert gpm_score(chosen, rejected).item() == pytest.approx(0.7, rel=1e-12)
    assert gpm_score(chosen, rejected, f64([[0.5, 1.5]])).item() == pytest.approx(0.83, rel=1e-12)
    out = gpm(chosen, rejected, tau=0.1)
    assert out.loss.item() == pytest.approx(9.114664537742447e-4, rel=1e-12)
    gap = out.chosen_rewards - out.rejected_rewards
    assert torch.sigmoid(gap).item() == pytest.approx(0.9990889488055994, rel=1e-12)
    single = gpm(chosen.float(), rejected.float(), tau=0.1).loss
    assert single.item() == pytest.approx(9.1146649e-4, rel=1e-6)


def test_a_cycle_has_scores():
    """Unit vectors at 0, 120 and 240 degrees: each beats the next by sin 120 = .8660254037844386."""
    v = torch.stack([f64([math.cos(t), math.sin(t)]) for t in (0, 2 * math.pi / 3, 4 * math.pi / 3)])
    for i in range(3):
        assert gpm_score(v[i], v[(i + 1) % 3]).item() == pytest.approx(0.8660254037844386, rel=1e-12)


@given(upper=st.lists(st.floats(-5, 5), min_size=6, max_size=6))
def test_any_antisymmetric_table_is_a_score(upper):
    """Four answers and 2K = 8 numbers: v_i has 1 in the first place of block i and S_li / 2 in the second of l."""
    table = torch.zeros(4, 4, dtype=torch.float64)
    i, j = torch.triu_indices(4, 4, 1)
    table[i, j] = f64(upper)
    table = table - table.T
    v = torch.stack([torch.eye(4, dtype=torch.float64), table.T / 2], -1).flatten(1)
    torch.testing.assert_close(gpm_score(v[:, None], v[None]), table, rtol=0, atol=1e-300)  # half a denormal is 0


def test_scales_from_the_gate():
    """Logits (2, -1, .5): the softmax, of sum 1, and the training formula softmax(l / sqrt 2048) * 3, of mean 1."""
    logits = f64([2.0, -1.0, 0.5])
    scoring = f64([0.7855970346, 0.0391125733, 0.1752903921])
    training = f64([1.0333226179, 0.9670434925, 0.9996338896])
    torch.testing.assert_close(gpm_scale(logits), scoring, rtol=0, atol=1e-10)
    torch.testing.assert_close(gpm_scale(logits, temperature=math.sqrt(2048), total=3), training, rtol=0, atol=1e-10)


def test_bradley_terry_learns_nothing_of_a_cycle_and_gpm_all():
    """A > B > C > A: at equal scores Bradley-Terry's gradient is 0 and its loss log 2; GPM ends at 120 degrees."""
    scores = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    loss = bradley_terry(scores, scores.roll(-1)).loss
    torch.testing.assert_close(loss, torch.full((3,), math.log(2), dtype=torch.float64))
    (gradient,) = torch.autograd.grad(loss.mean(), scores)
    assert gradient.abs().max().item() < 1e-15
    v = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for _ in range(500):
        (gradient,) = torch.autograd.grad(gpm(unit_norm(v), unit_norm(v).roll(-1, 0), tau=1.0).loss.mean(), v)
        v = (v - gradient).detach().requires_grad_()
    w = unit_norm(v).detach()
    torch.testing.assert_close(gpm_score(w, w.roll(-1, 0)), torch.full((3,), math.sin(2 * math.pi / 3)).double())


vectors = st.lists(st.floats(-3, 3), min_size=4, max_size=4)


@given(a=vectors, b=vectors, angles=st.tuples(st.floats(-4, 4), st.floats(-4, 4)), tau=st.floats(0.05, 5))
def test_symmetries(a, b, angles, tau):
    """Turning each block of both by one angle changes nothing; swapping negates, exactly; P + P' = 1."""
    a, b, scale = f64([a]), f64([b]), f64([[0.5, 1.5]])
    cos, sin = torch.cos(f64(angles)), torch.sin(f64(angles))
    turn = torch.block_diag(
        *(torch.stack([torch.stack([c, -s]), torch.stack([s, c])]) for c, s in zip(cos, sin, strict=True))
    )
    torch.testing.assert_close(gpm_score(a @ turn.T, b @ turn.T, scale), gpm_score(a, b, scale), rtol=0, atol=1e-12)
    assert torch.equal(gpm_score(a, b, scale), -gpm_score(b, a, scale))
    assert gpm_score(a, a, scale).item() == 0.0
    out, swapped = gpm(a, b, scale, tau=tau), gpm(b, a, scale, tau=tau)
    assert torch.exp(-out.loss).item() + torch.exp(-swapped.loss).item() == pytest.approx(1.0, rel=1e-12)
    assert torch.equal(out.rewards, -swapped.rewards)
    scaled = gpm(a, b, scale * 3, tau=tau * 3)
    torch.testing.assert_close(scaled.loss, out.loss)


def test_soft_labels_are_the_expectation_over_both_orders():
    a, b, p = f64([[0.5, -0.2, 0.3, 0.7]]), f64([[0.1, 0.4, -0.6, 0.2]]), f64([0.3])
    expected = 0.3 * gpm(a, b).loss + 0.7 * gpm(b, a).loss
    torch.testing.assert_close(gpm(a, b, None, p).loss, expected)
    torch.testing.assert_close(gpm(a, b, None, f64([1.0])).loss, gpm(a, b).loss)


def test_a_learnt_temperature_is_a_scale():
    """1/tau as the one scale of all blocks: the loss is that of tau, and its gradient that of finite differences."""
    a, b = f64([[0.5, -0.2, 0.3, 0.7]]), f64([[0.1, 0.4, -0.6, 0.2]])
    tau = f64(0.4).requires_grad_()

    def loss(tau: torch.Tensor) -> torch.Tensor:
        return gpm(a, b, (1 / tau).expand(1, 2), tau=1.0).loss

    torch.testing.assert_close(loss(tau).detach(), gpm(a, b, tau=0.4).loss)
    assert torch.autograd.gradcheck(loss, tau)


def test_gradient_equals_finite_differences():
    inputs = [f64(x).requires_grad_() for x in ([[0.5, -0.2, 0.3, 0.7]], [[0.1, 0.4, -0.6, 0.2]], [[0.5, 1.5]])]
    assert torch.autograd.gradcheck(lambda a, b, s: gpm(a, b, s, f64([0.8]), tau=0.3).loss, inputs)


def test_unit_norm_is_of_each_position_by_itself():
    """(3, 4) has length 5. Positions do not touch each other, and a zero vector stays zero, with a gradient."""
    v = f64([[[3.0, 4.0], [0.0, 0.0]], [[0.0, 2.0], [1e-9, 0.0]]]).requires_grad_()
    unit = unit_norm(v)
    torch.testing.assert_close(unit.detach()[:, 0], f64([[0.6, 0.8], [0.0, 1.0]]))
    assert unit[0, 1].tolist() == [0.0, 0.0]
    torch.testing.assert_close(unit_norm(v.detach()[:, :1]), unit.detach()[:, :1])
    unit.sum().backward()
    assert torch.isfinite(v.grad).all()


def test_extremes_and_dtypes():
    """Products of bf16 numbers are exact in float32; embeddings of 1e4 give finite losses and gradients."""
    a, b = torch.tensor([[1.5, -0.25]]), torch.tensor([[0.5, 2.0]])
    half = gpm(a.bfloat16(), b.bfloat16(), tau=4.0).loss
    assert half.dtype == torch.float32
    assert torch.equal(half, gpm(a, b, tau=4.0).loss)
    far = (a * 1e4).requires_grad_()
    for pair in ((far, b * 1e4), (b * 1e4, far)):
        loss = gpm(*pair).loss
        loss.sum().backward()
        assert torch.isfinite(loss).all()
        assert torch.isfinite(far.grad).all()
    rows = torch.randn(3, 4)
    together = gpm(rows, rows.roll(1, 0)).loss
    for row in range(3):
        assert torch.equal(gpm(rows[[row]], rows.roll(1, 0)[[row]]).loss[0], together[row])


V = f64([[1.0, 0.0], [0.0, 1.0]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gpm(V, V, tau=0.0), "tau is 0.0: it must be positive"),
        (lambda: gpm(V, V[:1]), r"rejected_embedding has shape \(1, 2\) and must have \(2, 2\)"),
        (lambda: gpm(V[0], V[0]), r"chosen_embedding has shape \(2,\) and must have \(B, D\)"),
        (lambda: gpm(f64([[1.0]]), f64([[1.0]])), r"chosen_embedding has shape \(1, 1\).*D even"),
        (lambda: gpm(torch.zeros(1, 3), torch.zeros(1, 3)), "D even"),
        (lambda: gpm(V, V, f64([[1.0], [-0.5]])), r"scale\[1, 0\] is -0.5: it must not be negative"),
        (lambda: gpm(V, V, f64([[1.0]])), r"scale has shape \(1, 1\) and must have \(2, 1\)"),
        (lambda: gpm(V, V, None, f64([0.5, 1.5])), r"preference\[1\] is 1.5: a probability"),
        (lambda: gpm(V, V, None, f64([0.5])), r"preference has shape \(1,\)"),
        (lambda: gpm(V * float("nan"), V), r"chosen_embedding\[0, 0\] is nan"),
        (lambda: gpm_score(V, f64([[1.0, 0.0, 0.0, 0.0]])), "2 and 4 numbers"),
        (lambda: gpm_score(V, torch.zeros(3, 2)), r"leading dimensions \(2,\) and \(3,\), which do not fit"),
        (lambda: gpm_score(V, V, f64([1.0, 1.0])), r"scale has shape \(2,\) and must have \(..., 1\)"),
        (lambda: gpm_score(V, V, f64([[float("inf")]])), r"scale\[0, 0\] is inf"),
        (lambda: gpm_scale(f64([float("nan")])), r"logits\[0\] is nan"),
        (lambda: gpm_scale(f64([0.0]), temperature=0), "temperature is 0"),
        (lambda: gpm_scale(f64([0.0]), total=-1.0), "total is -1.0"),
        (lambda: unit_norm(V * float("inf")), r"embeddings\[0, 0\] is inf"),
        (lambda: unit_norm(V, eps=0.0), "eps is 0.0"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
