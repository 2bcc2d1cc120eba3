"""Whole runs on thumbs: the shipped recipes on a tiny model, what they leave, and BCO's state after a kill."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from align.config.load import load_recipe
from align.errors import AlignError, ConfigError
from align.losses.binary import RewardShift
from align.run import train


def run(source: str | Path, *overrides: str) -> Path:
    recipe = load_recipe(str(source), list(overrides))
    return train(recipe, source=str(source), command=["align", "train", str(source), *overrides])


def metrics(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


@pytest.fixture
def thumbs_file(tmp_path: Path, pairs_file: Path) -> Path:
    """The 48 answers of the pairs, as rows of their own."""
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    answers = [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for row in rows
        for name in ("chosen", "rejected")
    ]
    path = tmp_path / "thumbs.jsonl"
    path.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    return path


def tiny(tiny_model_dir: Path, pairs_file: Path, heldout_file: Path, output: Path) -> list[str]:
    return [
        f"model.name={tiny_model_dir}",
        "model.dtype=float32",
        "model.lora.r=4",
        f"data.train={pairs_file}",
        f"data.eval={heldout_file}",
        f"output={output}",
        "training.learning_rate=5e-3",
        "training.max_steps=6",
        "training.per_device_train_batch_size=4",
        "training.logging_steps=1",
        "generation.reward=users_rule:longer",
        "generation.prompts=4",
        "generation.max_new_tokens=8",
    ]


@pytest.mark.parametrize("name", ["bco", "kto"])
def test_the_shipped_recipe_runs_and_leaves_everything(
    name, write_recipe, tmp_path, tiny_model_dir, pairs_file, heldout_file
):
    folder = run(name, *tiny(tiny_model_dir, pairs_file, heldout_file, tmp_path / "run"), "loss.beta=0.5")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["reference"]["kind"] == "adapters-off"
    facts = manifest["data"]["train"]
    assert (facts["rows"], facts["completions"], facts["up"], facts["down"], facts["unpaired"]) == (24, 48, 24, 24, 24)
    assert 0 <= manifest["merged"]["mean_change"] < 1e-3
    log = metrics(folder)
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6]
    assert log[0]["loss"] == pytest.approx(0.6931 if name == "bco" else 0.5, abs=1e-3)
    assert ("bco/shift" in log[-1]) == (name == "bco")
    assert ("kl" in log[-1]) == (name == "kto")
    thumbs = json.loads((folder / "eval" / "thumbs.json").read_text())
    assert thumbs["n"] == 48
    assert {row["row_id"] for row in thumbs["rows"]} == {one["row_id"] for one in thumbs["data"]["answers"]}
    assert thumbs["data"]["answers"][0].keys() == {"row_id", "prompt", "completion"}
    auc = thumbs["metrics"]["auc"]
    assert auc["low"] <= auc["value"] <= auc["high"]
    assert auc["n"] == 24  # prompts
    threshold = load_shift(folder) if name == "bco" else 0.0
    assert thumbs["settings"]["threshold"] == pytest.approx(threshold)
    assert thumbs["settings"]["rewards"] == name
    assert json.loads((folder / "eval" / "generation.json").read_text())["n"] == 4
    page = (folder / "report.html").read_text()
    assert "Thumbs up told from thumbs down" in page
    assert "Rewards of held-out answers" in page
    assert "Thumbs up told from thumbs down" in (folder / "README.md").read_text()


def load_shift(folder: Path) -> float:
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))
    shift = RewardShift()
    shift.load_state_dict(load_file(newest / "reward_shift.safetensors"))
    return float(shift.value)


def thumbs_recipe(write_recipe, thumbs_file: Path, **changes):
    settings = {"method": "bco", "loss": None, "data": {"train": str(thumbs_file)}, "evals": ["thumbs"]}
    return write_recipe(changes.pop("name", "recipe.yaml"), **{**settings, **changes})


def test_rows_with_labels_train_as_the_pairs_that_they_come_from(write_recipe, thumbs_file, tmp_path):
    one = run(thumbs_recipe(write_recipe, thumbs_file, output=str(tmp_path / "one")))
    pairs = write_recipe("two.yaml", method="bco", loss=None, evals=["thumbs"], output=str(tmp_path / "two"))
    assert [row["loss"] for row in metrics(one)] == [row["loss"] for row in metrics(run(pairs))]


def test_learning_tells_up_from_down(write_recipe, thumbs_file):
    """The rejected answers end in "no": forty steps are enough to hear it in held-out answers."""
    path = thumbs_recipe(write_recipe, thumbs_file, training={"max_steps": 40, "save_steps": 40})
    found = json.loads((run(path) / "eval" / "thumbs.json").read_text())["metrics"]
    assert found["auc"]["value"] > 0.9
    assert found["accuracy"]["value"] > 0.7
    assert found["reward_up"]["value"] > found["reward_down"]["value"]


def test_matched_prompts_are_kept_and_used_again(write_recipe, thumbs_file, tmp_path, monkeypatch):
    from align import run as module

    path = thumbs_recipe(write_recipe, thumbs_file, bco={"match_prompts": True, "density_ratio": [0.25, 4]})

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(path)
    folder = tmp_path / "run"
    density = folder / "density.json"
    stored = json.loads(density.read_text())
    assert (stored["minimum"], stored["maximum"]) == (0.25, 4.0)
    assert 0 <= metrics(folder)[0]["bco/density_accuracy"] <= 1
    assert "bco/weight_down" in metrics(folder)[0]
    density.write_text(json.dumps({**stored, "coefficients": stored["coefficients"][1:]}))
    with pytest.raises(AlignError, match="fitted on embeddings of 31 dimensions, and these have 32"):
        run(path)
    density.write_text(json.dumps(stored))
    assert (run(path) / "report.html").exists()


ENCODER = """
import torch


