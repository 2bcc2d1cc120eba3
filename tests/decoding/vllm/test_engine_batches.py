"""Real vLLM on the CPU: what its scheduler does, what else is in the batch and what fails there have no say."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch

from align.decoding.constraints import Built, Vocabulary, build
from align.decoding.engines import TransformersEngine
from align.decoding.engines.vllm import VLLMEngine
from align.decoding.generate import generate
from align.decoding.law import Law
from align.decoding.request import Request

PROMPT = [0, 1, 2]
pytestmark = pytest.mark.usefixtures("nothing_is_left")


def regex(pattern: str, vocabulary: Vocabulary) -> Built:
    return build({"regex": pattern}, vocabulary)


def test_preempted_rows_go_on_where_they_were(
    engine: VLLMEngine,
    outside: TransformersEngine,
    vocabulary: Vocabulary,
    monkeypatch: pytest.MonkeyPatch,
    assert_same: Any,
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


def test_prompts_in_chunks(
    engine: VLLMEngine, outside: TransformersEngine, vocabulary: Vocabulary, assert_same: Any
) -> None:
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


def test_rows_that_move(
    engine: VLLMEngine, outside: TransformersEngine, vocabulary: Vocabulary, assert_same: Any
) -> None:
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


@contextmanager
def beside(engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch, plain: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Plain requests, by name, that run in the same batches as what is generated here; their tokens, in the end."""
    inner, found, sizes = engine.llm.llm_engine.step, dict[str, Any](), list[int]()

    def step() -> Any:
        scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
        names = [request.request_id for request in scheduler.running]
        sizes.append(len({"/" in name for name in names}))
        outputs = inner()
        found.update({o.request_id: list(o.outputs[0].token_ids) for o in outputs if o.request_id in plain})
        return outputs

    for name, params in plain.items():
        engine.llm.llm_engine.add_request(name, {"prompt_token_ids": list(PROMPT)}, params)
    with monkeypatch.context() as patch:
        patch.setattr(engine.llm.llm_engine, "step", step)
        yield found
        while engine.llm.llm_engine.has_unfinished_requests():
            step()
    assert max(sizes) == 2  # both kinds in one batch


def test_plain_requests_get_their_own_tokens(
    engine: VLLMEngine, model: Any, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch, assert_same: Any
) -> None:
    from vllm import SamplingParams

    def sampled(**settings: Any) -> Any:
        return SamplingParams(max_tokens=20, ignore_eos=True, detokenize=False, **settings)

    plain = {"greedy": sampled(temperature=0)}
    plain |= {f"seed {seed}": sampled(temperature=0.9, top_p=0.95, seed=seed) for seed in range(4)}
    plain |= {"penalties": sampled(temperature=0, repetition_penalty=1.3, logit_bias={1: 0.5})}
    alone = {
        name: list(engine.llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)[0].outputs[0].token_ids)
        for name, params in plain.items()
    }
    requests = [
        Request(PROMPT, regex("[ab]{5,}", vocabulary), particles=6, seed=seed, max_new_tokens=20) for seed in range(4)
    ]
    expected = engine.generate(requests, vocabulary)
    with beside(engine, monkeypatch, plain) as found:
        assert_same(engine.generate(requests, vocabulary), expected)
    assert found == alone
    tokens = list(PROMPT)
    for _ in range(20):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert found["greedy"] == tokens[len(PROMPT) :]


HOSTILE = "(.{0,300}a.{0,300}){20}c"  # small as it stands, and llguidance's automaton of it grows with every token


