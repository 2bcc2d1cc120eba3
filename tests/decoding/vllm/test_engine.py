"""Real vLLM on the CPU: what is drawn inside it is what is drawn outside, whatever its scheduler does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from align.decoding.constraints import Built, Vocabulary, build
from align.decoding.engines import TransformersEngine
from align.decoding.engines.vllm import VLLMEngine
from align.decoding.generate import generate
from align.decoding.law import Law
from align.decoding.request import Answer, Request

PROMPT = [0, 1, 2]
LAWS = [Law(), Law(temperature=0.7), Law(temperature=1.5, target="model"), Law(top_k=3), Law(top_p=0.8)]


@pytest.fixture(scope="module")
def outside(model: Any) -> TransformersEngine:
    return TransformersEngine(model)


def regex(pattern: str, vocabulary: Vocabulary) -> Built:
    return build({"regex": pattern}, vocabulary)


def assert_same(found: Sequence[Answer], expected: Sequence[Answer]) -> None:
    """The same samples, with the same weights up to float32, from the same questions."""
    for one, other in zip(found, expected, strict=True):
        assert one.reason == other.reason
        assert one.result is not None
        assert other.result is not None
        assert [sample.tokens for sample in one.result.samples] == [sample.tokens for sample in other.result.samples]
        weights = [sample.log_weight for sample in other.result.samples]
        assert [sample.log_weight for sample in one.result.samples] == pytest.approx(weights, abs=2e-4)
        assert one.result.log_normaliser == pytest.approx(other.result.log_normaliser, abs=2e-4)
        assert one.result.resamplings == other.result.resamplings
        assert one.valid == other.valid


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
    method: Any, law: Law, engine: VLLMEngine, outside: TransformersEngine, vocabulary: Vocabulary
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
    exact: dict[tuple[int, ...], float] = {}

    def walk(tokens: tuple[int, ...], state: Any, logp: float) -> None:
        with torch.no_grad():
            logps = model(torch.tensor([[*PROMPT, *tokens]])).logits[0, -1].double().log_softmax(-1)
        if constraint.may_end(state):
            exact[(*tokens, 4)] = math.exp(logp + float(logps[4]))
        for token in range(3):
            after = constraint.advance(state, token)
            if after is not None and len(tokens) + 2 <= limit:
                walk((*tokens, token), after, logp + float(logps[token]))

    walk((), constraint.start(), 0.0)
    for threshold in (0.0, 0.9):
        requests = [
            Request(PROMPT, constraint, particles=8, seed=seed, max_new_tokens=limit, threshold=threshold)
            for seed in range(300)
        ]
        answers = engine.generate(requests, vocabulary)
        for text, mass in [(None, math.fsum(exact.values())), *exact.items()]:
            means = torch.tensor(
                [
                    math.fsum(math.exp(s.log_weight) for s in a.result.samples if text in (None, s.tokens)) / 8
                    for a in answers
                    if a.result is not None
                ],
                dtype=torch.float64,
            )
            assert len(means) == 300
            assert abs(float(means.mean()) - mass) < 4 * float(means.std()) / math.sqrt(300)
        assert sum(a.result.resamplings for a in answers if a.result) > 0 or not threshold


def test_preempted_rows_go_on_where_they_were(
    engine: VLLMEngine, outside: TransformersEngine, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
    preempted: list[str] = []
    original = scheduler._preempt_request

    def counted(request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.request_id)
        return original(request, *args, **kwargs)

    monkeypatch.setattr(scheduler, "_preempt_request", counted)
    requests = [
        Request([seed % 3] * 20, regex("(a|b){60,}", vocabulary), particles=8, seed=seed, max_new_tokens=70)
        for seed in range(5)
    ]
    found = engine.generate(requests, vocabulary)
    assert preempted
    assert_same(found, generate(outside, requests, vocabulary))


def test_prompts_in_chunks(engine: VLLMEngine, outside: TransformersEngine, vocabulary: Vocabulary) -> None:
    """200 tokens come in four chunks of at most 64, and vLLM samples after each and throws it away."""
    requests = [
        Request(
            [(seed + i) % 3 for i in range(200)],
            regex("[ab]{1,6}", vocabulary),
            particles=4,
            seed=seed,
            max_new_tokens=8,
        )
        for seed in range(3)
    ]
    assert_same(engine.generate(requests, vocabulary), generate(outside, requests, vocabulary))


def test_rows_that_move(engine: VLLMEngine, outside: TransformersEngine, vocabulary: Vocabulary) -> None:
    """Answers of very different lengths: rows leave, and others take their places in the batch."""
    requests = [
        Request(
            PROMPT,
            regex(f"[ab]{{{1 + 5 * (seed % 5)}}}", vocabulary),
            particles=1 + seed % 3,
            seed=seed,
            max_new_tokens=30,
        )
        for seed in range(20)
    ]
    assert_same(engine.generate(requests, vocabulary), generate(outside, requests, vocabulary))
