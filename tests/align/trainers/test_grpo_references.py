"""References that cannot be made are told before training: prompts set aside, or left to the other rewards."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace

import pytest
from trl import GRPOConfig

from align.data.prompts import read_prompts, tokenize_prompts, unpacked
from align.errors import AlignError, ConfigError
from align.rewards.functions import RewardFunction
from align.rewards.scorers import RuleReward
from align.trainers.grpo import _check_share, check_prompts, with_references


def seldom(prompts, completions):
    """Nothing of prompt "none" where several answers are asked for, as of the start; of "one" the first alone."""
    if len(prompts) > 1 and prompts[0] == "none":
        return [None] * len(prompts)
    if prompts[0] == "one":
        return [1.0] + [None] * (len(prompts) - 1)
    return [float(len(text)) for text in completions]


SCORERS = {
    "m:seldom": RuleReward(seldom),
    "m:length": RuleReward(lambda prompts, answers: [float(len(text)) for text in answers]),
    "m:asked": RuleReward(lambda prompts, answers: [1.0 if p == "ask" else None for p in prompts]),
    "m:of_no": RuleReward(lambda prompts, answers: [None if a == "No" else 1.0 for a in answers]),
}
SELDOM = {"lsc": {"reward": "m:seldom", "reference": {"quantile": 0.5, "samples": 3}}}
LENGTH = {"lsc": {"reward": "m:length", "reference": 2}}


@pytest.fixture
def referenced(make_tiny_model, tiny_tokenizer, tmp_path):
    def make(given, *prompts, limit=0.5, training=False):
        source = tmp_path / "prompts.jsonl"
        source.write_text("".join(f'{{"prompt": "{prompt}"}}\n' for prompt in prompts))
        data = tokenize_prompts(read_prompts(str(source)).rows, tiny_tokenizer, 64).dataset()
        reward = RewardFunction.of(given, scorers=SCORERS)
        options = {"max_new_tokens": 4, "seed": 1, "max_bad_fraction": limit, "training": training}
        path = tmp_path / "references.jsonl"
        found = with_references(data, reward, make_tiny_model(), tiny_tokenizer, path, **options)
        return reward, [unpacked(row) for row in found]

    return make


def test_prompts_without_a_reference_are_set_aside_with_prompt_count_and_remedy(referenced, caplog):
    """0 and 1 of 3 sampled answers have a reward: such prompts go; of the others the reference is there."""
    caplog.set_level(logging.WARNING)
    _, rows = referenced(SELDOM, "ask", "none", "one", "say")
    assert [row["prompt"] for row in rows] == ["ask", "say"]
    assert all(math.isfinite(row["seldom_reference"]) for row in rows)
    said = caplog.messages[-1]
    assert said.startswith("grpo.rewards: no reference can be made for 2 of 4 prompts; the first, 'none': seldom_ref")
    assert "they are set aside: leave such prompts out, sample more" in said
    assert "canned" not in said


@pytest.mark.parametrize(
    ("prompts", "problem"),
    [
        (["none", "ask", "say"], r"for 1 of 3 prompts; the first, 'none'.* has a reward; over data\.max_bad_fraction"),
        (["one", "ask", "say"], r"the first, 'one': seldom_reference: 1 of 3 sampled answers.* or give the reference"),
        (["none", "one"], "for 2 of 2 prompts"),
    ],
)
def test_too_many_of_them_stop_the_run(referenced, prompts, problem):
    with pytest.raises(AlignError, match=problem):
        referenced(SELDOM, *prompts, limit=1.0 if len(prompts) == 2 else 0.05)


def test_where_another_reward_judges_the_prompt_it_stays_and_is_judged_by_that_alone(referenced, caplog):
    """Also where the rule gives an answer of training a reward, which no reference says the worth of."""
    caplog.set_level(logging.WARNING)
    reward, rows = referenced({"all_of": [SELDOM, LENGTH]}, "ask", "none", limit=0.0)
    assert [row["prompt"] for row in rows] == ["ask", "none"]
    assert caplog.messages[-1] == (
        "grpo.rewards: no seldom_reference can be made for 1 of 2 prompts; the first, 'none': m:seldom gives no "
        "answer that it is made of a reward; the other rewards alone judge them: if all should, sample more answers "
        "(reference.samples), or give the reference as a number"
    )
    assert reward(["none"], ["ab"], seldom_reference=[rows[1]["seldom_reference"]]) == [math.log(0.5)]
    good = reward.columns(["none"], ["ab"], {"seldom_reference": [None]})
    assert reward.good(["none"], good)["all"].tolist() == [1.0]


def test_a_reward_that_judges_no_training_prompt_stops_the_run(referenced):
    """Of one that judges some, the others are left to the other rewards; prompts set aside are not counted."""
    both = {"all_of": [SELDOM, LENGTH]}
    assert len(referenced(both, "ask", "none", "one", training=True)[1]) == 2
    wanted = (
        "no seldom_reference can be made for any of 1 prompts; the first, 'none': m:seldom .* or take the reward out"
    )
    with pytest.raises(AlignError, match=wanted):
        referenced(both, "one", "none", training=True)


def test_a_canned_answer_that_the_rule_does_not_judge(referenced):
    canned = {"lsc": {"reward": "m:of_no", "reference": {"canned": "No"}}}
    with pytest.raises(
        AlignError, match=r"for 2 of 2 prompts; the first, 'ask': of_no_reference: no answer.*another canned"
    ):
        referenced(canned, "ask", "say", limit=1.0)
    reward, rows = referenced({"all_of": [canned, LENGTH]}, "ask", limit=0.0)
    assert reward([row["prompt"] for row in rows], ["ab"]) == [math.log(0.5)]


def test_a_canned_answer_that_judges_no_training_prompt_stops_the_run(referenced, caplog):
    """In a combination; where a part of the prompts has it, the others are named and left to the other rewards."""
    caplog.set_level(logging.WARNING)
    canned = {"lsc": {"reward": "m:asked", "reference": {"canned": "No"}}}
    wanted = "no asked_reference can be made for any of 2 prompts; the first, 'say': m:asked .*; choose another canned"
    with pytest.raises(AlignError, match=wanted):
        referenced({"all_of": [canned, LENGTH]}, "say", "one", training=True)
    assert len(referenced({"all_of": [canned, LENGTH]}, "ask", "say", training=True)[1]) == 2
    assert "no asked_reference can be made for 1 of 2 prompts; the first, 'say'" in caplog.messages[-1]
    assert "if all should, choose another canned answer, or give the reference" in caplog.messages[-1]


def test_answers_to_a_prompt_stay_in_one_process_where_a_rule_may_say_none():
    """2 processes with 4 answers each, 8 to a prompt: either would decide by its half."""
    split = SimpleNamespace(generation_batch_size=8, world_size=2, num_generations=8)
    with pytest.raises(ValueError, match=r"4 answers at once, .* num_generations 8: where a rule \(m:seldom\)"):
        _check_share(RewardFunction.of({"raw_sum": ["m:seldom", "m:length"]}, scorers=SCORERS), split)
    _check_share(RewardFunction.of("m:seldom", scorers=SCORERS), split)


def test_fewer_prompts_than_a_step_takes_are_told_by_what_made_it_so(tmp_path):
    options = {"per_device_train_batch_size": 4, "num_generations": 4, "use_cpu": True, "bf16": False}
    arguments = GRPOConfig(str(tmp_path), steps_per_generation=2, gradient_accumulation_steps=4, **options)
    with pytest.raises(ConfigError) as caught:
        check_prompts(1, arguments, "r")
    ((_, what),) = caught.value.problems
    assert what.startswith("1 prompt, and a step takes 2: 8 answers (training.per_device_train_batch_size 4, steps_p")