def test_what_fails_fails_alone(engine: VLLMEngine, vocabulary: Vocabulary, predicates: Any, assert_same: Any) -> None:
    def request(spec: dict[str, Any], seed: int, **settings: Any) -> Request:
        settings = {"particles": 4, "max_new_tokens": 12, **settings}
        return Request(PROMPT, build(spec, vocabulary), seed=seed, **settings)

    good = [request({"regex": f"[ab]{{{3 + seed}}}"}, seed) for seed in range(4)]
    expected = engine.generate(good, vocabulary)
    unspellable = Built(regex("a", vocabulary), {"regex": "("})
    bad = {
        "raised RuntimeError: no ab here; on ": request({"python": "vllm_predicates:raises"}, 1),
        "took over 0.3 s on ": request({"python": "vllm_predicates:sleeps", "timeout": 0.3}, 1),
        "too many expressions": request({"regex": HOSTILE}, 1, particles=1, max_new_tokens=250),
        "no token may follow": request({"regex": "c"}, 1),
        "could not end at the limit": request({"grammar": 'start: A B\nA: /a+/\nB: "a"'}, 1),
        "raise it": request({"regex": "ab{3}"}, 1, max_draws=1, particles=1),
        "more than the 256 that the model reads": request({"regex": "a"}, 1, max_new_tokens=254),
        "unclosed group": replace(request({"regex": "a"}, 1), constraint=unspellable),
        "only constraints of": replace(request({"regex": "a"}, 1), constraint=regex("a", vocabulary).constraint),
        "ZeroDivisionError": replace(request({"regex": "a"}, 1), potential=lambda texts: [1 / 0 for _ in texts]),
        "log_potential is nan": replace(request({"regex": "a"}, 1), potential=lambda texts: [math.nan for _ in texts]),
    }
    answers = engine.generate([*good[:2], *bad.values(), *good[2:]], vocabulary)
    assert_same([*answers[:2], *answers[-2:]], expected)
    for (reason, one), answer in zip(bad.items(), answers[2:-2], strict=True):
        assert reason in answer.reason, (reason, answer)
        assert not answer.valid
        assert answer.result is None or answer.result.drawn is None, one


@pytest.mark.parametrize("error", [RuntimeError("full disk"), KeyboardInterrupt()])
@pytest.mark.parametrize("place", ["on_answer", "step"])
def test_what_is_raised_leaves_nothing_behind(
    error: BaseException,
    place: str,
    engine: VLLMEngine,
    vocabulary: Vocabulary,
    monkeypatch: pytest.MonkeyPatch,
    assert_same: Any,
) -> None:
    """By who takes the answers, or between two steps of vLLM; what comes next is as ever."""
    requests = [
        Request(PROMPT, regex(f"[ab]{{{3 * seed}}}", vocabulary), particles=6, seed=seed, max_new_tokens=30)
        for seed in range(1, 6)
    ]
    expected = engine.generate(requests, vocabulary)
    inner, steps = engine.llm.llm_engine.step, count()

    def step() -> Any:
        if next(steps) == 5:
            raise error
        return inner()

    def on_answer(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        if place == "step":
            patch.setattr(engine.llm.llm_engine, "step", step)
        with pytest.raises(type(error)):
            engine.generate(requests, vocabulary, on_answer=on_answer if place == "on_answer" else None)
    assert engine.llm.llm_engine.get_num_unfinished_requests() == 0
    assert engine.llm.collective_rpc("align_waiting") == [0]
    for ask in (
        lambda: engine.next_logits(engine.open([[0], [1]])),
        lambda: engine.rollouts([[0]] * 9, max_new_tokens=9, law=Law(), seeds=range(9), ends=()),
    ):
        steps = count(5)
        with monkeypatch.context() as patch:
            patch.setattr(engine.llm.llm_engine, "step", step)
            with pytest.raises(type(error)):
                ask()
        assert engine.llm.llm_engine.get_num_unfinished_requests() == 0
        assert engine.llm.collective_rpc("align_waiting") == [0]
    assert_same(engine.generate(requests, vocabulary), expected)


def test_vllm_refuses_with_its_own_error(engine: VLLMEngine) -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    own = {"constraint": {"regex": "a"}, "seed": 1}
    for params, reason in [
        (SamplingParams(logprobs=1), "logprobs: this engine reports the logits"),
        (SamplingParams(min_p=0.1, extra_args={"align": own}), "min_p: it does not go with align"),
        (SamplingParams(extra_args={"align": {**own, "constraint": {"regex": "("}}}), "regex '\\('"),
    ]:
        with pytest.raises(VLLMValidationError, match=reason):
            engine.llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)
    unlimited = SamplingParams(max_tokens=None, temperature=0.5, extra_args={"align": own})
    (found,) = engine.llm.generate([{"prompt_token_ids": PROMPT}], unlimited, use_tqdm=False)
    assert found.outputs[0].token_ids == [0, 4]


def test_what_is_drawn_in_the_middle_of_a_prompt_does_not_count(
    engine: VLLMEngine, vocabulary: Vocabulary, predicates: Any
) -> None:
    """After each of four chunks a token is drawn and thrown away: a constraint that fails on it has not failed."""
    constraint = build({"python": "vllm_predicates:once"}, vocabulary)
    request = Request([0, 1] * 100, constraint, "awrs", 1, Law(), seed=1, max_new_tokens=8)
    (answer,) = engine.generate([request], vocabulary)
    assert answer.reason == ""
    assert any(text for text, _ in predicates.CALLS)
