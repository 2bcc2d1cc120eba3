"""Transfer-Q* on vLLM against its loop run naively, one ``generate`` a candidate, on the same engine.

The naive loop takes seconds a token, so only the first tokens of an answer are compared with it; ours goes on to the
end. Both may use the engine's prefix cache, which is emptied before each answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from serving_ways import Bench, Made, Watch

from align.decoding.engines.vllm import GREEDY
from align.decoding.guided import Query, Tokens, TransferQ
from align.decoding.transfer_q import transfer_q
from align.rewards.rules import everyday_answer

PAPER = TransferQ(candidates=10, length=20, alpha=0.5)
RANGE = (0.0, 1.0)
"""Of the rule; each of its parts is from 0 to 1."""
SETTINGS: dict[str, TransferQ] = {
    "10 candidates, 20 tokens": PAPER,
    "the same, known range of the reward": replace(PAPER, reward_range=RANGE),
    "the same, range, 2 candidates at once": replace(PAPER, reward_range=RANGE, at_once=2),
    "10 blocks of 8 tokens (another law)": replace(PAPER, block=8),
    "10 blocks of 8 tokens, range": replace(PAPER, block=8, reward_range=RANGE),
}
BEST = "the same, known range of the reward"


def question(number: int) -> str:
    """A request of everyday."""
    things = ["bread", "a garden", "rain", "sleep", "a bicycle", "tea", "the moon", "a letter"]
    return f"Explain {things[number % len(things)]} to a child of {number + 5} in three sentences."


class Judged:
    """The rule as a reward of tokens."""

    def __init__(self, bench: Bench, asked: Callable[[int], str], count: int) -> None:
        self._texts, self._vocabulary, self.calls = [asked(n) for n in range(count)], bench.vocabulary, 0

    def __call__(self, numbers: Sequence[int], answers: Sequence[Tokens]) -> list[float]:
        """One reward an answer."""
        self.calls += len(answers)
        return everyday_answer(
            [self._texts[number] for number in numbers], [self._vocabulary.text(answer) for answer in answers]
        )


class Timed:
    """The engine, with a note of the seconds after every choice."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.stamps: list[tuple[float, float]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def extend(self, handle: int, token: int) -> None:
        """As it is, timed."""
        self.stamps.append((time.perf_counter(), time.process_time()))
        self._engine.extend(handle, token)


def ours(
    bench: Bench, settings: TransferQ, at: int, longest: int, first: int = 0, engine: Any = None
) -> tuple[Made, list[Any]]:
    """``at`` requests together."""

    def asked(number: int) -> str:
        return question(first + number)

    judged = Judged(bench, asked, at)
    queries = [Query(bench.prompt(asked(number)), seed=number, max_new_tokens=longest) for number in range(at)]
    bench.engine.llm.reset_prefix_cache()
    watch = Watch(at)
    answers = transfer_q(
        engine or bench.engine,
        bench.engine,
        judged,
        queries,
        bench.vocabulary,
        settings,
        together=at,
        on_answer=watch.answered,
    )
    made = watch.made()
    made.tokens = sum(len(answer.tokens) for answer in answers)
    made.evaluations = judged.calls
    return made, answers


def naive(bench: Bench, settings: TransferQ, longest: int, steps: int, number: int = 0) -> tuple[Made, Tokens]:
    """The first ``steps`` tokens as the definition reads: for each candidate a call of the engine, and its reward."""
    judged = Judged(bench, lambda n: question(number + n), 1)
    prompt, ends = bench.prompt(question(number)), bench.vocabulary.ends
    bench.engine.llm.reset_prefix_cache()
    watch = Watch(1)
    tokens: Tokens = ()
    while len(tokens) < min(steps, longest) and not (tokens and tokens[-1] in ends):
        (handle,) = bench.engine.open([(*prompt, *tokens)])
        logits, _ = bench.engine.next_logits([handle])
        bench.engine.close(handle)
        logps = settings.law.log_probs(logits[0])
        scores = []
        for token in map(int, (-logps).argsort(kind="stable")[: settings.candidates]):
            begun, room = (*tokens, token), longest - len(tokens) - 1
            if token not in ends and room > 0:
                (rollout,) = bench.engine.rollouts(
                    [(*prompt, *begun)],
                    max_new_tokens=min(settings.length or room, room),
                    law=GREEDY,
                    seeds=[0],
                    ends=ends,
                )
                begun += rollout.tokens
            (value,) = judged([0], [begun])
            scores.append((settings.score(float(logps[token]), value), -token))
        tokens += (-max(scores)[1],)
    watch.answered(0)
    made = watch.made()
    made.tokens, made.evaluations = len(tokens), judged.calls
    return made, tokens


def against_naive(
    bench: Bench, rounds: int, longest: int, steps: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The naive loop and ours in turns, on the same questions: seconds of the first ``steps`` tokens, and of all."""
    rows = []
    for number in range(rounds):
        slow, right = naive(bench, PAPER, longest, steps, number)
        say(f"naive: {slow.tokens} tokens, {slow.cpu:.1f} s of the processor")
        begun = {"tokens": slow.tokens, "wall": slow.wall, "cpu": slow.cpu}
        rows.append({"part": "transfer", "way": "naive", "round": number, "begun": begun, "same": True})
        whole: Tokens = ()
        for name, settings in SETTINGS.items():
            timed = Timed(bench.engine)
            start = (time.perf_counter(), time.process_time())
            made, (answer,) = ours(bench, settings, 1, longest, number, timed)
            row: dict[str, Any] = {"part": "transfer", "way": name, "round": number, "rewards": made.evaluations}
            row |= {"tokens": made.tokens, "wall": made.wall, "cpu": made.cpu, "reward": answer.reward}
            row |= {"rollout_tokens": answer.costs.rollout_tokens, "reason": answer.reason}
            if settings.block is None and len(timed.stamps) >= slow.tokens:
                then = timed.stamps[slow.tokens - 1]
                row["begun"] = {"tokens": slow.tokens, "wall": then[0] - start[0], "cpu": then[1] - start[1]}
                row["same"] = answer.tokens[: slow.tokens] == right
                whole = whole or answer.tokens
                row["same_whole"] = answer.tokens == whole
            rows.append(row)
            say(f"{name}: {row}")
    return rows
