"""``align score --annotator``: answers compared with each other, and rows that cannot be."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from math import exp
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from align.data.groups import GroupRules, read_groups
from align.data.splits import read_split
from align.errors import AlignError, ConfigError
from align.score.annotated import AnnotatorScorer
from align.score.run import score_data

RULES = """
def number(prompts, completions):
    return [None if text == "none" else float(text) for text in completions]
def wanted(prompts, completions, wanted):
    return [float(text == one) for text, one in zip(completions, wanted)]
def short(prompts, completions):
    return [-float(len(text)) for text in completions]
"""


@pytest.fixture
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "annotated_rules.py").write_text(RULES, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "annotated_rules", raising=False)  # of another test, in another folder
    return "annotated_rules"


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def of(given: Any) -> AnnotatorScorer:
    return AnnotatorScorer(given, "align score", "--annotator")


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def test_means_against_the_others(rules: str, tmp_path: Path) -> None:
    """Rewards 0, 1, 3 at temperature 1/2 are log-odds of twice their differences; each answer's mean over two."""
    source = write(tmp_path, [{"prompt": "p", "completions": ["0", "1", "3"]}])
    score_data(str(source), [of({"reward": f"{rules}:number", "temperature": 0.5})], tmp_path / "out.jsonl")
    (row,) = lines(tmp_path / "out.jsonl")
    assert row["scores"] == pytest.approx([-4, -1, 5])
    rates = [sigmoid(-2) + sigmoid(-6), sigmoid(2) + sigmoid(-4), sigmoid(6) + sigmoid(4)]
    assert row["win_rates"] == pytest.approx([rate / 2 for rate in rates])
    assert row["preference"][0] == pytest.approx([0.5, sigmoid(-2), sigmoid(-6)])
    (group,) = read_groups(str(tmp_path / "out.jsonl"), GroupRules("scores")).rows
    assert group.scores == row["scores"]


def test_rows_that_cannot_be_judged_are_set_aside_alone(rules: str, tmp_path: Path) -> None:
    """Groups of other sizes are judged beside them; an answer without a reward leaves its group without means."""
    rows = [
        {"prompt": "p", "completions": ["0", "1"]},
        {"prompt": "p", "completions": ["0", "none", "2"]},
        {"prompt": "p", "completions": ["0", "x"]},
        {"prompt": "p", "completions": ["1", "2", "3"]},
        {"prompt": "p", "completions": ["4"]},
        {"prompt": "p", "completion": "4"},
    ]
    outcome = score_data(str(write(tmp_path, rows)), [of(f"{rules}:number")], tmp_path / "out.jsonl")
    assert outcome is not None
    assert [row["scores"] for row in lines(tmp_path / "out.jsonl")] == [[-1, 1], [-1.5, 0, 1.5]]
    assert [(fault.row, fault.field) for fault in outcome.faults] == [
        (2, "annotator"),
        (3, "annotator"),
        (5, "completions"),
        (6, "completions"),
    ]
    assert outcome.faults[0].reason.startswith(
        "answers 1 and 2 were not compared: number gave None for the second of them"
    )
    assert "could not convert string to float: 'x'" in outcome.faults[1].reason


def test_a_rule_reads_columns(rules: str, tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completions": ["a", "b"], "wanted": "b"}, {"prompt": "p", "completions": ["a", "b"]}]
    outcome = score_data(str(write(tmp_path, rows)), [of(f"{rules}:wanted")], tmp_path / "out.jsonl")
    assert outcome is not None
    assert lines(tmp_path / "out.jsonl")[0]["scores"] == [-1, 1]
    assert outcome.faults[0].field == "wanted"
    assert outcome.faults[0].reason == f"missing, and {rules}:wanted asks for it"


def test_an_answer_that_a_model_ended_at_once_is_judged(rules: str, tmp_path: Path) -> None:
    """As text and as a message; an empty answer of other data is no answer."""
    drawn = {"completions": ["", "aa"], "prompt_ids": [1], "completion_ids": [[2], [3]]}
    user = [{"role": "user", "content": "p"}]
    rows = [{"prompt": "p", **drawn}, {"prompt": user, **drawn}, {"prompt": "p", "completions": ["", "aa"]}]
    outcome = score_data(str(write(tmp_path, rows)), [of(f"{rules}:short")], tmp_path / "out.jsonl")
    assert outcome is not None
    assert [row["scores"] for row in lines(tmp_path / "out.jsonl")] == [[2, -2]] * 2
    assert [(fault.row, fault.field) for fault in outcome.faults] == [(3, "completions 1")]


def test_the_command_and_what_it_refuses(
    align: Callable[..., Any],
    rules: str,
    tmp_path: Path,
    tiny_model_dir: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """What ``align generate --n`` wrote, judged, is what training on groups reads: the ids that were drawn."""
    prompts, answers, groups = (tmp_path / f"{name}.jsonl" for name in ("prompts", "answers", "groups"))
    prompts.write_text('{"prompt": "the hat"}\n{"prompt": "an inner thing"}\n')
    made = align("generate", "-m", tiny_model_dir, "-i", prompts, "-o", answers, "--n", 3, "--max-new-tokens", 4)
    assert made.exit_code == 0, made.output
    spec = tmp_path / "annotator.yaml"
    spec.write_text(f"reward: {rules}:short\ntemperature: 2\n")
    for given in (spec, f"{{reward: '{rules}:short', temperature: 2}}"):
        done = align("score", answers, "--annotator", given, "-o", groups)
        assert done.exit_code == 0, done.output
        assert "2 of 2 rows scored" in done.stdout
    split = read_split(str(groups), tiny_tokenizer, 64, kind="groups", rules=GroupRules("win_rates"))
    assert split.faults == []
    assert split.dataset()["answer_ids"] == [row["completion_ids"] for row in lines(answers)]
    for given, problem in [
        (f"{{rewardd: {rules}:short}}", "--annotator.rewardd  did you mean reward?"),
        ("nowhere.yaml", "nowhere.yaml: no such file"),
    ]:
        refused = align("score", answers, "--annotator", given, "-o", tmp_path / "x.jsonl")
        assert refused.exit_code == 2
        assert problem in refused.stderr
    other = align("score", answers, "--annotator", f"{rules}:number", "-o", groups)
    assert "begun with other scorers" in other.stderr


def test_a_changed_rule_is_another_annotator(rules: str, tmp_path: Path) -> None:
    before = of(f"{rules}:short").identity
    assert before == of(f"{rules}:short").identity
    (tmp_path / "annotated_rules.py").write_text(RULES + "\n# changed\n")
    assert before != of(f"{rules}:short").identity


def test_an_annotator_that_fails_for_all_stops_the_pass(
    rules: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is set aside for a server that is not there: the same command goes on once it is."""
    from align.rewards.annotators import AnnotatorError

    scorer = of(f"{rules}:number")

    def gone(*_: Any) -> None:
        raise AnnotatorError("judge", "no answer from http://localhost:1")

    source = write(tmp_path, [{"prompt": "p", "completions": ["0", "1"]}])
    monkeypatch.setitem(scorer.__dict__, "annotator", gone)
    with pytest.raises(AlignError, match="align score: judge: no answer from"):
        score_data(str(source), [scorer], tmp_path / "out.jsonl")
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert score_data(str(source), [of(f"{rules}:number")], tmp_path / "out.jsonl").counts["scored"] == 1  # type: ignore[union-attr]


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="--annotator"):
        of({"gpm": "runs/nowhere/at/all"}).annotator  # noqa: B018
