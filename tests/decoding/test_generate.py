"""Requests against a tiny model whose answers can all be enumerated; batching; what fails, fails alone."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from align.decoding.constraints import Constraint, PythonPredicate, Vocabulary, Words
from align.decoding.engines import TransformersEngine
from align.decoding.generate import generate
from align.decoding.law import Law
from align.decoding.request import METHODS, Answer, Method, Request
from align.decoding.smc import Result

END = 4
VOCABULARY = Vocabulary([b"a", b"b", b"ab", None, None], frozenset({END}))
PROMPT, LIMIT = [3, 0], 4
WORDS = Words(["ab", "aab", "b", "aaaa"], VOCABULARY)  # the last does not fit the limit


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=5,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,  # flat enough that 1,500 runs meet every text
    )
    return LlamaForCausalLM(config).eval()


def texts(model: Any, law: Law) -> dict[tuple[int, ...], float]:
    """Probability of each sequence of tokens that satisfies WORDS and ends within the limit."""
    found: dict[tuple[int, ...], float] = {}

    def walk(tokens: tuple[int, ...], state: Any, logp: float) -> None:
        with torch.no_grad():
            logps = law.log_probs(model(torch.tensor([[*PROMPT, *tokens]])).logits[0, -1])
        if WORDS.may_end(state):
            found[(*tokens, END)] = math.exp(logp + float(logps[END]))
        for token in range(3):
            after = WORDS.advance(state, token)
            if after is not None and len(tokens) + 2 <= LIMIT:
                walk((*tokens, token), after, logp + float(logps[token]))

    walk((), WORDS.start(), 0.0)
    return found


def within(values: Sequence[float], truth: float) -> None:
    """The mean is within 4 standard errors of the truth."""
    sample = torch.tensor(values, dtype=torch.float64)
    assert abs(float(sample.mean()) - truth) <= 4 * float(sample.std()) / math.sqrt(len(values)) + 1e-12


@pytest.mark.parametrize(
    ("method", "target"), [("awrs-smc", "law"), ("awrs-smc", "model"), ("awrs", "law"), ("mask", "law")]
)
def test_weights_are_proper(model: Any, method: Method, target: Literal["law", "model"]) -> None:
    """Means over 1,500 runs: ``Z`` is the mass of all texts, the weight on x and ``Z 1{x is drawn}`` are that of x."""
    law = Law(temperature=1.3, target=target)
    truth = texts(model, law if target == "law" else Law())
    assert len(truth) == 5
    requests = [Request(PROMPT, WORDS, method, 3, law, seed, LIMIT, threshold=0.9) for seed in range(1500)]
    answers = generate(TransformersEngine(model), requests, VOCABULARY, rows=3000)
    masses = [math.exp(answer.result.log_normaliser) for answer in answers if answer.result]
    within(masses, sum(truth.values()))
    results = [answer.result for answer in answers if answer.result]
    for text, mass in truth.items():
        within([sum(math.exp(s.log_weight) for s in r.samples if s.tokens == text) / 3 for r in results], mass)
        drawn = [r.drawn is not None and r.drawn.tokens == text for r in results]
        within([z * one for z, one in zip(masses, drawn, strict=True)], mass)


def test_a_potential_multiplies_the_target_wherever_it_is_looked_at(model: Any) -> None:
    """``exp(potential)`` of 3 for texts with b first; looked at on the way as well, the target is the same."""
    truth = texts(model, Law())
    target = sum(mass * (3 if text[0] == 1 else 1) for text, mass in truth.items())

    looked: set[bool] = set()

    def potential(sequences: Sequence[tuple[int, ...]]) -> list[float]:
        looked.update(sequence[-1] == END for sequence in sequences)
        return [math.log(3) if sequence[0] == 1 else 0.0 for sequence in sequences]

    for every in (0, 1):
        looked.clear()
        requests = [Request(PROMPT, WORDS, "awrs-smc", 3, Law(), seed, LIMIT, potential, every) for seed in range(800)]
        answers = generate(TransformersEngine(model), requests, VOCABULARY, rows=2400)
        assert all(answer.result is not None and answer.valid for answer in answers)
        within([math.exp(answer.result.log_normaliser) for answer in answers if answer.result], target)
        assert looked == ({True, False} if every else {True}), "of unfinished answers where it was asked for"


def test_what_resamples_and_what_does_not(model: Any) -> None:
    """Under the same high threshold awrs-smc does and the others never do; multinomial draws are others, as proper."""

    def results(method: Method, resampling: Literal["systematic", "multinomial"], seeds: int) -> list[Result]:
        requests = [
            Request(PROMPT, WORDS, method, 3, Law(), seed, LIMIT, threshold=0.9, resampling=resampling)
            for seed in range(seeds)
        ]
        answers = generate(TransformersEngine(model), requests, VOCABULARY, rows=3 * seeds)
        return [answer.result for answer in answers if answer.result]

    counts = {method: sum(r.resamplings for r in results(method, "systematic", 100)) for method in METHODS}
    assert counts.pop("awrs-smc") > 30
    assert set(counts.values()) == {0}
    found = results("awrs-smc", "multinomial", 800)
    assert found[:100] != results("awrs-smc", "systematic", 100)
    within([math.exp(result.log_normaliser) for result in found], sum(texts(model, Law()).values()))


def test_a_budget_of_questions(model: Any) -> None:
    """Two questions a token at most: some particles die of it, Z stays what it is, and a request says what it was."""
    requests = [Request(PROMPT, WORDS, particles=3, seed=s, max_new_tokens=LIMIT, max_draws=2) for s in range(1500)]
    answers = generate(TransformersEngine(model), requests, VOCABULARY, rows=3000)
    assert max(max(answer.evaluations) for answer in answers) == 2
    results = [answer.result for answer in answers if answer.result]
    within([math.exp(result.log_normaliser) for result in results], sum(texts(model, Law()).values()))
    first = next(a for a in answers if a.result and a.result.drawn is None and "max_draws" in a.reason)
    assert re.search(r"after '\w*' there was no allowed token among the 2 of max_draws: raise it", first.reason)
    requests = [Request(PROMPT, WORDS, "rejection", 1, seed=seed, max_draws=1) for seed in range(50)]
    answers = generate(TransformersEngine(model), requests, VOCABULARY)
    assert {count for answer in answers for count in answer.evaluations} == {1}
    assert any("max_draws" in answer.reason for answer in answers)


LETTERS = Vocabulary([bytes([33 + index]) for index in range(79)] + [None], frozenset({79}))


def letters(engine: Any, constraint: Constraint, method: Method, seeds: int) -> list[Answer]:
    requests = [Request([1], constraint, method, 1, seed=seed, max_new_tokens=4) for seed in range(seeds)]
    return generate(engine, requests, LETTERS, rows=seeds)


def test_where_text_is_forced_the_mask_is_asked_and_counted_by_itself() -> None:
    """Of 80 tokens one may come, three times: after 16 refusals the mask says which, and weights stay proper."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=80, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    engine = TransformersEngine(LlamaForCausalLM(config).eval())
    answers = letters(engine, Words(["abc", "b"], LETTERS), "awrs", 600)
    assert max(max(answer.evaluations) for answer in answers) <= 17
    assert sum(answer.masks for answer in answers) > 600
    masses = [math.exp(answer.result.log_normaliser) for answer in answers if answer.result]
    masked = letters(engine, Words(["abc", "b"], LETTERS), "mask", 600)
    exact = [math.exp(answer.result.log_normaliser) for answer in masked if answer.result]
    spread = math.hypot(*(float(torch.tensor(values).std()) / math.sqrt(600) for values in (masses, exact)))
    assert abs(sum(masses) - sum(exact)) / 600 < 4 * spread
    for answer in masked:
        assert set(answer.evaluations[:3]) == {0}, "asked one by one at the last position alone"
        assert answer.masks == min(3, len(answer.evaluations))

    class Liar(Words):
        def allowed(self, state: Any) -> np.ndarray:
            return np.ones(80, dtype=bool)

    for method in ("awrs", "mask"):
        (answer,) = letters(engine, Liar(["abc"], LETTERS), method, 1)  # type: ignore[arg-type]
        assert re.search(r"its mask allows token \d+, which it refuses", answer.reason), answer.reason


