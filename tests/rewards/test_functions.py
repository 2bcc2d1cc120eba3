"""Rewards as GRPO calls them: rules, models and expressions alike, and no reference taken as 0."""

from __future__ import annotations

import math

import pytest
import torch

from align.rewards.expression import ExpressionError, SampledReference, parse_expression
from align.rewards.functions import RewardFunction
from align.rewards.models import RewardModel
from align.rewards.scorers import ModelReward, RewardError, RuleReward, load_scorer

RULE = "align.rewards.rules:everyday_answer"


def length(prompts, completions):
    return [len(text) for text in completions]


def vowels(prompts, completions):
    return [sum(letter in "aeiou" for letter in text) for text in completions]


SCORERS = {"m:length": RuleReward(length), "m:vowels": RuleReward(vowels)}
CHAT = [{"role": "user", "content": "Say it"}]


def answer(text):
    return [{"role": "assistant", "content": text}]


def test_all_of_two_rules():
    """Length 6 and 3 vowels: log sigmoid((6 - 4) / 2) + log sigmoid(3 - 2) = 2 * -0.31326168751822286."""
    reward = RewardFunction.of(
        {
            "all_of": [
                {"lsc": {"reward": "m:length", "reference": 4, "temperature": 2.0}},
                {"lsc": {"reward": "m:vowels", "reference": "usual"}},
            ]
        },
        scorers=SCORERS,
    )
    logged = {}
    found = reward(
        ["p", "p"],
        ["banana", "xyz"],
        completion_ids=[[1], [2]],
        usual=[2, 2.0],
        trainer_state=None,
        log_metric=lambda name, value: logged.update({name: value}),
    )
    assert found[0] == pytest.approx(2 * -0.31326168751822286)
    assert found[1] == pytest.approx(math.log(1 / (1 + math.exp(0.5))) + math.log(1 / (1 + math.exp(2))))
    assert logged == {
        "rewards/length": 4.5,
        "rewards/vowels": 1.5,
        "good/length": 0.5,
        "good/vowels": 0.5,
        "good/all": 0.5,
        "unrewarded/answers": 0.0,
        "unrewarded/prompts": 0.0,
    }
    assert reward.__name__ == "combined"
    assert reward.expression.data_columns == ("usual",)


def test_raw_sum_adds_rewards_and_its_references_judge_alone():
    given = [{"reward": "m:length", "weight": 0.5, "reference": 4}, "m:vowels"]
    reward = RewardFunction.of({"raw_sum": given}, scorers=SCORERS)
    assert reward(["p"], ["banana"]) == [6.0]
    columns = reward.columns(["p"], ["banana"], {})
    assert {name: good.tolist() for name, good in reward.good(["p"], columns).items()} == {"length": [True]}


def test_a_name_alone_is_that_reward_as_text_and_as_messages():
    reward = RewardFunction.of(RULE)
    prompt, text = "What is a shadow? One sentence is enough.", "A shadow is a dark shape where light is blocked."
    as_messages = reward([[{"role": "user", "content": prompt}]], [answer(text)])
    assert reward([prompt], [text]) == as_messages
    assert 0 < as_messages[0] <= 1
    assert reward.__name__ == "everyday_answer"


def test_or_not_and_weights():
    """With p = 1/2 at the reference: OR of two is 3/4, NOT is 1/2, weight 2 is twice log 1/2."""
    lsc = {"lsc": {"reward": "m:length", "reference": 3}}
    other = {"lsc": {"reward": "m:vowels", "reference": 1}}
    call = lambda given: RewardFunction.of(given, scorers=SCORERS)(["p"], ["cat"])[0]  # noqa: E731
    assert call({"any_of": [lsc, other]}) == pytest.approx(math.log(3 / 4))
    assert call({"not": lsc}) == pytest.approx(math.log(1 / 2))
    assert call({"weighted": [{"weight": 2, **lsc}, {"weight": 0.5, **other}]}) == pytest.approx(2.5 * math.log(1 / 2))


