"""Rewards that hang: they end the requests that ask for them, and nothing else."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from transformers import PreTrainedTokenizerFast

from align.decoding.constraints import ConstraintError, Vocabulary
from align.decoding.request import Answer, Request
from align.rewards.scorers import RuleReward
from align.serve import work
from align.serve.admission import Admission
from align.serve.checker import Checker
from align.serve.errors import RefusedError
from align.serve.metrics import Metrics
from align.serve.options import Options
from align.serve.rewards import Rewards
from align.serve.wire import ScoreBody, Settings
from align.serve.work import Job, Service


@pytest.fixture
def rewards() -> Iterator[Rewards]:
    """One that does not come back before the test is over, and one that says on which thread it was called."""
    over = threading.Event()
    threads = dict[str, int]()

    def hangs(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        assert over.wait(20)
        return [0.0 for _ in completions]

    def which(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        number = threads.setdefault(threading.current_thread().name, len(threads))
        return [float(number) for _ in completions]

    yield Rewards({"hangs": RuleReward(hangs), "which": RuleReward(which)})
    over.set()


def in_a_loop(test: Callable[[], Any]) -> None:
    """Where asyncio has two threads for everything."""

    async def main() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        await test()
        began = time.monotonic()
        await asyncio.wait_for(asyncio.to_thread(time.monotonic), 5)  # as constraints are built and answers checked
        assert time.monotonic() - began < 1

    asyncio.run(main())


@pytest.mark.parametrize(("timeout", "advice"), [(1.0, "ask for fewer particles"), (10.0, "s of that it waited")])
def test_requests_with_a_reward_that_hangs_end_in_time_and_give_their_places_back(
    timeout: float,
    advice: str,
    rewards: Rewards,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A second before their time is up they are let in: it is told where the rest of it went."""
    vocabulary = Vocabulary.of(tiny_tokenizer)

    async def run(client: Any, request: Request, *_: Any, executor: Any, **__: Any) -> Any:
        """As far as the first potential, with which ``tests/decoding/vllm/test_particles.py`` goes on."""
        return await asyncio.get_running_loop().run_in_executor(executor, request.potential, [(5, 6)])

    async def test() -> None:
        admission = Admission(8, 0)
        service = Service(
            SimpleNamespace(generate=None),
            vocabulary,
            Options(timeout=timeout),
            admission=admission,
            metrics=Metrics(registry=CollectorRegistry()),
            checker=Checker(1),
            rewards=rewards,
        )
        potential = rewards.potential("hangs", 1.0, "a", vocabulary)
        settings = Settings(reward="hangs", particles=2)
        jobs = [
            Job(
                f"r{number}",
                Request((5,), None, particles=2, potential=potential, max_new_tokens=4),
                settings,
                admission.reserve(2),
                asyncio.get_running_loop().time() + 1.0,
            )
            for number in range(4)
        ]
        assert admission.running == 8
        found = await asyncio.gather(*map(service.answer, jobs), return_exceptions=True)
        assert [getattr(one, "status", one) for one in found] == [504] * 4
        assert all(advice in str(one) for one in found)
        assert admission.running == 0

    monkeypatch.setattr(work, "run", run)
    in_a_loop(test)


def broken(prompts: Sequence[str], completions: Sequence[str]) -> Any:
    return 0.5


def raising(prompts: Sequence[str], completions: Sequence[str]) -> Any:
    return [{}[text] for text in completions]


def choosy(prompts: Sequence[str], completions: Sequence[str], wanted: Sequence[Any]) -> Any:
    if None in wanted:
        raise ValueError("no wanted")
    return [1.0 for _ in completions]


def picky(prompts: Sequence[str], completions: Sequence[str]) -> Any:
    raise ValueError("no such prompt")


def judges_none(prompts: Sequence[str], completions: Sequence[str]) -> Any:
    return [None for _ in completions]