def mixed() -> list[Request]:
    prompts = ([3], [0, 1, 2], [3, 0, 0, 1, 2, 2, 1])
    return [
        Request(prompts[number % 3], WORDS, METHODS[number % 4], 1 + number % 5, Law(0.8, top_p=0.95), number, 6)
        for number in range(24)
    ]


def test_an_answer_does_not_depend_on_what_else_is_in_the_batch(model: Any) -> None:
    """In float32 the same tokens, and weights up to rounding: together, few at a time, alone."""
    engine = TransformersEngine(model)
    together = generate(engine, mixed(), VOCABULARY)
    few = generate(engine, mixed(), VOCABULARY, rows=4)
    alone = [generate(engine, [request], VOCABULARY)[0] for request in mixed()]
    assert any(answer.valid for answer in together)
    for others in (few, alone):
        for one, other in zip(together, others, strict=True):
            assert one.result is not None
            assert other.result is not None
            assert [s.tokens for s in one.result.samples] == [s.tokens for s in other.result.samples]
            assert [s.log_weight for s in one.result.samples] == pytest.approx(
                [s.log_weight for s in other.result.samples], abs=1e-4
            )
            assert one.evaluations == other.evaluations
    assert not engine._sequences, "everything was closed"


class Broken:
    """Raises on its third token."""

    def start(self) -> int:
        return 0

    def advance(self, state: int, token: int) -> int | None:
        if state == 2:
            raise RuntimeError("no more")
        return state + 1

    def may_end(self, state: int) -> bool:
        return False