@pytest.mark.parametrize("columns", [{}, {"usual": [None]}, {"usual": [float("nan")]}])
def test_a_missing_reference_is_an_error(columns):
    reward = RewardFunction.of({"lsc": {"reward": "m:length", "reference": "usual"}}, scorers=SCORERS)
    with pytest.raises(ValueError, match="usual"):
        reward(["p"], ["cat"], **columns)


def test_a_sampled_reference_that_nobody_sampled_is_an_error():
    reward = RewardFunction.of(
        {"lsc": {"reward": "m:length", "reference": {"quantile": 0.5, "samples": 4}}}, scorers=SCORERS
    )
    assert reward.expression.parts[0].reference == SampledReference(0.5, 4)
    assert reward.expression.data_columns == ()
    with pytest.raises(ValueError, match=r"length_reference.*makes it before training"):
        reward(["p"], ["cat"])
    assert reward(["p"], ["cat"], length_reference=[3.0]) == pytest.approx([math.log(0.5)])


def test_rewards_that_are_no_numbers():
    reward = RewardFunction.of("m:bad", scorers={"m:bad": RuleReward(lambda p, c: [math.nan] * len(p))})
    with pytest.raises(ValueError, match="m:bad"):
        reward(["p"], ["cat"])
    reward = RewardFunction.of("m:bad", scorers={"m:bad": RuleReward(lambda p, c: [1.0])})
    with pytest.raises(ValueError, match="gave 1 numbers for 2 answers"):
        reward(["p", "p"], ["cat", "dog"])


def test_a_reward_model_stands_where_a_rule_stands(backbone_dir, tmp_path):
    torch.manual_seed(0)
    model = RewardModel.create(backbone_dir("llama"))
    model.save_pretrained(tmp_path / "model")
    prompts, answers = [CHAT] * 2, [answer("banana"), answer("")]
    expected = model.rewards(prompts, [answer("banana"), answer("...")]).double()
    found = RewardFunction.of(str(tmp_path / "model"))(prompts, answers)
    assert found == pytest.approx(expected.tolist(), abs=1e-6)
    goal = RewardFunction.of({"lsc": {"reward": str(tmp_path / "model"), "reference": 0.1}})
    centred = torch.nn.functional.logsigmoid(expected - 0.1)
    assert goal(prompts, answers) == pytest.approx(centred.tolist(), abs=1e-6)


def test_a_preference_model_rewards_an_answer_among_those_of_its_prompt(backbone_dir):
    """Three answers to one prompt, two to the next: each reward is the mean log-odds against the others of its own."""
    torch.manual_seed(0)
    model = RewardModel.create(backbone_dir("llama"), kind="gpm", dimension=4, tau=0.5)
    other = [{"role": "user", "content": "Say more"}]
    prompts = [CHAT, CHAT, CHAT, other, other]
    answers = [answer(text) for text in ("one", "two", "three", "four", "five")]
    reward = RewardFunction.of("gpm", scorers={"gpm": ModelReward(model)})
    found = reward(prompts, answers)
    first, second = model.score_groups([CHAT, other], [answers[:3], answers[3:]])
    assert found[0] == pytest.approx(float((first[0, 1] + first[0, 2]) / 2), abs=1e-6)
    assert found[3] == pytest.approx(float(second[0, 1]), abs=1e-6)
    assert sum(found[:3]) == pytest.approx(0, abs=1e-5)
    with pytest.raises(ValueError, match="row 0: one answer to its prompt"):
        reward([CHAT], [answer("one")])


