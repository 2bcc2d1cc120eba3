"""What Transfer-Q* saves and what that keeps: the range of the reward, kept rollouts, one call a step, and blocks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from align.decoding.constraints import Vocabulary
from align.decoding.engines import Rollout, TransformersEngine
from align.decoding.law import Law
from align.decoding.transfer_q import Guided, Query, Reward, TransferQ, best_of, transfer_q

Tokens = tuple[int, ...]
END = 11
VOCABULARY = Vocabulary([*(bytes([97 + place]) for place in range(11)), None], frozenset({END}))
PROMPTS = ([3, 1, 4], [1, 5, 9, 2], [6])


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """Two random models of one vocabulary, in float32."""

    def make(seed: int) -> Any:
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=12,
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=64,
                initializer_range=0.5,
            )
        ).eval()

    return make(0), make(1)


def graded(numbers: Sequence[int], answers: Sequence[Tokens]) -> list[float]:
    """A number from 0 to 1 in quarters, without a pattern, so that there are ties."""
    return [
        hashlib.blake2b(bytes([number, *answer])).digest()[0] % 5 / 4
        for number, answer in zip(numbers, answers, strict=True)
    ]


def run(models: tuple[Any, Any], reward: Reward = graded, *, prompts: Any = PROMPTS, **given: Any) -> list[Guided]:
    policy, baseline = map(TransformersEngine, models)
    most = given.pop("max_new_tokens", 8)
    queries = [Query(prompt, seed=7 + place, max_new_tokens=most) for place, prompt in enumerate(prompts)]
    together = given.pop("together", 16)
    made = transfer_q(policy, baseline, reward, queries, VOCABULARY, TransferQ(**given), together=together)
    assert policy._sequences.keys() == set(policy._kept.values()), "what blocks have in common is kept, and no more"
    return made


@pytest.mark.parametrize("alpha", [0.05, 0.3, 1.0])
@pytest.mark.parametrize(
    "more", [{}, {"rollouts": 3}, {"length": None}, {"value": "soft", "rollouts": 3}, {"block": 2}]
)
def test_the_range_keeps_the_greedy_choice_and_saves_rollouts(
    models: tuple[Any, Any], alpha: float, more: dict[str, Any]
) -> None:
    base = {"candidates": 6, "length": 4, "alpha": alpha, **more}
    plain = run(models, **base)
    for savings in ({"reward_range": (0.0, 1.0)}, {"reward_range": (0.0, 1.0), "at_once": 1}):
        saved = run(models, **base, **savings)
        assert [answer.tokens for answer in saved] == [answer.tokens for answer in plain]
        assert [answer.reward for answer in saved] == [answer.reward for answer in plain]
        tokens = [sum(answer.costs.rollout_tokens for answer in answers) for answers in (saved, plain)]
        assert tokens[0] < tokens[1] or ("at_once" not in savings and (alpha == 0.05 or "block" in more))
    wide = run(models, **base, reward_range=(-100.0, 100.0))
    assert [answer.costs.rollouts for answer in wide] == [answer.costs.rollouts for answer in plain]


numbers = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0, 0.1, 1 / 3]), st.floats(0, 1))


class OneStep:
    """A policy of one step, and rollouts of one token, which is what the candidate is worth."""

    context = None

    def __init__(self, logits: Sequence[float]) -> None:
        self._logits = torch.tensor([[*logits, -math.inf]], dtype=torch.float64)

    def open(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        return [0] * len(prompts)

    def close(self, handle: int) -> None: ...
    def extend(self, handle: int, token: int) -> None: ...
    def fork(self, handle: int) -> int:
        return handle

    def next_logits(self, handles: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        return self._logits, [0] * len(handles)

    def rollouts(self, prompts: Sequence[Sequence[int]], **given: Any) -> list[Rollout]:
        return [Rollout((place,), False) for place, _ in enumerate(prompts)]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([0.0, -0.1, -1.0, -3.0]) | st.floats(-5, 5), numbers), min_size=2, max_size=8),
    st.floats(1e-6, 100) | st.sampled_from([1e-300, 1.0, 1e300]),
    st.integers(1, 8),
    st.integers(1, 8),
)
@example([(0.0, 0.1), (-0.1, 0.2)], 1.0, 2, 1)
def test_the_range_keeps_the_choice_whatever_the_numbers(
    tokens: list[tuple[float, float]], alpha: float, candidates: int, at_once: int
) -> None:
    """Ties, equal probabilities, any alpha: the same token by the range, all at once or one after the other."""
    vocabulary = Vocabulary([*(bytes([97 + place]) for place in range(len(tokens))), None], frozenset({len(tokens)}))
    engine = OneStep([logit for logit, _ in tokens])

    def reward(numbers: Sequence[int], answers: Sequence[Tokens]) -> list[float]:
        return [tokens[answer[0]][1] for answer in answers]

    given = {"candidates": candidates, "alpha": alpha, "length": 1}
    chosen = [
        transfer_q(engine, engine, reward, [Query([0], max_new_tokens=2)], vocabulary, TransferQ(**given, **savings))[
            0
        ].steps[0]
        for savings in ({}, {"reward_range": (0.0, 1.0)}, {"reward_range": (0.0, 1.0), "at_once": at_once})
    ]
    assert len({step.candidates[step.chosen] for step in chosen}) == 1


def test_a_reward_outside_of_its_range_ends_the_query(models: tuple[Any, Any]) -> None:
    made = run(models, reward_range=(0.0, 0.9), alpha=0.1)
    assert any("outside of reward_range 0, 0.9: give the range that it has" in answer.reason for answer in made)
    assert all(answer.reward is None for answer in made if answer.reason)


def test_a_gated_step_is_counted(models: tuple[Any, Any]) -> None:
    """With a range of nothing the likeliest token is the choice at once: the policy's greedy answer, no rollouts."""
    made = run(models, lambda n, a: [0.5] * len(a), reward_range=(0.5, 0.5))
    for answer, prompt in zip(made, PROMPTS, strict=True):
        assert (answer.costs.rollouts, answer.costs.gated_steps) == (0, answer.costs.steps)
        assert answer.costs.reward_calls == 1, "of the answer itself"
        greedy = TransformersEngine(models[0]).rollouts(
            [prompt], max_new_tokens=8, law=Law(top_k=1), seeds=[0], ends=[END]
        )
        assert answer.tokens == greedy[0].tokens


