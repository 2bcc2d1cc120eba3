"""The loss that a formula compiles to: equal to the losses written by hand, and honest about its limits."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import align.losses as by_hand
from align.losses import Loss, PairLogps, SequenceLogps, combine
from align.losses.logic import FormulaError, LogicLoss, logic

CPO = {"logic": "implies(M(l), M(w))", "where": "or(M(w), M(l))", "also": "and(M(w), M(l))"}
ORPO = {"logic": "implies(M(l), M(w))", "where": "xor(M(w), M(l))"}
CCPO = {"logic": "implies(M(l), M(w))", "where": "or(M(w), M(l))"}
UNCPO = {"logic": "implies(M(l), M(w))"}
DPO = {
    "logic": "implies(and(Ref(w), M(l)), and(Ref(l), M(w)))",
    "where": "or(and(Ref(w), M(l)), and(Ref(l), M(w)))",
    "also": "and(M(w), M(l), Ref(w), Ref(l))",
}
CE = {"logic": "M(w)"}


def pairs(
    w: list[float], lost: list[float], n: list[int], m: list[int], dtype: torch.dtype = torch.float64
) -> PairLogps:
    def one(total: list[float], length: list[int]) -> SequenceLogps:
        return SequenceLogps(torch.tensor(total, dtype=dtype, requires_grad=True), torch.tensor(length))

    return PairLogps(one(w, n), one(lost, m))


def of(w: float, lost: float) -> PairLogps:
    """One pair of one token each with these probabilities."""
    return pairs([math.log(w)], [math.log(lost)], [1], [1])


def value(policy: PairLogps, reference: PairLogps | None = None, **arguments: object) -> float:
    return LogicLoss(**arguments)(policy, reference).loss.item()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("f", "beta", "expected"),
    [
        ("logistic", 0.1, 0.6730794135),
        ("logistic", 1.0, 0.5108256238),
        ("squared", 0.1, 21.1097508),
        ("squared", 1.0, 0.0089368458),
        ("hinge", 0.1, 0.0),
        ("hinge", 1.0, 0.5945348919),
        ("rrhf", 1.0, 0.0),
    ],
)
def test_the_four_outer_functions_on_cpo(f: str, beta: float, expected: float) -> None:
    """Rho = log .3/.2 = .405465; the squared aim is 1/(2 beta), the hinge's margin is beta."""
    assert value(of(0.3, 0.2), **CPO, f=f, beta=beta) == pytest.approx(expected, rel=2e-8, abs=1e-12)


def test_rrhf_of_a_pair_ranked_wrong() -> None:
    """Rho = log .2/.3: max(0, -rho) = .405465."""
    assert value(of(0.2, 0.3), **CPO, f="rrhf") == pytest.approx(math.log(1.5), rel=1e-14)


def test_semantic_loss() -> None:
    """Without where and also, at beta 1, -log sigma(rho) = -log WMC(P); P = l -> w is 1 - .2 * .7 = .86."""
    assert value(of(0.3, 0.2), **UNCPO) == pytest.approx(-math.log(0.86), rel=1e-13)


total = st.floats(-400, -1e-3)
length = st.integers(1, 60)
SAME = [
    (CPO, "logistic", "sum", lambda p, r, b: by_hand.cpo(p, beta=b, sft_weight=0.0), None),
    (CPO, "logistic", "mean", lambda p, r, b: by_hand.simpo(p, beta=b, gamma=0.0), None),
    (CPO, "hinge", "sum", lambda p, r, b: by_hand.slic_hf(p, delta=b, sft_weight=0.0), None),
    (CE, "logistic", "mean", lambda p, r, b: by_hand.sft(p), 1.0),
    (ORPO, "logistic", "mean", lambda p, r, b: by_hand.orpo(p, odds_weight=1.0, sft_weight=0.0), 1.0),
    (DPO, "logistic", "sum", lambda p, r, b: by_hand.dpo(p, r, beta=b), None),
    (DPO, "logistic", "mean", lambda p, r, b: by_hand.ln_dpo(p, r, beta=b), None),
    (DPO, "squared", "sum", lambda p, r, b: by_hand.ipo(p, r, beta=b), None),
    (DPO, "squared", "mean", lambda p, r, b: by_hand.ipo_per_token(p, r, beta=b), None),
    (DPO, "hinge", "sum", lambda p, r, b: by_hand.slic(p, r, beta=b), 1.0),
]