def test_names_that_lead_nowhere(tmp_path):
    with pytest.raises(ValueError, match="no module"):
        load_scorer("no_such_module_here:reward")
    with pytest.raises(OSError, match="nowhere"):
        load_scorer(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("given", "where", "problem"),
    [
        ({"all_off": []}, "all_off", "did you mean all_of?"),
        ({"all_of": []}, "all_of", "not a list of one or more"),
        ({"all_of": [{"raw_sum": ["m:f"]}]}, "all_of.0.raw_sum", "at the top alone"),
        ({"lsc": {"reward": "m:f"}}, "lsc.reference", "is missing"),
        ({"lsc": {"reference": 1}}, "lsc.reward", "is missing"),
        ({"lsc": {"reward": "m:f", "reference": 1, "temprature": 2}}, "lsc.temprature", "did you mean temperature?"),
        ({"lsc": {"reward": "m:f", "reference": 1, "temperature": 0}}, "lsc", "must be positive"),
        ({"lsc": {"reward": "m:f", "reference": float("nan")}}, "lsc.reference", "finite"),
        ({"lsc": {"reward": "m:f", "reference": {"quantile": 1.0}}}, "lsc.reference.quantile", "between 0 and 1"),
        ({"lsc": {"reward": "m:f", "reference": {"samples": 1}}}, "lsc.reference.samples", "2 answers"),
        ({"lsc": {"reward": "m:f", "reference": {"canned": " "}}}, "lsc.reference.canned", "is empty"),
        ({"lsc": {"reward": "m:f", "reference": {"canned": "a", "quantile": 0.5}}}, "lsc.reference", "give one"),
        ({"weighted": [{"lsc": {"reward": "m:f", "reference": 1}}]}, "weighted.0", "no weight"),
        ({"weighted": [{"weight": -1, "lsc": {"reward": "m:f", "reference": 1}}]}, "weighted", "must not be negative"),
        ({"raw_sum": ["m:f", "n:f"]}, "raw_sum.1", "is the name of raw_sum.0 too"),
        ({"lsc": {"reward": "m:f", "reference": "f"}}, "lsc", "name of a reference column"),
        (3, "", "is not one of lsc"),
    ],
)
def test_expressions_that_say_nothing(given, where, problem):
    with pytest.raises(ExpressionError, match=problem) as caught:
        parse_expression(given)
    assert caught.value.where == where


def some(prompts, completions):
    """No reward for an answer with an x."""
    return [None if "x" in text else float(len(text)) for text in completions]


PARTS = [{"lsc": {"reward": "m:some", "reference": 3}}, {"lsc": {"reward": "m:vowels", "reference": 2}}]
SOME = {**SCORERS, "m:some": RuleReward(some), "m:none": RuleReward(lambda p, c: [None] * len(c))}


@pytest.mark.parametrize("kind", ["all_of", "any_of"])
def test_an_answer_without_one_of_its_prompt_s_rewards_has_no_value(kind):
    """Length says nothing of "axz", and something of "cat": by vowels alone "axz" would be better than "cat"."""
    reward = RewardFunction.of({kind: PARTS}, scorers=SOME)
    logged = {}
    found = reward(["p"] * 2, ["cat", "axz"], log_metric=lambda name, value: logged.update({name: value}))
    alone = reward(["p"], ["cat"])
    assert found == [*alone, None]
    assert (logged["rewards/some"], logged["good/some"]) == (3.0, 1.0)
    assert logged["good/all"] == 0.0  # of "cat" alone, which has one vowel of two
    assert (logged["unrewarded/answers"], logged["unrewarded/prompts"]) == (0.5, 0.0)
    assert RewardFunction.of({"raw_sum": ["m:some", "m:vowels"]}, scorers=SOME)(["p"] * 2, ["cat", "axz"]) == [
        4.0,
        None,
    ]


def test_a_rule_that_gives_no_answer_to_a_prompt_a_reward_leaves_it_to_the_others():
    """Of prompt p both answers have an x: vowels alone, log sigmoid(1 - 2) and log sigmoid(2 - 2). Of q all count."""
    reward = RewardFunction.of({"all_of": PARTS}, scorers=SOME)
    found = reward(["p", "p", "q"], ["axz", "axe", "cat"])
    one = math.log(1 / (1 + math.e))
    assert found == pytest.approx([one, math.log(0.5), math.log(0.5) + one])
    good = reward.good(["p", "p", "q"], reward.columns(["p", "p", "q"], ["axz", "axe", "cat"]))
    assert good["all"].tolist() == [0.0, 1.0, 0.0]
    weighted = {"weighted": [{"weight": 2, **PARTS[0]}, {"weight": 3, "not": PARTS[1]}]}
    found = RewardFunction.of(weighted, scorers=SOME)(["p"], ["axz"])
    assert found == pytest.approx([3 * math.log(1 / (1 + math.exp(-1)))])