def test_whole_greedy_rollouts_are_kept_for_the_steps_on_their_way(models: tuple[Any, Any]) -> None:
    """The winner's rollout is the one of the candidate that follows it: one rollout less, one reward less, a step."""
    made = run(models, candidates=4, length=None)
    again = run(models, candidates=4, length=None, rollout_law=Law(temperature=1e-6))  # as greedy, and not known to be
    assert [answer.tokens for answer in made] == [answer.tokens for answer in again]
    assert [step.values for answer in made for step in answer.steps] == [
        step.values for answer in again for step in answer.steps
    ]
    spared = sum(two.costs.rollouts - one.costs.rollouts for one, two in zip(made, again, strict=True))
    followed = sum(answer.costs.steps for answer in made)
    assert 3 < spared < followed


class Counting(TransformersEngine):
    """Counts its calls."""

    calls = 0

    def rollouts(self, *prompts: Any, **given: Any) -> list[Rollout]:
        self.calls += 1
        return super().rollouts(*prompts, **given)


def test_a_step_is_one_call_of_the_baseline_and_one_of_the_reward(models: tuple[Any, Any]) -> None:
    """Three queries of at most four steps; the last position needs no rollouts; nothing is judged twice."""
    asked: list[tuple[int, Tokens]] = []
    sizes: list[int] = []

    def reward(numbers: Sequence[int], answers: Sequence[Tokens]) -> list[float]:
        asked.extend(zip(numbers, answers, strict=True))
        sizes.append(len(answers))
        return graded(numbers, answers)

    baseline = Counting(models[1])
    queries = [Query(prompt, max_new_tokens=4) for prompt in PROMPTS]
    made = transfer_q(
        TransformersEngine(models[0]), baseline, reward, queries, VOCABULARY, TransferQ(candidates=5, length=2)
    )
    steps = max(answer.costs.steps for answer in made)
    assert baseline.calls <= min(steps, 3)
    assert len(sizes) <= steps + len(queries)
    assert sum(sizes) == sum(answer.costs.reward_calls for answer in made)
    assert len(asked) == len(set(asked))
    assert sum(answer.costs.cached_tokens for answer in made) > 0


@pytest.mark.parametrize("given", [{}, {"rollouts": 2, "choice": "drawn"}, {"block": 3, "rollouts": 2}])
def test_what_else_is_asked_changes_nothing(models: tuple[Any, Any], given: dict[str, Any]) -> None:
    together = run(models, **given)
    in_turn = run(models, **given, together=1)
    assert [answer.tokens for answer in together] == [answer.tokens for answer in in_turn]
    for one, other in zip(together, in_turn, strict=True):
        assert [(s.candidates, s.values, s.chosen) for s in one.steps] == [
            (s.candidates, s.values, s.chosen) for s in other.steps
        ]


