"""Rules as scorers: what they see, what they may ask for, and what is said of a rule that fails."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest

from align.rewards.encoding import plain
from align.rewards.scorers import RewardError, RuleReward

TALK = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "pre"}]


def test_one_view_of_text():
    """The last turn of the user, not the last turn; nothing of a turn without content."""
    assert plain(TALK, "user") == "hello"
    assert plain([{"role": "assistant", "content": None, "tool_calls": [{}]}], "assistant") == ""
    seen: list[Any] = []
    RuleReward(lambda prompts, answers: seen.append((prompts, answers)) or [0.0])([TALK], [TALK[1:]])
    assert seen == [(["hello"], ["pre"])]


def test_columns_are_asked_for_by_name():
    columns = {"solution": ["4", "5"], "level": [1, 2], "trainer_state": object()}

    def solved(prompts, completions, solution, level=0):
        return [float(text == right) + one for text, right, one in zip(completions, solution, level, strict=True)]

    rule = RuleReward(solved)
    assert rule.columns == {"solution": True, "level": False}
    assert rule(["2+2", "2+2"], ["4", "4"], columns) == [2.0, 2.0]
    with pytest.raises(RewardError, match="asks for column solution, and there is none"):
        rule(["2+2"], ["4"])


def test_trls_own_form_is_called_as_trl_calls_it():
    def form(completions, **columns):
        return [len(text) + len(columns["prompts"][0]) + columns["level"][0] for text in completions]

    assert RuleReward(form)(["ab"], ["abc"], {"level": [10]}) == [15.0]
    assert RuleReward(lambda completions: [1] * len(completions))(["p"], ["c"], {"level": [10]}) == [1.0]


def test_none_is_kept_and_nothing_else_is_taken_for_a_number():
    assert RuleReward(lambda p, c: [None, 2])(["p", "p"], ["a", "b"]) == [None, 2.0]
    for given, message in (
        ([1.0], "gave 1 numbers for 2 answers"),
        (None, "gave None: wanted a list"),
        (["x", 1], "row 0: the rule gave 'x': not a number"),
        ([1, math.nan], "row 1: nan: not a finite number"),
    ):
        with pytest.raises(RewardError, match=message):
            RuleReward(lambda p, c, given=given: given)(["p", "p"], ["a", "b"], {})


def test_a_rule_that_would_end_the_process_fails():
    """Alone and among others; a server's event loop would end with it."""

    def leaves(prompts: list[str], completions: list[str]) -> list[float]:
        if "bad" in completions:
            sys.exit("no")
        return [1.0] * len(completions)

    for answers, row in ((["good", "bad"], 1), (["bad"], 0)):
        with pytest.raises(RewardError, match=f"row {row}: the rule fails: SystemExit: no"):
            RuleReward(leaves)(["p"] * len(answers), answers)


def test_the_answer_that_a_rule_fails_on_is_named():
    def inverse(prompts, completions):
        return [1 / len(text) for text in completions]

    with pytest.raises(RewardError, match="row 1: the rule fails: ZeroDivisionError") as caught:
        RuleReward(inverse)(["p"] * 3, ["a", "", "b"])
    assert caught.value.row == 1


def test_a_rule_that_takes_one_answer_is_told_of_lists():
    """It is given a list of two prompts and one of two answers, of which it says one number."""
    rule = RuleReward(lambda prompts, completions: 24)
    with pytest.raises(RewardError, match=r"gave 24: wanted a list .*; prompts and answers come as lists"):
        rule(["a", "b"], ["c", "d"], {})
