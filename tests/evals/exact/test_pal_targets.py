"""PAL's exact world: what is right by hand, and models that are wrong, which miss."""

from __future__ import annotations

import pytest
import torch

from align.evals.exact.pal_targets import accuracy, best_order, check_pal, new_user, own_weight
from align.evals.exact.rows import Stack
from align.rewards.pal import PalA


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def missed() -> set[str]:
    return {row.quantity for row in check_pal(Stack()) if row.status == "miss"}


def test_shares_by_hand():
    """One order: .7 .9 + .3 .1. Three labels: P = .9^3 + 3 .9^2 .1 = .972, so .972 .9 + .028 .1; one: .9^2 + .1^2."""
    assert best_order() == pytest.approx(0.66, abs=1e-12)
    assert [new_user(count) for count in (0, 1, 3)] == pytest.approx([0.66, 0.82, 0.8776], abs=1e-12)
    sides = torch.tensor([1, -1])
    assert accuracy(torch.tensor([[2.0, 1.0], [1.0, 0.0]]), sides) == pytest.approx((0.9 + 0.9 + 0.1 + 0.5) / 4)


def test_prototypes_may_be_named_either_way():
    weights = torch.tensor([[0.8, 0.2]] * 7 + [[0.4, 0.6]] * 3)
    assert own_weight(weights) == own_weight(weights.flip(-1)) == pytest.approx(0.6)
    weights[0] = torch.tensor([0.3, 0.7])
    assert own_weight(weights) == pytest.approx(0.3)


def test_new_users_who_stay_at_the_prior_miss(monkeypatch):
    monkeypatch.setattr(PalA, "fit_user", lambda self, left, right, label, *, prior: self.prior(prior))
    assert missed() == {f"new user, labels: {count}: accuracy" for count in (1, 3, 5)}


def test_two_prototypes_that_are_one_miss(monkeypatch):
    """Users of equal weights, .5 each: training can reach the majority's reward, and new users change nothing."""
    monkeypatch.setattr(
        PalA, "weights", lambda self, users: torch.full((len(users), self.groups), 1 / self.groups).double()
    )
    found = missed()
    assert {"K = 2: accuracy", "K = 2: delta for one's group", "K = 2: weight on own group"} <= found
    assert "K = 1: accuracy" not in found
