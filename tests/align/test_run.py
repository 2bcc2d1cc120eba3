"""Whole runs on a tiny model, through the function that the command line calls."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from align.cli import app, main
from align.config.load import load_recipe
from align.errors import AlignError
from align.models.fingerprint import weights_hash
from align.models.load import load_model, load_run
from align.run import train


def run(path: Path, *overrides: str) -> Path:
    recipe = load_recipe(str(path), list(overrides))
    return train(recipe, source=str(path), command=["align", "train", str(path), *overrides])


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, recipe_in) -> Path:
    """A recipe of a run that is finished, in the folder ``run`` beside it; no test changes it."""
    folder = tmp_path_factory.mktemp("finished")
    path = recipe_in(folder, tracking={"wandb": {"mode": "offline", "project": "test"}})
    run(path)
    return path


def test_a_run_leaves_everything_that_the_design_names(finished, tiny_model_dir):
    folder = finished.parent / "run"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    base, _ = load_model(str(tiny_model_dir), dtype="float32")
    sha = weights_hash(base.state_dict().items())
    assert manifest["reference"] == {"kind": "adapters-off", "weights_sha256": sha}
    assert manifest["model"]["weights_sha256"] == sha
    assert manifest["model"]["trainable"] < manifest["model"]["parameters"]
    assert manifest["data"]["train"]["pairs"] == 24
    assert manifest["speed"]["rows"] == "packed"
    assert 0 <= manifest["speed"]["padding"] < 0.3
    assert manifest["speed"]["checkpointing"]["on"] is False
    assert manifest["speed"]["threads"]["count"] == torch.get_num_threads()
    assert 0.8 < manifest["speed"]["estimated_peak_gb"] < 1.1
    assert 0 < manifest["speed"]["peak_rss_gb"] <= manifest["peak_rss_gb"]
    assert manifest["wandb"]["sync"].startswith("wandb sync ")

    rows = metrics(folder)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert rows[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert rows[5]["loss"] < rows[0]["loss"]

    accuracy = json.loads((folder / "eval" / "preference.json").read_text())["metrics"]["accuracy"]
    assert accuracy["n"] == 24
    assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    generation = json.loads((folder / "eval" / "generation.json").read_text())
    assert generation["n"] == 8
    assert {"win_rate", "kl_to_reference", "length_after"} <= set(generation["metrics"])
    displacement = json.loads((folder / "eval" / "displacement.json").read_text())["metrics"]
    assert displacement["rejected_delta"]["value"] < displacement["chosen_delta"]["value"]
    assert len((folder / "samples.jsonl").read_text().splitlines()) == 8
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tiny_model_dir
    )
    assert not (folder / "adapter" / "README.md").exists()
    assert 0 <= manifest["merged"]["mean_change"] < 1e-3
    for name in ("config.resolved.yaml", "report.html", "README.md", "adapter/adapter_model.safetensors"):
        assert (folder / name).stat().st_size > 0, name


def test_the_run_and_each_of_its_evaluations_are_runs_of_one_group_in_wandb(finished, wandb_records):
    """And so is what `align eval` finds of the run later: the recipe says where to."""
    folder = finished.parent / "run"

    def runs(place: Path) -> dict[str, tuple[str, str, str]]:
        files = place.glob("wandb/offline*/*.wandb")
        every = [next(record.run for record in wandb_records(file) if record.run.run_id) for file in files]
        return {run.display_name: (run.job_type, run.run_group, run.project) for run in every}

    suites = {f"run-{suite}": ("eval", "run", "test") for suite in ("preference", "generation", "displacement")}
    assert runs(folder) == {"run": ("train", "run", "test"), **suites}
    output = finished.parent / "later" / "moved.json"
    words = ["eval", str(folder), "--suite", "displacement", "-o", str(output)]
    told = CliRunner().invoke(app, words)
    assert told.exit_code == 0, told.stderr
    assert f"wandb sync {output.parent}/wandb/offline-run-*" in " ".join(told.stderr.split())
    assert runs(output.parent) == {"moved": ("eval", "run", "test")}
    none = finished.parent / "none" / "moved.json"
    assert CliRunner().invoke(app, [*words[:-1], str(none), "--wandb", "disabled"]).exit_code == 0
    assert [path.name for path in none.parent.iterdir()] == ["moved.json"]


def test_the_merged_model_is_base_plus_adapter(finished):
    folder = finished.parent / "run"
    merged, _ = load_model(str(folder / "merged"), dtype="float32")
    adapted = load_run(str(folder), dtype="float32").model
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        one, other = merged(ids).logits, adapted(ids).logits
        with adapted.disable_adapter():
            base = adapted(ids).logits
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert (base - other).abs().max() > 1e-2


def test_full_training_without_an_adapter(write_recipe):
    folder = run(
        write_recipe(
            model={"lora": None}, method="dpo", loss={"beta": 0.1}, data={"packing": False}, evals=["displacement"]
        )
    )
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["reference"]["kind"] == "log-probs"
    assert manifest["reference"]["weights_sha256"] == manifest["model"]["weights_sha256"]
    assert manifest["speed"]["rows"] == "shared prompt: packing is off"
    assert (folder / "model" / "model.safetensors").exists()
    assert not (folder / "merged").exists()
    assert "computed before the first step" in (folder / "README.md").read_text()


def test_full_training_keeps_a_copy_where_it_has_to(write_recipe, tmp_path):
    """Without the cache, and of a run that sees a few of its rows; the steps are those of a run with the cache."""
    settings = {"model": {"lora": None}, "method": "dpo", "loss": {"beta": 0.1}, "evals": []}
    folders = []
    for name, cache, steps in (("with", True, 4), ("without", False, 4), ("short", True, 2)):
        path = write_recipe(
            **settings, output=str(tmp_path / name), data={"reference_cache": cache}, training={"max_steps": steps}
        )
        folders.append(run(path))
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in folders]
    assert [found["reference"]["kind"] for found in manifests] == ["log-probs", "frozen-copy", "frozen-copy"]
    assert ["reference" in found["speed"] for found in manifests] == [True, False, True]
    logs = [[row["loss"] for row in metrics(folder) if "loss" in row] for folder in folders]
    assert logs[0] == pytest.approx(logs[1], abs=1e-6)
    assert len(logs[2]) == 2


def test_a_cache_that_cannot_be_written_is_said_and_left_out(write_recipe, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "file"))
    folder = run(write_recipe(evals=[]))
    assert "file/references cannot be written, so the reference is scored with each batch" in caplog.text
    assert "reference" not in json.loads((folder / "manifest.json").read_text())["speed"]


def test_a_trained_adapter_is_continued_against_a_copy_of_itself(finished, write_recipe):
    first = finished.parent / "run"
    path = write_recipe(
        model={"lora": None, "adapter": str(first / "adapter")},
        evals=["displacement"],
        training={"max_steps": 2},
    )
    folder = run(path)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["reference"]["kind"] == "frozen-copy"
    assert (
        manifest["reference"]["weights_sha256"]
        != json.loads((first / "manifest.json").read_text())["reference"]["weights_sha256"]
    )
    assert metrics(folder)[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert set(load_file(folder / "adapter" / "adapter_model.safetensors")) == set(
        load_file(first / "adapter" / "adapter_model.safetensors")
    )


def test_sft(write_recipe):
    folder = run(write_recipe(method="sft", loss=None, evals=["generation"]))
    rows = [row for row in metrics(folder) if "loss" in row]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert json.loads((folder / "manifest.json").read_text())["reference"]["kind"] == "none"
    assert (folder / "report.html").exists()


def test_a_reference_free_loss_is_still_compared_with_the_untrained_model(write_recipe):
    folder = run(write_recipe(method="simpo", loss={"beta": 2.0}, evals=["displacement", "preference"]))
    assert json.loads((folder / "manifest.json").read_text())["reference"]["kind"] == "none"
    change = json.loads((folder / "eval" / "displacement.json").read_text())["metrics"]["rejected_delta"]
    assert change["value"] < 0


def test_a_finished_run_is_not_overwritten(finished):
    with pytest.raises(AlignError, match="finished"):
        run(finished)
    with pytest.raises(AlignError, match="another recipe"):
        run(finished, "loss.beta=2.0")


def test_too_many_bad_rows_stop_the_run_and_are_kept(write_recipe, tmp_path):
    data = tmp_path / "bad.jsonl"
    data.write_text(
        '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": "", "rejected": "c"}\n'
    )
    path = write_recipe(data={"train": str(data), "eval": None})
    with pytest.raises(AlignError, match="max_bad_fraction"):
        run(path)
    rejected = (tmp_path / "run" / "rejected_rows.jsonl").read_text().splitlines()
    assert len(rejected) == 1
    assert "chosen" in rejected[0]
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "failed"


def wait_for_step(folder: Path, step: int, process: Any) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (folder / "metrics.jsonl").exists() and f'"step": {step},' in (folder / "metrics.jsonl").read_text():
            return
        assert process.is_alive(), process.said.read_text()
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached")


def test_killed_at_a_random_step_and_gone_on_equals_uninterrupted(write_recipe, tmp_path, fork):
    """Kill -9, then the same command: adapter and metrics are those of a run that nobody killed, bit for bit."""
    settings = {"training": {"max_steps": 20, "save_steps": 4}, "evals": []}
    whole = run(write_recipe("whole.yaml", **settings, output=str(tmp_path / "whole")))
    path = write_recipe("killed.yaml", **settings, output=str(tmp_path / "killed"))
    process = fork(lambda: run(path))
    wait_for_step(tmp_path / "killed", random.Random().randint(5, 17), process)
    process.kill()
    process.join()
    assert json.loads((tmp_path / "killed" / "manifest.json").read_text())["status"] == "running"

    killed = run(path)
    assert json.loads((killed / "manifest.json").read_text())["resumed"]
    one, other = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (whole, killed))
    assert set(one) == set(other)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
    timed = ("seconds", "perf/tokens_per_s", "perf/peak_rss_gb")
    logs = [
        [{k: v for k, v in row.items() if k not in timed} for row in metrics(folder) if "loss" in row]
        for folder in (whole, killed)
    ]
    assert logs[0] == logs[1]


def test_ctrl_c_saves_and_says_how_to_go_on(write_recipe, tmp_path, fork, monkeypatch):
    path = write_recipe(training={"max_steps": 4000, "save_steps": 2000}, evals=[])
    monkeypatch.setattr(sys, "argv", ["align", "train", str(path)])
    process = fork(lambda: sys.exit(main()))
    wait_for_step(tmp_path / "run", 3, process)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    errors = process.said.read_text()
    assert "stopping after this step" in errors
    assert "is saved; to go on from there" in errors
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "interrupted"
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert int(checkpoint.name.removeprefix("checkpoint-")) >= 3


def test_changed_data_is_not_mixed_into_a_run(write_recipe, tmp_path, pairs_file, monkeypatch):
    """A run that stopped after training, and another first row when it is called again."""
    from align import run as module

    data = tmp_path / "pairs.jsonl"
    data.write_text(pairs_file.read_text())
    path = write_recipe(data={"train": str(data)}, evals=["preference"])

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(path)
    data.write_text("\n".join(pairs_file.read_text().splitlines()[1:]))
    with pytest.raises(AlignError, match="has changed since"):
        run(path)
    data.write_text(pairs_file.read_text())
    assert (run(path) / "report.html").exists()


def test_dry_run_shows_rows_and_plan_and_writes_nothing(write_recipe, tmp_path, capsys):
    recipe = load_recipe(str(write_recipe()), [])
    train(recipe, source="r", command=[], dry_run=True)
    shown = capsys.readouterr().out
    assert shown.count("rejected") >= 8
    assert "24 rows · 6 steps of 4 (1 epochs)" in shown
    assert "memory, estimated" in shown
    assert re.search(r"^gradient checkpointing off: .* are free$", shown, re.M)
    assert not (tmp_path / "run").exists()


def test_an_interrupted_evaluation_keeps_its_answers(write_recipe, tmp_path, monkeypatch):
    """The second call draws only what is missing, and ends with the same answers as an evaluation in one piece."""
    from align import answering

    settings = {"evals": ["generation"], "generation": {"prompts": 8}}
    whole = run(write_recipe("whole.yaml", **settings, output=str(tmp_path / "whole")))
    monkeypatch.setattr(answering, "BATCH", 3)
    real, calls = answering.sample, []

    def failing(model, tokenizer, prompts, **kwargs):
        calls.append(len(prompts))
        if len(calls) == 2:
            kwargs["on_batch"], keep = (
                (lambda batch: (keep(batch), (_ for _ in ()).throw(KeyboardInterrupt))),
                kwargs["on_batch"],
            )
        return real(model, tokenizer, prompts, **kwargs)

    monkeypatch.setattr(answering, "sample", failing)
    path = write_recipe("parts.yaml", **settings, output=str(tmp_path / "parts"))
    with pytest.raises(KeyboardInterrupt):
        run(path)
    decided = json.loads((tmp_path / "parts" / "manifest.json").read_text())["speed"]
    monkeypatch.setattr("align.trainers.plan.free_memory", lambda: (1e-6, "this machine"))  # by now
    parts = run(path)
    assert calls == [8, 8, 0, 5, 8]
    speed = json.loads((parts / "manifest.json").read_text())["speed"]
    assert speed["checkpointing"] == decided["checkpointing"]
    assert speed["threads"]["count"] == decided["threads"]["count"]
    one, other = (json.loads((f / "eval" / "generation.json").read_text())["rows"] for f in (whole, parts))
    assert [r["after"]["text"] for r in one] == [r["after"]["text"] for r in other]
    assert [r["before"]["text"] for r in one] == [r["before"]["text"] for r in other]
