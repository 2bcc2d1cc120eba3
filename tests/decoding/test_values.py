"""Values of candidates in a world of two steps: ``p1 = (.6, .4)``, two second tokens after each first one."""

from __future__ import annotations

import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.decoding.values import Kind, estimate, normalised, transfer_weights, weighted

P = ((0.7, 0.3), (0.2, 0.8))
R = ((0.1, 1.0), (0.6, 0.4))
OTHER = ((0.5, 0.3), (0.2, 0.9))
BETA = 0.5
REWARDS = st.lists(st.floats(-5, 5), min_size=1, max_size=6)


def log_aligned(first: int, rewards: tuple[tuple[float, ...], ...]) -> list[float]:
    """``log p(second) + r / beta``: log-weights of every second token, of the law that is aligned with r."""
    return [math.log(p) + r / BETA for p, r in zip(P[first], rewards[first], strict=True)]


def test_the_mean_is_that_of_the_aligned_law() -> None:
    """(.7 e^.2 .1 + .3 e^2 1) / (.7 e^.2 + .3 e^2) = .74949; with the policy's own rollouts .7 .1 + .3 1 = .37."""
    own = [weighted(R[z], [math.log(p) for p in P[z]], kind="mean", beta=BETA) for z in (0, 1)]
    assert own == pytest.approx([0.37, 0.44], abs=1e-12)
    direct = [weighted(R[z], log_aligned(z, R), kind="mean", beta=BETA) for z in (0, 1)]
    assert direct == pytest.approx([0.7494924478, 0.4543289264], abs=1e-10)


def test_a_baseline_aligned_with_another_reward_gives_the_same_by_its_weights() -> None:
    """And without normalisation something else: the constant depends on the first token."""
    indirect, bare = [], []
    for z in (0, 1):
        log_rho = [math.log(share) for share in normalised(log_aligned(z, OTHER))]
        log_weights = transfer_weights(R[z], OTHER[z], kind="mean", beta=BETA)
        both = [a + b for a, b in zip(log_rho, log_weights, strict=True)]
        indirect.append(weighted(R[z], both, kind="mean", beta=BETA))
        bare.append(sum(math.exp(w) * r for w, r in zip(both, R[z], strict=True)))
    assert indirect == pytest.approx([0.7494924478, 0.4543289264], abs=1e-10)
    assert bare == pytest.approx([0.9398971509, 0.2161481523], abs=1e-10)


def test_the_soft_value_is_the_policys_whoever_rolls_out() -> None:
    soft = [weighted(R[z], [math.log(p) for p in P[z]], kind="soft", beta=BETA) for z in (0, 1)]
    assert soft == pytest.approx([0.5611153754, 0.4469113277], abs=1e-10)
    for other in (R, OTHER):
        for z in (0, 1):
            log_rho = [math.log(share) for share in normalised(log_aligned(z, other))]
            back = transfer_weights(R[z], other[z], kind="soft", beta=BETA)
            both = [a + b for a, b in zip(log_rho, back, strict=True)]
            assert weighted(R[z], both, kind="soft", beta=BETA) == pytest.approx(soft[z], abs=1e-12)


@given(REWARDS, st.sampled_from(get_args(Kind)), st.floats(0.05, 5))
def test_laws(rewards: list[float], kind: Kind, beta: float) -> None:
    """Between least and largest reward; as direct where r_BL = r; shifted as r is; more where a reward is more."""
    value = estimate(rewards, kind=kind, beta=beta)
    assert min(rewards) <= value.value <= max(rewards)
    assert (value.ess, value.plain) == (None, False)
    if kind == "mean" and len(rewards) > 1:
        same = estimate(rewards, rewards, kind=kind, beta=beta)
        assert same.value == pytest.approx(value.value, abs=1e-12)
        assert same.ess == pytest.approx(len(rewards))
    shifted = estimate([reward + 3 for reward in rewards], kind=kind, beta=beta)
    assert shifted.value == pytest.approx(value.value + 3, abs=1e-9)
    more = estimate([rewards[0] + 1, *rewards[1:]], kind=kind, beta=beta)
    assert more.value >= value.value


def test_rollouts_of_equal_reward_have_that_value_to_the_last_bit() -> None:
    """3 x 0.1 / 3 is 0.10000000000000002 in floats, over a bound of 0.1."""
    for kind in get_args(Kind):
        assert estimate([0.1] * 3, kind=kind, beta=0.7).value == 0.1


def test_the_soft_value_goes_from_the_mean_to_the_largest() -> None:
    rewards = [0.2, 0.9, 0.4]
    assert estimate(rewards, kind="soft", beta=1e6).value == pytest.approx(0.5, abs=1e-6)
    assert estimate(rewards, kind="soft", beta=1e-4).value == pytest.approx(0.9, abs=1e-3)


def test_few_effective_rollouts_leave_the_weights_out_and_say_so() -> None:
    """Weights 1 and e^-4: (1 + .0183)^2 / (1 + .000335) = 1.037 under 1.5; with 1 and e^-1, 1.649 over it."""
    found = estimate([2.0, 1.0], [0.0, 3.0], beta=1.0)
    assert found.ess == pytest.approx(1.0366, abs=1e-4)
    assert (found.value, found.plain) == (1.5, True)
    kept = estimate([2.0, 1.0], [0.0, 0.0], beta=1.0)
    assert kept.ess == pytest.approx(1.6482, abs=1e-3)
    assert not kept.plain
    assert kept.value == pytest.approx((2 + math.exp(-1)) / (1 + math.exp(-1)))


def test_large_differences_do_not_overflow() -> None:
    found = estimate([1e4, 1e4 + 1], [0.0, 1.0], beta=1e-3)
    assert (found.value, found.plain) == (1e4 + 0.5, False)


def test_weights_that_are_all_zero_are_an_error() -> None:
    with pytest.raises(ValueError, match="every rollout has weight 0"):
        estimate([-math.inf, -math.inf], [0.0, 0.0], beta=1.0)
    assert estimate([-math.inf, 0.0], beta=1.0).value == -math.inf, "without weights it is a value as any other"
    assert estimate([-math.inf, 0.0], kind="soft", beta=1.0).value == pytest.approx(-math.log(2))
