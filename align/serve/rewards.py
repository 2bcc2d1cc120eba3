"""Rewards that the operator named: as potentials of particles, and as scores of answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

from align.controlled import reward_fault, reward_potential
from align.data.rows import Content
from align.decoding.constraints import Vocabulary
from align.decoding.request import Potential
from align.errors import AlignError
from align.rewards.encoding import as_answer
from align.rewards.scorers import Scorer, load_scorer

from .admission import Admission, Ticket
from .errors import RefusedError, failed
from .wire import ScoreBody

WAITING = 16
"""Requests for scores of one reward that may wait for those before them."""


class Rewards:
    """Scorers by name, each in a thread of its own: one that hangs holds up those who ask for it, and nobody else.

    Args:
        scorers: what ``load`` made.
    """

    def __init__(self, scorers: Mapping[str, Scorer]) -> None:
        self._scorers = scorers
        self._threads = {name: ThreadPoolExecutor(1, thread_name_prefix=f"align-reward-{name}") for name in scorers}
        self._admissions = {name: Admission(1, WAITING, "requests for this reward") for name in scorers}

    @classmethod
    def load(cls, names: Mapping[str, str]) -> Rewards:
        """Load rules and models.

        Raises:
            AlignError: there is none, or it compares answers.
        """
        scorers = {}
        for name, reward in names.items():
            try:
                scorers[name] = load_scorer(reward)
            except (ValueError, OSError) as error:
                raise AlignError(f"--reward {name}: {error}") from error
            if scorers[name].compares:
                raise AlignError(
                    f"--reward {name}: a preference model compares answers; name one that scores one alone"
                )
        return cls(scorers)

    def thread(self, name: str) -> Executor:
        """The one in which this reward is called."""
        return self._threads[name]

    def potential(self, name: str, strength: float, prompt: Content, vocabulary: Vocabulary) -> Potential:
        """``strength`` times the reward, of the texts of particles.

        Raises:
            RefusedError: it asks for columns, which these have none of: 400.
        """
        self._check_columns(name, ())
        return reward_potential(self._scorers[name], f"reward {name}", strength, prompt, {}, vocabulary)

    async def score(self, body: ScoreBody, seconds: float) -> list[float | None]:
        """One number an answer, None where the reward does not apply.

        Raises:
            RefusedError: no such reward or a row that cannot be scored (400), too many wait (429), a rule that fails
                (500), time is up (504).
        """
        if body.reward not in self._scorers:
            known = ", ".join(sorted(self._scorers)) or "none; its operator names them by --reward NAME=REWARD"
            raise RefusedError(400, f"reward: this server has no {body.reward!r}; it has {known}")
        extras = [row.model_extra or {} for row in body.rows]
        columns = {name: [row.get(name) for row in extras] for name in sorted({key for row in extras for key in row})}
        self._check_columns(body.reward, columns)
        prompts: list[Content] = [row.prompt for row in body.rows]
        answers = [as_answer(row.prompt, row.completion) for row in body.rows]
        ticket = self._admissions[body.reward].reserve(1)
        running: asyncio.Future[list[Any]] | None = None
        try:
            async with asyncio.timeout(seconds):
                await ticket.turn()
                loop = asyncio.get_running_loop()
                scorer = self._scorers[body.reward]
                began = time.monotonic()
                running = loop.run_in_executor(
                    self.thread(body.reward), lambda: list(scorer(prompts, answers, columns))
                )
                running.add_done_callback(lambda done: self._over(body.reward, ticket, time.monotonic() - began, done))
                return await asyncio.shield(running)
        except TimeoutError:
            raise RefusedError(504, f"scoring took over {seconds:g} s; send fewer rows") from None
        except Exception as error:
            raise failed("score", f"reward {body.reward}: {error}", reward_fault(error)) from None
        finally:
            if running is None:
                ticket.leave()

    def _over(self, name: str, ticket: Ticket, seconds: float, done: asyncio.Future[Any]) -> None:
        """Whoever waited may have gone: the place is free only now, and an error is nobody's."""
        ticket.leave()
        self._admissions[name].took(seconds)
        if not done.cancelled():
            done.exception()

    def _check_columns(self, reward: str, given: Collection[str]) -> None:
        for name, needed in self._scorers[reward].columns.items():
            if needed and name not in given:
                raise RefusedError(
                    400, f"reward {reward}: it asks for column {name}; give it in the rows of /v1/align/score"
                )
