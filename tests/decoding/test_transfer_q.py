"""Transfer-Q* in worlds whose laws are tables: the published figures, the edge cases, and what its savings keep.

Answers are two tokens, with ``p1 = (.6, .4)``, ``p2 = ((.7, .3), (.2, .8))``, ``r = ((.1, 1), (.6, .4))`` and
``alpha = beta = .5``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from align.decoding.constraints import Vocabulary
from align.decoding.course import drawn
from align.decoding.engines import Rollout
from align.decoding.engines.rollouts import roll_out
from align.decoding.law import Law
from align.decoding.transfer_q import Guided, Query, Reward, TransferQ, transfer_q

A, B, END = 0, 1, 2
Tokens = tuple[int, ...]
WORDS = Vocabulary([b"a", b"b", None], frozenset({END}))
P1, P2 = (0.6, 0.4), ((0.7, 0.3), (0.2, 0.8))
R = {(A, A): 0.1, (A, B): 1.0, (B, A): 0.6, (B, B): 0.4}
OTHER = {(A, A): 0.5, (A, B): 0.3, (B, A): 0.2, (B, B): 0.9}


class Table:
    """An engine whose logits are a function of the tokens after a prompt of one token."""

    def __init__(self, logits: Callable[[Tokens], Sequence[float]], context: int | None = None) -> None:
        self._logits, self.context = logits, context
        self.sequences: dict[int, Tokens] = {}
        self._opened = 0
        self._kept: dict[Tokens, int] = {}
        self.calls: list[list[Tokens]] = []

    def open(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        handles = range(self._opened, self._opened + len(prompts))
        self._opened += len(prompts)
        self.sequences.update(zip(handles, map(tuple, prompts), strict=True))
        return list(handles)

    def extend(self, handle: int, token: int) -> None:
        self.sequences[handle] += (token,)

    def fork(self, handle: int) -> int:
        return self.open([self.sequences[handle]])[0]

    def close(self, handle: int) -> None:
        del self.sequences[handle]

    def next_logits(self, handles: Sequence[int]) -> tuple[Tensor, list[int]]:
        rows = [self._logits(self.sequences[handle][1:]) for handle in handles]
        return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), -1), list(range(len(rows)))

    def rollouts(self, prompts: Sequence[Sequence[int]], **given: Any) -> list[Rollout]:
        self.calls.append([tuple(prompt) for prompt in prompts])
        return roll_out(self, self._kept, prompts, **given)


class Deck(Table):
    """Ten rollouts of a candidate hold each second token as often as p2 says, exactly."""

    def rollouts(self, prompts: Sequence[Sequence[int]], **given: Any) -> list[Rollout]:
        self.calls.append([tuple(prompt) for prompt in prompts])
        tens = [round(10 * P2[prompt[1]][A]) for prompt in prompts]
        return [Rollout((A if place % 10 < ten else B,), False) for place, ten in enumerate(tens)]


def world(tokens: Tokens) -> list[float]:
    p = P2[tokens[0]] if tokens else P1
    return [math.log(p[A]), math.log(p[B]), -math.inf]


def of_table(table: Mapping[Tokens, float]) -> Reward:
    return lambda numbers, answers: [table[answer] for answer in answers]


def first_token(answer: Guided, alpha: float) -> list[float]:
    """The law of the first choice, ``p exp(Q / alpha)`` by the values that the answer reports, by token."""
    step = answer.steps[0]
    scores = {
        z[0]: lp + (q or 0) / alpha for z, lp, q in zip(step.candidates, step.log_probs, step.values, strict=True)
    }
    weights = np.exp([scores[token] for token in sorted(scores)])
    return list(weights / weights.sum())


def run(
    policy: Any, reward: Reward, baseline: Any = None, vocabulary: Vocabulary = WORDS, *, seed: int = 0, **given: Any
) -> Guided:
    query = Query([2], seed=seed, max_new_tokens=given.pop("max_new_tokens", 2))
    other = given.pop("baseline_reward", None)
    found = transfer_q(
        policy, baseline or policy, reward, [query], vocabulary, TransferQ(**given), baseline_reward=other
    )
    return found[0]


DECK = {"rollouts": 10, "alpha": 0.5, "length": None}


@pytest.mark.parametrize(
    ("given", "values", "first", "mean_reward", "divergence"),
    [
        ({}, (0.37, 0.44), 0.5659792587, 0.6213853574, 0.2220644956),
        ({"baseline_reward": lambda n, a: [0.0] * len(a)}, (0.7494924478, 0.4543289264), 0.7302304614, None, None),
        ({"value": "soft"}, (0.5611153754, 0.4469113277), 0.6533671798, 0.6471790839, 0.2573370300),
    ],
    ids=["controlled decoding", "indirect, from the policy to r", "soft: rho_r"],
)
def test_values_and_the_first_token(
    given: dict[str, Any],
    values: tuple[float, float],
    first: float,
    mean_reward: float | None,
    divergence: float | None,
) -> None:
    """The policy rolls out; an indirect baseline is then the policy itself, whose own reward is constant.

    The reward and the divergence are of both tokens: the second is drawn by ``p2 exp(r / alpha)``.
    """
    answer = run(Table(world), of_table(R), Deck(world), **DECK, choice="drawn", **given)
    step = answer.steps[0]
    by_token = dict(zip(step.candidates, step.values, strict=True))
    assert [by_token[A,], by_token[B,]] == pytest.approx(values, abs=1e-10)
    law = first_token(answer, 0.5)
    assert law == pytest.approx([first, 1 - first], abs=1e-10)
    if mean_reward is not None and divergence is not None:
        joint = {}
        for one, two in R:
            weights = {z: P2[one][z] * math.exp(R[one, z] / 0.5) for z in (A, B)}
            joint[one, two] = law[one] * weights[two] / sum(weights.values())
        assert sum(share * R[text] for text, share in joint.items()) == pytest.approx(mean_reward, abs=1e-10)
        far = [share * math.log(share / (P1[one] * P2[one][two])) for (one, two), share in joint.items()]
        assert sum(far) == pytest.approx(divergence, abs=1e-10)


def test_the_draw_is_by_p_exp_q_over_alpha() -> None:
    """By enumeration of the uniform: token 0 up to 0.7302304614 of the way, as in the published figures."""
    log_probs, values = [math.log(p) for p in P1], [0.7494924478, 0.4543289264]
    cells = [drawn(log_probs, values, 0.5, (cell + 0.5) / 100_000) for cell in range(100_000)]
    assert cells.count(0) / 100_000 == pytest.approx(0.7302304614, abs=1e-5)
    assert cells == sorted(cells)
    answers = [run(Table(world), of_table(R), **DECK, choice="drawn", seed=seed) for seed in range(60)]
    assert {answer.tokens[0] for answer in answers} == {A, B}


def test_a_wide_alpha_is_the_policy_and_a_narrow_one_the_reward() -> None:
    answer = run(Table(world), of_table(R), Deck(world), **{**DECK, "alpha": 1e9}, choice="drawn")
    assert first_token(answer, 1e9) == pytest.approx(P1, abs=1e-8)
    for choice in ("greedy", "drawn"):
        assert run(Table(world), of_table(R), Deck(world), **{**DECK, "alpha": 1e-300}, choice=choice).tokens == (B, A)


def test_args_judges_the_text_as_it_stands() -> None:
    """Logits (2, 1, .5, -1), rewards (.1, .9, .3, 2), k = 3, w = 1: 2.1, 1.9, .8, so token 0; 3 is left out."""
    vocabulary = Vocabulary([b"a", b"b", b"c", b"d", None], frozenset({4}))
    policy = Table(lambda tokens: [2, 1, 0.5, -1, -math.inf])
    judged: list[Tokens] = []

    def reward(numbers: Sequence[int], answers: Sequence[Tokens]) -> list[float]:
        judged.extend(answers)
        return [(0.1, 0.9, 0.3, 2.0)[tokens[0]] for tokens in answers]

    answer = run(policy, reward, None, vocabulary, candidates=3, length=0, max_new_tokens=1)
    assert answer.tokens == (0,)
    assert first_token(answer, 1.0) == pytest.approx([0.4781800362, 0.3915007011, 0.1303192627], abs=1e-10)
    assert judged == [(0,), (1,), (2,)]
    assert policy.calls == []


def letters(*rows: Sequence[float]) -> Vocabulary:
    return Vocabulary(
        [bytes([97 + place]) for place in range(len(rows[0]) - 1)] + [None], frozenset({len(rows[0]) - 1})
    )


def test_more_candidates_than_tokens_are_as_many_as_there_are() -> None:
    answer = run(Table(world), of_table(R), candidates=50, length=None)
    assert answer.steps[0].candidates == ((A,), (B,)), "the end token is impossible"


@pytest.mark.parametrize("given", [{}, {"reward_range": (0.0, 1.0)}])
def test_of_equal_scores_the_lowest_id_is_taken_and_of_equal_candidates_the_lowest_ids(given: dict[str, Any]) -> None:
    """Six tokens with one probability, three candidates, all with reward .3."""
    vocabulary = Vocabulary([*(bytes([97 + place]) for place in range(6)), None], frozenset({6}))
    policy = Table(lambda tokens: [*[0.0] * 6, -math.inf])
    answer = run(
        policy, lambda n, a: [0.3] * len(a), None, vocabulary, candidates=3, max_new_tokens=3, length=2, **given
    )
    assert answer.steps[0].candidates == ((0,), (1,), (2,))
    assert answer.tokens == (0, 0, 0)


def ending(tokens: Tokens) -> list[float]:
    """a, b or the end, likely in this order; after three tokens the end is sure."""
    return [math.log(p) for p in ((0.5, 0.3, 0.2) if len(tokens) < 3 else (1e-9, 1e-9, 1.0))]


def test_an_end_token_among_the_candidates_is_judged_without_a_rollout() -> None:
    """The reward wants answers of one token: the end at once is worth 5, everything else nothing."""
    baseline = Table(ending)
    answer = run(
        Table(ending), lambda n, a: [5.0 if len(x) == 1 else 0.0 for x in a], baseline, length=None, max_new_tokens=6
    )
    assert (answer.tokens, answer.finished, answer.reward) == ((END,), True, 5.0)
    assert [prompt[1:] for prompt in baseline.calls[0]] == [(A,), (B,)]
    assert (answer.costs.rollouts, answer.costs.reward_calls, answer.costs.steps) == (2, 3, 1)


def test_the_answer_stops_at_its_length_and_at_the_context() -> None:
    reward: Reward = lambda n, a: [float(x.count(A)) for x in a]  # noqa: E731
    cut = run(Table(ending), reward, length=None, candidates=2, max_new_tokens=2)
    assert (cut.tokens, cut.finished, cut.reason, cut.reward) == ((A, A), False, "", 2.0)
    narrow = run(Table(ending, context=3), reward, candidates=2, max_new_tokens=9, length=None)
    assert (narrow.tokens, narrow.finished) == ((A, A), False)
    assert narrow.costs.cut_rollouts == 0, "what the length of the answer cuts is an answer"
    full = run(Table(ending, context=1), reward, max_new_tokens=9)
    assert full.tokens == ()
    assert full.reason.startswith("prompt: its 1 tokens fill the 1 that the model reads")


def test_one_candidate_is_the_greedy_policy() -> None:
    answer = run(Table(world), of_table(R), candidates=1)
    assert answer.tokens == (A, A)
    assert (answer.costs.rollouts, answer.costs.gated_steps, answer.reward) == (0, 0, 0.1)


def test_a_constant_reward_leaves_the_policy_and_r_bl_equal_to_r_the_direct_transfer() -> None:
    constant: Reward = lambda n, a: [0.7] * len(a)  # noqa: E731
    assert first_token(run(Table(world), constant, Deck(world), **DECK), 0.5) == pytest.approx(P1, abs=1e-12)
    direct = run(Table(world), of_table(R), Deck(world), **DECK)
    same = run(Table(world), of_table(R), Deck(world), **DECK, baseline_reward=of_table(R))
    for one, two in zip(direct.steps, same.steps, strict=True):
        assert one.values == pytest.approx(two.values, abs=1e-12)
    assert same.ess == pytest.approx(10)
    assert direct.ess is None


def test_values_grow_with_the_reward() -> None:
    more = run(Table(world), of_table({**R, (B, A): 0.9}), Deck(world), **DECK).steps[0]
    less = run(Table(world), of_table(R), Deck(world), **DECK).steps[0]
    assert (more.values[0], more.candidates) == (less.values[0], less.candidates)
    assert (more.values[1] or 0) - (less.values[1] or 0) == pytest.approx(0.2 * 0.3)


def test_weights_on_one_rollout_fall_back_and_weights_that_are_all_zero_end_the_query() -> None:
    """Ten rollouts, seven or two of them a: a difference of 100 in r - r_BL leaves one kind, 7 and 3, 2 and 8."""
    far = {(A, A): 100.0, (A, B): 0.0, (B, A): 0.0, (B, B): 100.0}
    found = run(Table(world), of_table(R), Deck(world), **DECK, baseline_reward=of_table(far))
    assert found.ess == pytest.approx(2.0)
    assert found.plain_values == 0
    two = {**DECK, "rollouts": 2}
    lone = run(Table(world), of_table(R), Pair(world), **two, baseline_reward=of_table(far))
    assert lone.ess == pytest.approx(1.0)
    assert lone.plain_values == 2
    assert lone.steps[0].values == pytest.approx((0.55, 0.5))
    barred = run(Table(world), lambda n, a: [-math.inf] * len(a), Deck(world), **DECK, baseline_reward=of_table(R))
    assert "every rollout has weight 0" in barred.reason
    assert (barred.tokens, barred.reward) == ((), None)
    assert "rules out every candidate" in run(Table(world), lambda n, a: [-math.inf] * len(a), length=None).reason


class Pair(Table):
    """Two rollouts: one of each token."""

    def rollouts(self, prompts: Sequence[Sequence[int]], **given: Any) -> list[Rollout]:
        return [Rollout((place % 2,), False) for place, _ in enumerate(prompts)]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"candidates": 0}, "candidates is 0"),
        ({"rollouts": 0}, "rollouts is 0"),
        ({"length": -1}, "length is -1"),
        ({"block": 0}, "block is 0"),
        ({"alpha": 0.0}, "alpha is 0.0: it must be positive"),
        ({"alpha": -1.0}, "alpha is -1.0"),
        ({"alpha": math.nan}, "alpha is nan"),
        ({"beta": 0.0}, "beta is 0.0"),
        ({"value": "best"}, "value is 'best': it must be one of mean, soft"),
        ({"choice": "sampled"}, "choice is 'sampled'"),
        ({"rollouts": 2, "length": 0}, "with length 0 there are none"),
        ({"rollouts": 2, "rollout_law": Law(top_k=1)}, "greedy ones are all the same"),
        ({"reward_range": (1.0, 0.0)}, "the least reward first"),
        ({"reward_range": (0.0, math.inf)}, "two finite numbers"),
        ({"reward_range": (0.0, 1.0), "choice": "drawn"}, "keeps the greedy choice alone"),
        ({"at_once": 2}, "give the range"),
    ],
)
def test_settings_that_cannot_be(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TransferQ(**given)


def test_parts_that_do_not_go_together() -> None:
    reward = of_table(R)
    for given, said in (
        ({"baseline": None}, "baseline: none is given"),
        ({"settings": TransferQ(block=2), "policy": object()}, "has no rollouts to draw blocks by"),
        ({"baseline_reward": reward}, "one rollout has all the weight"),
        ({"vocabulary": Vocabulary([b"a", None], frozenset({1}))}, "the policy's logits 3 columns"),
    ):
        every = {"policy": Table(world), "baseline": Table(world), "queries": [Query([0])], "vocabulary": WORDS}
        with pytest.raises(ValueError, match=said):
            transfer_q(**{**every, "reward": reward, **given})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        Query([1], max_new_tokens=0)
    assert transfer_q(Table(world), Table(world), reward, [], WORDS) == []