@pytest.mark.parametrize(
    ("formula", "f", "norm", "hand", "only"), SAME, ids=[f"{s[1]}-{s[2]}-{i}" for i, s in enumerate(SAME)]
)
@settings(max_examples=50)
@given(w=total, lost=total, rw=total, rl=total, n=length, m=length, beta=st.sampled_from([0.05, 0.5, 1.0, 3.0]))
def test_known_losses_equal_the_hand_written_ones(formula, f, norm, hand, only, w, lost, rw, rl, n, m, beta) -> None:
    """Values and gradients to 1e-12 in float64, answers of 400 nats included; what ``known.SAME`` says is true."""
    beta = only or beta
    outputs, gradients = [], []
    for loss in (lambda p, r: logic(p, r, **formula, f=f, norm=norm, beta=beta), lambda p, r: hand(p, r, beta)):
        policy, reference = pairs([w], [lost], [n], [m]), pairs([rw], [rl], [n], [m])
        outputs.append(loss(policy, reference))
        inputs = [policy.chosen.total, policy.rejected.total]
        gradients.append(torch.autograd.grad(outputs[-1].loss.sum(), inputs, allow_unused=True))
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(*gradients, strict=True):
        # A loss that never reads an answer has no gradient there, and torch gives 0 or None.
        ours, theirs = (torch.zeros(1, dtype=torch.float64) if g is None else g for g in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("formula", "norm", "hand"),
    [
        (CPO, "sum", lambda p, r: by_hand.cpo(p, beta=0.5, sft_weight=0.0)),
        (DPO, "sum", lambda p, r: by_hand.dpo(p, r, beta=0.5)),
        (DPO, "mean", lambda p, r: by_hand.ln_dpo(p, r, beta=0.5)),
    ],
    ids=["CPO", "DPO", "LN-DPO"],
)
def test_rewards_are_those_of_the_hand_written_losses(formula, norm, hand) -> None:
    policy = pairs([-300.0, -20.0], [-310.0, -10.0], [100, 7], [90, 9])
    reference = pairs([-301.5, -21.0], [-309.0, -10.5], [100, 7], [90, 9])
    ours = logic(policy, reference, **formula, norm=norm, beta=0.5)
    torch.testing.assert_close(ours.rewards, hand(policy, reference).rewards, rtol=1e-12, atol=1e-12)


def test_rewards_of_orpo_are_log_odds() -> None:
    out = logic(of(0.3, 0.2), **ORPO, beta=1.0)
    assert out.rewards[0].tolist() == pytest.approx([math.log(0.3 / 0.7), math.log(0.2 / 0.8)], rel=1e-14)


@pytest.mark.parametrize(("f", "scale"), [("logistic", 0.5), ("squared", 0.5), ("hinge", 1.0), ("rrhf", 1.0)])
def test_the_rewards_margin_is_the_losss_own(f: str, scale: float) -> None:
    """UnCPO is no sum over answers: the rewards are the logarithms of .86 and .14, and rho is their difference."""
    out = logic(of(0.3, 0.2), **UNCPO, f=f, beta=0.5)
    margin = (out.chosen_rewards - out.rejected_rewards).item()
    assert margin == pytest.approx(scale * math.log(0.86 / 0.14), rel=1e-12)
    assert not out.rewards.requires_grad


def test_300_nats_in_float32() -> None:
    """Whole answers that differ by half a nat: log-ratios of .5 and -.25 survive sums of 1e4 nats."""
    policy = pairs([-10000.5], [-9000.0], [900], [800], torch.float32)
    reference = pairs([-10001.0], [-8999.75], [900], [800], torch.float32)
    out = logic(policy, reference, **DPO, norm="sum", beta=1.0)
    assert out.rewards.tolist() == [[0.5, -0.25]]


def test_no_gradient_flows_into_the_reference() -> None:
    policy, reference = of(0.3, 0.2), of(0.25, 0.4)
    logic(policy, reference, **DPO, beta=1.0).loss.sum().backward()
    assert policy.chosen.total.grad is not None
    assert reference.chosen.total.grad is None
    assert reference.rejected.total.grad is None