class Endless(Broken):
    def advance(self, state: int, token: int) -> int | None:
        return state + 1


class Exits(Broken):
    """Ends the program, as scripts do."""

    def may_end(self, state: int) -> bool:
        sys.exit(0)


class NotPrefixClosed(Broken):
    """Takes a token after which nothing may follow."""

    def advance(self, state: int, token: int) -> int | None:
        return state + 1 if state == 0 else None


class Forgetful(Broken):
    """Lets an answer end the first time that it is asked, and never again."""

    def __init__(self) -> None:
        self.asked = iter([True])

    def advance(self, state: int, token: int) -> int | None:
        return None

    def may_end(self, state: int) -> bool:
        return next(self.asked, False)


def none_at_all(text: str, complete: bool) -> bool:
    return not complete and not text


@pytest.mark.parametrize(
    ("request_of", "reason"),
    [
        (
            lambda: Request(PROMPT, Broken()),
            r"Broken raised RuntimeError: no more; after '\w+'; the constraint was asked about token \d",
        ),
        (lambda: Request(PROMPT, Exits()), "Exits raised SystemExit: 0"),
        (
            lambda: Request(PROMPT, WORDS, potential=lambda sequences: sys.exit("no")),
            "SystemExit: no",
        ),
        (
            lambda: Request(PROMPT, Endless(), max_new_tokens=7),
            "could not end at the limit of 7 tokens: raise .* if any finite text satisfies it",
        ),
        (lambda: Request(PROMPT, NotPrefixClosed()), "or it is not prefix-closed"),
        (lambda: Request(PROMPT, PythonPredicate(none_at_all, VOCABULARY)), "no token may follow ''"),
        (lambda: Request(PROMPT, Forgetful()), "does not depend on the text alone"),
        (lambda: Request([0] * 508, WORDS, max_new_tokens=10), "508 tokens and an answer of 10 are more than the 512"),
        (lambda: Request([], WORDS), "prompt: it has no tokens"),
        (lambda: Request([99], WORDS), "prompt: 99 is the id of no token, they are from 0 to 4"),
        (lambda: Request([3, -1], WORDS), "prompt: -1 is the id of no token"),
        (lambda: Request([3, 1.5], WORDS), "prompt: 1.5 is no whole number"),  # type: ignore[list-item]
        (lambda: Request("the hat", WORDS), "prompt: 't' is no whole number"),  # type: ignore[arg-type]
        (lambda: Request(PROMPT, WORDS, law=Law(top_k=1)), r"none of the 1 tokens \(of 5\) to which top_k=1 leaves"),
        (lambda: Request(PROMPT, WORDS, law=Law(top_p=0.3)), r"after '' none .* top_p=0\.3 leaves .* loosen it"),
        (lambda: Request(PROMPT, WORDS, law=Law(1e-5)), r"after '' none .* temperature=1e-05 leaves"),
        (
            lambda: Request(PROMPT, Endless(), law=Law(top_k=2), max_new_tokens=3),
            "could not end at the limit of 3 tokens: raise",
        ),
        (
            lambda: Request(PROMPT, WORDS, potential=lambda sequences: [0.0, 0.0]),
            r"potential: it gave 2 numbers for \d",
        ),
        (lambda: Request(PROMPT, WORDS, potential=lambda sequences: None), "potential: it gave None; it must give a"),
        (lambda: Request(PROMPT, WORDS, potential=lambda sequences: [1 / 0]), "ZeroDivisionError"),
    ],
)
def test_what_fails_says_why_and_harms_no_other(model: Any, request_of: Callable[[], Request], reason: str) -> None:
    engine = TransformersEngine(model)
    good = [Request(PROMPT, WORDS, seed=seed, max_new_tokens=LIMIT) for seed in (1, 2)]
    expected = generate(engine, good, VOCABULARY)
    first, bad, last = generate(engine, [good[0], request_of(), good[1]], VOCABULARY)
    assert not bad.valid
    assert re.search(reason, bad.reason), bad.reason
    assert [first.result.drawn, last.result.drawn] == [answer.result.drawn for answer in expected]  # type: ignore[union-attr]
    assert not engine._sequences


