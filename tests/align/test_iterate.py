"""Whole recipes on groups of answers, and in rounds, on a tiny model."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

import align.iterate
import align.run
from align.cli import app
from align.config.load import load_recipe
from align.errors import AlignError, ConfigError
from align.run import train

ITERATE = {"rounds": 2, "answers": 3, "max_new_tokens": 5}
TRAINING = {"max_steps": 2, "per_device_train_batch_size": 4, "save_steps": 1, "learning_rate": 1e-2}


def run(path: Path, *changes: str) -> Path:
    return train(load_recipe(str(path), changes), source=str(path), command=["align", "train", str(path)])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found


@pytest.fixture
def no_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw no report, which takes longer than they do."""
    monkeypatch.setattr(align.run, "render_report", lambda folder: folder / "report.html")


@pytest.fixture
def recipe(recipe_in: Callable[..., Path], users_rule: str, tmp_path: Path) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        annotator = {"reward": users_rule, "temperature": 10}
        settings = {
            "method": "sppo",
            "loss": {"beta": 0.1},
            "iterate": {**ITERATE, "annotator": annotator},
            "training": TRAINING,
            "generation": {"prompts": 4, "max_new_tokens": 5},
        }
        return recipe_in(tmp_path, **{**settings, **changes})

    return write


def test_rounds(recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Each round answers with the policy of the one before, which is its reference; the last one's weights are the
    whole's.
    """
    last = run(recipe())
    whole = tmp_path / "run"
    assert last == whole / "round-2" / "run"
    assert manifest(whole)["status"] == manifest(last)["status"] == "finished"
    for number in (1, 2):
        rows = lines(whole / f"round-{number}" / "scored.jsonl")
        assert len(rows) == 24
        assert all(len(row["win_rates"]) == len(row["completion_ids"]) == 3 for row in rows)
        assert (whole / f"round-{number}" / "run" / "report.html").is_file()
    first, second = (lines(whole / f"round-{number}" / "answers.jsonl") for number in (1, 2))
    assert first[0]["settings"]["model"] != second[0]["settings"]["model"]
    assert second[0]["settings"]["model"] == str(whole / "round-1" / "run" / "adapter")
    assert [row["completions"] for row in first] != [row["completions"] for row in second]
    kinds = [manifest(whole / f"round-{number}" / "run")["reference"]["kind"] for number in (1, 2)]
    assert kinds == ["adapters-off", "frozen-copy"]
    before, after = (
        load_file(whole / f"round-{number}" / "run" / "adapter" / "adapter_model.safetensors") for number in (1, 2)
    )
    assert any(not value.equal(after[name]) for name, value in before.items())
    assert [row["step"] for row in lines(whole / "metrics.jsonl")] == [1, 2]
    assert (whole / "adapter").resolve() == (last / "adapter").resolve()
    rounds = [json.loads((whole / f"round-{n}" / "run" / "eval" / "generation.json").read_text()) for n in (1, 2)]
    both = json.loads((whole / "eval" / "generation.json").read_text())
    assert both["data"] == rounds[0]["data"]
    for side, number in (("before", 0), ("after", 1)):
        assert [row[side] for row in both["rows"]] == [row[side] for row in rounds[number]["rows"]]
    assert [row["before"] for row in both["rows"]] != [row["before"] for row in rounds[1]["rows"]]
    said = CliRunner().invoke(app, ["generate", "-m", str(whole), "-p", "say", "--max-new-tokens", "2"])
    assert said.exit_code == 0, said.output
    with pytest.raises(AlignError, match="holds this very run, finished"):
        run(recipe())


@pytest.mark.usefixtures("no_pages")
def test_more_rounds_go_on_from_those_that_are_done(recipe: Callable[..., Path], tmp_path: Path) -> None:
    """One round, and one more: the first is not done again, and the second is the whole's."""
    path = recipe(iterate={**ITERATE, "rounds": 1, "annotator": "users_rule:longer"}, evals=[])
    run(path)
    first = tmp_path / "run" / "round-1" / "run" / "adapter" / "adapter_model.safetensors"
    made = first.stat().st_mtime_ns
    last = run(path, "iterate.rounds=2")
    assert last == tmp_path / "run" / "round-2" / "run"
    assert first.stat().st_mtime_ns == made
    assert (tmp_path / "run" / "adapter").resolve() == (last / "adapter").resolve()
    assert [row["step"] for row in lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    assert manifest(tmp_path / "run")["status"] == "finished"
    with pytest.raises(AlignError, match="holds this very run, finished"):
        run(path)


@pytest.mark.usefixtures("no_pages")
def test_the_same_command_goes_on_from_any_stage(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted before each stage of both rounds in turn, they end in the weights of rounds that were not."""
    path = recipe(evals=[])
    run(path, f"output={tmp_path / 'straight'}")
    for number in (1, 2):
        for name, stage in (("answer_file", "answers.jsonl"), ("score_data", "scored.jsonl"), ("train", "run")):
            kept, place = getattr(align.iterate, name), tmp_path / "run" / f"round-{number}" / stage

            def stop(*given: Any, kept: Any = kept, place: Path = place, **named: Any) -> Any:
                if str(place) in [str(getattr(one, "output", one)) for one in given]:
                    raise KeyboardInterrupt
                return kept(*given, **named)

            with monkeypatch.context() as patch:
                patch.setattr(align.iterate, name, stop)
                with pytest.raises(KeyboardInterrupt):
                    run(path)
            assert manifest(tmp_path / "run")["status"] == "interrupted"
            assert not place.exists()
    run(path)
    one, other = (
        load_file(tmp_path / folder / "round-2" / "run" / "adapter" / "adapter_model.safetensors")
        for folder in ("straight", "run")
    )
    assert all(value.equal(other[name]) for name, value in one.items())
    with pytest.raises(AlignError, match="holds rounds of another recipe"):
        run(path, "loss.beta=0.2")


@pytest.mark.usefixtures("no_pages")
def test_an_annotator_that_hangs_ends_in_a_message_and_rounds_that_go_on(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is no part of what the rounds come to: with a longer one they are the same."""
    (tmp_path / "hangs.py").write_text(
        "import threading\n"
        "released = threading.Event()\n"
        "def longer(prompts, completions):\n"
        "    released.wait(20)\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = {"rounds": 1, "answers": 2, "max_new_tokens": 2, "annotator_seconds": 0.2, "annotator": "hangs:longer"}
    path = recipe(iterate=spec, evals=[])
    said = r"iterate.annotator: it has not answered in 0.2 s \(iterate.annotator_seconds\), on 16 prompts. The same"
    with pytest.raises(AlignError, match=said):
        run(path)
    assert manifest(tmp_path / "run")["status"] == "failed"
    importlib.import_module("hangs").released.set()
    run(path, "iterate.annotator_seconds=30")
    assert manifest(tmp_path / "run")["status"] == "finished"


@pytest.mark.usefixtures("no_pages")
@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("raise OSError('no network')", "the rule fails: OSError: no network"),
        ("return [float('nan')] * len(completions)", "nan: not a finite number"),
        ("return [1.0]", "the rule gave 1 numbers for"),
    ],
    ids=["raises", "NaN", "another length"],
)
def test_an_annotator_that_fails_on_some_prompts_ends_in_a_message_and_rounds_that_go_on(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, why: str
) -> None:
    """No prompt is lost to a fault that may pass, and what was judged is not asked again."""
    monkeypatch.delitem(sys.modules, "fails", raising=False)
    (tmp_path / "fails.py").write_text(
        "broken, asked = [True], []\n"
        "def rule(prompts, completions):\n"
        "    if broken and any(' 20 ' in str(prompt) for prompt in prompts):\n"
        f"        {fault}\n"
        "    asked.extend(prompts)\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    path = recipe(iterate={"rounds": 1, "answers": 2, "max_new_tokens": 2, "annotator": "fails:rule"}, evals=[])
    with pytest.raises(AlignError, match=rf"iterate.annotator: .*{why}.*The same command goes on"):
        run(path)
    assert manifest(tmp_path / "run")["status"] == "failed"
    fails = importlib.import_module("fails")
    fails.broken.clear()
    fails.asked.clear()
    run(path)
    assert len(lines(tmp_path / "run" / "round-1" / "scored.jsonl")) == 24
    assert len(set(map(str, fails.asked))) == 24 - align.iterate.JUDGED_TOGETHER


@pytest.mark.usefixtures("no_pages")
def test_a_rule_that_was_mended_judges_the_rounds_that_are_left(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its code is another one by then, and nothing of the round that is done is asked of it."""
    monkeypatch.delitem(sys.modules, "mended", raising=False)
    rule, judged = tmp_path / "mended.py", "    return [float(len(text)) for text in completions]\n"
    rule.write_text(
        "calls = []\n"
        "def rule(prompts, completions):\n"
        "    calls.append(len(prompts))\n"
        "    if sum(calls) > 2 * 24:\n"
        "        raise OSError('a fault')\n" + judged
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    path = recipe(iterate={"rounds": 2, "answers": 2, "max_new_tokens": 2, "annotator": "mended:rule"}, evals=[])
    with pytest.raises(AlignError, match=r"a fault.*The same command goes on"):
        run(path)
    first = tmp_path / "run" / "round-1" / "scored.jsonl"
    made = first.stat().st_mtime_ns
    rule.write_text("def rule(prompts, completions):\n" + judged)
    sys.modules.pop("mended")
    importlib.invalidate_caches()
    last = run(path)
    assert last == tmp_path / "run" / "round-2" / "run"
    assert first.stat().st_mtime_ns == made


@pytest.mark.usefixtures("no_pages")
def test_each_round_may_have_prompts_of_its_own(recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Two rounds of 14 of the 24 prompts: all of them, and the first four of the second round again."""
    spec = {"rounds": 2, "answers": 2, "max_new_tokens": 2, "prompts": 14, "annotator": "users_rule:longer"}
    run(recipe(iterate=spec, evals=[]))
    first, second = (lines(tmp_path / "run" / f"round-{number}" / "answers.jsonl") for number in (1, 2))
    asked = [json.dumps(row["prompt"]) for row in (*first, *second)]
    assert (len(first), len(second), len(set(asked))) == (14, 14, 24)
    assert asked[24:] == asked[:4]


@pytest.mark.usefixtures("no_pages")
def test_all_weights(recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Without an adapter the next round starts from the model of the one before."""
    path = recipe(model={"lora": None}, iterate={**ITERATE, "annotator": "users_rule:longer"}, method="gpo", evals=[])
    last = run(path)
    assert manifest(last)["model"]["name"] == str(tmp_path / "run" / "round-1" / "run" / "model")
    assert (tmp_path / "run" / "model" / "config.json").is_file()


@pytest.mark.usefixtures("no_pages")
def test_a_rule_gets_the_columns_of_its_prompts(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wants.py").write_text(
        "def close(prompts, completions, wanted):\n"
        "    return [-abs(len(text) - float(want)) for text, want in zip(completions, wanted)]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"say {n}", "wanted": n, "other": n}) + "\n" for n in range(6)))
    path = recipe(
        iterate={**ITERATE, "rounds": 1, "annotator": "wants:close"}, data={"train": str(data), "eval": None}, evals=[]
    )
    run(path)
    for row in lines(tmp_path / "run" / "round-1" / "scored.jsonl"):
        rewards = [-abs(len(text) - row["wanted"]) for text in row["completions"]]
        assert row["scores"][0] == pytest.approx(rewards[0] - sum(rewards[1:]) / 2)
        assert "other" not in row
    data.write_text(data.read_text().replace("say 1", "tell 1"))
    shutil.rmtree(tmp_path / "run" / "round-1" / "run")
    marked = tmp_path / "run" / "manifest.json"
    marked.write_text(json.dumps(manifest(tmp_path / "run") | {"status": "interrupted"}))
    with pytest.raises(AlignError, match="has changed since"):
        run(path)


@pytest.mark.usefixtures("no_pages")
def test_groups_of_data(recipe: Callable[..., Path], tmp_path: Path) -> None:
    """What ``align score --annotator`` wrote is data of gpo and sppo; held-out data are prompts."""
    run(recipe(iterate={**ITERATE, "rounds": 1, "annotator": "users_rule:longer"}, evals=[]))
    scored = str(tmp_path / "run" / "round-1" / "scored.jsonl")
    path = recipe(iterate=None, data={"train": scored}, method="gpo", groups={"use": "best_and_worst"})
    dry = CliRunner().invoke(app, ["train", str(path), "--dry-run", f"output={tmp_path / 'groups'}"])
    assert dry.exit_code == 0, dry.output
    assert "answer 2" in dry.stdout
    valid = CliRunner().invoke(app, ["validate", str(path)])
    assert valid.exit_code == 0, valid.output
    assert "groups of 2 answers" in valid.stdout
    folder = run(path, f"output={tmp_path / 'groups'}")
    assert manifest(folder)["merged"]["answers"] == 16
    facts = manifest(folder)["data"]
    assert facts["train"]["groups"] + facts["train"]["ties"] == 24
    assert facts["train"]["as_drawn"] == facts["train"]["groups"]
    assert (folder / "eval" / "generation.json").is_file()
    card = (folder / "README.md").read_text()
    assert "s and P: its mean log-odds and win rate against all of them" in card
    assert "groups by the token ids that were drawn" in card
    logged = [row for row in lines(folder / "metrics.jsonl") if "loss" in row]
    assert len(logged) == 2
    assert logged[0]["kl/k1"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "where", "what"),
    [
        ({"method": "ipo"}, "iterate", "belongs to methods that learn from groups of answers: gpo, gpo_pointwise"),
        ({"method": "mdpo"}, "iterate", "belongs to methods that learn from groups of answers"),
        ({"method": "mdpo", "iterate": None}, "method", "it takes section online"),
        ({"online": {"annotator": "users_rule:longer"}}, "iterate", "does not go with online"),
        ({"iterate": {**ITERATE}}, "iterate.annotator", "missing"),
        ({"iterate": {**ITERATE, "annotator": "users_rule:shorter"}}, "iterate.annotator", "shorter"),
        ({"iterate": {**ITERATE, "annotator": {"gpm": "./nowhere"}}}, "iterate.annotator", "nowhere"),
        ({"training": {"eval_strategy": "steps"}}, "training.eval_strategy", "groups have no held-out loss"),
        ({"data": {"filter": {"wanted": {"keep": 0.5}}}}, "data.filter", "iterate makes them itself"),
        ({"evals": ["preference"]}, "evals.0", "the policy answers prompts itself; leave generation"),
        ({"iterate": None, "evals": ["preference"]}, "evals.0", "method: sppo reads groups of answers"),
        ({"iterate": None, "loss": {"beta": -1}}, "loss", "must be positive"),
        ({"groups": {"use": "some"}}, "groups.use", "all"),
    ],
)
def test_what_a_recipe_may_not_say(
    recipe: Callable[..., Path], changes: dict[str, Any], where: str, what: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(recipe(**changes)))
    said = [text for found, text in caught.value.problems if found.startswith(where)]
    assert said, caught.value.problems
    assert what in said[0]