@pytest.mark.parametrize("formula", [UNCPO, CCPO, ORPO, CPO, DPO], ids=["unCPO", "cCPO", "ORPO", "CPO", "DPO"])
@pytest.mark.parametrize("norm", ["mean", "sum"])
@pytest.mark.filterwarnings("ignore:logic")
def test_finite_where_a_model_is_sure_or_hopeless(formula, norm) -> None:
    """Probabilities 1 and exp(-1e4), in float32 and float64: value and gradient are finite."""
    for dtype in (torch.float32, torch.float64):
        policy = pairs([0.0, 0.0, -1e4, -1e4], [0.0, -1e4, 0.0, -1e4], [1] * 4, [1] * 4, dtype)
        out = logic(policy, pairs([-1.0] * 4, [-1.0] * 4, [1] * 4, [1] * 4, dtype), **formula, norm=norm, beta=1.0)
        out.loss.sum().backward()
        assert torch.isfinite(out.loss).all()
        assert torch.isfinite(policy.chosen.total.grad).all()
        assert torch.isfinite(policy.rejected.total.grad).all()


@pytest.mark.parametrize("f", ["logistic", "squared"])
@pytest.mark.parametrize("formula", [UNCPO, CCPO, ORPO, DPO], ids=["unCPO", "cCPO", "ORPO", "DPO"])
def test_gradient_equals_finite_differences(formula, f) -> None:
    reference = pairs([-2.2, -6.0], [-3.8, -1.0], [3, 6], [5, 2])

    def function(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        policy = PairLogps(SequenceLogps(chosen, torch.tensor([3, 6])), SequenceLogps(rejected, torch.tensor([5, 2])))
        return logic(policy, reference, **formula, f=f, beta=0.7).loss

    inputs = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in ([-1.7, -7.0], [-4.1, -0.5])]
    assert torch.autograd.gradcheck(function, inputs)


def test_more_than_two_answers() -> None:
    """The first or the second is accepted, where the third is not: P = (1 - (1-.3)(1-.2)) / ((1-.3)(1-.2))."""
    group = SequenceLogps(torch.log(torch.tensor([[0.3, 0.2, 0.6]], dtype=torch.float64)), torch.ones(1, 3))
    loss = LogicLoss("M(1) | M(2)", where="~M(3)", f="rrhf", norm="mean")
    out = LogicLoss("M(1) | M(2)", where="~M(3)", f="hinge", beta=5.0)(group, None)
    assert out.loss.item() == pytest.approx(5 - math.log(0.44 / 0.56), rel=1e-12)
    assert loss(group, None).loss.item() == pytest.approx(-math.log(0.44 / 0.56), rel=1e-12)
    assert out.rewards[0].exp().tolist() == pytest.approx([0.3, 0.2, 0.6], rel=1e-12)


def test_rewards_of_many_answers_are_log_ratios_where_there_is_a_reference() -> None:
    policy = SequenceLogps(torch.tensor([[-2.0, -4.0, -6.0]]), torch.tensor([[1, 2, 2]]))
    reference = SequenceLogps(torch.tensor([[-1.0, -6.0, -6.0]]), torch.tensor([[1, 2, 2]]))
    out = LogicLoss("implies(and(Ref(1), M(2)), and(Ref(2), M(1)))", beta=0.5)(policy, reference)
    assert out.rewards.tolist() == [[-0.5, 0.5, 0.0]]


def test_numbers_name_the_answers_of_a_pair() -> None:
    lettered, numbered = LogicLoss("implies(M(l), M(w))"), LogicLoss("implies(M(2), M(1))")
    assert numbered(of(0.3, 0.2), None).loss.item() == lettered(of(0.3, 0.2), None).loss.item()
    assert numbered.report().name == "unCPO"


