"""Real vLLM: a copy goes on from its source's block, exactly; where it cannot, it is computed as any other request."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from align.decoding.constraints import Vocabulary, build
from align.decoding.engines import TransformersEngine
from align.decoding.engines.vllm import VLLMEngine, sampling
from align.decoding.generate import generate
from align.decoding.request import Request

BLOCK = 32


@pytest.fixture
def scheduler(engine: VLLMEngine) -> Iterator[Any]:
    """The engine's scheduler; afterwards nothing runs, and it has all its blocks again."""
    found: Any = engine.llm.llm_engine.engine_core.engine_core.scheduler
    yield found
    assert engine.llm.llm_engine.get_num_unfinished_requests() == 0
    pool = found.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # but the null block
    assert not found._by_name


@pytest.fixture
def steps(scheduler: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What every step of the engine was to compute."""
    found: list[Any] = []
    original = scheduler.schedule

    def schedule(*args: Any, **others: Any) -> Any:
        found.append(original(*args, **others))
        return found[-1]

    monkeypatch.setattr(scheduler, "schedule", schedule)
    return found


def copied(steps: Sequence[Any]) -> int:
    return sum(len(step.kv_cache_block_copies or ()) for step in steps)


class Hand:
    """Requests by hand: a source that runs on and on, and rows of logits of what goes on from it."""

    def __init__(self, engine: VLLMEngine, steps: list[Any]) -> None:
        self._engine, self._vllm, self._steps = engine, engine.llm.llm_engine, steps
        self.tokens: list[int] = []

    def start(self, prompt: Sequence[int], name: str = "source") -> None:
        from vllm.sampling_params import RequestOutputKind

        self.tokens = list(prompt)
        own = {"name": name, "seed": 1, "law": {}, "constraint": {"regex": "[ab]{150,}"}}
        params = sampling(200 - len(prompt), own, weights=True)
        params.output_kind = RequestOutputKind.DELTA
        self._vllm.add_request(name, {"prompt_token_ids": list(prompt)}, params)

    def step(self, count: int) -> None:
        for _ in range(count):
            for output in self._vllm.step():
                if output.request_id == "source":
                    self.tokens += output.outputs[0].token_ids

    def stop(self, name: str = "source") -> None:
        self._vllm.abort_request([name])
        self._engine.llm.collective_rpc("align_pop", args=([name],))

    def add(self, name: str, prompt: Sequence[int], source: str | None, salt: str | None = None) -> None:
        own: dict[str, Any] = {"capture": True, "name": name, "law": {}}
        params = sampling(1, own if source is None else {**own, "source": source})
        given: Any = {"prompt_token_ids": list(prompt)}
        self._vllm.add_request(name, given if salt is None else {**given, "cache_salt": salt}, params)

    def logits(self, *names: str) -> list[Tensor]:
        """Of requests that were added; in one step."""
        self.step(1)
        records: Sequence[Mapping[str, Any]] = self._engine.llm.collective_rpc("align_pop", args=(list(names),))[0]
        return [torch.frombuffer(bytearray(record["logits"]), dtype=torch.float32) for record in records]

    def computed(self, name: str) -> int:
        """Tokens that the last step computed for a request."""
        (found,) = [n for known, n in self._steps[-1].num_scheduled_tokens.items() if known.startswith(name)]
        return int(found)


@pytest.fixture
def hand(engine: VLLMEngine, steps: list[Any]) -> Iterator[Hand]:
    made = Hand(engine, steps)
    yield made
    made.stop()


def assert_exact(outside: TransformersEngine, prompt: Sequence[int], found: Tensor) -> None:
    expected, (row,) = outside.next_logits(outside.open([prompt]))
    torch.testing.assert_close(found.log_softmax(-1), expected[row].log_softmax(-1), atol=1e-5, rtol=0)


PROMPT = [0, 1, 2, 2, 1, 0, 1] * 6  # 42 tokens: a block, and ten of the next


def test_copies_compute_one_token(
    engine: VLLMEngine, outside: TransformersEngine, vocabulary: Vocabulary, steps: list[Any]
) -> None:
    """All copies of a run of SMC, and it is the run that it is without."""
    request = Request(
        PROMPT, build({"regex": "(a|bb){40,}"}, vocabulary), particles=12, seed=5, threshold=0.9, max_new_tokens=20
    )
    (found,), (expected,) = engine.generate([request], vocabulary), generate(outside, [request], vocabulary)
    assert found.result is not None
    assert expected.result is not None
    assert [one.tokens for one in found.result.samples] == [one.tokens for one in expected.result.samples]
    weights = [one.log_weight for one in expected.result.samples]
    assert [one.log_weight for one in found.result.samples] == pytest.approx(weights, abs=2e-4)
    forks = [
        step.num_scheduled_tokens[one.req_id]
        for step in steps
        for one in step.scheduled_new_reqs
        if "source" in one.sampling_params.extra_args["align"]
    ]
    assert len(forks) > 10
    assert forks == [1] * len(forks)
    assert copied(steps) >= len(forks) - sum(step.scheduled_new_reqs != [] for step in steps)  # some begin a block


@pytest.mark.parametrize("length", [92, 91, 87, 66, 65, 64, 63, 43])
def test_a_source_may_be_ahead(hand: Hand, outside: TransformersEngine, steps: list[Any], length: int) -> None:
    """In its block, and by blocks: up to two whole ones and 28 tokens of the third."""
    hand.start(PROMPT)
    hand.step(50)
    assert len(hand.tokens) == 92
    prompt = hand.tokens[:length]
    hand.add("copy", prompt, "source")
    (found,) = hand.logits("copy")
    assert_exact(outside, prompt, found)
    assert hand.computed("copy") == 1
    assert copied(steps) == (length != 65)  # there all but the last token stands in whole blocks


def test_copies_go_their_own_ways(
    hand: Hand, engine: VLLMEngine, outside: TransformersEngine, steps: list[Any]
) -> None:
    """Three from one block at once, and one from another beside them; then each block is the prefix of what it holds,
    and of nothing else.
    """
    hand.start(PROMPT)
    hand.step(5)
    base = hand.tokens[:]
    names = ["one", "two", "three"]
    for name in names:
        hand.add(name, base, "source")
    found = hand.logits(*names)
    assert copied(steps) == 3
    for row in found:
        assert_exact(outside, base, row)
    hand.step(30)
    ways = [[*base, *tail] for tail in ([0] * 40, [1] * 40, [0, 1] * 20, [*hand.tokens[len(base) :], 2])]
    for _ in range(2):  # computed, and then from the prefix cache
        rows, places = engine.next_logits(engine.open(ways))
        for way, place in zip(ways, places, strict=True):
            assert_exact(outside, way, rows[place])


def test_what_is_not_there_is_computed(hand: Hand, outside: TransformersEngine, steps: list[Any]) -> None:
    """No such source, other tokens, another salt, itself, a text: what is in no whole block is computed."""
    hand.start(PROMPT)
    hand.step(3)
    other = [*PROMPT[:-2], 1 - PROMPT[-2], PROMPT[-1]]
    for name, prompt, source, salt in [
        ("nobody", PROMPT, "who", None),
        ("other", other, "source", None),
        ("salted", PROMPT[:20], "source", "salt"),
        ("itself", PROMPT, "itself", None),
    ]:
        hand.add(name, prompt, source, salt)
        (found,) = hand.logits(name)
        assert_exact(outside, prompt, found)
        assert hand.computed(name) == (10 if salt is None else 20)
    params = sampling(1, None)
    params.extra_args = {"align": json.dumps({"capture": True, "name": "text", "law": {}, "source": "source"})}
    hand._vllm.add_request("text", {"prompt_token_ids": PROMPT}, params)
    hand.logits("text")
    assert hand.computed("text") == 10
    assert copied(steps) == 0


def test_a_source_that_is_gone_or_has_yet_to_come(hand: Hand, outside: TransformersEngine, steps: list[Any]) -> None:
    hand.add("late", PROMPT, None)
    hand.add("early", PROMPT, "late")  # both in one step: nothing of the source is computed
    for row in hand.logits("late", "early"):
        assert_exact(outside, PROMPT, row)
    hand.start(PROMPT)
    hand.step(4)
    prompt = hand.tokens[:]
    hand.add("copy", prompt, "source")
    hand.stop()  # before the copy is scheduled
    (found,) = hand.logits("copy")
    assert_exact(outside, prompt, found)
    assert hand.computed("copy") == len(prompt) - BLOCK
    assert copied(steps) == 0


def test_a_copy_of_a_copy_that_is_not_made_yet(hand: Hand, outside: TransformersEngine, steps: list[Any]) -> None:
    """The blocks of a step are copied at once, so that one of them is no source."""
    hand.start(PROMPT)
    hand.step(4)
    prompt = hand.tokens[:]
    hand.add("first", prompt, "source")
    hand.add("second", prompt, "first")
    for row in hand.logits("first", "second"):
        assert_exact(outside, prompt, row)
    assert (hand.computed("first"), hand.computed("second"), copied(steps)) == (1, len(prompt) - BLOCK, 1)


def test_copies_are_put_aside_and_come_back(
    engine: VLLMEngine,
    outside: TransformersEngine,
    vocabulary: Vocabulary,
    steps: list[Any],
    scheduler: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Forty particles of 90 tokens in 24 blocks: sources and copies are preempted, and give what they give outside."""
    preempted: list[Any] = []
    original = scheduler._preempt_request

    def counted(request: Any, *args: Any, **others: Any) -> Any:
        preempted.append(request)
        return original(request, *args, **others)

    monkeypatch.setattr(scheduler, "_preempt_request", counted)
    requests = [
        Request(
            [seed % 3] * 20, build({"regex": "(a|bb){60,}"}, vocabulary), particles=8, seed=seed, max_new_tokens=70
        )
        for seed in range(5)
    ]
    found, expected = engine.generate(requests, vocabulary), generate(outside, requests, vocabulary)
    own = [request.sampling_params.extra_args["align"] for request in preempted]
    assert any("source" in one for one in own)
    assert {one["name"] for one in own} & {
        one.sampling_params.extra_args["align"].get("source") for step in steps for one in step.scheduled_new_reqs
    }
    assert copied(steps) > 20
    preempted.clear()
    for one, other in zip(found, expected, strict=True):
        assert one.result is not None
        assert other.result is not None
        assert [it.tokens for it in one.result.samples] == [it.tokens for it in other.result.samples]
        assert one.result.log_normaliser == pytest.approx(other.result.log_normaliser, abs=2e-4)


def test_each_way_of_scheduling_has_its_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    from align.decoding.vllm import forks

    for ahead, name in [(True, "AsyncForks"), (False, "Forks")]:
        config: Any = SimpleNamespace(scheduler_config=SimpleNamespace(async_scheduling=ahead))
        monkeypatch.setattr(forks, name, lambda vllm_config, kind=name, **others: (kind, vllm_config, others))
        assert forks.scheduler(vllm_config=config, block_size=4) == (name, config, {"block_size": 4})
