"""Annotators: probabilities of all pairs, what is set aside, and what is said of one that fails."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align.rewards.annotators import AnnotatorError, Verdicts, annotator_of, parse_annotator
from align.rewards.expression import ExpressionError
from align.rewards.models import RewardModel
from align.rewards.pal import PalB
from align.rewards.pal_model import PalRewardModel
from align.rewards.verdicts import MOST_LOG_ODDS

HERE = __name__


def length(prompts, completions):
    return [len(text) for text in completions]


def wanted(prompts, completions, target):
    return [-abs(len(text) - one) for text, one in zip(completions, target, strict=True)]


def picky(prompts, completions):
    """Nothing of an answer with an x."""
    return [None if "x" in text else len(text) for text in completions]


def faulty(prompts, completions):
    return [1 / len(text) if text != "nan" else math.nan for text in completions]


def short(prompts, completions):
    return [1.0]


def first_is_better(prompts, first, second):
    """Nine times of ten, if not by as much longer; it says nothing of an answer with an x."""
    return [
        None if "x" in a + b else min(1, 0.9 + 0.1 * (len(a) - len(b))) for a, b in zip(first, second, strict=True)
    ]


def unsure(prompts, first, second):
    return [{"high": 1.5, "text": "yes", "nan": math.nan}.get(text, 0.5) for text in first]


def breaks(prompts, first, second):
    return [1 / len(text) for text in first]


def one_for_all(prompts, first, second):
    return [0.5]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """The functions above as ``rules:NAME``."""
    import sys

    monkeypatch.setitem(sys.modules, "rules", sys.modules[HERE])


def test_a_reward_s_differences():
    """Lengths 1, 3 and 2 at temperature 2: log-odds (1 - 3)/2 = -1, (1 - 2)/2 = -1/2, (3 - 2)/2 = 1/2."""
    annotator = annotator_of({"reward": "rules:length", "temperature": 2})
    found = annotator(["p"], [["a", "aaa", "aa"]])
    assert annotator.name == "length"
    assert found.scores.tolist() == [[[0, -1, -0.5], [1, 0, 0.5], [0.5, -0.5, 0]]]
    assert found.preference.dtype == torch.float64
    assert found.preference[0, 0, 1] == pytest.approx(0.2689414213699951)
    assert found.problems == []
    assert torch.equal(annotator_of("rules:length")(["p"], [["a", "aaa"]]).scores[0, 1], torch.tensor([2.0, 0]))


@given(st.lists(st.floats(0, 1), min_size=6, max_size=6))
@settings(deadline=None)
def test_verdicts_mirror(values):
    """Whatever stands on and under the diagonal: p + p^T = 1, scores are antisymmetric, and sure ones are held."""
    matrix = torch.full((1, 4, 4), torch.nan)
    matrix[0, *torch.triu_indices(4, 4, 1)] = torch.tensor(values)
    found = Verdicts.of_probabilities(matrix)
    assert torch.allclose(found.preference + found.preference.mT, torch.ones(1, 4, 4, dtype=torch.float64), atol=1e-15)
    assert torch.equal(found.scores, -found.scores.mT)
    assert float(found.scores.abs().max()) <= MOST_LOG_ODDS
    again = Verdicts.of_log_odds(found.scores)
    assert torch.allclose(again.preference, found.preference, atol=1e-4)
    assert torch.equal(found.preference[0].diagonal(), torch.full((4,), 0.5, dtype=torch.float64))


def test_columns_are_one_a_prompt():
    annotator = annotator_of("rules:wanted")
    columns = {"target": [1, 3], "completions": [["of the data"], []]}
    found = annotator(["p", "q"], [["a", "aaa"], ["a", "aaa"]], columns)
    assert found.scores[:, 0, 1].tolist() == [2, -2]
    with pytest.raises(AnnotatorError, match="wanted: 1 values of target for 2 prompts"):
        annotator(["p", "q"], [["a", "b"], ["a", "b"]], {"target": [1]})
    with pytest.raises(AnnotatorError, match="asks for column target"):
        annotator(["p"], [["a", "b"]])


def test_a_rule_that_does_not_apply_sets_its_pairs_aside():
    found = annotator_of("rules:picky")(["p", "q"], [["a", "x", "aaa"], ["a", "aa", "aaaa"]])
    assert [(one.prompt, one.first, one.second) for one in found.problems] == [(0, 0, 1), (0, 1, 2)]
    assert [one.reason for one in found.problems] == [
        f"picky gave None for the {n} of them" for n in ("second", "first")
    ]
    assert found.scores[0].isnan().tolist() == [[False, True, False], [True, False, True], [False, True, False]]
    assert torch.equal(found.preference.isnan(), found.scores.isnan())
    assert found.scores[0, 0, 2] == -2
    assert not found.scores[1].isnan().any()


@pytest.mark.parametrize(
    ("rule", "answers", "message"),
    [
        ("faulty", ["a", ""], r"faulty: prompt 2 \('ask'\): .*row 1: the rule fails: ZeroDivisionError"),
        ("faulty", ["nan", "a"], r"prompt 2 \('ask'\): .*row 0: nan: not a finite number"),
        ("short", ["a", "b"], r"prompt 1 .*gave 1 numbers for 2 answers"),
    ],
)
def test_a_faulty_rule_is_told_with_its_prompt(rule, answers, message):
    with pytest.raises(AnnotatorError, match=message):
        annotator_of(f"rules:{rule}")(["fine", "ask", "fine"], [["a", "b"], answers, ["a", "b"]])


def test_sizes_are_checked():
    annotator = annotator_of("rules:length")
    for prompts, answers, message in (
        (["p"], [["a"]], "1 answers; give every prompt the same number, two or more"),
        (["p", "q"], [["a", "b"], ["a", "b", "c"]], r"prompt 2 \('q'\): 3 answers"),
        (["p"], [], "1 prompts and 0 groups"),
        ([], [], "0 prompts"),
    ):
        with pytest.raises(AnnotatorError, match=message):
            annotator(prompts, answers)


def test_an_expression():
    """Log-odds: log sigmoid(1 - 2) - log sigmoid(3 - 2) = log(0.2689/0.7311) = -1."""
    found = annotator_of({"all_of": [{"lsc": {"reward": "rules:length", "reference": 2}}]})(["p"], [["a", "aaa"]])
    assert found.scores[0, 0, 1] == pytest.approx(-1)
    parsed = parse_annotator({"reward": {"lsc": {"reward": "rules:length", "reference": "usual"}}, "temperature": 0.5})
    assert parsed.data_columns == ("usual",)
    assert parsed.rules == ("rules:length",)
    found = parsed.load()(["p", "q"], [["a", "aaa"], ["a", "aaa"]], {"usual": [2, 2]})
    assert found.scores[:, 0, 1].tolist() == pytest.approx([-2, -2])


@pytest.fixture(scope="module")
def gpm_dir(backbone_dir: Callable[[str], Path], tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gpm")
    RewardModel.create(backbone_dir("llama"), kind="gpm", dimension=4, tau=0.5).save_pretrained(folder)
    return folder


def test_a_preference_model(gpm_dir: Path):
    """By its folder, as gpm or as a reward; two groups of one prompt stay apart; an empty answer is judged."""
    prompts, answers = ["an apple", "an apple"], [[" no", " ok", ""], [" the garden", " a hint", " kind"]]
    found = annotator_of({"gpm": str(gpm_dir)})(prompts, answers)
    model = RewardModel.from_pretrained(gpm_dir)
    expected = model.score_groups(prompts, [[" no", " ok", "..."], answers[1]])
    assert torch.allclose(found.scores, torch.stack(expected).double(), atol=1e-5)
    assert torch.equal(annotator_of(str(gpm_dir))(prompts, answers).scores, found.scores)
    hotter = annotator_of({"gpm": str(gpm_dir), "temperature": 1})(prompts, answers)
    assert torch.allclose(hotter.scores, found.scores / 2)
    assert torch.allclose(torch.sigmoid(found.scores), found.preference)


def test_a_reward_model_and_one_in_an_expression(backbone_dir: Callable[[str], Path], gpm_dir: Path, tmp_path: Path):
    torch.manual_seed(0)
    RewardModel.create(backbone_dir("llama")).save_pretrained(tmp_path / "run" / "model")
    spec = str(tmp_path / "run")
    prompts, answers = ["an apple", "cat"], [[" no", " ok"], [" the garden", " a hint"]]
    alone = annotator_of({"reward": spec, "temperature": 0.5})(prompts, answers)
    model = RewardModel.from_pretrained(tmp_path / "run" / "model")
    r = model.rewards([prompts[0]] * 2, answers[0]).double()
    assert alone.scores[0, 0, 1] == pytest.approx(float(2 * (r[0] - r[1])), abs=1e-5)
    in_sum = annotator_of({"reward": {"raw_sum": [spec]}, "temperature": 0.5})(prompts, answers)
    assert torch.allclose(in_sum.scores, alone.scores, atol=1e-5)
    # Of a preference model in an expression: each group by itself, though the prompts are equal.
    same = annotator_of({"raw_sum": [str(gpm_dir)]})(["an apple"] * 2, answers)
    apart = [annotator_of({"raw_sum": [str(gpm_dir)]})(["an apple"], [group]).scores for group in answers]
    assert torch.allclose(same.scores, torch.cat(apart), atol=1e-5)
    with pytest.raises(ExpressionError, match="of kind scalar, not gpm") as caught:
        annotator_of({"gpm": spec})
    assert caught.value.where == "gpm"
    with pytest.raises(AnnotatorError, match=r"prompt 2 \('an ant'\): .*the answer is messages"):
        annotator_of(spec)(["cat", "an ant"], [[" a", " b"], [" a", [{"role": "assistant", "content": "b"}]]])


@pytest.fixture(scope="module")
def pal_dir(backbone_dir: Callable[[str], Path], tmp_path_factory) -> Path:
    torch.manual_seed(0)
    model = PalRewardModel.create(backbone_dir("llama"), kind="pal", frozen=True)
    pal = PalB(model.hidden_size, ["ann", "bob@x.org"], groups=2, dimension=6)
    with torch.no_grad():
        pal.logits.weight.copy_(torch.tensor([[2.0, -2.0], [-2.0, 2.0]]))
    model.attach(pal).fitted = {"eve": [0.25, 0.75]}
    folder = tmp_path_factory.mktemp("pal")
    model.save_pretrained(folder / "run" / "model")
    return folder / "run"


def test_a_population_is_the_mean_of_its_people(pal_dir: Path):
    """Ann twice as often as eve: p = (2 sigmoid(r_i - r_j of ann) + sigmoid(r_i - r_j of eve)) / 3."""
    prompts, answers = ["an apple", "cat"], [[" no", " ok", " ok"], [" the garden", " a hint", ""]]
    each = {
        who: annotator_of(f"{pal_dir}@annotator:{who}")(prompts, answers).preference
        for who in ("ann", "bob@x.org", "eve")
    }
    found = annotator_of({"pal": str(pal_dir), "annotators": {"ann": 2, "eve": 1}})(prompts, answers)
    assert torch.allclose(found.preference, (2 * each["ann"] + each["eve"]) / 3, atol=1e-6)
    assert (each["ann"] - each["eve"]).abs().max() > 0.01
    assert torch.allclose(found.scores, torch.logit(found.preference))
    everybody = annotator_of({"pal": str(pal_dir), "annotators": "all"})(prompts, answers)
    assert torch.allclose(everybody.preference, sum(each.values()) / 3, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "value", "message"),
    [
        (Verdicts.of_probabilities, 1.5, "1.5 for answer 1 against 3: a probability"),
        (Verdicts.of_log_odds, math.inf, "inf for answer 1 against 3: not a finite number"),
    ],
)
def test_verdicts_that_are_none_are_told_counting_from_1(make, value, message):
    values = torch.full((1, 3, 3), 0.5)
    values[0, 0, 2] = value
    with pytest.raises(ValueError, match=message):
        make(values)


def test_a_comparison_in_both_orders():
    """Lengths 2 and 1: p = 1 in one order and 0.8 in the other: (1 + 1 - 0.8)/2 = 0.6. Equal answers: 1/2."""
    both = annotator_of({"compare": "rules:first_is_better"})
    found = both(["p"], [["aa", "b", "bx", "c"]])
    assert both.name == "first_is_better"
    assert found.preference[0, 0, 1] == pytest.approx(0.6)
    assert found.preference[0, 1, 3] == pytest.approx(0.5)
    assert found.scores[0, 1, 0] == pytest.approx(math.log(0.4 / 0.6))
    assert [(one.first, one.second) for one in found.problems] == [(0, 2), (1, 2), (2, 3)]
    assert found.preference[0, 2].isnan().tolist() == [True, True, False, True]
    as_given = annotator_of({"compare": "rules:first_is_better", "both_orders": False})(["p"], [["c", "b"]])
    assert as_given.preference[0].tolist() == [[0.5, 0.9], [pytest.approx(0.1), 0.5]]


@pytest.mark.parametrize(
    ("function", "answers", "message"),
    [
        ("unsure", ["a", "high"], r"unsure: prompt 2 \('q'\): .*gave 1.5 for answer 2 against 1: .*in \[0, 1\]"),
        ("unsure", ["text", "a"], "gave 'yes' for answer 1 against 2"),
        ("unsure", ["nan", "a"], "gave nan for answer 1 against 2"),
        ("breaks", ["a", ""], r"prompt 2 \('q'\): the function fails: ZeroDivisionError"),
        ("one_for_all", ["a", "b"], "one_for_all: the function gave 1 probabilities for 2 pairs"),
    ],
)
def test_a_faulty_comparison_is_told(function, answers, message):
    with pytest.raises(AnnotatorError, match=message):
        annotator_of({"compare": f"rules:{function}"})(["p", "q"], [["a", "b"], answers])


@pytest.mark.parametrize(
    ("annotators", "where", "problem"),
    [
        (None, "annotators", "is missing: all, or weights by name"),
        ({}, "annotators", "is missing"),
        ({"anne": 1}, "annotators.anne", "no such annotator; it knows ann$"),
        ({"zzz": 1}, "annotators.zzz", "it knows ann, bob@x.org, eve"),
        ({"ann": 0}, "annotators.ann", "must be a positive number"),
    ],
)
def test_people_are_looked_for_and_not_loaded(pal_dir: Path, annotators, where, problem):
    with pytest.raises(ExpressionError, match=problem) as caught:
        parse_annotator({"pal": str(pal_dir), "annotators": annotators})
    assert caught.value.where == where


def test_a_folder_of_another_kind(pal_dir: Path, gpm_dir: Path):
    with pytest.raises(ExpressionError, match=r"no pal.json in this folder"):
        parse_annotator({"pal": str(gpm_dir), "annotators": "all"})
    with pytest.raises(ExpressionError, match="names one person"):
        parse_annotator({"pal": f"{pal_dir}@mean", "annotators": "all"})
    with pytest.raises(ExpressionError, match="write pal: FOLDER"):
        parse_annotator(str(pal_dir))
    canned = {"reward": {"lsc": {"reward": str(gpm_dir), "reference": {"canned": "No."}}}}
    with pytest.raises(ExpressionError, match="no canned one has a reward") as caught:
        parse_annotator(canned)
    assert caught.value.where == "reward.lsc.reference"


def test_null_takes_a_key_away():
    """Of the annotator that an override changes."""
    given = {"reward": None, "temperature": None, "compare": "rules:first_is_better"}
    assert parse_annotator(given).name == "first_is_better"
    assert parse_annotator({"raw_sum": ["rules:length"], "reward": None}).rules == ("rules:length",)


@pytest.mark.parametrize(
    ("said", "where", "problem"),
    [
        (3, "", "is no annotator"),
        ({}, "", "is no annotator"),
        ({"rewrd": "rules:length"}, "rewrd", "did you mean reward"),
        ({"reward": "rules:length", "gpm": "x"}, "", r"has reward and gpm: give one, or .* at once, \{gpm: ...\}"),
        ({"reward": "rules:length", "tau": 1}, "tau", "unknown key; known beside reward: temperature"),
        ({"reward": "rules:length", "temperature": 0}, "temperature", "is 0; it must be a positive number"),
        ({"reward": "rules:nothing"}, "reward", "has no nothing"),
        ("rules:lenght", "", "did you mean rules:length"),
        ({"reward": {"lsc": {"reward": "rules:no", "reference": 1}}}, "reward.lsc.reward", "has no no"),
        ({"lsc": {"reward": "rules:length"}}, "lsc.reference", "is missing"),
        (
            {"reward": {"lsc": {"reward": "rules:length", "reference": {"quantile": 0.5}}}},
            "reward.lsc.reference",
            "makes no references",
        ),
        ({"gpm": "rules:length"}, "gpm", "is a rule"),
        ({"gpm": None}, "gpm", "must be text"),
        ({"gpm": None, "temperature": None}, "gpm", "must be text"),
        ({"reward": None, "temperature": 1}, "temperature", "give one of reward, gpm"),
        ({"compare": "rules:no"}, "compare", "has no no"),
        ({"compare": "rules:unsure", "both_orders": 1}, "both_orders", "must be true or false"),
    ],
)
def test_what_is_wrong_in_a_recipe_is_said_with_its_place(said, where, problem):
    with pytest.raises(ExpressionError, match=problem) as caught:
        parse_annotator(said)
    assert caught.value.where == where


def test_folders_are_looked_for_and_not_loaded(tmp_path: Path, gpm_dir: Path):
    with pytest.raises(ExpressionError, match=r"no reward.json in this folder") as caught:
        parse_annotator({"gpm": str(tmp_path)})
    assert caught.value.where == "gpm"
    parsed = parse_annotator({"gpm": "owner/hub-id"})
    assert (parsed.name, dict(parsed.models), parsed.rules) == ("hub-id", {"gpm": "owner/hub-id"}, ())
    assert parse_annotator(str(gpm_dir)).models == {"": str(gpm_dir)}