def test_a_query_that_fails_leaves_the_others_alone(models: tuple[Any, Any]) -> None:
    """A reward that raises, one that gives no number, prompts that cannot be; in the order of the queries."""

    def reward(numbers: Sequence[int], answers: Sequence[Tokens]) -> list[Any]:
        if 1 in numbers:
            raise RuntimeError("no")
        return [
            None if number == 2 else value for number, value in zip(numbers, graded(numbers, answers), strict=True)
        ]

    policy, baseline = map(TransformersEngine, models)
    prompts: list[Any] = [PROMPTS[0], PROMPTS[1], PROMPTS[2], [], [12], ["a"], [1] * 64]
    seen: list[int] = []
    made = transfer_q(
        policy,
        baseline,
        reward,
        [Query(prompt, seed=7, max_new_tokens=8) for prompt in prompts],
        VOCABULARY,
        TransferQ(),
        on_answer=lambda number, answer: seen.append(number),
    )
    good = run(models, prompts=PROMPTS[:1])
    assert made[0].tokens == good[0].tokens
    assert made[0].reason == ""
    for answer, said in zip(
        made[1:],
        (
            "reward: RuntimeError: no",
            "reward: it gave None for",
            "no tokens",
            "12 is the id of no",
            "ids",
            "fill the 64",
        ),
        strict=True,
    ):
        assert said in answer.reason
        assert (answer.tokens, answer.reward) == ((), None)
    assert sorted(seen) == list(range(7))
    assert not policy._sequences


def test_what_is_raised_closes_everything(models: tuple[Any, Any]) -> None:
    class Broken(TransformersEngine):
        def rollouts(self, *prompts: Any, **given: Any) -> list[Rollout]:
            raise OSError("gone")

    policy = TransformersEngine(models[0])
    with pytest.raises(OSError, match="gone"):
        transfer_q(policy, Broken(models[1]), graded, [Query([1])], VOCABULARY)
    assert not policy._sequences


def test_best_of_n_is_the_best_of_n_answers_of_the_policy(models: tuple[Any, Any]) -> None:
    policy = TransformersEngine(models[0])
    (answer,) = transfer_q(policy, None, graded, [Query([3, 1], max_new_tokens=6)], VOCABULARY, best_of(16))
    (step,) = answer.steps
    rewards = graded([0] * 16, step.candidates)
    assert len(set(step.candidates)) > 8
    assert answer.reward == max(rewards)
    assert answer.tokens == step.candidates[rewards.index(max(rewards))], "the first of equal ones"
    assert (answer.costs.rollouts, answer.costs.cut_rollouts) == (0, 0)


def test_blocks_are_judged_by_a_value_function_or_by_rollouts(models: tuple[Any, Any]) -> None:
    """Controlled Decoding block-wise: 8 tokens in blocks of 3 are three choices, judged as they stand."""
    (answer,) = run(models, prompts=PROMPTS[:1], block=3, length=0, candidates=4)
    sizes = {len(block) for step in answer.steps for block in step.candidates if END not in block}
    assert sizes <= {3, 2}
    assert answer.costs.rollouts == 0
    for step in answer.steps:
        assert step.log_probs == (0.0,) * 4
    (rolled,) = run(models, prompts=PROMPTS[:1], block=3, length=2, candidates=4)
    assert rolled.costs.rollouts > 0


def test_the_law_of_a_drawn_block_is_p_exp_v_over_alpha(models: tuple[Any, Any]) -> None:
    """Of two blocks of one token each, by what they are worth: over 800 seeds, within four standard errors."""

    def reward(numbers: Sequence[int], answers: Sequence[Tokens]) -> list[float]:
        return [float(answer[0] % 2) for answer in answers]

    policy = TransformersEngine(models[0])
    chances = Law().log_probs(policy.next_logits(policy.open([[3]]))[0][0])
    p = [math.exp(chance) for chance in chances]
    odd = sum(p[1::2])
    # A token worth 1 is chosen: both are, or one is and wins with e / (1 + e).
    exact = odd**2 + 2 * odd * (1 - odd) * math.e / (1 + math.e)
    queries = [Query([3], seed=seed, max_new_tokens=1) for seed in range(800)]
    drawn = TransferQ(candidates=2, block=1, length=0, choice="drawn")
    made = transfer_q(policy, None, reward, queries, VOCABULARY, drawn, together=800)
    share = sum(answer.reward or 0 for answer in made) / 800
    assert abs(share - exact) < 4 * math.sqrt(exact * (1 - exact) / 800)
