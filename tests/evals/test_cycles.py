"""Preferences in a circle: which pairs are pure cycles, and no reward can have them all."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from align.evals.cycles import cycle_suite, pure_cycles, scalar_ceiling
from align.losses.general_preference import gpm, unit_norm
from align.rewards.heads import pair_matrix


def edges(matrices: Tensor) -> list[Tensor]:
    """Scores of each answer over the next one."""
    places = torch.arange(matrices.shape[-1])
    return list(matrices[:, places, (places + 1) % len(places)])


def ids(scores: list[Tensor]) -> list[list[str]]:
    return [[f"{number}-{edge}" for edge in range(len(values))] for number, values in enumerate(scores)]


def value(scores: list[Tensor], name: str) -> float:
    return float(cycle_suite(scores, ids(scores))["metrics"][name]["value"])


@given(st.lists(st.integers(3, 6), min_size=1, max_size=5), st.integers(0, 1000))
def test_cycles_are_found_whole_and_in_order_in_any_order_of_the_pairs(lengths: list[int], seed: int):
    pairs = [
        ("p", (cycle, edge), (cycle, (edge + 1) % length))
        for cycle, length in enumerate(lengths)
        for edge in range(length)
    ]
    random.Random(seed).shuffle(pairs)
    found = pure_cycles(*map(list, zip(*pairs, strict=True)))
    assert sorted(pair for cycle in found for pair in cycle) == list(range(len(pairs)))
    assert sorted(map(len, found)) == sorted(lengths)
    for cycle in found:
        assert all(pairs[one][2] == pairs[other][1] for one, other in itertools.pairwise([*cycle, cycle[0]]))


@pytest.mark.parametrize(
    ("pairs", "cycles"),
    [
        (["ab", "bc", "ca"], 1),
        (["ab", "bc", "ca", "ab"], 1),  # said twice
        (["ab", "ba"], 0),  # people who contradict each other
        (["ab", "bc", "cd"], 0),
        (["ab", "bc", "ca", "ax"], 0),  # a is compared with another one too
        (["ab", "bc", "ca", "xa"], 0),
        (["ab", "bc", "ca", "ba"], 0),
        (["ab", "bc", "cd", "db"], 0),  # a path that leads into a circle
        (["ab", "bc", "ca", "xy", "yz", "zx"], 2),
    ],
)
def test_what_is_a_pure_cycle(pairs: list[str], cycles: int):
    assert len(pure_cycles(["p"] * len(pairs), [p[0] for p in pairs], [p[1] for p in pairs])) == cycles


def test_answers_to_other_prompts_make_no_circle():
    assert pure_cycles(["p", "p", "q"], "abc", "bca") == []


@pytest.mark.parametrize("length", [3, 4])
def test_ties_do_not_help_a_reward(length: int):
    """Every weak order, by ranks that may be equal, a tie as half: at most (K - 1) / K, which some order has."""
    best = 0.0
    for ranks in itertools.product(range(length), repeat=length):
        pairs = [(ranks[i], ranks[(i + 1) % length]) for i in range(length)]
        best = max(best, sum((a > b) + 0.5 * (a == b) for a, b in pairs) / length)
    assert best == scalar_ceiling(length)


def test_accuracy_counts_ties_as_half():
    """Edges + + - and 0 0 0 0: (2 + 2) / 7; 4 of 7 tie; the ceiling is (2 + 3) / 7; no cycle is whole."""
    scores = [torch.tensor([1.0, 2.0, -1.0]), torch.zeros(4)]
    result = cycle_suite(scores, ids(scores))
    values = {name: metric["value"] for name, metric in result["metrics"].items()}
    assert values == pytest.approx(
        {"accuracy": 4 / 7, "ceiling": 5 / 7, "whole": 0, "ties": 4 / 7}
        | {"accuracy_3": 2 / 3, "ceiling_3": 2 / 3, "whole_3": 0, "ties_3": 0}
        | {"accuracy_4": 1 / 2, "ceiling_4": 3 / 4, "whole_4": 0, "ties_4": 1}
    )
    assert result["n"] == 2
    assert result["rows"][1]["row_ids"] == ["1-0", "1-1", "1-2", "1-3"]


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 6), st.integers(0, 1000))
def test_no_reward_passes_the_ceiling(length: int, seed: int):
    rewards = torch.randint(0, 4, (50, length), generator=torch.Generator().manual_seed(seed)).float()
    assert value(edges(rewards[:, :, None] - rewards[:, None]), "accuracy") <= scalar_ceiling(length) + 1e-12


def drawn(length: int, seed: int) -> Tensor:
    """200 cycles of answers (K, 2K): how much each is praised and blamed for each criterion, by 0.5 or more; noise."""
    praised = torch.eye(length)
    said = torch.cat([praised, praised.roll(1, 0)], 1)  # answer i + 1 is blamed for what i is praised for
    noise = torch.rand(200, length, 2 * length, generator=torch.Generator().manual_seed(seed))
    return (0.5 + noise) * said + 0.3 * noise.flip(-1) * (1 - said)


@pytest.mark.parametrize("length", [3, 4, 5])
def test_a_preference_model_learns_cycles(length: int):
    """It is right on every edge of 200 held-out cycles, where no reward passes K - 1 of K."""
    train, held = drawn(length, 0), drawn(length, 1)
    torch.manual_seed(0)
    preference = nn.Linear(2 * length, 4, bias=False)
    optimizer = torch.optim.Adam(preference.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        v = unit_norm(preference(train))
        gpm(v.flatten(0, 1), v.roll(-1, 1).flatten(0, 1), tau=0.1).loss.mean().backward()
        optimizer.step()
    with torch.no_grad():
        found = edges(pair_matrix(unit_norm(preference(held))))
    assert (value(found, "accuracy"), value(found, "whole")) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pure_cycles(["p"], ["a"], []), "1 prompts, 1 winners, 0 losers"),
        (lambda: scalar_ceiling(2), "length is 2"),
        (lambda: cycle_suite([], []), "no cycles"),
        (lambda: cycle_suite([torch.zeros(2)], [["a", "b"]]), "length is 2"),
        (lambda: cycle_suite([torch.zeros(1, 3)], [["a"]]), "scores is of shape"),
        (lambda: cycle_suite([torch.tensor([1.0, 2.0, float("nan")])], [["a"] * 3]), r"scores\[2\] is nan"),
    ],
)
def test_what_is_no_cycle(call: Any, message: str):
    with pytest.raises(ValueError, match=message):
        call()
