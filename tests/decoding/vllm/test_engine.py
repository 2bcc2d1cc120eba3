"""Real vLLM on the CPU: what is drawn inside it is what is drawn outside, whatever its scheduler does."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from align.decoding.constraints import Built, Constraint, Vocabulary, build
from align.decoding.engines import TransformersEngine
from align.decoding.engines.vllm import VLLMEngine
from align.decoding.generate import generate
from align.decoding.law import Law
from align.decoding.request import Request

PROMPT = [0, 1, 2]
pytestmark = pytest.mark.usefixtures("nothing_is_left")
LAWS = [Law(), Law(temperature=0.7), Law(temperature=1.5, target="model"), Law(top_k=3), Law(top_p=0.8)]


def regex(pattern: str, vocabulary: Vocabulary) -> Built:
    return build({"regex": pattern}, vocabulary)


def masses(
    model: Any, law: Law, constraint: Constraint, limit: int, prompt: Sequence[int] = PROMPT
) -> dict[tuple[int, ...], float]:
    """Probability under the law of each sequence that satisfies the constraint and ends within the limit."""
    found: dict[tuple[int, ...], float] = {}

    def walk(tokens: tuple[int, ...], state: Any, logp: float) -> None:
        with torch.no_grad():
            logps = law.log_probs(model(torch.tensor([[*prompt, *tokens]])).logits[0, -1])
        if constraint.may_end(state) and logps[4] > -math.inf:
            found[(*tokens, 4)] = math.exp(logp + float(logps[4]))
        for token in range(3):
            after = constraint.advance(state, token) if logps[token] > -math.inf else None
            if after is not None and len(tokens) + 2 <= limit:
                walk((*tokens, token), after, logp + float(logps[token]))

    walk((), constraint.start(), 0.0)
    return found


def within(values: Sequence[float], truth: float) -> None:
    """The mean is within 4 standard errors of the truth."""
    sample = torch.tensor(values, dtype=torch.float64)
    assert abs(float(sample.mean()) - truth) < 4 * float(sample.std()) / math.sqrt(len(values)) + 1e-12


def test_logits_are_those_of_transformers(engine: VLLMEngine, outside: TransformersEngine) -> None:
    prompts = [[0], [0, 1, 2], [2] * 40, [0, 1, 2]]
    found, places = engine.next_logits(engine.open(prompts))
    expected, others = outside.next_logits(outside.open(prompts))
    assert found.dtype == torch.float32
    for place, other in zip(places, others, strict=True):
        torch.testing.assert_close(found[place].log_softmax(-1), expected[other].log_softmax(-1), atol=1e-5, rtol=0)
    handle = engine.fork(engine.open([[0, 1]])[0])
    engine.extend(handle, 2)
    again, _ = engine.next_logits([handle])
    torch.testing.assert_close(again[0], found[places[1]], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"prompts\[0\] has no tokens"):
        engine.open([[]])


@pytest.mark.parametrize("method", ["awrs-smc", "awrs", "mask", "rejection"])
@pytest.mark.parametrize("law", LAWS, ids=str)
def test_inside_is_outside(
    method: Any, law: Law, engine: VLLMEngine, outside: TransformersEngine, vocabulary: Vocabulary, assert_same: Any
) -> None:
    requests = [
        Request(
            PROMPT, regex("(a|bb)*ab?", vocabulary), method=method, particles=12, law=law, seed=seed, max_new_tokens=9
        )
        for seed in range(4)
    ]
    assert_same(engine.generate(requests, vocabulary), generate(outside, requests, vocabulary))


def test_the_lab_through_vllm(engine: VLLMEngine, model: Any, vocabulary: Vocabulary) -> None:
    """Means of weights over 300 runs of 8 particles against Z by enumeration, and of each text, within 4 sigma."""
    constraint, limit = build({"words": ["ab", "aab", "b", "aba"]}, vocabulary), 4
    exact = masses(model, Law(), constraint, limit)
    assert len(exact) == 7
    for threshold in (0.0, 0.9):
        requests = [
            Request(PROMPT, constraint, particles=8, seed=seed, max_new_tokens=limit, threshold=threshold)
            for seed in range(300)
        ]
        answers = engine.generate(requests, vocabulary)
        results = [answer.result for answer in answers if answer.result is not None]
        assert len(results) == 300
        for text, mass in [(None, math.fsum(exact.values())), *exact.items()]:
            within(
                [
                    math.fsum(
                        math.exp(sample.log_weight) for sample in result.samples if text in (None, sample.tokens)
                    )
                    / 8
                    for result in results
                ],
                mass,
            )
        assert sum(result.resamplings for result in results) > 0 or not threshold


def test_dead_ends_and_budgets_are_as_outside(
    engine: VLLMEngine, outside: TransformersEngine, vocabulary: Vocabulary, assert_same: Any
) -> None:
    """Where a budget ends, where a text leads nowhere, and where all particles do; the reasons are the same."""
    specs = [{"regex": "(ab|b){2}a"}, {"regex": "c"}, {"all_of": [{"regex": "a.*"}, {"regex": ".*b.{2}"}]}]
    requests = [
        Request(PROMPT, build(spec, vocabulary), "awrs-smc", 4, Law(), seed, 4, max_draws=most)
        for spec in specs
        for most in (1, 2, None)
        for seed in range(4)
    ]
    found = engine.generate(requests, vocabulary)
    assert_same(found, generate(outside, requests, vocabulary))
    assert any(answer.result and 0 < answer.result.dead_ends < 4 for answer in found)


def test_a_cheap_part_rules_tokens_out_before_the_predicate_is_asked(
    engine: VLLMEngine, model: Any, vocabulary: Vocabulary, predicates: Any
) -> None:
    """``b{3}`` leaves one token at each place, so its mass is the weight, exactly, and one question is enough.

    Asked: the empty text when it is built and for its first mask, then b, bb and bbb, and bbb as a whole.
    """
    spec = {"all_of": [{"regex": "b{3}"}, {"python": "vllm_predicates:takes"}]}
    constraint = build(spec, vocabulary)
    predicates.CALLS.clear()
    requests = [Request(PROMPT, constraint, particles=8, seed=seed, max_new_tokens=8) for seed in range(5)]
    answers = engine.generate(requests, vocabulary)
    (mass,) = masses(model, Law(), regex("b{3}", vocabulary), 8).values()
    for answer in answers:
        assert answer.result is not None
        assert answer.result.log_normaliser == pytest.approx(math.log(mass), abs=1e-4)
        assert answer.evaluations == (1,) * 32
    asked = [text for text, complete in predicates.CALLS if not complete and text]
    again = 5  # answers are put to the constraint anew, outside of vLLM
    assert sorted(asked) == ["b"] * (1 + again) + ["bb"] * (1 + again) + ["bbb"] * (1 + again)

    spec = {"all_of": [{"regex": "[ab]{2,3}"}, {"python": "vllm_predicates:one_b"}]}
    constraint, predicates.CALLS[:] = build(spec, vocabulary), []
    exact = masses(model, Law(), constraint, 5)
    predicates.CALLS.clear()
    requests = [Request(PROMPT, constraint, "awrs", particles=8, seed=seed, max_new_tokens=5) for seed in range(200)]
    results = [answer.result for answer in engine.generate(requests, vocabulary)]
    within([math.exp(result.log_normaliser) for result in results if result], math.fsum(exact.values()))
    inside = len(predicates.CALLS) - sum(len(r.drawn.tokens) for r in results if r and r.drawn)
    assert inside <= 2 * 15 + 1  # 1,600 particles, and 15 texts of up to three letters: none is asked about twice


def test_again_is_the_same_and_others_have_no_say(
    engine: VLLMEngine, vocabulary: Vocabulary, assert_same: Any
) -> None:
    requests = [
        Request(PROMPT, regex("(a|bb)*ab?", vocabulary), particles=5, law=law, seed=seed, max_new_tokens=12)
        for seed, law in enumerate(LAWS)
    ]
    first = engine.generate(requests, vocabulary)
    alone = [engine.generate([request], vocabulary)[0] for request in requests]
    mixed = engine.generate([Request([1], None, particles=9, seed=8, max_new_tokens=7), *requests[::-1]], vocabulary)
    for others in (engine.generate(requests, vocabulary), alone, mixed[:0:-1]):
        assert_same(others, first, within=1e-6)


def test_a_vocabulary_of_another_model_is_refused(engine: VLLMEngine, vocabulary: Vocabulary) -> None:
    def other(tokens: list[bytes | None], ends: set[int]) -> Vocabulary:
        return Vocabulary(tokens, frozenset(ends))

    with pytest.raises(ValueError, match="has 6 tokens and the model's logits 5 columns"):
        engine.generate([], other([*vocabulary.tokens, b"c"], {4}))
    with pytest.raises(ValueError, match=r"ends answers by \[3, 4\] and the engine by \[4\]"):
        engine.generate([], other(list(vocabulary.tokens), {3, 4}))
    with pytest.raises(ValueError, match="other tokens than the model's tokenizer"):
        engine.generate([], other([b"a", b"b", b"ba", None, None], {4}))


def test_rollouts_are_those_of_transformers(engine: VLLMEngine, outside: TransformersEngine) -> None:
    prompts = [[0], [0, 1, 2], [0, 1, 2], [1] * 255, [2] * 256]
    for law in (Law(), Law(0.7), Law(top_k=1)):
        settings: dict[str, Any] = {"max_new_tokens": 10, "law": law, "seeds": [1, 2, 3, 4, 5], "ends": {4}}
        found, expected = engine.rollouts(prompts, **settings), outside.rollouts(prompts, **settings)
        assert [(one.tokens, one.ended) for one in found] == [(one.tokens, one.ended) for one in expected]
    for prompts, changed, reason in [
        ([[0], []], {}, r"prompts\[1\] has no tokens"),
        ([[0]], {"seeds": []}, "0 seeds for 1 prompts"),
        ([[0]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
    ]:
        settings = {"max_new_tokens": 3, "law": Law(), "seeds": [1] * len(prompts), "ends": {4}, **changed}
        with pytest.raises(ValueError, match=reason):
            engine.rollouts(prompts, **settings)


def test_the_requests_own_settings(
    engine: VLLMEngine, outside: TransformersEngine, model: Any, vocabulary: Vocabulary
) -> None:
    """Temperature, top-k, top-p and seed of the vLLM request; its log-probs sum to the log-weight at 0.7, too."""
    from vllm import SamplingParams

    spec = {"words": ["ab", "aab", "b", "aba"]}
    constraint = build(spec, vocabulary)

    def answers(law: Law, count: int, own: Callable[[], Any]) -> list[tuple[tuple[int, ...], float]]:
        asked = [
            SamplingParams(
                temperature=law.temperature,
                top_k=law.top_k or 0,
                top_p=law.top_p or 1.0,
                seed=seed,
                max_tokens=6,
                logprobs=0,
                detokenize=False,
                extra_args={"align": own()},
            )
            for seed in range(count)
        ]
        made: list[Any] = []
        for begin in range(0, count, 20):  # vLLM cannot compute the prompt of a seeded request in chunks on a CPU
            part = asked[begin : begin + 20]
            outputs = engine.llm.generate([{"prompt_token_ids": PROMPT}] * len(part), part, use_tqdm=False)
            made += [one.outputs[0] for one in outputs]
        return [
            (
                tuple(one.token_ids),
                math.fsum(row[token].logprob for row, token in zip(one.logprobs, one.token_ids, strict=True)),
            )
            for one in made
        ]

    for law in (Law(), Law(0.7), Law(1.4, top_k=3), Law(0.7, top_p=0.9)):
        for method in ("awrs", "mask"):
            found = answers(law, 12, lambda method=method: json.dumps({"constraint": spec, "method": method}))
            requests = [Request(PROMPT, constraint, method, 1, law, seed, 6) for seed in range(12)]
            for (tokens, weight), other in zip(found, generate(outside, requests, vocabulary), strict=True):
                assert other.result is not None
                sample = other.result.samples[0]
                if sample.log_weight == -math.inf:
                    assert weight < -1e8
                else:
                    assert (tokens, weight) == (sample.tokens, pytest.approx(sample.log_weight, abs=1e-5))
    exact = masses(model, Law(0.7), constraint, 6)
    drawn = answers(Law(0.7), 600, lambda: {"constraint": spec})
    for text, mass in exact.items():
        within([math.exp(weight) * (tokens == text) for tokens, weight in drawn], mass)
