"""Transfer-Q*: a policy's tokens chosen by what a reward says of where an aligned baseline goes from them.

    settings = TransferQ(candidates=10, length=20, alpha=0.5)
    (answer,) = transfer_q(policy, baseline, reward, [Query(prompt_ids)], vocabulary, settings)

At every step the policy p proposes its likeliest tokens z; the baseline, a model that is aligned already, goes on from
each; the value Q of z is what the reward says of these answers (``values``); and the choice is by
``log p(z) + Q(z) / alpha`` (arXiv:2405.20495). With other settings it is

- **block-wise** (``block``): the policy draws blocks of tokens, and one is chosen by its value alone. It is cheaper,
  and another law: what is weighed by its probability token by token, here has to be drawn among the candidates.
- **ARGS** (``length=0``): the reward judges the unfinished text itself, ``log p(z) + r([s, z]) / alpha``
  (arXiv:2402.01694). With a learned value function as the reward it is Controlled Decoding, with ``block`` in its
  block-wise form (arXiv:2310.17022).
- **best of n** (``best_of(n)``): one block that is the whole answer.

All queries go forward together: the rollouts of a step are one call, and so are its rewards. Randomness is by seed,
position, candidate and rollout, so an answer does not depend on what else is decided with it, up to the rounding of
the engines. A query that fails gives an answer that says why, and leaves the others alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from .constraints.protocol import Vocabulary
from .course import Candidate, Run
from .engines.protocol import Engine, Rollouts
from .guided import Costs, Guided, Query, Reward, Step, Tokens, TransferQ, best_of
from .judging import Judge
from .lazy import Draws

__all__ = ["Costs", "Guided", "Query", "Reward", "Step", "TransferQ", "best_of", "transfer_q"]

TOGETHER = 16
"""Queries that go forward together."""


def transfer_q(
    policy: Engine,
    baseline: Rollouts | None,
    reward: Reward,
    queries: Sequence[Query],
    vocabulary: Vocabulary,
    settings: TransferQ | None = None,
    *,
    baseline_reward: Reward | None = None,
    together: int = TOGETHER,
    on_answer: Callable[[int, Guided], None] | None = None,
) -> list[Guided]:
    """Answer all queries; those that are done make room for the next.

    Args:
        policy: proposes; with ``block`` an engine that rolls out too.
        baseline: rolls out; with the policy's own vocabulary. None where ``length`` is 0.
        reward: of answers, as the values' unit.
        queries: their numbers, from 0, are what the reward is given.
        vocabulary: of both models.
        settings: how; None for ``TransferQ()``.
        baseline_reward: the reward that the baseline is aligned with, where that is another (indirect transfer).
        together: queries that go forward together.
        on_answer: called with the number of a query and its answer as soon as it is there.

    Returns:
        The answers in the order of ``queries``.

    Raises:
        ValueError: the settings ask for rollouts, blocks or weights that cannot be had, or the vocabulary has more or
            fewer tokens than the policy's logits have columns.
    """
    settings = settings or TransferQ()
    if baseline is None and settings.length != 0:
        raise ValueError(f"baseline: none is given, and length is {settings.length}; length=0 does without")
    if settings.block is not None and not isinstance(policy, Rollouts):
        raise ValueError(f"block is {settings.block}: {type(policy).__name__} has no rollouts to draw blocks by")
    if baseline_reward is not None and settings.rollouts < 2:
        raise ValueError("baseline_reward: one rollout has all the weight; give rollouts=2 or more, or leave it out")
    work = _Work(policy, baseline, vocabulary, settings, reward, baseline_reward)
    waiting = deque(Run(number, query) for number, query in enumerate(queries))
    running: list[Run] = []
    answers: dict[int, Guided] = {}
    try:
        while waiting or running:
            new = [waiting.popleft() for _ in range(min(len(waiting), together - len(running)))]
            running += new
            work.begin(new)
            work.step([run for run in running if not run.over])
            over = [run for run in running if run.over]
            running = [run for run in running if not run.over]
            for number, answer in work.finish(over).items():
                answers[number] = answer
                if on_answer is not None:
                    on_answer(number, answer)
    finally:
        for run in running:
            work.close(run)
    return [answers[number] for number in range(len(queries))]


class _Work:
    """The models and the reward, and what all queries do together."""

    def __init__(
        self,
        policy: Engine,
        baseline: Rollouts | None,
        vocabulary: Vocabulary,
        settings: TransferQ,
        reward: Reward,
        other: Reward | None,
    ) -> None:
        self._policy, self._baseline, self._vocabulary, self._settings = policy, baseline, vocabulary, settings
        self._judge = Judge(reward, vocabulary, settings.reward_range)
        self._other = Judge(other, vocabulary, None, name="baseline_reward") if other is not None else None

    def begin(self, runs: Sequence[Run]) -> None:
        """Open the prompts that can be answered."""
        for run in runs:
            run.check(self._vocabulary, self._policy.context)
        able = [run for run in runs if not run.over]
        if self._settings.block is None:
            for run, handle in zip(able, self._policy.open([run.query.prompt for run in able]), strict=True):
                run.handle = handle

    def close(self, run: Run) -> None:
        """Free what the query holds."""
        if run.handle is not None:
            self._policy.close(run.handle)
            run.handle = None

    def step(self, runs: Sequence[Run]) -> None:
        """A choice for each query."""
        if not runs:
            return
        if self._settings.block is None:
            self._propose_tokens(runs)
        else:
            self._propose_blocks(runs)
        while jobs := [(run, one) for run in runs for one in run.wanted(self._settings)]:
            self._roll_out(jobs)
            self._evaluate(jobs)
            for run in runs:
                run.prune(self._settings)
        for run in runs:
            chosen = None if run.reason else run.choose(self._settings)
            if chosen is not None:
                run.take(chosen, keep=self._settings.drawing.top_k == 1 and self._settings.length != 0)
                if run.handle is not None and not run.over:
                    self._policy.extend(run.handle, chosen.tokens[0])

    def finish(self, runs: Sequence[Run]) -> dict[int, Guided]:
        """Free what they hold, and have their answers judged."""
        for run in runs:
            self.close(run)
        self._ask(self._judge, [(run, run.tokens) for run in runs if not run.reason])
        answers = {run.number: run.answer(self._judge) for run in runs}
        for judge in filter(None, (self._judge, self._other)):
            for number in answers:
                judge.forget(number)
        return answers

    def _propose_tokens(self, runs: Sequence[Run]) -> None:
        """The likeliest tokens of the policy."""
        logits, places = self._policy.next_logits([run.handle for run in runs if run.handle is not None])
        if logits.shape[-1] != self._vocabulary.size:
            raise ValueError(
                f"the vocabulary has {self._vocabulary.size:,} tokens and the policy's logits {logits.shape[-1]:,} "
                "columns: they must be as many; build it by Vocabulary.of(tokenizer, size=...)"
            )
        for run, place in zip(runs, places, strict=True):
            run.costs["policy_tokens"] += 1
            try:
                logps = self._settings.law.log_probs(logits[place])
            except ValueError as error:
                run.fail(str(error))
                continue
            found = _likeliest(logps, self._settings.candidates)
            ends = self._vocabulary.ends
            run.propose([Candidate((z,), float(logps[z]), z, z in ends) for z in found], self._settings)

    def _propose_blocks(self, runs: Sequence[Run]) -> None:
        """Blocks that the policy draws."""
        settings, count = self._settings, self._settings.candidates
        assert settings.block is not None
        assert isinstance(self._policy, Rollouts)
        drawn = self._policy.rollouts(
            [(*run.query.prompt, *run.tokens) for run in runs for _ in range(count)],
            max_new_tokens=min(settings.block, max(run.room for run in runs)),
            law=settings.law,
            seeds=[_seed(run, f"block/{number}") for run in runs for number in range(count)],
            ends=self._vocabulary.ends,
        )
        for place, run in enumerate(runs):
            blocks = [one.tokens[: run.room] for one in drawn[place * count : (place + 1) * count]]
            run.costs["policy_tokens"] += sum(map(len, blocks))
            ends = self._vocabulary.ends
            run.propose(
                [Candidate(block, 0.0, rank, block[-1] in ends) for rank, block in enumerate(blocks)], settings
            )

    def _roll_out(self, jobs: Sequence[tuple[Run, Candidate]]) -> None:
        """The answers that the candidates lead to: those that are known, or one call for all others."""
        settings = self._settings
        wanted = list[tuple[Run, Candidate]]()
        for run, one in jobs:
            one.answers = run.answers_of(one)
            if not one.answers and settings.length == 0:
                one.answers = ((*run.tokens, *one.tokens),)
                run.costs["cut_rollouts"] += 1
            elif not one.answers:
                wanted.append((run, one))
        if not wanted:
            return
        assert self._baseline is not None
        most = max(run.room - len(one.tokens) for run, one in wanted)
        each = range(settings.rollouts)
        made = self._baseline.rollouts(
            [(*run.query.prompt, *run.tokens, *one.tokens) for run, one in wanted for _ in each],
            max_new_tokens=most if settings.length is None else min(most, settings.length),
            law=settings.drawing,
            seeds=[_seed(run, f"rollout/{one.rank}/{number}") for run, one in wanted for number in each],
            ends=self._vocabulary.ends,
        )
        for place, (run, one) in enumerate(wanted):
            own = made[place * len(each) : (place + 1) * len(each)]
            room = run.room - len(one.tokens)
            whole = [rollout.ended or len(rollout.tokens) >= room for rollout in own]
            one.answers = tuple((*run.tokens, *one.tokens, *rollout.tokens[:room]) for rollout in own)
            one.whole = all(whole)
            run.costs["rollouts"] += len(own)
            run.costs["rollout_tokens"] += sum(len(rollout.tokens) for rollout in own)
            run.costs["cached_tokens"] += sum(rollout.cached_tokens for rollout in own)
            run.costs["cut_rollouts"] += whole.count(False)

    def _evaluate(self, jobs: Sequence[tuple[Run, Candidate]]) -> None:
        self._ask(self._judge, [(run, answer) for run, one in jobs for answer in one.answers])
        if self._other is not None:
            weighed = [(run, one) for run, one in jobs if len(one.answers) > 1 and not run.reason]
            self._ask(self._other, [(run, answer) for run, one in weighed for answer in one.answers])
        for run, one in jobs:
            if not run.reason:
                run.evaluate(one, self._judge, self._other, self._settings)

    @staticmethod
    def _ask(judge: Judge, answers: Sequence[tuple[Run, Tokens]]) -> None:
        """One call of a reward for all answers; where it fails, the query fails."""
        runs = {run.number: run for run, _ in answers}
        calls, failures = judge.ask([(run.number, answer) for run, answer in answers])
        for number, count in calls.items():
            runs[number].costs["reward_calls"] += count
        for number, reason in failures.items():
            runs[number].fail(reason)


def _seed(run: Run, stream: str) -> int:
    """A seed of 52 bits, of the query's seed, the position and the stream."""
    return int(Draws(run.query.seed, len(run.tokens), stream).uniform() * 2**52)


def _likeliest(logps: NDArray[np.float64], count: int) -> list[int]:
    """The likeliest tokens, the first of them first, of equal ones the lowest ids; none that cannot be."""
    if count < len(logps):
        least = -np.partition(-logps, count - 1)[count - 1]
        over = np.flatnonzero(logps > least)
        ids = np.concatenate([over, np.flatnonzero(logps == least)[: count - len(over)]])
    else:
        ids = np.arange(len(logps))
    ids = ids[logps[ids] > -np.inf]
    return [int(token) for token in ids[np.lexsort((ids, -logps[ids]))]]
