"""``align eval --suite preference``: rules, reward models and policies on the same pairs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from align.config.load import load_recipe
from align.rewards.models import RewardModel
from align.rewards.pal_model import load_reward_model
from align.run import train
from align.suites import margins

Evaluated = Callable[..., tuple[dict[str, Any], str]]
Jsonl = Callable[..., Path]
SUITE = ("--suite", "preference")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, recipe_in: Callable[..., Path]) -> Path:
    """Six steps of LN-DPO with its own evaluation; no test changes it."""
    recipe = recipe_in(tmp_path_factory.mktemp("preference"), generation=None, evals=["preference"])
    return train(load_recipe(str(recipe), []), source="r", command=[])


def pairs(count: int = 6) -> list[dict[str, Any]]:
    """Text pairs of two subsets; the longer answer is the chosen one in all but the last."""
    rows = [
        {
            "prompt": f"Say {number}:",
            "chosen": " yes yes" + " x" * number,
            "rejected": " no",
            "subset": "ab"[number % 2],
        }
        for number in range(count)
    ]
    rows[-1]["chosen"], rows[-1]["rejected"] = rows[-1]["rejected"], rows[-1]["chosen"]
    return rows


def test_a_run_its_checkpoint_and_a_rule(evaluated: Evaluated, run: Path, heldout_file: Path, users_rule: str) -> None:
    """The run has the rewards of its own evaluation, those of its loss; a checkpoint and an adapter of it too."""
    own = json.loads((run / "eval" / "preference.json").read_text())
    found, shown = evaluated(run, run / "checkpoint-6", run / "adapter", users_rule, *SUITE, "--data", heldout_file)
    first, checkpoint, adapter, rule = found["models"].values()
    assert first["settings"]["reward"] == "implicit reward, 1 * ln_dpo"
    for one in (first, checkpoint, adapter):
        assert one["metrics"]["accuracy"] == own["metrics"]["accuracy"]
        assert one["metrics"]["margin"]["value"] == pytest.approx(own["metrics"]["margin"]["value"], abs=1e-5)
        rows = {row["row_id"]: row["chosen_reward"] for row in one["rows"]}
        assert rows == pytest.approx({row["row_id"]: row["chosen_reward"] for row in own["rows"]}, abs=1e-5)
    assert rule["settings"]["reward"] == "rule"
    assert found["n"] == 24
    assert [(one["model"], one["metric"]) for one in found["comparisons"]][-1] == (users_rule, "accuracy")
    assert found["comparisons"][0]["value"] == 0
    assert not found["comparisons"][0]["clear"]
    assert "24 pairs of" in shown
    assert "clear among all 3 comparisons (Holm)" in shown


def test_a_model_without_a_recipe(evaluated: Evaluated, refused: Callable[..., str], run: Path, pairs_file: Path):
    """The log-ratio to --reference, nats: of the reference itself 0, so that all is ties; without one it is asked."""
    base = json.loads((run / "manifest.json").read_text())["model"]["name"]
    words = (run / "merged", base, *SUITE, "--data", pairs_file)
    # The merged folder is of a run on pairs, whose own reward is the length-normalised one.
    assert f"{base} is neither a run nor an adapter" in refused(*words)
    found, _ = evaluated(*words, "--reference", base)
    merged, itself = found["models"].values()
    assert merged["settings"]["reward"] == "implicit reward, 1 * ln_dpo"
    assert itself["settings"]["reward"] == "implicit reward, log-ratio"
    assert (itself["metrics"]["accuracy"]["value"], itself["metrics"]["ties"]["value"]) == (0.5, 1.0)
    assert found["reference"] == base


def test_reward_models_of_all_kinds(
    evaluated: Evaluated, jsonl: Jsonl, reward_dirs: dict[str, Path], pal_dir: Path
) -> None:
    """Scores are those of ``score_pairs``; rewards stand beside them but for a gpm."""
    rows = pairs()
    names = [*map(str, reward_dirs.values()), f"{pal_dir}@annotator:ann", f"{pal_dir}@mean"]
    found, _ = evaluated(*names, *SUITE, "--data", jsonl(rows))
    for name in names:
        model = load_reward_model(name, dtype=torch.float32)
        sides = ([row[side] for row in rows] for side in ("prompt", "chosen", "rejected"))
        expected = model.score_pairs(*sides).tolist()
        one = found["models"][name]
        assert [row["score"] for row in one["rows"]] == pytest.approx(expected, abs=1e-4)
        assert ("chosen_reward" in one["rows"][0]) == (name != str(reward_dirs["gpm"]))
        assert {"accuracy/a", "ties/a", "accuracy/b", "ties/b"} <= set(one["metrics"])


def test_subsets_ties_and_soft_labels(evaluated: Evaluated, jsonl: Jsonl, users_rule: str):
    """Longer is right in 5 of 6; a tie of the rule is half, a tie of the label is left out, below 1/2 turns the pair.

    ``kind`` x: five of six and the turned pair right, 6/7; y: a tie 1/2. Together 6.5 of 8.
    """
    rows = [{**row, "kind": "x"} for row in pairs()]
    more = {"prompt": "Say:", "kind": "y"}
    rows += [
        {**more, "chosen": " one", "rejected": " two"},
        {**more, "chosen": " a", "rejected": " bbb", "preference": 0.5},
        {**more, "chosen": " c", "rejected": " ddd", "preference": 0.2, "kind": "x"},
    ]
    found, shown = evaluated(users_rule, "by=kind", *SUITE, "--data", jsonl(rows))
    (one,) = found["models"].values()
    values = {name: metric["value"] for name, metric in one["metrics"].items()}
    assert values["accuracy"] == pytest.approx(6.5 / 8)
    assert values["accuracy/x"] == pytest.approx(6 / 7)
    assert (values["accuracy/y"], values["ties/y"]) == (0.5, 0.5)
    assert values["ties"] == pytest.approx(1 / 9)
    assert [row["right"] for row in one["rows"]] == [1, 1, 1, 1, 1, 0, 0.5, None, 1]
    assert "Accuracy by kind" in shown


def test_rewardbench(evaluated: Evaluated, jsonl: Jsonl, users_rule: str, reward_dirs: dict[str, Path]):
    """Found by its subsets; text is read as a chat; a tie is wrong; what is missing is said.

    Reasoning by the rule: math-prm 1/2 (a tie), hep-go 1: (984 / 2 + 164) / 1148; its accuracy is 1 of two, and 3/4.
    """
    rows = [
        {"prompt": "1 + 1", "chosen": "It is 2", "rejected": "3", "subset": "math-prm", "id": 1},
        {"prompt": "1 + 2", "chosen": "3", "rejected": "4", "subset": "math-prm", "id": 2},
        {"prompt": "sort", "chosen": "sorted(x)", "rejected": "x", "subset": "hep-go", "id": 3},
    ]
    found, shown = evaluated(users_rule, reward_dirs["scalar"], *SUITE, "--data", jsonl(rows))
    rule, model = found["models"].values()
    values = {name: metric["value"] for name, metric in rule["metrics"].items()}
    assert values["rewardbench/Reasoning"] == pytest.approx((984 / 2 + 164) / 1148)
    assert (values["accuracy/math-prm"], values["rewardbench/math-prm"]) == (0.75, 0.5)
    assert "rewardbench/mean" not in values
    assert len(found["rewardbench"]["missing"]) == 21
    assert "2 of its 23 subsets are there; missing alpacaeval-easy" in shown
    reasoning = found["comparisons"][-1]
    assert reasoning["metric"] == "rewardbench/Reasoning"
    other = model["metrics"]["rewardbench/Reasoning"]["value"]
    assert reasoning["value"] == pytest.approx(other - values["rewardbench/Reasoning"])
    assert reasoning["p_holm"] >= reasoning["p"]
    assert "math-prm: 2 of 447 pairs" in shown
    chats = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    answers = [[{"role": "assistant", "content": row["chosen"]}] for row in rows]
    expected = RewardModel.from_pretrained(reward_dirs["scalar"], dtype=torch.float32).rewards(chats, answers)
    assert [row["chosen_reward"] for row in model["rows"]] == pytest.approx(expected.tolist(), abs=1e-4)
    plain, _ = evaluated(users_rule, "format=pairs", *SUITE, "--data", jsonl(rows))
    assert "rewardbench" not in plain


def test_the_batch_changes_nothing(
    evaluated: Evaluated, monkeypatch: pytest.MonkeyPatch, reward_dirs: dict[str, Path], run: Path, heldout_file: Path
) -> None:
    words = (reward_dirs["scalar"], reward_dirs["gpm"], run, *SUITE, "--data", heldout_file)
    one, _ = evaluated(*words)
    monkeypatch.setattr(margins, "BATCH", 1)
    monkeypatch.setattr(margins, "PART", 5)
    monkeypatch.setattr("align.heldout.BATCH", 3)
    other, _ = evaluated(*words)
    for name, found in one["models"].items():
        assert [row["right"] for row in found["rows"]] == [row["right"] for row in other["models"][name]["rows"]]
        scores = [row["score"] for row in other["models"][name]["rows"]]
        assert [row["score"] for row in found["rows"]] == pytest.approx(scores, abs=1e-4)


def test_rows_and_models_that_cannot_be_used(
    evaluated: Evaluated, refused: Callable[..., str], jsonl: Jsonl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row without a reward is set aside for all models; what is no model is told before any is loaded."""
    (tmp_path / "some_rule.py").write_text(
        "def some(prompts, completions, wanted):\n"
        "    return [None if want is None else float(len(text)) for text, want in zip(completions, wanted)]\n"
        "def fails(prompts, completions):\n    return [1 / len(text.strip()[5:]) for text in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rows = [{**row, "wanted": None if number == 2 else 1} for number, row in enumerate(pairs())]
    data = jsonl([*rows, {"prompt": "a", "chosen": "same", "rejected": "same"}])
    longer = "align.rewards.rules:informative"
    found, shown = evaluated("some_rule:some", longer, *SUITE, "--data", data)
    assert found["n"] == 5 == found["models"][longer]["n"]
    assert "2 of 7 rows cannot be used" in shown
    assert "some_rule:some gave None" in shown
    assert (tmp_path / "result.rejected_rows.jsonl").exists()
    assert "rows.jsonl, row 6: the rule fails: ZeroDivisionError" in refused("some_rule:fails", *SUITE, "--data", data)
    assert "has no informativ; did you mean" in refused("align.rewards.rules:informativ", *SUITE, "--data", data)
    assert "has no column kind" in refused(longer, "by=kind", *SUITE, "--data", data)
    assert "--suite preference asks models" in refused(*SUITE, "--data", data)
    ties = jsonl([{**row, "preference": 0.5} for row in pairs()])
    assert "all pairs are ties" in refused(longer, *SUITE, "--data", ties)


def test_whose_reward_of_a_pal_model(refused: Callable[..., str], jsonl: Jsonl, pal_dir: Path):
    assert f"write {pal_dir}@WHO" in refused(pal_dir, *SUITE, "--data", jsonl(pairs()))
