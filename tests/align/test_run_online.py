"""Whole runs of section online on a tiny model: from recipe to report, gone on with, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.config.load import load_recipe
from align.errors import AlignError, ConfigError
from align.run import train

TRAINING = {"max_steps": 4, "per_device_train_batch_size": 4, "save_steps": 1, "learning_rate": 1e-2}


@pytest.fixture
def online_recipe(write_recipe: Any, users_rule: str) -> Any:
    def write(**changes: Any) -> Path:
        online = {"annotator": {"reward": users_rule, "temperature": 2.0}, "max_new_tokens": 8, "eval_prompts": 4}
        settings: dict[str, Any] = {
            "method": "ipo",
            "loss": {"beta": 0.1},
            "training": TRAINING,
            "generation": {"reward": users_rule, "prompts": 6, "max_new_tokens": 8, "temperature": 1.0},
            "evals": ["generation"],
            **changes,
        }
        settings["online"] = {**online, **settings.get("online", {})}
        path: Path = write_recipe(**settings)
        return path

    return write


def run(source: Path, *overrides: str) -> Path:
    recipe = load_recipe(str(source), list(overrides))
    return train(recipe, source=str(source), command=["align", "train", str(source)])


def generation(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "eval" / "generation.json").read_text())
    return found


def test_from_recipe_to_report(online_recipe: Any) -> None:
    source = online_recipe(online={"mixture": 0.25}, training={**TRAINING, "eval_strategy": "steps", "eval_steps": 2})
    folder = run(source)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["annotator"]["name"] == "longer"
    assert manifest["reference"]["kind"] in ("adapters-off", "frozen-copy")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().split("\n")[:-1]]
    assert [row["step"] for row in rows if "eval_win_rate" in row] == [2, 4]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().split("\n")[:-1]]
    assert [sample["step"] for sample in samples] == [step for step in (1, 2, 3, 4) for _ in range(4)]
    assert all(len(sample["answers"]) == 2 for sample in samples)
    page = (folder / "report.html").read_text()
    assert "Win rate" in page
    assert "longer, 2 answers a prompt, of a mixture with 0.25 of the reference" in page
    assert "Answers before and after" in page


def test_a_run_goes_on_to_the_same_end(online_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped by its annotator in step 3, in the middle of a window; the same command then ends as if nothing was."""
    source = online_recipe(online={"inner_steps": 2})
    whole = run(source, f"output={tmp_path / 'whole'}")
    import users_rule

    longer, calls = users_rule.longer, []

    def faulty(prompts: list[str], completions: list[str]) -> list[float]:
        calls.append(len(prompts))
        if sum(calls) > 8:
            raise RuntimeError("out of order")
        return list(longer(prompts, completions))

    with monkeypatch.context() as patch:
        patch.setattr(users_rule, "longer", faulty)
        with pytest.raises(AlignError, match=r"out of order.*goes on from step 2"):
            run(source, f"output={tmp_path / 'again'}")
    again = run(source, f"output={tmp_path / 'again'}")
    assert (again / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    assert generation(again)["rows"] == generation(whole)["rows"]


@pytest.mark.parametrize("lora", [{"r": 4}, None], ids=["lora", "full"])
def test_a_reference_that_moves_is_not_what_answers_are_compared_with(
    online_recipe: Any, tmp_path: Path, lora: Any
) -> None:
    """The policy of the last step as reference: the suite still compares with the model before training."""
    fixed, moved = (
        run(online_recipe(online=online), f"output={tmp_path / name}", f"model.lora={json.dumps(lora)}")
        for name, online in (("fixed", {}), ("moved", {"reference": "previous", "every": 1}))
    )
    before = [[row["before"]["text"] for row in generation(folder)["rows"]] for folder in (fixed, moved)]
    assert before[0] == before[1]
    assert generation(moved)["metrics"]["kl_to_reference"]["value"] != 0
    assert json.loads((moved / "manifest.json").read_text())["reference"]["kind"] == "previous"


@pytest.mark.parametrize(
    ("changes", "where", "what"),
    [
        ({"online": {"annotator": "users_rule:longr"}}, "online.annotator", "did you mean users_rule:longer"),
        ({"online": {"annotator": {"reward": "no/such/folder"}}}, "online.annotator.reward", "no such folder"),
        ({"online": {"annotator": {"judge": {"model": "m"}}}}, "online.annotator.judge.url", "is missing"),
        ({"online": {"labels": "hard"}}, "online.labels", "soft"),
        ({"online": {"mixture": 2.0}}, "online.mixture", "at most 1"),
        ({"online": {"mixture": 0.5, "engine": "vllm"}}, "online.engine", "a mixture takes"),
        ({"online": {"decay": 0.5}}, "online.decay", "reference: ema"),
        ({"online": {"kl_penalty": 0.5}}, "online.kl_penalty", "belongs to mdpo"),
        ({"method": "nash_md_pg", "online": {"answers": 4}}, "online.answers", "takes 2"),
        ({"method": "nash_md_pg", "online": {"inner_steps": 2}}, "online.inner_steps", "as it is"),
        ({"method": "mdpo", "loss": {}, "online": {"mixture": 0.5}}, "online.mixture", "ratios"),
        ({"method": "gpo", "online": {"labels": "drawn"}}, "online.labels", "scores"),
        ({"method": "bco", "loss": None}, "method", "answers of its own"),
        ({"method": "dpo", "evals": ["preference"]}, "evals.0", "answers prompts itself"),
        ({"training": {"max_lenght": 3}}, "training.max_lenght", "unknown key"),
        ({"training": {"train_sampling_strategy": "sequential"}}, "training.train_sampling_strategy", "loop's own"),
    ],
)
def test_what_is_wrong_is_said_at_once(online_recipe: Any, changes: Any, where: str, what: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_recipe(str(online_recipe(**changes)))
    problems = dict(error.value.problems)
    found = [text for place, text in problems.items() if place.startswith(where)]
    assert found, problems
    assert what in found[0], found