def test_a_logic_loss_is_a_loss() -> None:
    """It stands wherever a Loss stands: ``Loss.of``, ``combine``, a copy; and its terms add up."""
    loss = LogicLoss(**ORPO, weight=0.5)
    assert Loss.of(loss) is loss
    assert not loss.reference
    assert LogicLoss(**DPO).reference
    assert Loss.of("logic", **DPO).reference
    assert Loss.of("logic", **ORPO).settings["beta"] == 1.0
    policy = of(0.3, 0.2)
    out = combine([loss, Loss.of("sft", weight=2.0)], policy, None)
    assert out.loss.item() == pytest.approx(0.5 * 0.4595323294 - 2 * math.log(0.3), abs=1e-10)
    assert out.metrics["loss/logic"].item() == pytest.approx(0.4595323294, abs=1e-10)
    assert copy.deepcopy(loss)(policy, None).loss.item() == loss(policy, None).loss.item()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogicLoss("implies(M(l), M(w)"), "logic: column 19: '\\)' is missing"),
        (lambda: LogicLoss("M(w) | ~M(w)"), "logic: is a tautology"),
        (lambda: LogicLoss("M(w)", where="M(w) & ~M(w)"), "where: is true in no world"),
        (lambda: LogicLoss("M(w)", f="logit"), "f is 'logit'; it is one of logistic, squared, hinge, rrhf"),
        (lambda: LogicLoss("M(w)", norm="total"), "norm is 'total'; it is one of mean, sum"),
        (lambda: LogicLoss("M(w)", beta=0.0), "beta is 0.0: it must be positive"),
        (
            lambda: LogicLoss("M(1)")(SequenceLogps(-torch.ones(1, 3), torch.ones(1, 3)), None, torch.ones(1)),
            "preference: soft labels are of pairs",
        ),
        (
            lambda: LogicLoss("M(w)")(pairs([-1.0], [2.1], [2], [2]), None),
            r"policy.rejected: total\[0\] is 2.1, and log-probs are at most 0: were negative log-likelihoods passed",
        ),
        (
            lambda: LogicLoss("M(1)")(SequenceLogps(torch.ones(1, 3), torch.ones(1, 3)), None),
            r"policy: total\[0, 0\] is 1, and log-probs are at most 0",
        ),
        (lambda: LogicLoss(**DPO)(of(0.3, 0.2), None), "logic compares the policy with a reference, and none"),
        (lambda: logic(of(0.3, 0.2), **DPO, beta=1.0), "reference: the formula has Ref atoms"),
        (
            lambda: logic(of(0.3, 0.2), pairs([-1.0], [-1.0], [2], [1]), **DPO, beta=1.0),
            r"policy.chosen.length\[0\] is 1 and reference.chosen.length\[0\] is 2",
        ),
        (lambda: logic(of(0.3, 0.2), logic="M(3)", beta=1.0), r"names M\(3\), and there are 2 answers"),
        (
            lambda: logic(SequenceLogps(-torch.ones(1, 3), torch.ones(1, 3)), logic="M(w)", beta=1.0),
            "there are 3 answers to a prompt; number them from 1",
        ),
        (
            lambda: logic(SequenceLogps(-torch.ones(3), torch.ones(3)), logic="M(1)", beta=1.0),
            r"shape \(B, K\), not \(3,\)",
        ),
        (lambda: Loss.of("logic"), "logic needs logic"),
    ],
)
def test_errors_name_the_argument_and_the_rule(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_formula_error_knows_its_column() -> None:
    with pytest.raises(FormulaError) as caught:
        LogicLoss("M(w)", also="M(w) & N(w)")
    assert (caught.value.argument, caught.value.column) == ("also", 8)


def test_a_loss_that_is_not_monotone_warns_once() -> None:
    """W -> L prefers the loser: rho falls with M(w). The second use of the same formula is silent."""
    with pytest.warns(UserWarning, match=r"not monotone: rho falls with M\(w\); rho rises with M\(l\)"):
        LogicLoss("implies(M(w),  M(l))")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LogicLoss("implies(M(w),  M(l))")(of(0.3, 0.2), None)


def test_xor_goes_both_ways() -> None:
    with pytest.warns(UserWarning, match=r"rho rises or falls with M\(w\), by where the probabilities are"):
        LogicLoss("xor(M(w), M(l))")


def test_sums_with_negations_warn() -> None:
    """CPO's polynomials have no 1 - P, ORPO's have."""
    with pytest.warns(UserWarning, match=r"norm sum: log W\(1-L\)/\(L\(1-W\)\) has probabilities 1 - P"):
        LogicLoss("M(l)  ->  M(w)", where="xor(M(w), M(l))", norm="sum")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LogicLoss(**{**CPO, "logic": "M(l)  ->  M(w)"}, norm="sum")
        LogicLoss(**DPO, norm="sum")
