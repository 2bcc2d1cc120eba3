"""PAL: published vectors, the sign of its losses, identities of the ideal-point model."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.losses.preference import (
    pal_cross_entropy,
    pal_delta,
    pal_hinge,
    pal_logistic,
    pal_logits,
    token_weighted,
)


def f64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


WEIGHTS = torch.softmax(f64([0.3, -0.2]), 0)
LEFT, RIGHT = f64([[0.9, 0.1]]), f64([[0.2, 1.5]])
IDEAL = (WEIGHTS @ f64([[1.0, 0.0], [0.0, 2.0]]))[None]
NEITHER = torch.zeros(1, 2, dtype=torch.float64)


def test_ideal_point_vector():
    """W = softmax(.3, -.2), a = w P = (.622..., .755...). The left answer is nearer: delta < 0, and label -1 is right.

    Hinge 1 - y delta: .855... for y = -1 and 1.144... for y = +1; logistic log(1 + exp(-y delta)).
    """
    torch.testing.assert_close(WEIGHTS, f64([0.6224593312, 0.3775406688]), rtol=0, atol=1e-10)
    torch.testing.assert_close(IDEAL, f64([[0.6224593312, 0.7550813376]]), rtol=0, atol=1e-10)
    assert torch.linalg.vector_norm(LEFT - IDEAL).item() == pytest.approx(0.7114494934314505, rel=1e-12)
    assert torch.linalg.vector_norm(RIGHT - IDEAL).item() == pytest.approx(0.8563735750925815, rel=1e-12)
    delta = pal_delta(LEFT, RIGHT, IDEAL)
    assert delta.item() == pytest.approx(-0.14492408166113102, rel=1e-12)
    assert pal_delta(LEFT, RIGHT, IDEAL, squared=True).item() == pytest.approx(-0.22721531841298181, rel=1e-12)
    for label, hinge, logistic in (
        (-1, 0.855075918338869, 0.6233082190929368),
        (+1, 1.144924081661131, 0.7682323007540674),
    ):
        y = torch.tensor([label])
        assert pal_hinge(delta, y).loss.item() == pytest.approx(hinge, rel=1e-12)
        assert pal_logistic(delta, y).loss.item() == pytest.approx(logistic, rel=1e-12)
        gap = pal_logistic(delta, y).rewards
        assert (gap[:, 0] - gap[:, 1]).item() == pytest.approx(label * delta.item(), rel=1e-12)


def test_angle_vector():
    """Prompt maps (.5, .5, 0) and (0, -1, 1), the same w: logits 9.406... and 8.442..., P(right) = .276."""
    user = (WEIGHTS @ f64([[0.5, 0.5, 0.0], [0.0, -1.0, 1.0]]))[None]
    logits = pal_logits(f64([[0.4, 0.2, 0.1]]), f64([[-0.1, 0.3, 0.8]]), user, scale=1 / 0.07)
    torch.testing.assert_close(logits, f64([[9.4062406251, 8.4425353752]]), rtol=0, atol=1e-9)
    right = pal_cross_entropy(logits, torch.tensor([1]))
    assert right.loss.item() == pytest.approx(1.2868583197991021, rel=1e-12)
    assert torch.exp(-right.loss).item() == pytest.approx(0.2761369557652055, rel=1e-12)
    left = pal_cross_entropy(logits, torch.tensor([-1]))
    assert torch.exp(-left.loss).item() == pytest.approx(1 - 0.2761369557652055, rel=1e-12)
    assert torch.equal(right.rewards.flip(1), logits)
    assert torch.equal(left.rewards, logits)


def test_the_scale_is_clamped_at_a_hundred():
    x = f64([[1.0, 0.0]])
    assert pal_logits(x, -x, x, scale=1e6).tolist() == [[100.0, -100.0]]
    learnt = f64(5.0).requires_grad_()
    pal_logits(x, -x, x, scale=learnt.exp()).sum(-1).sum().backward()
    assert learnt.grad is not None


@pytest.mark.parametrize("loss", [pal_hinge, pal_logistic])
@pytest.mark.parametrize("label", [-1, 1])
def test_a_step_brings_the_preferred_answer_nearer(loss, label):
    """Descent takes the preferred answer's distance down and the other's up: dL/d(preferred distance) > 0."""
    distances = f64([0.9, 0.7]).requires_grad_()
    loss(distances[:1] - distances[1:], torch.tensor([label])).loss.sum().backward()
    preferred, other = (1, 0) if label == 1 else (0, 1)
    assert distances.grad[preferred].item() > 0
    assert distances.grad[other].item() == -distances.grad[preferred].item()


def test_distances_as_logits_have_the_wrong_sign():
    """Preferred at distance 0, the other at 1.3: ours is sigma(-1.3) = +.214, for a pair ranked right pulls little.

    The public logistic loss takes distances for logits: -sigma(1.3) = -.786, away from the preferred answer.
    """
    distances = f64([0.0, 1.3]).requires_grad_()
    pal_logistic(distances[:1] - distances[1:], torch.tensor([-1])).loss.sum().backward()
    assert distances.grad[0].item() == pytest.approx(0.2141650169574414, rel=1e-12)
    logits = f64([[0.0, 1.3]]).requires_grad_()
    pal_cross_entropy(logits, torch.tensor([-1])).loss.sum().backward()
    assert logits.grad[0, 0].item() == pytest.approx(-0.7858349830425586, rel=1e-12)


@pytest.mark.parametrize(
    ("margin", "loss"), [(-6.0, 4.5), (-4.0, 2.5), (-1.0, 0.4), (0.5, 0.025), (1.0, 0.0), (3.0, 0.0)]
)
def test_smooth_hinge(margin, loss):
    """Width 5: (1 - m)^2 / 10 from -4 to 1, and 1 - m - 2.5 under that, for either label."""
    for y in (-1, 1):
        out = pal_hinge(f64([y * margin]), torch.tensor([y]), smoothing=5.0)
        assert out.loss.item() == pytest.approx(loss, rel=1e-12, abs=1e-15)


@given(margin=st.floats(-1e3, 1e3), width=st.floats(1e-6, 10))
def test_smoothing_ends_in_the_hinge(margin, width):
    """It never differs from the hinge by more than half its width."""
    hinge, one = pal_hinge(f64([margin]), torch.tensor([1])).loss, torch.tensor([1])
    smooth = pal_hinge(f64([margin]), one, smoothing=width).loss
    assert -1e-9 <= (hinge - smooth).item() <= width / 2 + 1e-9


def test_token_weights():
    """(.4, .2, .9): mean .5, cumulative (.4 + .4 + 2.7) / 6 = .58333, last .9. The last is the last real one.

    What stands in the padding, on either side, is never read.
    """
    nan = float("nan")
    losses = f64([[0.4, 0.2, 0.9, 0.0, 0.0], [nan, 0.4, 0.2, 0.9, nan]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 0]])
    for weighting, expected in (("mean", 0.5), ("cumulative", 0.5833333333333334), ("last", 0.9)):
        assert token_weighted(losses, mask, weighting).tolist() == [pytest.approx(expected, rel=1e-12)] * 2
    assert torch.equal(token_weighted(losses, mask), token_weighted(losses, mask, "cumulative"))


def test_gradients_skip_the_padding():
    losses = f64([[0.4, 0.2, float("nan")]]).requires_grad_()
    token_weighted(losses, torch.tensor([[True, True, False]])).sum().backward()
    assert losses.grad.tolist() == [[pytest.approx(1 / 3), pytest.approx(2 / 3), 0.0]]


coordinates = st.lists(st.floats(-3, 3), min_size=2, max_size=2)


@given(left=coordinates, right=coordinates, ideal=coordinates)
def test_identities(left, right, ideal):
    """|l - a|^2 - |r - a|^2 = 2 <a, r - l> + |l|^2 - |r|^2; swapping the answers negates delta."""
    left, right, ideal = f64([left]), f64([right]), f64([ideal])
    expected = 2 * (ideal * (right - left)).sum(-1) + (left**2).sum(-1) - (right**2).sum(-1)
    torch.testing.assert_close(pal_delta(left, right, ideal, squared=True), expected, rtol=1e-9, atol=1e-12)
    delta, swapped = pal_delta(left, right, ideal), pal_delta(right, left, ideal)
    assert torch.equal(delta, -swapped)
    for loss in (pal_hinge, pal_logistic):
        ours, theirs = loss(delta, torch.tensor([1])), loss(swapped, torch.tensor([-1]))
        assert torch.equal(ours.loss, theirs.loss)
        assert torch.equal(ours.rewards, theirs.rewards)
    logits = pal_logits(left, right, ideal, scale=3.0)
    ours = pal_cross_entropy(logits, torch.tensor([1])).loss
    assert torch.equal(ours, pal_cross_entropy(logits.flip(1), torch.tensor([-1])).loss)
    torch.testing.assert_close(ours, pal_logistic(logits[:, 1] - logits[:, 0], torch.tensor([1])).loss)


@given(order=st.permutations(range(3)))
def test_prototypes_in_another_order(order):
    """Prototypes and weights permuted together are the same user."""
    prototypes, weights = f64([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.5]]), f64([0.2, 0.5, 0.3])
    base = pal_delta(LEFT, RIGHT, (weights @ prototypes)[None])
    torch.testing.assert_close(pal_delta(LEFT, RIGHT, (weights[order] @ prototypes[order])[None]), base)


def test_limits():
    """Identical answers: delta 0, loss 1 or log 2, and no gradient but a finite one, at the ideal point too."""
    answer = IDEAL.clone().requires_grad_()
    delta = pal_delta(answer, IDEAL, IDEAL)
    assert delta.item() == 0.0
    assert pal_hinge(delta, torch.tensor([1])).loss.item() == 1.0
    assert pal_logistic(delta, torch.tensor([1])).loss.item() == pytest.approx(math.log(2))
    pal_logistic(delta, torch.tensor([1])).loss.sum().backward()
    assert answer.grad.tolist() == [[0.0, 0.0]]
    assert pal_logistic(torch.tensor([-100.0]), torch.tensor([1])).loss.item() == 100.0
    far = torch.tensor([1e4, -1e4], requires_grad=True)
    for loss in (pal_hinge, pal_logistic):
        out = loss(far, torch.tensor([-1, -1])).loss
        assert torch.isfinite(out).all()
        assert torch.isfinite(torch.autograd.grad(out.sum(), far)[0]).all()
    assert torch.isfinite(pal_logits(NEITHER, LEFT, NEITHER, scale=1.0)).all()


def test_gradients_equal_finite_differences():
    delta, logits, y = f64([0.4, -0.7]).requires_grad_(), f64([[0.4, 1.0], [2.0, -1.0]]).requires_grad_(), [1, -1]
    y = torch.tensor(y)
    assert torch.autograd.gradcheck(lambda x: pal_hinge(x, y).loss, delta)
    assert torch.autograd.gradcheck(lambda x: pal_hinge(x, y, smoothing=0.5).loss, delta)
    assert torch.autograd.gradcheck(lambda x: pal_logistic(x, y).loss, delta)
    assert torch.autograd.gradcheck(lambda x: pal_cross_entropy(x, y).loss, logits)
    points = [x.clone().requires_grad_() for x in (LEFT, RIGHT, IDEAL)]
    assert torch.autograd.gradcheck(pal_delta, points)
    assert torch.autograd.gradcheck(lambda *x: pal_logits(*x, scale=2.0), points)


def test_bf16_inputs_compute_in_float32():
    for loss in (pal_hinge, pal_logistic):
        half = loss(torch.tensor([0.5], dtype=torch.bfloat16), torch.tensor([-1])).loss
        assert half.dtype == torch.float32
        assert torch.equal(half, loss(torch.tensor([0.5]), torch.tensor([-1])).loss)


ONE = torch.tensor([1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pal_hinge(f64([0.5, 0.5]), torch.tensor([1, 0])), r"label\[1\] is 0: -1 is the left answer"),
        (lambda: pal_logistic(f64([0.5]), torch.tensor([True])), r"label\[0\] is True"),
        (lambda: pal_logistic(f64([0.5]), torch.tensor([float("nan")])), r"label\[0\] is nan"),
        (lambda: pal_hinge(f64([0.5]), torch.tensor([1, 1])), r"label has shape \(2,\) and must have \(1,\)"),
        (lambda: pal_hinge(f64([float("inf")]), ONE), r"delta\[0\] is inf"),
        (lambda: pal_hinge(f64([[0.5]]), ONE), r"delta has shape \(1, 1\) and must have \(B,\)"),
        (lambda: pal_hinge(f64([0.5]), ONE, smoothing=-1.0), "smoothing is -1.0: it must not be negative"),
        (lambda: pal_cross_entropy(f64([[0.5]]), ONE), r"logits has shape \(1, 1\) and must have \(B, 2\)"),
        (lambda: pal_cross_entropy(f64([[0.5, float("nan")]]), ONE), r"logits\[0, 1\] is nan"),
        (lambda: pal_cross_entropy(f64([[0.5, 0.1]]), torch.tensor([2])), r"label\[0\] is 2"),
        (lambda: pal_delta(LEFT, RIGHT[0], IDEAL), r"right has shape \(2,\) and must have \(1, 2\)"),
        (lambda: pal_delta(LEFT, RIGHT, IDEAL * float("nan")), r"ideal\[0, 0\] is nan"),
        (lambda: pal_logits(LEFT, RIGHT, IDEAL, scale=0.0), "scale is 0.0: it must be positive"),
        (lambda: pal_logits(LEFT, RIGHT, IDEAL[0], scale=1.0), r"user has shape \(2,\)"),
        (lambda: pal_logits(LEFT, RIGHT, IDEAL, scale=f64([1.0, 2.0])), r"scale has shape \(2,\) and must have \(\)"),
        (lambda: pal_logits(LEFT, RIGHT, IDEAL, scale=1.0, eps=0.0), "eps is 0.0: it must be positive"),
        (lambda: pal_logits(LEFT, RIGHT, IDEAL, scale=1.0, eps=None), "eps is None: it must be a number"),
        (lambda: token_weighted(f64([[0.5]]), torch.tensor([[False]])), r"mask\[0\] has no true position"),
        (lambda: token_weighted(f64([[0.5]]), torch.tensor([True])), r"mask has shape \(1,\)"),
        (lambda: token_weighted(f64([0.5]), torch.tensor([True])), r"losses has shape \(1,\) and must have \(B, T\)"),
        (lambda: token_weighted(f64([[float("nan")]]), torch.tensor([[True]])), r"losses\[0, 0\] is nan"),
        (lambda: token_weighted(f64([[0.5]]), torch.tensor([[True]]), "first"), "it is one of mean, cumulative, last"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("squared", [False, True])
def test_distances_of_the_largest_vectors_are_taken_on(squared):
    """8 numbers of 1e6 against -1e6: 2e6 sqrt(8) = 5.66e6, squared 3.2e13; a delta may be that far out."""
    far = torch.full((1, 8), 1e6)
    delta = pal_delta(-far, far, far, squared=squared)
    assert delta.item() == pytest.approx(3.2e13 if squared else 2e6 * 8**0.5)
    for out in (pal_logistic(delta, ONE), pal_logistic(delta, -ONE), pal_hinge(delta, -ONE, smoothing=1e12)):
        assert torch.isfinite(out.loss).all()
    assert token_weighted(delta[:, None], torch.tensor([[True]])).item() == pytest.approx(delta.item())
