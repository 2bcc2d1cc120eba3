"""Rewards of answers under way: one call for all, none asked for twice, and a failure told to its query alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence

from .constraints.protocol import Vocabulary
from .guided import Reward, Tokens


class Judge:
    """What a reward has said.

    Args:
        reward: of answers.
        vocabulary: to quote answers by.
        limits: the least and the largest number that it may give; None where none are known.
        name: of the reward in messages. One that is not ``reward`` may not be -inf, since it is taken off another.
    """

    def __init__(
        self, reward: Reward, vocabulary: Vocabulary, limits: tuple[float, float] | None, *, name: str = "reward"
    ) -> None:
        self._reward, self._vocabulary, self._limits, self._name = reward, vocabulary, limits, name
        self._known: dict[int, dict[Tokens, float]] = {}

    def known(self, number: int, answer: Tokens) -> float:
        """The reward of an answer that was asked for."""
        return self._known[number][answer]

    def forget(self, number: int) -> None:
        """A query is over."""
        self._known.pop(number, None)

    def ask(self, answers: Collection[tuple[int, Tokens]]) -> tuple[Counter[int], dict[int, str]]:
        """Have answers judged, each with the number of its query.

        Returns:
            How many answers of each query were new, and by number of the query what has failed.
        """
        new = [
            (number, answer)
            for number, answer in dict.fromkeys(answers)
            if answer not in self._known.setdefault(number, {})
        ]
        calls, failures = Counter(number for number, _ in new), dict[int, str]()
        if not new:
            return calls, failures
        try:
            self._add(new)
        except (Exception, SystemExit) as error:  # a reward is anyone's code
            if len(calls) == 1:
                kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
                return calls, {new[0][0]: f"{self._name}: {kind}{error}"}
            for number in calls:
                own, failed = self.ask([(other, answer) for other, answer in new if other == number])
                calls[number] += own[number]
                failures |= failed
        return calls, failures

    def _add(self, new: Sequence[tuple[int, Tokens]]) -> None:
        found = list(self._reward([number for number, _ in new], [answer for _, answer in new]))
        if len(found) != len(new):
            raise ValueError(f"it gave {len(found):,} numbers for {len(new):,} answers")
        rewards = [self._number(value, answer) for value, (_, answer) in zip(found, new, strict=True)]
        for (number, answer), reward in zip(new, rewards, strict=True):
            self._known[number][answer] = reward

    def _number(self, value: object, answer: Tokens) -> float:
        said = repr(self._vocabulary.text(answer))
        try:
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise ValueError(f"it gave {value!r} for {said}: wanted a number") from None
        if math.isnan(number) or number == math.inf or (number == -math.inf and self._name != "reward"):
            raise ValueError(f"it gave {number} for {said}: wanted a finite number")
        if self._limits is not None and not self._limits[0] <= number <= self._limits[1]:
            raise ValueError(
                f"it gave {number} for {said}, outside of reward_range {self._limits[0]:g}, {self._limits[1]:g}: "
                "give the range that it has, or none"
            )
        return number
