"""Rewards as log-probabilities: numbers by hand, the logic as laws, the posterior by counting every outcome."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from align.rewards.transforms import AllOf, AnyOf, Goal, LogSigmoidCentered, Not, RawSum, Weighted

A, B = LogSigmoidCentered("a", "a_ref"), LogSigmoidCentered("b", "b_ref")
C = LogSigmoidCentered("c", 0.0)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def columns(a: float, b: float, c: float = 0.0) -> dict[str, Tensor]:
    """Rewards that are a, b and c above their references."""
    return {"a": column(a + 2), "a_ref": column(2), "b": column(b - 1), "b_ref": column(-1), "c": column(c)}


def test_log_sigmoid_centred_and_its_slope():
    """By hand: u = -log(1 + exp(1 - r)) and du/dr = sigma(1 - r) at a reference of 1."""
    r = column(-2, 0, 1, 3, 10).requires_grad_()
    u = LogSigmoidCentered("r", 1.0)({"r": r})
    expected = column(-3.048587351574, -1.313261687518, -0.69314718056, -0.126928011043, -0.00012340219)
    torch.testing.assert_close(u, expected, rtol=1e-9, atol=1e-11)
    (slope,) = torch.autograd.grad(u.sum(), r)
    expected = column(0.952574126822, 0.73105857863, 0.5, 0.119202922022, 0.000123394576)
    torch.testing.assert_close(slope, expected, rtol=1e-9, atol=1e-11)


def test_temperature_makes_logits_of_rewards():
    """Reward 12 against 10 at temperature 2 is 1 against 0: -log(1 + e^-1) = -0.31326168751822286; so is a column."""
    columns = {"r": torch.tensor([12.0]), "q": torch.tensor([10.0])}
    for reference in (10.0, "q"):
        found = LogSigmoidCentered("r", reference, temperature=2.0)(columns)
        torch.testing.assert_close(found, torch.tensor([-0.31326168751822286]))
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"temperature of r is .*: it must be positive and finite"):
            LogSigmoidCentered("r", 0.0, temperature)


def test_far_from_the_reference_nothing_is_lost():
    """At r - r_ref = -1000 u is -1000 exactly; +50 is -exp(-50) = -1.93e-22; also in float32, and from bf16."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        u = C({"c": torch.tensor([-1000.0, 50.0], dtype=dtype)})
        assert u.dtype == torch.promote_types(dtype, torch.float32)
        assert float(u[0]) == -1000.0
        assert float(u[1]) == pytest.approx(-math.exp(-50), rel=1e-5)


