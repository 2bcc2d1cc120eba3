"""``align eval --suite generation``: models of the tiny size against what they were trained from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from align.config.load import load_recipe
from align.run import train

Evaluated = Callable[..., tuple[dict[str, Any], str]]
SUITE = ("--suite", "generation")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, recipe_in: Callable[..., Path]) -> Path:
    """Six steps, with its own generation evaluation of 8 prompts; no test changes it."""
    recipe = recipe_in(tmp_path_factory.mktemp("generation"), evals=["generation"])
    return train(load_recipe(str(recipe), []), source="r", command=[])


def test_as_the_run_itself_says(evaluated: Evaluated, run: Path) -> None:
    """Data, reward, prompts, temperature and seed are the run's: so are all answers, and what is said of them."""
    found, shown = evaluated(run, *SUITE)
    base, end = found["models"].values()
    own = json.loads((run / "eval" / "generation.json").read_text())
    assert [row["text"] for row in end["rows"]] == [row["after"]["text"] for row in own["rows"]]
    assert [row["text"] for row in base["rows"]] == [row["before"]["text"] for row in own["rows"]]
    assert [row["kl"] for row in end["rows"]] == pytest.approx([row["kl"] for row in own["rows"]], abs=1e-4)
    assert (own["data"]["source"], len(own["data"]["sha256"])) == (found["data"]["source"], 64)
    same = {"win_rate": "win_rate", "ties": "ties", "reward": "reward_after", "reward_change": "reward_change"}
    same |= {"kl_to_reference": "kl_to_reference", "length": "length_after", "distinct_2": "distinct_after"}
    for ours, theirs in same.items():
        assert end["metrics"][ours] == pytest.approx(own["metrics"][theirs], abs=1e-4), ours
    assert "win_rate" not in base["metrics"]
    assert found["settings"]["seed"] == 0
    assert found["reference"] in shown
    (reward,) = (one for one in found["comparisons"] if one["metric"] == "reward")
    assert reward["value"] == pytest.approx(end["metrics"]["reward_change"]["value"])
    assert {one["metric"] for one in found["comparisons"]} == {
        "reward",
        "length",
        "unfinished",
        "repetition",
        "win_rate",
    }


def test_an_annotator_in_parts(
    evaluated: Evaluated, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Soft win rates of several models, in batches of another size, from answers that were kept and the rest."""
    words = (run, run / "checkpoint-6", run / "checkpoint-4", "annotator.reward=users_rule:longer")
    words = (*words, "annotator.temperature=8", "prompts=6", *SUITE)
    found, _ = evaluated(*words)
    base, end, last, first = found["models"].values()
    gain = [own["reward"] - before["reward"] for own, before in zip(end["rows"], base["rows"], strict=True)]
    assert [row["preference"] for row in end["rows"]] == pytest.approx(
        [1 / (1 + 2.718281828 ** (-g / 8)) for g in gain]
    )
    assert last["metrics"] == end["metrics"] != first["metrics"]
    assert 0 < end["metrics"]["length_controlled_win_rate"]["value"] < 1

    kept = tmp_path / "result.answers.jsonl"
    lines = kept.read_text().splitlines()
    kept.write_text("\n".join([*lines[:9], lines[9][:20]]))
    monkeypatch.setattr("align.answering.BATCH", 3)
    monkeypatch.setattr("align.heldout.BATCH", 2)
    again, _ = evaluated(*words)
    assert len(kept.read_text().splitlines()) == len(lines) + 1  # with the line that was torn
    for name, model in found["models"].items():
        assert [row["text"] for row in again["models"][name]["rows"]] == [row["text"] for row in model["rows"]]
        for metric, value in model["metrics"].items():
            assert again["models"][name]["metrics"][metric] == pytest.approx(value, abs=1e-5)
    other, _ = evaluated(*words, "seed=1")
    assert other["models"][str(run)]["rows"] != end["rows"]


def test_pairs_that_were_set_aside(
    evaluated: Evaluated, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An annotator that says nothing of some prompts: the win rate is of the others, and they are counted."""
    (tmp_path / "shy.py").write_text(
        "def compare(prompts, first, second):\n    return [None if '1' in p else 0.75 for p in prompts]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = (run, "annotator.compare=shy:compare", "annotator.both_orders=false", "prompts=24", *SUITE)
    found, shown = evaluated(*words)
    (end,) = (model for name, model in found["models"].items() if name == str(run))
    silent = [row["preference"] is None for row in end["rows"]]
    assert silent == ["1" in row["prompt"] for row in end["rows"]]
    assert 0 < sum(silent) < 24
    assert end["metrics"]["win_rate"] == {"value": 0.25, "low": 0.25, "high": 0.25, "n": 24 - sum(silent)}
    assert end["metrics"]["set_aside"]["value"] == sum(silent) / 24
    assert "set aside" in shown


def test_other_tokens_have_no_kl(
    evaluated: Evaluated, run: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """A model with another chat template answers too; what it says of its answers is not of the baseline's tokens."""
    other = tmp_path / "merged"
    shutil.copytree(run / "merged", other)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant", "bot"))
    base = json.loads((run / "manifest.json").read_text())["model"]["name"]
    found, shown = evaluated(run, other, "prompts=2", "--reference", base, *SUITE)
    assert "kl_to_reference" not in found["models"][str(other)]["metrics"]
    assert "kl_to_reference" in found["models"][str(run)]["metrics"]
    assert f"{other}: no KL to" in shown


def test_what_cannot_be_asked(refused: Callable[..., str], run: Path, heldout_file: Path, tmp_path: Path) -> None:
    base = json.loads((run / "manifest.json").read_text())["model"]["name"]
    assert "annotator is missing: who judges?" in refused(
        run / "merged", *SUITE, "--reference", base, "--data", heldout_file
    )
    assert "annotator.reward" in refused(run, "annotator.reward=nowhere:at_all", *SUITE)
    assert "reward" in refused(run, "reward=nowhere:at_all", *SUITE)
    assert "alone, which the others are compared with" in refused(
        base, "reward=users_rule:longer", *SUITE, "--reference", base, "--data", heldout_file
    )
    assert "no prompt leaves room" in refused(run, *SUITE, "--max-length", "20")
