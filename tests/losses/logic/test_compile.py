"""Weighted model counting: the published vectors, the sum over worlds, and arithmetic far from 1/2."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.losses.logic import structure
from align.losses.logic.compile import directions, log_not, log_odds
from align.losses.logic.known import CELLS, known_losses, relation
from align.losses.logic.parse import Atom
from align.losses.logic.structure import PAIR, Structure, full

STATE = ["top", "bottom", "both", "neither"]
# rho at W = .3, L = .2; rows: state of the world with both answers; columns: of the world with neither.
TABLE = [
    [1.81529, -0.847298, 0.205852, 0.76214],
    [1.386294, -1.15268, 0.051293, 0.182322],
    [1.458615, -0.929536, 0.123614, 0.405465],
    [1.742969, -1.070441, 0.133531, 0.538997],
]
VECTORS = [
    ("CE", -0.8472978604, 1.2039728043),
    ("CEUnl", -1.1526795099, 1.4271163556),
    ("CPO", 0.4054651081, 0.5108256238),
    ("ORPO", 0.5389965007, 0.4595323294),
    ("unCPO", 1.8152899666, 0.1508228897),
    ("cCPO", 0.7621400520, 0.3829922523),
    ("sCPO (?)", 0.2058520542, 0.5955087110),
    ("cUNL (?)", -1.0704414117, 1.3652409519),
    ("qfUNL (?)", 0.1335313926, 0.6286086594),
    ("fUNL (?)", 1.3862943611, 0.2231435513),
]
KNOWN = dict(known_losses())


def cell(both: str, neither: str) -> Structure:
    """W alone top, l alone bottom; worlds 3 (both answers) and 0 (neither) in these states."""
    top = 0b0010 | (both in ("top", "both")) << 3 | (neither in ("top", "both"))
    bottom = 0b0100 | (both in ("bottom", "both")) << 3 | (neither in ("bottom", "both"))
    return Structure(PAIR, top, bottom)


def rho(found: Structure, *logps: float, dtype: torch.dtype = torch.float64) -> float:
    return log_odds(found, [torch.tensor([x], dtype=dtype) for x in logps])[0].item()


def by_worlds(worlds: int, probabilities: list[float]) -> float:
    """The definition: a sum over worlds of products of P and 1 - P."""
    return math.fsum(
        math.prod(p if world >> j & 1 else 1 - p for j, p in enumerate(probabilities))
        for world in range(1 << len(probabilities))
        if worlds >> world & 1
    )


@pytest.mark.parametrize(("row", "column"), list(itertools.product(range(4), range(4))))
def test_all_sixteen_cells(row: int, column: int) -> None:
    found = cell(STATE[row], STATE[column])
    assert rho(found, math.log(0.3), math.log(0.2)) == pytest.approx(TABLE[row][column], abs=5e-7)


@pytest.mark.parametrize(("name", "expected", "logistic"), VECTORS)
def test_published_vectors(name: str, expected: float, logistic: float) -> None:
    value = rho(KNOWN[name], math.log(0.3), math.log(0.2))
    assert value == pytest.approx(expected, abs=6e-11)
    assert math.log1p(math.exp(-value)) == pytest.approx(logistic, abs=6e-11)


def test_dpo_with_its_reference() -> None:
    """Rho = log .3/.2 - log .25/.4 = .8754687373538994."""
    value = rho(KNOWN["DPO"], *map(math.log, (0.3, 0.2, 0.25, 0.4)))
    assert value == pytest.approx(0.8754687373538994, rel=1e-14)


def test_next_to_certainty() -> None:
    """Both answers all but certain, lp = (-1e-12, -1e-3): 1 - W is 1e-12, and unCPO is log 1/(L (1-W)) = 27.632..."""
    assert rho(KNOWN["unCPO"], -1e-12, -1e-3) == pytest.approx(27.63202111592805, rel=1e-14)


@pytest.mark.parametrize(("name", "expected"), [("unCPO", 310.0), ("CPO", 10.0), ("ORPO", 10.0), ("cCPO", 10.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_300_nats(name: str, expected: float, dtype: torch.dtype) -> None:
    """Whole answers, lp = (-300, -310): 1 - P is 1, so unCPO sees the loser alone and the others the difference."""
    assert rho(KNOWN[name], -300.0, -310.0, dtype=dtype) == expected


@given(st.integers(1, full(3)), st.integers(1, full(3)), st.lists(st.floats(0.01, 0.99), min_size=3, max_size=3))
def test_counting_equals_the_sum_over_worlds(top: int, bottom: int, probabilities: list[float]) -> None:
    """Any pair of sets of worlds of three answers, against the definition, to 1e-12."""
    found = Structure(tuple(Atom("M", str(k)) for k in (1, 2, 3)), top, bottom)
    expected = math.log(by_worlds(top, probabilities) / by_worlds(bottom, probabilities))
    assert rho(found, *map(math.log, probabilities)) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_twelve_answers_equal_the_sum_over_worlds() -> None:
    """One answer of twelve is accepted, against none or more: 4,096 worlds."""
    exactly_one = "xor(" * 11 + "M(1)" + "".join(f", M({k}))" for k in range(2, 13))
    found = structure(exactly_one, "or(" + ", ".join(f"M({k})" for k in range(1, 13)) + ")")
    probabilities = [0.05 + 0.07 * k for k in range(12)]
    expected = math.log(by_worlds(found.top, probabilities) / by_worlds(found.bottom, probabilities))
    assert rho(found, *map(math.log, probabilities)) == pytest.approx(expected, rel=1e-11)


@given(st.floats(-40, -1e-3), st.floats(-40, -1e-3))
def test_entailment_orders_rho(w: float, lost: float) -> None:
    """The stronger of two has the smaller rho: CEUnl <= cUNL <= ORPO <= cCPO <= unCPO, and all other such pairs."""
    chain = ["CEUnl", "cUNL (?)", "ORPO", "cCPO", "unCPO"]
    assert all(relation(KNOWN[a], KNOWN[b]) == "stronger" for a, b in itertools.pairwise(chain))
    cells = [cell(both, neither) for both, neither in CELLS]
    values = [rho(found, w, lost) for found in cells]
    for (a, x), (b, y) in itertools.product(zip(cells, values, strict=True), repeat=2):
        if relation(a, b) == "stronger":
            assert x <= y + 1e-12 * (1 + abs(y))


@pytest.mark.parametrize("state", STATE)
@given(st.floats(-40, -1e-3), st.floats(-40, -1e-3))
def test_self_dual_cells_change_sign(state: str, w: float, lost: float) -> None:
    """With both worlds in "both" or "neither", exchanging w and l exchanges top and bottom, and negates rho."""
    for other in ("both", "neither"):
        if state in ("both", "neither"):
            found = cell(state, other)
            assert rho(found, w, lost) == pytest.approx(-rho(found, lost, w), rel=1e-12, abs=1e-12)


@given(st.floats(-5, -0.01), st.floats(-5, -0.01))
def test_a_world_on_both_sides_moves_rho_towards_zero(w: float, lost: float) -> None:
    """(a + c) / (b + c) is nearer to 1 than a / b."""
    for state in ("both", "neither"):
        without, added = rho(cell("neither", state), w, lost), rho(cell("both", state), w, lost)
        assert abs(added) <= abs(without) + 1e-12


@pytest.mark.parametrize("x", [-1e-15, -1e-12, -1e-3, -0.6, -math.log(2), -0.7, -5.0, -50.0, -300.0])
def test_log_not_against_exact_arithmetic(x: float) -> None:
    """Log(1 - P) by the two-term series at either end, and by the formula between."""
    if x > -1e-4:
        expected = math.log(-x) + x / 2
    else:
        expected = math.log1p(-math.exp(x)) if x < -math.log(2) else math.log(-math.expm1(x))
    assert log_not(torch.tensor(x, dtype=torch.float64)).item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, -1e-7), (torch.float64, -1e-15)])
def test_certainty_is_clamped_straight_through(dtype: torch.dtype, limit: float) -> None:
    """P = 1: the value at the clamp, log 1e-7, and its gradient -P/(1-P) = -1e7; neither 0 nor NaN."""
    logp = torch.zeros(1, dtype=dtype, requires_grad=True)
    value = log_not(logp)
    value.sum().backward()
    assert value.item() == pytest.approx(math.log(-limit), rel=1e-6)
    assert logp.grad is not None
    assert logp.grad.item() == pytest.approx(1 / limit, rel=1e-6)


def test_gradient_of_log_not_is_finite_everywhere() -> None:
    """-P/(1-P) on both branches; the branch not taken adds no NaN."""
    logp = torch.tensor([-1e-6, -0.5, -0.7, -20.0, -1e4], dtype=torch.float64, requires_grad=True)
    log_not(logp).sum().backward()
    expected = -logp.detach().exp() / -torch.expm1(logp.detach())
    torch.testing.assert_close(logp.grad, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        ("implies(M(l), M(w))", [1, -1]),
        ("implies(M(w), M(l))", [-1, 1]),
        ("M(w)", [1, 0]),
        ("xor(M(w), M(l))", [None, None]),
        ("and(M(1), M(2), M(3), M(4), M(5))", [1, 1, 1, 1, 1]),
    ],
)
def test_directions(formula: str, expected: list[int | None]) -> None:
    assert directions(structure(formula)) == expected