def test_both_are_good():
    """By hand: log sigma(1) + log sigma(-1) = -.3132616875 - 1.3132616875."""
    assert float(AllOf([A, B])(columns(1, -1))) == pytest.approx(-1.6265233750364456, abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_of_two_unlikely_events_keeps_its_digits(dtype: torch.dtype):
    """Logits -30 and -31: log(1 - (1 - sigma(-30))(1 - sigma(-31))) = log(e^-30 + e^-31) = -29.68673831248188.

    The product of probabilities near 1 loses digits (-29.68667805), and at logits of -200 it is log 0.
    """
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    either = AnyOf([LogSigmoidCentered("a", 0.0), LogSigmoidCentered("b", 0.0)])
    two = {"a": torch.tensor([-30.0, -200.0], dtype=dtype), "b": torch.tensor([-31.0, -201.0], dtype=dtype)}
    expected = [-29.68673831248188, -200 + math.log1p(math.exp(-1))]
    assert either(two).tolist() == pytest.approx(expected, rel=tolerance)


def test_a_sum_of_rewards_ties_where_one_is_bad_and_goals_do_not():
    """(3, 3) and (8, -2) both sum to 6; both good has log-probability -.0971747 against -2.1272634."""
    rows = {"a": column(3, 8), "b": column(3, -2)}
    assert RawSum(["a", "b"])(rows).tolist() == [6, 6]
    assert RawSum(["a", "b"], [0.5, 2])(rows).tolist() == [7.5, 0]
    both = AllOf([LogSigmoidCentered("a", 0.0), LogSigmoidCentered("b", 0.0)])
    assert both(rows).tolist() == pytest.approx([-0.0971747, -2.1272634], abs=1e-7)


def optimum(pi0: Tensor, reward: Tensor, coefficient: float = 1.0) -> Tensor:
    """The policy that maximises E[reward] - coefficient KL(pi | pi0)."""
    return torch.softmax(pi0.log() + reward / coefficient, -1)


def kl(pi: Tensor, pi0: Tensor) -> float:
    return float((pi * (pi / pi0).log()).sum())


def test_aligned_policy_is_the_posterior():
    """At KL coefficient 1: pi0(y) sigma(r - 1) / Z, the policy given a good answer; raw r goes much further."""
    pi0, r = column(0.5, 0.3, 0.15, 0.05), column(-1, 0.5, 2, 6)
    raw = optimum(pi0, r)
    expected = column(0.008376753512, 0.022525202795, 0.050475477587, 0.918622566105)
    torch.testing.assert_close(raw, expected, rtol=1e-9, atol=1e-11)
    assert kl(raw, pi0) == pytest.approx(2.5264245316)
    aligned = optimum(pi0, LogSigmoidCentered("r", 1.0)({"r": r}))
    expected = column(0.179420977991, 0.340958333293, 0.330110813363, 0.149509875353)
    torch.testing.assert_close(aligned, expected, rtol=1e-9, atol=1e-11)
    assert kl(aligned, pi0) == pytest.approx(0.2839045393)
    good = pi0 * torch.sigmoid(r - 1)
    torch.testing.assert_close(aligned, good / good.sum())


numbers = st.floats(-8, 8)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["all", "any", "not", "nested"]))
def test_posterior_by_counting_every_outcome(seed: int, kind: str):
    """Each answer meets goals a, b, c independently with sigma(z): sum the eight outcomes in which the event holds."""
    generator = torch.Generator().manual_seed(seed)
    pi0 = torch.randn(5, generator=generator, dtype=torch.float64).softmax(-1)
    z = 3 * torch.randn(3, 5, generator=generator, dtype=torch.float64)
    shift = torch.randn(5, generator=generator, dtype=torch.float64)
    rows = {"a": z[0] + shift, "a_ref": shift, "b": z[1] - shift, "b_ref": -shift, "c": z[2]}
    goal, holds = {
        "all": (AllOf([A, B, C]), lambda a, b, c: a and b and c),
        "any": (AnyOf([A, B, C]), lambda a, b, c: a or b or c),
        "not": (Not(AnyOf([A, Not(B)])), lambda a, b, c: not (a or not b)),
        "nested": (AllOf([AnyOf([A, B]), Not(AllOf([C]))]), lambda a, b, c: (a or b) and not c),
    }[kind]
    p = torch.sigmoid(z)
    joint = torch.zeros(5, dtype=torch.float64)
    for outcome in itertools.product([True, False], repeat=3):
        if holds(*outcome):
            joint += torch.stack([p[i] if met else 1 - p[i] for i, met in enumerate(outcome)]).prod(0)
    posterior = pi0 * joint / (pi0 * joint).sum()
    aligned = optimum(pi0, goal(rows))
    torch.testing.assert_close(aligned, posterior, rtol=1e-9, atol=1e-12)
    for coefficient in (0.3, 2.0):
        tempered = pi0 * joint ** (1 / coefficient)
        expected = tempered / tempered.sum()
        torch.testing.assert_close(optimum(pi0, goal(rows), coefficient), expected, rtol=1e-9, atol=1e-12)
    # It is the optimum: no other policy has a greater E[u] - KL.
    other = torch.randn(5, generator=generator, dtype=torch.float64).softmax(-1)
    assert float(other @ goal(rows)) - kl(other, pi0) <= float(aligned @ goal(rows)) - kl(aligned, pi0) + 1e-12


@given(numbers, numbers, numbers)
def test_identities(r: float, reference: float, shift: float):
    """Of one reward: u <= 0; u(r) - u(2 ref - r) = r - ref; a constant on both changes nothing."""
    plain, moved = ({"a": column(r + c), "a_ref": column(reference + c)} for c in (0.0, shift))
    u = float(A(plain))
    assert u <= 0
    mirrored = {"a": column(2 * reference - r), "a_ref": column(reference)}
    assert u - float(A(mirrored)) == pytest.approx(r - reference, abs=1e-12)
    assert float(A(moved)) == pytest.approx(u, abs=1e-12)
    assert float(Not(A)(plain)) == pytest.approx(float(A(mirrored)), abs=1e-12)


