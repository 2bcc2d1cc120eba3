"""Preferences in a circle: every edge is right by construction, and no reward can have them all."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from align.evals.cycles import (
    CRITERIA,
    LEVELS,
    attribute_cycles,
    cycle_suite,
    edge_scores,
    scalar_ceiling,
    text_cycles,
)
from align.losses.general_preference import gpm, unit_norm
from align.losses.preference import bradley_terry
from align.rewards.heads import pair_matrix


@settings(max_examples=20, deadline=None)
@given(st.integers(3, 8), st.integers(0, 1000))
def test_each_answer_beats_the_next_on_the_criterion_of_its_edge(length: int, seed: int):
    x = attribute_cycles(20, length, seed=seed)
    for edge in range(length):
        assert float((x[:, edge, edge] - x[:, (edge + 1) % length, edge]).min()) >= 0.6 - 1e-6
    assert torch.equal(x, attribute_cycles(20, length, seed=seed))
    assert not torch.equal(x, attribute_cycles(20, length, seed=seed + 1))


def test_texts_say_what_the_attributes_are():
    rows = text_cycles(5, 4, seed=3)
    assert len(rows) == 20
    for row in rows:
        level = {
            key: LEVELS.index(word) for key in CRITERIA[:4] for word in LEVELS if f"{key} {word}" in row["chosen"]
        }
        other = {
            key: LEVELS.index(word) for key in CRITERIA[:4] for word in LEVELS if f"{key} {word}" in row["rejected"]
        }
        assert len(level) == len(other) == 4
        assert level[row["criterion"]] == 4
        assert other[row["criterion"]] in (0, 1)
    for cycle in range(5):
        edges = [row for row in rows if row["cycle"] == cycle]
        assert [row["edge"] for row in edges] == [0, 1, 2, 3]
        assert all(edges[i]["rejected"] == edges[(i + 1) % 4]["chosen"] for i in range(4))
        assert len({row["prompt"] for row in edges}) == 1


@pytest.mark.parametrize("length", [3, 4, 5, 6])
def test_ceiling_of_a_reward(length: int):
    assert scalar_ceiling(length) == (length - 1) / length


@pytest.mark.parametrize("length", [3, 4])
def test_ties_do_not_help_a_reward(length: int):
    """Every weak order, by ranks that may be equal, a tie as half: still at most (K - 1) / K."""
    best = 0.0
    for ranks in itertools.product(range(length), repeat=length):
        edges = [(ranks[i], ranks[(i + 1) % length]) for i in range(length)]
        best = max(best, sum((a > b) + 0.5 * (a == b) for a, b in edges) / length)
    assert best == scalar_ceiling(length)


def test_accuracy_counts_ties_as_half():
    """Edges + + - and 0 0 0: (2/3 + 1/2) / 2 = 7/12; half of the edges tie; no cycle is whole."""
    result = cycle_suite(torch.tensor([[1.0, 2.0, -1.0], [0.0, 0.0, 0.0]]))
    values = {name: metric["value"] for name, metric in result["metrics"].items()}
    assert values == pytest.approx({"accuracy": 7 / 12, "ties": 0.5, "cycles": 0.0})
    assert result["settings"]["scalar_ceiling"] == 2 / 3
    assert result["n"] == 2


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 6), st.integers(0, 1000))
def test_no_reward_passes_the_ceiling(length: int, seed: int):
    rewards = torch.randint(0, 4, (50, length), generator=torch.Generator().manual_seed(seed)).float()
    scores = edge_scores(rewards[:, :, None] - rewards[:, None])
    assert torch.equal(scores, rewards - rewards.roll(-1, 1))
    assert cycle_suite(scores)["metrics"]["accuracy"]["value"] <= scalar_ceiling(length) + 1e-12


@pytest.mark.parametrize("length", [3, 4, 5])
def test_a_preference_model_learns_cycles_and_a_reward_cannot(length: int):
    """On 200 held-out cycles the one is right on every edge; the other at most on K - 1 of K."""
    train, held = attribute_cycles(200, length, seed=0), attribute_cycles(200, length, seed=1)
    torch.manual_seed(0)
    preference, reward = nn.Linear(length, 4, bias=False), nn.Sequential(nn.Linear(length, 16), nn.Tanh())
    head = nn.Linear(16, 1)
    optimizer = torch.optim.Adam([*preference.parameters(), *reward.parameters(), *head.parameters()], lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        v = unit_norm(preference(train))
        r = head(reward(train))[..., 0]
        cyclic = gpm(v.flatten(0, 1), v.roll(-1, 1).flatten(0, 1), tau=0.1).loss.mean()
        scalar = bradley_terry(r.flatten(), r.roll(-1, 1).flatten()).loss.mean()
        (cyclic + scalar).backward()
        optimizer.step()
    with torch.no_grad():
        cyclic_result = cycle_suite(edge_scores(pair_matrix(unit_norm(preference(held)))))
        r = head(reward(held))[..., 0]
        scalar_result = cycle_suite(edge_scores(r[:, :, None] - r[:, None]))
    assert cyclic_result["metrics"]["accuracy"]["value"] == 1.0
    assert cyclic_result["metrics"]["cycles"]["value"] == 1.0
    assert scalar_result["metrics"]["accuracy"]["value"] <= (length - 1) / length + 1e-12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attribute_cycles(5, 2, seed=0), "length is 2"),
        (lambda: attribute_cycles(0, 3, seed=0), "count is 0"),
        (lambda: text_cycles(1, 9, seed=0), "texts have 8 criteria"),
        (lambda: scalar_ceiling(9), "too many orders"),
        (lambda: edge_scores(torch.zeros(2, 3, 4)), r"must have \(C, K, K\)"),
        (lambda: edge_scores(torch.zeros(2, 2, 2)), "length is 2"),
        (lambda: cycle_suite(torch.zeros(3)), r"must have \(C, K\)"),
        (lambda: cycle_suite(torch.tensor([[1.0, 2.0, float("nan")]])), r"scores\[2\] is nan"),
    ],
)
def test_what_is_no_cycle(call: Any, message: str):
    with pytest.raises(ValueError, match=message):
        call()
