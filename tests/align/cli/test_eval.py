"""``align eval`` on a run of the tiny model: its checkpoints, its end and other models on one set of pairs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from align.config.load import load_recipe
from align.run import train
from align.suites.models import steps_of

Align = Callable[..., Result]
OPTIONS = ("--suite", "displacement", "--data")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, recipe_in: Callable[..., Path]) -> Path:
    """Six steps with checkpoints at 2, 4 and 6, evaluated on the held-out pairs; no test changes it."""
    settings = {"training": {"save_total_limit": 3}, "generation": None, "evals": ["displacement"]}
    recipe = recipe_in(tmp_path_factory.mktemp("evaluated"), **settings)
    return train(load_recipe(str(recipe), []), source="r", command=[])


def evaluated(align: Align, *words: Any, output: Path) -> tuple[dict[str, Any], str]:
    result = align("eval", *words, "-o", output)
    assert result.exit_code == 0, result.stderr
    return json.loads(output.read_text()), result.stdout


def values(result: dict[str, Any]) -> Iterator[float]:
    yield from (metric["value"] for metric in result["metrics"].values())


def test_checkpoints_of_a_run(align: Align, run: Path, heldout_file: Path, tmp_path: Path) -> None:
    """The end of the run is what its own evaluation says of it; its last checkpoint is the end, and asked once."""
    found, shown = evaluated(align, run, *OPTIONS, heldout_file, output=tmp_path / "d.json")
    names = [str(run / f"checkpoint-{step}") for step in (2, 4)] + [str(run)]
    assert list(found["models"]) == names
    first, _, end = found["models"].values()
    own = json.loads((run / "eval" / "displacement.json").read_text())
    assert list(values(end)) == pytest.approx(list(values(own)), abs=1e-5)
    assert [token["id"] for token in end["gained"]] == [token["id"] for token in own["gained"]]
    assert found["n"] == 24 == end["n"]
    assert found["reference"] == json.loads((run / "manifest.json").read_text())["model"]["name"]

    compared = {(one["model"], one["metric"]): one for one in found["comparisons"]}
    metrics = ("chosen_delta_per_token", "rejected_delta_per_token", "frac_chosen_down")
    assert list(compared) == [(name, metric) for name in names[1:] for metric in metrics]
    difference = compared[str(run), "rejected_delta_per_token"]
    means = [result["metrics"]["rejected_delta_per_token"]["value"] for result in (end, first)]
    assert difference["value"] == pytest.approx(means[0] - means[1], abs=1e-6)
    assert difference["low"] < difference["value"] < difference["high"] < 0
    assert difference["p"] < difference["p_holm"]
    assert found["settings"]["test"]["correction"] == "Holm"
    assert len(found["data"]["pairs"]) == 24
    assert found["data"]["pairs"][0].keys() == {"row_id", "prompt", "chosen", "rejected"}
    for key in ("source", "sha256", "pairs"):
        assert own["data"][key] == found["data"][key]
    assert "paired; * clear among all 6 comparisons (Holm)" in shown
    decrease = found["decreases"][str(run)]
    assert decrease["steps"] == 4
    assert 0 <= decrease["mean"]["value"] <= decrease["largest"] < 1
    assert "24 pairs of" in shown
    assert "checkpoint-4" in shown
    assert f"{run}: between two of its 4 steps the probability of a chosen answer fell by at most" in shown
    assert "d.json" in shown


def test_models_with_a_reference(align: Align, run: Path, heldout_file: Path, tmp_path: Path) -> None:
    """The merged model is close to the run; the reference against itself has not moved, and nothing gained."""
    base = json.loads((run / "manifest.json").read_text())["model"]["name"]
    words = (run / "merged", base, run, *OPTIONS, heldout_file, "--reference", base)
    found, shown = evaluated(align, *words, output=tmp_path / "d.json")
    merged, itself, *_, end = found["models"].values()
    assert list(values(merged)) == pytest.approx(list(values(end)), abs=1e-4)
    assert set(values(itself)) == {0.0}
    assert itself["gained"] == []
    assert f"{base}  none" in shown


def test_full_training_and_a_checkpoint_alone(
    align: Align, write_recipe: Callable[..., Path], heldout_file: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(model={"lora": None}, generation=None, evals=["displacement"])
    folder = train(load_recipe(str(recipe), []), source="r", command=[])
    checkpoint = folder / "checkpoint-6"
    found, _ = evaluated(align, checkpoint, *OPTIONS, heldout_file, output=tmp_path / "d.json")
    own = json.loads((folder / "eval" / "displacement.json").read_text())
    assert list(values(found["models"][str(checkpoint)])) == pytest.approx(list(values(own)), abs=1e-5)
    assert steps_of(str(folder)) == [str(folder / "checkpoint-4"), str(folder)]
    (checkpoint / "model.safetensors").write_bytes((folder / "checkpoint-4" / "model.safetensors").read_bytes())
    assert steps_of(str(folder)) == [str(folder / "checkpoint-4"), str(checkpoint), str(folder)]


def test_what_cannot_be_compared(align: Align, run: Path, heldout_file: Path, tmp_path: Path) -> None:
    def refusal(*words: Any) -> str:
        result = align("eval", *words, "-o", tmp_path / "d.json")
        assert result.exit_code in (1, 2)
        assert not (tmp_path / "d.json").exists()
        return " ".join(result.stderr.split())

    base = json.loads((run / "manifest.json").read_text())["model"]["name"]
    assert f"{base} is neither a run nor an adapter" in refusal(run, base, *OPTIONS, heldout_file)
    folder = align("eval", run, *OPTIONS, heldout_file, "-o", tmp_path)
    assert (folder.exit_code, f"{tmp_path} is a folder" in folder.stderr) == (2, True)
    below = align("eval", run, *OPTIONS, heldout_file, "-o", heldout_file / "d.json")
    assert (below.exit_code, f"{heldout_file}: cannot be written in" in below.stderr) == (1, True)
    assert "'speed' is not" in refusal(run, "--suite", "speed", "--data", heldout_file)
    other = tmp_path / "other"
    shutil.copytree(run, other)
    text = (other / "config.resolved.yaml").read_text()
    (other / "config.resolved.yaml").write_text(text.replace(base, "smollm2-135m-instruct"))
    assert f"the models were trained from {base} and smollm2-135m-instruct" in refusal(
        run, other, *OPTIONS, heldout_file
    )
    for path in (*other.glob("checkpoint-*"), other / "adapter", other / "merged"):
        shutil.rmtree(path)
    assert "neither a checkpoint nor trained weights yet" in refusal(other, *OPTIONS, heldout_file)
    renamed = tmp_path / "template"
    shutil.copytree(run / "merged", renamed)
    template = renamed / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant", "bot"))
    assert "reads other tokens than the reference" in refusal(renamed, *OPTIONS, heldout_file, "--reference", base)


def test_rows_that_cannot_be_used(align: Align, run: Path, heldout_file: Path, tmp_path: Path) -> None:
    """In a folder that is made; what was set aside there before is not, where all rows can be used."""
    reference = ("--reference", json.loads((run / "manifest.json").read_text())["model"]["name"])
    data = tmp_path / "pairs.jsonl"
    data.write_text(heldout_file.read_text() + '{"prompt": "a", "chosen": "same", "rejected": "same"}\n')
    output = tmp_path / "new folder" / "d.json"
    found, shown = evaluated(align, run / "merged", *reference, *OPTIONS, data, output=output)
    assert found["n"] == 24
    assert found["data"]["set_aside"] == 1
    assert "1 of 25 rows cannot be used" in shown
    assert output.with_name("d.rejected_rows.jsonl").exists()
    evaluated(align, run / "merged", *reference, *OPTIONS, heldout_file, output=output)
    assert not output.with_name("d.rejected_rows.jsonl").exists()


def test_settings_and_data_of_a_run(align: Align, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data default to the run's held-out ones; settings are checked, and models are asked for."""
    found, _ = evaluated(align, run, "--suite", "displacement", output=tmp_path / "d.json")
    assert found["n"] == 24
    wrong = align("eval", run, "promts=3", "--suite", "displacement", "-o", tmp_path / "e.json")
    assert (wrong.exit_code, "is no setting of displacement; it takes none" in " ".join(wrong.stderr.split())) == (
        2,
        True,
    )
    nobody = align("eval", "--suite", "displacement", "-o", tmp_path / "e.json")
    assert (nobody.exit_code, "--suite displacement asks models" in " ".join(nobody.stderr.split())) == (2, True)
    monkeypatch.chdir(tmp_path)  # where no run is
    untrained = align("eval", "quickstart", "--suite", "displacement", "-o", tmp_path / "e.json")
    assert (untrained.exit_code, "align train quickstart first" in " ".join(untrained.stderr.split())) == (2, True)