@given(numbers, numbers, numbers)
def test_logic(a: float, b: float, c: float):
    rows = columns(a, b, c)

    def same(one: Goal, other: Goal) -> None:
        for way in (lambda goal: goal.log_true(rows), lambda goal: goal.log_false(rows)):
            torch.testing.assert_close(way(one), way(other), rtol=1e-10, atol=1e-12)

    same(AllOf([A, B, C]), AllOf([C, A, B]))
    same(AnyOf([A, B, C]), AnyOf([C, A, B]))
    same(Not(Not(A)), A)
    same(Not(AllOf([A, B])), AnyOf([Not(A), Not(B)]))
    same(AnyOf([A, AnyOf([B, C])]), AnyOf([A, B, C]))
    same(AllOf([A]), A)
    same(AnyOf([A]), A)
    p = AllOf([A, B, C])(rows)
    assert float(p) <= min(float(goal(rows)) for goal in (A, B, C))
    for goal in (A, AllOf([A, B]), AnyOf([A, Not(C)])):
        assert float(goal.log_true(rows).exp() + goal.log_false(rows).exp()) == pytest.approx(1, abs=1e-12)
    assert float(Weighted([A, B], [2, 1])(rows)) == pytest.approx(float(AllOf([A, A, B])(rows)))
    assert float(Weighted([A, B], [1, 0])(rows)) == float(A(rows))


def test_a_small_coefficient_picks_the_best():
    """The transform keeps the order: as the KL coefficient goes to 0 the policy goes to the answer of greatest r."""
    r = column(-1, 0.5, 2, 1.9)
    policy = optimum(column(0.4, 0.3, 0.1, 0.2), C({"c": r}), 1e-3)
    assert int(policy.argmax()) == 2
    assert float(policy.max()) > 0.99


def test_no_gradient_through_references():
    rows = {"a": column(1.0).requires_grad_(), "a_ref": column(0.5).requires_grad_()}
    Not(AllOf([A]))(rows).sum().backward()
    assert rows["a"].grad is not None
    assert rows["a_ref"].grad is None


def test_a_tie_with_the_reference():
    assert float(A(columns(0, 0))) == pytest.approx(math.log(0.5))


def test_goals_are_values():
    assert AllOf([A, Not(B)]) == AllOf((A, Not(B)))
    assert hash(AnyOf([A, B])) == hash(AnyOf([A, B]))
    with pytest.raises(AttributeError):
        A.reward = "b"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        (lambda: AllOf([]), "nothing to combine"),
        (lambda: AnyOf([]), "nothing to combine"),
        (lambda: RawSum([]), "nothing to combine"),
        (lambda: Weighted([A], [-1]), r"weights\[0\] is -1: it must not be negative; Not"),
        (lambda: Weighted([A], [math.nan]), "weights"),
        (lambda: Weighted([A, B], [1]), "1 weights for 2 parts"),
        (lambda: RawSum(["a"], [-1]), "must not be negative"),
        (lambda: LogSigmoidCentered("a", math.nan), "the reference of a is nan"),
    ],
)
def test_goals_that_cannot_be(goal, message: str):
    with pytest.raises(ValueError, match=message):
        goal()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"a": column(1)}, "no column 'a_ref' .* never taken as 0"),
        ({"a": column(1), "a_ref": None}, "no column 'a_ref'"),
        ({"a_ref": column(1)}, "no column 'a'"),
        ({"a": column(1, math.nan), "a_ref": column(1, 1)}, r"a\[1\] is nan"),
        ({"a": column(1, 1), "a_ref": column(1, math.inf)}, r"a_ref\[1\] is inf"),
        ({"a": column(1, 1), "a_ref": column(1)}, "a_ref has shape"),
        ({"a": torch.ones(1, 1), "a_ref": column(1)}, r"must have \(N,\)"),
    ],
)
def test_columns_that_cannot_be_used(rows: dict[str, Tensor], message: str):
    with pytest.raises(ValueError, match=message):
        A(rows)


def test_parts_of_other_sizes_do_not_broadcast():
    with pytest.raises(ValueError, match="part 1"):
        AllOf([LogSigmoidCentered("a", 0.0), C])({"a": column(1, 2), "c": column(1)})
    with pytest.raises(ValueError, match="part 1"):
        AnyOf([LogSigmoidCentered("a", 0.0), C])({"a": column(1, 2), "c": column(1)})


def test_a_weighted_sum_has_no_opposite():
    with pytest.raises(ValueError, match="has no opposite"):
        Not(Weighted([A], [2]))(columns(0, 0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AllOf(LogSigmoidCentered("a", 0.0)), "give a list"),
        (lambda: AnyOf(["a"]), "part 0 is 'a': it must be a goal"),
        (lambda: Not("a"), "what Not negates is 'a'"),
        (lambda: RawSum("ab"), "give a list"),
        (lambda: LogSigmoidCentered("a", None), "the reference of a is None: it must be a number"),
        (lambda: LogSigmoidCentered("a", 0.0, "1"), "the temperature of a is '1'"),
        (lambda: LogSigmoidCentered("a", 0.0)({"a": [1.0, 2.0]}), "a is a list: it must be a tensor"),
    ],
)
def test_what_is_no_goal_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
