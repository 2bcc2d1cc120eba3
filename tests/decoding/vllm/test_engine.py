"""Real vLLM on the CPU: what is drawn inside it is what is drawn outside, whatever its scheduler does."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from align.decoding.constraints import Built, Constraint, Vocabulary, build
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


@pytest.fixture
def predicates(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module ``vllm_predicates``, which constraints import by name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import vllm_predicates

    vllm_predicates.CALLS.clear()
    return vllm_predicates


@pytest.fixture(autouse=True)
def nothing_is_left(engine: VLLMEngine) -> Iterator[None]:
    """After every test vLLM has no request, running or waiting, and no record waits to be fetched."""
    yield
    core = engine.llm.llm_engine.engine_core.engine_core
    assert engine.llm.llm_engine.get_num_unfinished_requests() == 0
    assert not core.scheduler.requests
    assert engine.llm.collective_rpc("align_waiting") == [0]


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


def assert_same(found: Sequence[Answer], expected: Sequence[Answer], within: float = 2e-4) -> None:
    """The same samples, with the same weights up to float32, from the same questions."""
    for one, other in zip(found, expected, strict=True):
        assert one.reason == other.reason
        assert one.result is not None
        assert other.result is not None
        assert [sample.tokens for sample in one.result.samples] == [sample.tokens for sample in other.result.samples]
        weights = [sample.log_weight for sample in other.result.samples]
        assert [sample.log_weight for sample in one.result.samples] == pytest.approx(weights, abs=within)
        assert one.result.log_normaliser == pytest.approx(other.result.log_normaliser, abs=within)
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
    engine: VLLMEngine, model: Any, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
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


def test_what_fails_fails_alone(engine: VLLMEngine, vocabulary: Vocabulary, predicates: Any) -> None:
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


def test_dead_ends_and_budgets_are_as_outside(
    engine: VLLMEngine, outside: TransformersEngine, vocabulary: Vocabulary
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


def test_again_is_the_same_and_others_have_no_say(engine: VLLMEngine, vocabulary: Vocabulary) -> None:
    requests = [
        Request(PROMPT, regex("(a|bb)*ab?", vocabulary), particles=5, law=law, seed=seed, max_new_tokens=12)
        for seed, law in enumerate(LAWS)
    ]
    first = engine.generate(requests, vocabulary)
    alone = [engine.generate([request], vocabulary)[0] for request in requests]
    mixed = engine.generate([Request([1], None, particles=9, seed=8, max_new_tokens=7), *requests[::-1]], vocabulary)
    for others in (engine.generate(requests, vocabulary), alone, mixed[:0:-1]):
        assert_same(others, first, within=1e-6)


@pytest.mark.parametrize("error", [RuntimeError("full disk"), KeyboardInterrupt()])
@pytest.mark.parametrize("place", ["on_answer", "step"])
def test_what_is_raised_leaves_nothing_behind(
    error: BaseException, place: str, engine: VLLMEngine, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
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