def test_the_same_prompt_with_other_columns_is_another_prompt():
    """A rule for tasks of one kind: None for the other row of the same prompt, which vowels judge."""
    of_maths = RuleReward(
        lambda p, c, kind: [float(len(a)) if k == "maths" else None for a, k in zip(c, kind, strict=True)]
    )
    reward = RewardFunction.of({"raw_sum": ["m:maths", "m:vowels"]}, scorers={**SCORERS, "m:maths": of_maths})
    assert reward(["p"] * 4, ["ox", "a", "ox", "a"], kind=["maths"] * 2 + ["prose"] * 2) == [3.0, 2.0, 1.0, 1.0]


def test_prompts_without_any_reward_are_counted_and_said_once(caplog):
    logged = []
    reward = RewardFunction.of({"raw_sum": ["m:some", "m:none"]}, scorers=SOME)
    for _ in range(2):
        found = reward(["p", "p", "q"], ["ox", "axe", "on"], log_metric=lambda *one: logged.append(one))
        assert found == [None, None, 2.0]
    assert [value for name, value in logged if name == "unrewarded/prompts"] == [0.5, 0.5]
    assert [record.getMessage().partition(",")[0] for record in caplog.records] == [
        "combined: no answer to 1 of 2 prompts has a reward"
    ]


def test_a_canned_answer_is_the_reference():
    """It has 2 letters to a prompt of 1, and the rule adds the column: 2 + 10 and 2 + 20."""

    def shifted(prompts, completions, shift):
        return [len(text) + one for text, one in zip(completions, shift, strict=True)]

    given = {"lsc": {"reward": "m:shifted", "reference": {"canned": "No"}}}
    reward = RewardFunction.of(given, scorers={"m:shifted": RuleReward(shifted)})
    found = reward.columns(["p", "p", "q"], ["a", "bcd", "ef"], {"shift": [10, 10, 20]})
    assert found["shifted_reference"].tolist() == [12, 12, 22]
    found = reward.columns(["p", "p"], ["a", "b"], {"shift": [10, 20]})  # two rows of the data with one prompt
    assert found["shifted_reference"].tolist() == [12, 22]
    assert reward([CHAT], [answer("ab")], shift=[1]) == pytest.approx([math.log(0.5)])
    with pytest.raises(RewardError, match="m:shifted: the rule asks for column shift"):
        reward(["p"], ["a"])


def test_a_canned_answer_is_not_judged_by_the_tokens_of_another():
    reward = RewardFunction.of(
        {"lsc": {"reward": "m:tokens", "reference": {"canned": "No"}}},
        scorers={
            "m:tokens": RuleReward(lambda prompts, completions, completion_ids: [len(x) for x in completion_ids])
        },
    )
    with pytest.raises(RewardError, match="m:tokens: the rule asks for column completion_ids"):
        reward(["p"], ["a"], completion_ids=[[1, 2, 3]])


def test_a_tie_with_a_sampled_reference_is_one_half():
    """Rewards are float64 from end to end: .6 against .6 is log .5, and good."""
    given = {"lsc": {"reward": "m:six", "reference": {"quantile": 0.5}}}
    reward = RewardFunction.of(given, scorers={"m:six": RuleReward(lambda p, c: [0.6] * len(c))})
    assert reward(["p"], ["a"], six_reference=[0.6]) == [math.log(0.5)]
    assert reward.good(["p"], reward.columns(["p"], ["a"], {"six_reference": [0.6]}))["six"].tolist() == [1.0]


@pytest.mark.parametrize("reference", [{"quantile": 0.5}, {"canned": "No"}, {"regression": "some.jsonl"}])
def test_a_preference_model_has_no_reference_to_be_made(backbone_dir, reference):
    model = ModelReward(RewardModel.create(backbone_dir("llama"), kind="gpm", dimension=2))
    with pytest.raises(ExpressionError, match="an answer among the others of its prompt") as caught:
        RewardFunction.of({"not": {"lsc": {"reward": "g", "reference": reference}}}, scorers={"g": model})
    assert caught.value.where == "not.lsc.reference"