def test_logits_that_are_no_numbers_end_their_request_alone(model: Any) -> None:
    class Poisoned(TransformersEngine):
        """The first sequence has no logits at the first step."""

        poison = False

        def next_logits(self, handles: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
            logits, rows = super().next_logits(handles)
            if self.poison:
                logits = logits.index_fill(0, torch.tensor(rows[0]), math.nan)
                self.poison = False
            return logits, rows

    engine = Poisoned(model)
    engine.poison = True
    bad, good = generate(engine, [Request([3], WORDS), Request(PROMPT, WORDS)], VOCABULARY)
    assert "NaN" in bad.reason
    assert good.valid


def test_without_a_constraint_answers_follow_the_model(model: Any) -> None:
    requests = [Request(PROMPT, None, particles=2, seed=seed, max_new_tokens=2) for seed in range(500)]
    results = [answer.result for answer in generate(TransformersEngine(model), requests, VOCABULARY)]
    assert all(result is not None and result.log_normaliser == 0 for result in results)
    drawn = [sample.tokens for result in results if result for sample in result.samples]
    assert all(len(tokens) == 2 or tokens == (END,) for tokens in drawn)
    with torch.no_grad():
        law = model(torch.tensor([PROMPT])).logits[0, -1].double().softmax(-1)
    for token, probability in enumerate(law.tolist()):
        within([float(tokens[0] == token) for tokens in drawn], probability)


def test_what_is_raised_leaves_nothing_open(model: Any) -> None:
    """By the caller, by the engine in the middle, and for a vocabulary of another width: both widths are named."""

    def stop(number: int, answer: Answer) -> None:
        raise KeyboardInterrupt

    class Failing(TransformersEngine):
        steps = 0

        def next_logits(self, handles: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
            self.steps += 1
            if self.steps == 2:
                raise RuntimeError("out of memory")
            return super().next_logits(handles)

    requests = [Request(PROMPT, WORDS, seed=seed, max_new_tokens=2 + seed) for seed in range(4)]
    narrow = Vocabulary([b"a", b"b", b"ab", None], frozenset({3}))
    wide = Vocabulary([*VOCABULARY.tokens, None], frozenset({END}))
    for engine, vocabulary, on_answer, error, message in (
        (TransformersEngine(model), VOCABULARY, stop, KeyboardInterrupt, None),
        (Failing(model), VOCABULARY, None, RuntimeError, "out of memory"),
        (TransformersEngine(model), narrow, None, ValueError, "vocabulary has 4 tokens and .* 5 columns.*size=5"),
        (TransformersEngine(model), wide, None, ValueError, "vocabulary has 6 tokens and .* 5 columns"),
    ):
        with pytest.raises(error, match=message):
            generate(engine, requests, vocabulary, on_answer=on_answer)
        assert not engine._sequences


def test_answers_come_as_they_are_done(model: Any) -> None:
    seen: list[int] = []
    long = Request(PROMPT, Words(["a" * 12], VOCABULARY), particles=1, max_new_tokens=30)
    short = Request(PROMPT, WORDS, particles=2, max_new_tokens=3)
    answers = generate(
        TransformersEngine(model), [long, short, short], VOCABULARY, rows=3, on_answer=lambda n, _: seen.append(n)
    )
    assert sorted(seen) == [0, 1, 2]
    assert seen[-1] == 0, "the long one was asked first and is there last"
    assert len(answers) == 3


def test_settings_out_of_range() -> None:
    for wrong in (
        {"method": "best"},
        {"particles": 0},
        {"max_new_tokens": 0},
        {"potential_every": -1},
        {"threshold": 2},
        {"particles": 2.5},
        {"max_draws": 0},
        {"max_draws": 3, "method": "mask"},
        {"resampling": "residual"},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Request(PROMPT, WORDS, **wrong)  # type: ignore[arg-type]
