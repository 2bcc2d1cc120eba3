"""Reward-model losses on scores and ratings: published vectors, optima, invariances."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.losses.catalogue import LOSSES
from align.losses.preference import (
    bradley_terry,
    centering,
    chosen_by_strength,
    margin_bradley_terry,
    regression,
    scaled_bradley_terry,
)


def f64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


DELTA, STRENGTH = f64([1.2, -0.4, 0.1]), f64([1.0, 2.0, 3.0])
REJECTED = f64([0.3, -2.0, 5.0])
CHOSEN = REJECTED + DELTA
NAN, INF = float("nan"), float("inf")


def gradient(loss, *arguments) -> torch.Tensor:
    """Gradient in the margin, which is that in the chosen scores."""
    chosen = CHOSEN.clone().requires_grad_()
    return torch.autograd.grad(loss(chosen, REJECTED, *arguments).loss.sum(), chosen)[0]


def test_published_vectors():
    """Margins (1.2, -.4, .1), strengths 1, 2, 3: log(1 + e^-d), log(1 + e^(m - d)) and m log(1 + e^-d)."""
    plain = bradley_terry(CHOSEN, REJECTED).loss
    torch.testing.assert_close(plain, f64([0.26328247, 0.91301525, 0.64439666]), rtol=0, atol=1e-8)
    assert plain.mean().item() == pytest.approx(0.6068981266038516, rel=1e-12)
    margin = margin_bradley_terry(CHOSEN, REJECTED, STRENGTH).loss
    torch.testing.assert_close(margin, f64([0.59813887, 2.48683615, 2.95356278]), rtol=0, atol=1e-8)
    assert margin.mean().item() == pytest.approx(2.012845932584501, rel=1e-12)
    scaled = scaled_bradley_terry(CHOSEN, REJECTED, STRENGTH).loss
    assert scaled.mean().item() == pytest.approx(1.340834317452883, rel=1e-12)
    normalised = scaled_bradley_terry(CHOSEN, REJECTED, STRENGTH, normalize_weights=True).loss
    assert normalised.mean().item() == pytest.approx(0.6704171587264415, rel=1e-12)


def test_published_gradients():
    """-sigma(-d), -sigma(m - d) and -m sigma(-d)."""
    for ours, published in (
        (gradient(bradley_terry), [-0.23147522, -0.59868766, -0.47502081]),
        (gradient(margin_bradley_terry, STRENGTH), [-0.450166, -0.9168273, -0.94784644]),
        (gradient(scaled_bradley_terry, STRENGTH), [-0.23147522, -1.19737532, -1.42506244]),
    ):
        torch.testing.assert_close(ours, f64(published), rtol=0, atol=1e-8)


def test_scaling_is_repeating_the_pair():
    """Pairs 1, 2, 2, 3, 3, 3: the sum 4.022502952358649 of the plain losses is that of the scaled ones."""
    repeated = torch.tensor([0, 1, 1, 2, 2, 2])
    total = bradley_terry(CHOSEN[repeated], REJECTED[repeated]).loss.sum().item()
    assert total == pytest.approx(4.022502952358649, rel=1e-12)
    assert scaled_bradley_terry(CHOSEN, REJECTED, STRENGTH).loss.sum().item() == pytest.approx(total, rel=1e-12)


def slope_at(delta: float, loss, *arguments, preference: float) -> float:
    score = f64([delta]).requires_grad_()
    out = loss(score, f64([0.0]), *arguments, f64([preference]))
    return torch.autograd.grad(out.loss.sum(), score)[0].item()


def test_optimum_under_label_noise():
    """One label in five wrong: the gap is log(.8/.2) = 1.3862943611, whatever the scaling.

    Where the noise is that of the logit d - m, a margin of 3 adds itself: 4.3862943611.
    """
    best = 1.3862943611198906
    assert slope_at(best, bradley_terry, preference=0.8) == pytest.approx(0.0, abs=1e-15)
    noisy = f64([best]).requires_grad_()
    scaled = 0.8 * scaled_bradley_terry(noisy, f64([0.0]), f64([3.0])).loss
    scaled = scaled + 0.2 * scaled_bradley_terry(f64([0.0]), noisy, f64([3.0])).loss
    soft = scaled_bradley_terry(noisy, f64([0.0]), f64([3.0]), f64([0.8])).loss
    assert soft.item() == pytest.approx(scaled.item(), rel=1e-12)
    assert torch.autograd.grad(scaled.sum(), noisy)[0].item() == pytest.approx(0.0, abs=1e-15)
    shifted = f64([4.3862943611198906]).requires_grad_()
    loss = (
        0.8 * margin_bradley_terry(shifted, f64([0.0]), f64([3.0])).loss
        + 0.2 * bradley_terry(f64([3.0]), shifted).loss
    )
    assert torch.autograd.grad(loss.sum(), shifted)[0].item() == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize(("p", "m"), [(0.8, 3.0), (0.8, 0.0), (0.5, 2.0), (0.3, 1.0)])
def test_optimum_of_soft_labels_with_a_margin(p, m):
    """Flipped labels ask for the margin the other way: p sigma(m - d) = (1 - p) sigma(m + d).

    With x = e^d and M = e^m: (1 - p) x^2 - (2p - 1) M x - p = 0. At m = 0 the log-odds, at p = 1/2 zero.
    """
    b = (2 * p - 1) * math.exp(m)
    x = (b + math.sqrt(b * b + 4 * p * (1 - p))) / (2 * (1 - p))
    assert slope_at(math.log(x), margin_bradley_terry, f64([m]), preference=p) == pytest.approx(0.0, abs=1e-14)


@pytest.mark.parametrize("loss", [bradley_terry, lambda c, r, *p: margin_bradley_terry(c, r, STRENGTH, *p)])
def test_soft_labels_are_the_expectation_over_both_orders(loss):
    p = f64([0.8, 0.5, 0.0])
    expected = p * loss(CHOSEN, REJECTED).loss + (1 - p) * loss(REJECTED, CHOSEN).loss
    torch.testing.assert_close(loss(CHOSEN, REJECTED, p).loss, expected)
    torch.testing.assert_close(loss(CHOSEN, REJECTED, torch.ones(3)).loss, loss(CHOSEN, REJECTED).loss)


@given(shift=st.floats(-100, 100), strength=st.floats(0, 3))
def test_identities(shift, strength):
    """M = 1: scaled is plain. m = 0: no gradient when scaled, plain with a margin. c(x) in both scores: nothing."""
    plain = bradley_terry(CHOSEN, REJECTED).loss
    ones, zeros = torch.ones(3), torch.zeros(3)
    assert torch.equal(scaled_bradley_terry(CHOSEN, REJECTED, ones).loss, plain)
    assert torch.equal(scaled_bradley_terry(CHOSEN, REJECTED, ones * 2, normalize_weights=True).loss, plain)
    assert gradient(scaled_bradley_terry, zeros).abs().max().item() == 0.0
    assert torch.equal(margin_bradley_terry(CHOSEN, REJECTED, zeros).loss, plain)
    m = torch.full((3,), strength, dtype=torch.float64)
    for loss, extra in ((bradley_terry, ()), (margin_bradley_terry, (m,)), (scaled_bradley_terry, (m,))):
        moved = loss(CHOSEN + shift, REJECTED + shift, *extra)
        torch.testing.assert_close(moved.loss, loss(CHOSEN, REJECTED, *extra).loss, rtol=1e-9, atol=1e-12)
        assert torch.equal(loss(-REJECTED, -CHOSEN, *extra).loss, loss(CHOSEN, REJECTED, *extra).loss)


def test_swap_is_the_loss_less_its_margin():
    """L(l, w) - L(w, l) = r_w - r_l."""
    swapped = bradley_terry(REJECTED, CHOSEN).loss
    torch.testing.assert_close(swapped - bradley_terry(CHOSEN, REJECTED).loss, DELTA)


def test_a_tie_has_no_chosen_answer():
    """Strengths -2, 0, 3: the first answer, neither, the second. NeMo takes a 0 for the second, with full weight."""
    scores = f64([1.0, 2.0, 3.0]), f64([-1.0, 9.0, 7.0])
    chosen, rejected, strength = chosen_by_strength(*scores, torch.tensor([-2, 0, 3]))
    assert chosen.tolist() == [1.0, 7.0]
    assert rejected.tolist() == [-1.0, 3.0]
    assert strength.tolist() == [2.0, 3.0]
    score = f64([2.0]).requires_grad_()
    tie = chosen_by_strength(score, f64([9.0]), f64([0.0]))
    for out in (bradley_terry(*tie[:2]), margin_bradley_terry(*tie), scaled_bradley_terry(*tie)):
        assert out.loss.shape == (0,)
    # A tie that is kept is a preference of 1/2: at equal scores it pushes neither up.
    assert slope_at(0.0, bradley_terry, preference=0.5) == 0.0


def test_regression_masks_what_nobody_rated():
    """Slots 4 to 8 are (3.2, 2, 3, 1, 1.5). Helpfulness 4 alone: .8^2 = .64. (4, 3, 4, 2, 1): 3.89 / 5 = .778."""
    outputs = f64([[9.0, 9.0, 9.0, 9.0, 3.2, 2.0, 3.0, 1.0, 1.5]] * 2).requires_grad_()
    labels = f64([[-100.0] * 4 + [4.0] + [-100.0] * 4, [-100.0] * 4 + [4.0, 3.0, 4.0, 2.0, 1.0]])
    out = regression(outputs, labels)
    torch.testing.assert_close(out.loss.detach(), f64([0.64, 0.778]), rtol=1e-12, atol=0)
    count = out.metrics["attributes"]
    assert count.tolist() == [1.0, 5.0]
    assert ((out.loss * count).sum() / count.sum()).item() == pytest.approx((0.64 + 3.89) / 6, rel=1e-12)
    out.loss.sum().backward()
    assert outputs.grad[0].nonzero().flatten().tolist() == [4]
    assert outputs.grad[0, 4].item() == pytest.approx(2 * -0.8, rel=1e-12)
    assert torch.equal(out.rewards, outputs.detach())


def test_regression_takes_whole_labels():
    assert regression(torch.tensor([[2.5, 1.0]]), torch.tensor([[4, -100]])).loss.item() == 2.25


def test_centering_by_hand():
    """(1.5 - .5)^2 = 1; scores of opposite sign cost nothing, and a constant of the prompt does."""
    assert centering(f64([1.5]), f64([-0.5])).loss.item() == 1.0
    assert centering(f64([2.0]), f64([-2.0])).loss.item() == 0.0
    assert centering(f64([3.0]), f64([-1.0])).loss.item() == 4.0


def test_rewards_are_the_scores():
    for out in (
        bradley_terry(CHOSEN, REJECTED),
        margin_bradley_terry(CHOSEN, REJECTED, STRENGTH),
        scaled_bradley_terry(CHOSEN, REJECTED, STRENGTH),
        centering(CHOSEN, REJECTED),
    ):
        assert torch.equal(out.chosen_rewards, CHOSEN)
        assert torch.equal(out.rejected_rewards, REJECTED)


PAIRED = {
    "bradley_terry": (),
    "margin_bradley_terry": (STRENGTH,),
    "scaled_bradley_terry": (STRENGTH,),
    "centering": (),
}


@pytest.mark.parametrize("name", list(PAIRED))
def test_gradients_rows_extremes_and_dtypes(name):
    """Finite differences; a row alone or in a batch; margins of 2e4; halves from bf16 as from float32."""
    loss, extra = LOSSES[name].function, PAIRED[name]
    inputs = [x.clone().requires_grad_() for x in (CHOSEN, REJECTED)]
    assert torch.autograd.gradcheck(lambda c, r: loss(c, r, *extra).loss, inputs)
    together = loss(CHOSEN, REJECTED, *extra).loss
    for row in range(3):
        alone = loss(CHOSEN[[row]], REJECTED[[row]], *(x[[row]] for x in extra)).loss
        assert torch.equal(alone[0], together[row])
    far = torch.tensor([1e4, -1e4, 0.0], requires_grad=True)
    out = loss(far, -far.detach(), *extra).loss
    assert torch.isfinite(out).all()
    assert torch.isfinite(torch.autograd.grad(out.sum(), far)[0]).all()
    halves = [torch.tensor(x) for x in ([1.5, -2.0, 0.0], [0.5, 4.0, -1.0])]
    half = loss(*(x.bfloat16() for x in halves), *extra).loss
    assert torch.equal(half, loss(*halves, *extra).loss)


def test_strengths_are_data():
    """No gradient goes through a margin or a strength."""
    m = STRENGTH.clone().requires_grad_()
    for loss in (margin_bradley_terry, scaled_bradley_terry):
        assert not loss(CHOSEN, REJECTED, m).loss.requires_grad


def test_regression_gradient():
    outputs = f64([[1.0, 2.0], [0.5, -1.0]]).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: regression(x, f64([[4.0, -100.0], [1.0, 2.0]])).loss, outputs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bradley_terry(CHOSEN, REJECTED[:2]), r"rejected has shape \(2,\) and must have \(3,\)"),
        (lambda: bradley_terry(CHOSEN[:, None], REJECTED), r"chosen has shape \(3, 1\) and must have \(B,\)"),
        (lambda: bradley_terry(f64([0.0, NAN]), f64([0.0, 0.0])), r"chosen\[1\] is nan: it must be finite"),
        (lambda: bradley_terry(f64([0.0]), f64([-INF])), r"rejected\[0\] is -inf"),
        (lambda: bradley_terry(CHOSEN, REJECTED, f64([0.5, 1.1, 0.0])), r"preference\[1\] is 1.1: a probability"),
        (lambda: bradley_terry(CHOSEN, REJECTED, f64([0.5])), r"preference has shape \(1,\)"),
        (lambda: margin_bradley_terry(CHOSEN, REJECTED, -STRENGTH), r"margin\[0\] is -1.0: it must not be negative"),
        (lambda: margin_bradley_terry(CHOSEN, REJECTED, STRENGTH[:1]), r"margin has shape \(1,\)"),
        (lambda: margin_bradley_terry(CHOSEN, REJECTED, STRENGTH * NAN), r"margin\[0\] is nan"),
        (lambda: scaled_bradley_terry(CHOSEN, REJECTED, f64([1.0, 1.0, -0.5])), r"strength\[2\] is -0.5"),
        (lambda: scaled_bradley_terry(CHOSEN, REJECTED, f64([1.0, INF, 1.0])), r"strength\[1\] is inf"),
        (
            lambda: scaled_bradley_terry(CHOSEN, REJECTED, torch.zeros(3), normalize_weights=True),
            "strength is 0 in every row",
        ),
        (lambda: chosen_by_strength(CHOSEN, REJECTED, f64([1.0, -4.0, 0.0])), r"strength\[1\] is -4.0.*\[-3, 3\]"),
        (lambda: chosen_by_strength(CHOSEN, REJECTED, f64([1.0])), r"strength has shape \(1,\)"),
        (lambda: chosen_by_strength(CHOSEN, REJECTED[:1], STRENGTH), r"second_score has shape \(1,\)"),
        (lambda: regression(f64([1.0]), f64([1.0])), r"predictions has shape \(1,\) and must have \(B, A\)"),
        (lambda: regression(f64([[1.0]]), f64([[1.0, 2.0]])), r"labels has shape \(1, 2\)"),
        (lambda: regression(f64([[1.0], [2.0]]), f64([[1.0], [-100.0]])), r"labels\[1\] is -100 throughout"),
        (lambda: regression(f64([[NAN]]), f64([[1.0]])), r"predictions\[0, 0\] is nan"),
        (lambda: regression(f64([[1.0]]), f64([[NAN]])), r"labels\[0, 0\] is nan"),
        (lambda: centering(f64([1.0]), f64([NAN])), r"rejected\[0\] is nan"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_table_has_them():
    for name in (*PAIRED, "regression", "gpm", "pal_hinge", "pal_logistic", "pal_cross_entropy"):
        info = LOSSES[name]
        assert info.kind == "reward"
        assert info.laws is not None
        assert info.default_beta is None
    assert not LOSSES["centering"].ranks