def lengths(texts):
    return torch.tensor([[float(len(text)), float(text.count("a"))] for text in texts])
"""


def test_a_recipe_names_an_encoder(write_recipe, thumbs_file, tmp_path):
    (tmp_path / "users_encoder.py").write_text(ENCODER, encoding="utf-8")
    bco = {"match_prompts": True, "encoder": "users_encoder:lengths"}
    run(thumbs_recipe(write_recipe, thumbs_file, bco=bco))
    assert len(json.loads((tmp_path / "run" / "density.json").read_text())["coefficients"]) == 2
    with pytest.raises(ConfigError, match="has no lenghts; did you mean users_encoder:lengths"):
        run(thumbs_recipe(write_recipe, thumbs_file, bco={**bco, "encoder": "users_encoder:lenghts"}))
    with pytest.raises(ConfigError, match="embeds prompts for match_prompts: true, which is not set"):
        run(thumbs_recipe(write_recipe, thumbs_file, bco={"encoder": "users_encoder:lengths"}))


def test_thumbs_of_one_kind_stop_the_run(write_recipe, thumbs_file):
    kept = [line for line in thumbs_file.read_text().splitlines() if '"label": true' in line]
    thumbs_file.write_text("\n".join(kept))
    with pytest.raises(AlignError, match=r"thumbs\.jsonl: no thumb down among 24 thumbs up"):
        run(thumbs_recipe(write_recipe, thumbs_file))


def test_dry_run(write_recipe, thumbs_file, tmp_path, capsys):
    recipe = load_recipe(str(thumbs_recipe(write_recipe, thumbs_file)), [])
    train(recipe, source="r", command=[], dry_run=True)
    shown = capsys.readouterr().out
    assert shown.count("completion") >= 8
    assert shown.count("thumb up") == shown.count("thumb down") == 4
    assert "48 rows · 6 steps of 4 (0.5 epochs)" in shown
    assert not (tmp_path / "run").exists()


def test_killed_and_gone_on_equals_uninterrupted(write_recipe, thumbs_file, tmp_path, fork):
    """Kill -9, then the same command: adapter, metrics, shift and evaluation as if nobody had, bit for bit."""
    training = {"max_steps": 12, "save_steps": 4, "gradient_accumulation_steps": 2}
    whole = run(
        thumbs_recipe(write_recipe, thumbs_file, name="w.yaml", training=training, output=str(tmp_path / "whole"))
    )
    path = thumbs_recipe(write_recipe, thumbs_file, name="k.yaml", training=training, output=str(tmp_path / "killed"))
    killed = tmp_path / "killed"
    process = fork(lambda: run(path))
    wanted, deadline = f'"step": {random.Random().randint(5, 10)},', time.monotonic() + 120
    while wanted not in ((killed / "metrics.jsonl").read_text() if (killed / "metrics.jsonl").exists() else ""):
        assert process.is_alive(), process.said.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()

    run(path)
    assert json.loads((killed / "manifest.json").read_text())["resumed"]
    one, other = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (whole, killed))
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
    timed = ("seconds", "perf/tokens_per_s", "perf/peak_rss_gb")
    logs = [[{k: v for k, v in row.items() if k not in timed} for row in metrics(f)] for f in (whole, killed)]
    assert logs[0] == logs[1]
    assert load_shift(whole) == load_shift(killed)
    one, other = (json.loads((folder / "eval" / "thumbs.json").read_text()) for folder in (whole, killed))
    assert one == other


@pytest.mark.parametrize(
    ("changes", "where", "what"),
    [
        ({"bco": {"decay": 1.0}}, "bco.decay", "is 1.0; it must be below 1"),
        ({"bco": {"shift": "ema"}}, "bco.shift", "'ema' is not"),
        ({"bco": {"match_prompt": True}}, "bco.match_prompt", "unknown key; did you mean bco.match_prompts?"),
        ({"bco": {"density_ratio": [2.0, 1.0]}}, "bco.density_ratio", "is [2.0, 1.0]; it must be [least, most]"),
        ({"bco": {"density_ratio": [1.0]}}, "bco.density_ratio", "is [1.0]; it must be [least, most]"),
        ({"bco": {}, "method": "kto"}, "bco", "belongs to method: bco; remove it"),
        ({"evals": ["preference"]}, "evals.0", "preference compares pairs, and method: bco reads single answers with"),
        ({"method": "dpo", "evals": ["thumbs"]}, "evals.0", "thumbs tells thumbs up from thumbs down, and the losses"),
        ({"training": {"beta": 1.0}}, "training.beta", "set it as loss.beta"),
        ({"training": {"desirable_weight": 1.0}}, "training.desirable_weight", "set it as loss.desirable_weight"),
        ({"training": {"lerning_rate": 1.0}}, "training.lerning_rate", "unknown key; did you mean"),
        ({"loss": {"beta": -1.0}}, "loss", "beta is -1.0: it must be positive"),
        ({"loss": {"bta": 1.0}}, "loss.bta", "unknown key; did you mean loss.beta?"),
        (
            {"method": "kto", "training": {"per_device_train_batch_size": 1}},
            "training.per_device_train_batch_size",
            "is 1; kto scores each prompt with the answer of another row of its batch, so it must be at least 2",
        ),
        (
            {"method": "kto", "training": {"train_sampling_strategy": "random"}},
            "training.train_sampling_strategy",
            "is 'random'; kto scores each prompt with the answer of another row of its batch, which needs rows in",
        ),
        (
            {"method": None, "losses": [{"name": "dpo"}, {"name": "bco"}], "evals": []},
            "losses.1.name",
            "bco reads thumbs and stands alone; write method: bco",
        ),
    ],
)
def test_recipes_that_do_not_fit(write_recipe, thumbs_file, changes, where, what):
    with pytest.raises(AlignError) as caught:
        load_recipe(str(thumbs_recipe(write_recipe, thumbs_file, **changes)))
    found = dict(caught.value.problems)
    assert found.get(where, f"not among {found}").startswith(what)


def test_defaults_are_filled_in(write_recipe, thumbs_file):
    recipe = load_recipe(str(thumbs_recipe(write_recipe, thumbs_file, evals=None)))
    assert recipe.loss == {"beta": 0.1}
    assert recipe.bco.model_dump() == {
        "shift": "balanced_ema",
        "decay": 0.9,
        "match_prompts": False,
        "encoder": None,
        "density_ratio": [0.5, 10.0],
        "density_prompts": 1024,
    }
    assert recipe.evals == ["thumbs", "generation"]
    assert load_recipe(str(thumbs_recipe(write_recipe, thumbs_file, method="kto"))).bco is None