@pytest.mark.parametrize(
    ("rule", "row", "status", "said"),
    [
        (broken, {}, 500, "wanted a list"),
        (raising, {}, 500, "the rule fails: KeyError"),
        (picky, {}, 400, "no such prompt"),
        (choosy, {}, 400, "asks for column wanted"),
        (choosy, {"wanted": None}, 400, "no wanted"),
    ],
)
def test_a_rule_that_is_wrong_is_the_operators_fault_and_a_row_the_clients(
    rule: Any, row: dict[str, Any], status: int, said: str
) -> None:
    async def test() -> None:
        rows = [{"prompt": "a", "completion": "b", **row}]
        with pytest.raises(RefusedError, match=said) as refused:
            await Rewards({"it": RuleReward(rule)}).score(ScoreBody.model_validate({"reward": "it", "rows": rows}), 5)
        assert refused.value.status == status
        assert ("operator" in refused.value.message) == (status == 500)

    in_a_loop(test)


@pytest.mark.parametrize(
    ("rule", "fault", "said"),
    [
        (broken, "function", "wanted a list"),
        (raising, "function", "the rule fails: KeyError"),
        (picky, "", "no such prompt"),
        (judges_none, "", "no number for"),
    ],
)
def test_so_it_is_where_particles_are_judged(
    rule: Any, fault: str, said: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    potential = Rewards({"it": RuleReward(rule)}).potential("it", 1.0, "a", Vocabulary.of(tiny_tokenizer))
    with pytest.raises(ConstraintError, match=said) as failed:
        potential([(5, 6)])
    assert failed.value.fault == fault


def test_particles_have_no_columns(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(RefusedError, match="asks for column wanted") as refused:
        Rewards({"it": RuleReward(choosy)}).potential("it", 1.0, "a", Vocabulary.of(tiny_tokenizer))
    assert refused.value.status == 400


def test_who_comes_while_others_wait_is_told_for_how_long() -> None:
    """By what they take: 0.4 s of three are at most 0.8^3 of the second that is thought of at first, and 0.2 more."""

    def slow(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        time.sleep(0.4)
        return [1.0 for _ in completions]

    async def test() -> None:
        rewards = Rewards({"slow": RuleReward(slow)})
        body = ScoreBody.model_validate({"reward": "slow", "rows": [{"prompt": "a", "completion": "b"}]})
        for _ in range(3):
            await rewards.score(body, 5)
        waiting = [asyncio.create_task(rewards.score(body, 0.1)) for _ in range(17)]
        await asyncio.sleep(0)
        with pytest.raises(RefusedError, match="busy: 1 requests for this reward are under way and 16 wait") as busy:
            await rewards.score(body, 5)
        assert busy.value.status == 429
        assert int(busy.value.headers["Retry-After"]) < 17
        await asyncio.gather(*waiting, return_exceptions=True)

    in_a_loop(test)


@pytest.mark.parametrize(("fault", "status"), [("function", 500), ("later", 503)])
def test_a_function_that_failed_is_no_answer_of_the_clients(
    fault: str, status: int, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(*_: Any, **__: Any) -> Answer:
        return Answer(None, (), False, "python:f: it is so", fault=fault)

    async def test() -> None:
        admission = Admission(8, 0)
        service = Service(
            SimpleNamespace(generate=None),
            Vocabulary.of(tiny_tokenizer),
            Options(),
            admission=admission,
            metrics=Metrics(registry=CollectorRegistry()),
            checker=Checker(1),
            rewards=Rewards({}),
        )
        deadline = asyncio.get_running_loop().time() + 120
        job = Job("r", Request((5,), None, max_new_tokens=4), Settings(), admission.reserve(1), deadline)
        with pytest.raises(RefusedError, match="it is so") as refused:
            await service.answer(job)
        assert refused.value.status == status
        assert refused.value.headers == ({"Retry-After": "5"} if fault == "later" else {})

    monkeypatch.setattr(work, "run", run)
    in_a_loop(test)


def test_one_that_hangs_does_not_hold_up_another_which_is_always_called_in_one_thread(rewards: Rewards) -> None:
    async def test() -> None:
        rows = [{"prompt": "a", "completion": "b"}]
        with pytest.raises(RefusedError, match="took over") as refused:
            await rewards.score(ScoreBody.model_validate({"reward": "hangs", "rows": rows}), 0.1)
        assert refused.value.status == 504
        which = ScoreBody.model_validate({"reward": "which", "rows": rows})
        assert [await rewards.score(which, 5) for _ in range(3)] == [[0.0]] * 3

    in_a_loop(test)
