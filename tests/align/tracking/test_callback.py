"""A real Trainer under the callbacks: lines on disk, lines on the terminal, a mirror in W&B, and a resume."""

from __future__ import annotations

import io
import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from align.tracking.callback import tracked
from align.tracking.metrics import read_metrics
from align.tracking.run_folder import RunFolder
from align.tracking.wandb import WandbMirror


@pytest.fixture
def make_trainer(make_tiny_model):
    def make(output: Path, steps: int) -> Trainer:
        rows = [{"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i} for i in range(8)]
        arguments = TrainingArguments(
            output_dir=str(output),
            max_steps=steps,
            per_device_train_batch_size=2,
            logging_steps=1,
            save_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            report_to=[],
            use_cpu=True,
            seed=3,
        )
        return Trainer(model=make_tiny_model(), args=arguments, train_dataset=rows, eval_dataset=rows[:2])

    return make


def wandb_history(records: list[object]) -> dict[int, dict[str, float]]:
    history: dict[int, dict[str, float]] = {}
    for record in records:
        if record.WhichOneof("record_type") == "history":
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            history.setdefault(row["_step"], {}).update(row)
    return history


def wandb_config(records: list[object]) -> dict[str, object]:
    run = next(record.run for record in records if record.WhichOneof("record_type") == "run")
    return {item.key: json.loads(item.value_json) for item in run.config.update}


def interrupted_run(path: Path, config: dict[str, object], trainer: Trainer) -> None:
    with RunFolder(path) as run:
        assert run.open_or_resume("a" * 64) is None
        mirror = WandbMirror(run, config, group="tests")
        with tracked(trainer, run, mirror):
            trainer.train()
        run.log(5, {"loss": 9.0})
        mirror.finish()
        raise KeyboardInterrupt


def test_a_run_its_resume_and_its_offline_mirror(tmp_path, make_trainer, wandb_records, capfd):
    """Four of six steps, a kill after step 5 was logged (checkpoint at 4), and the rest: six lines, each once."""
    path = tmp_path / "run"
    config = {"method": "ln_dpo", "loss": {"beta": 5.0}, "output": str(path)}
    with pytest.raises(KeyboardInterrupt):
        interrupted_run(path, config, make_trainer(path, steps=4))

    first = read_metrics(path / "metrics.jsonl")
    assert [row["step"] for row in first] == [1, 2, 2, 3, 4, 4, 5]
    assert [row["step"] for row in first if "eval_loss" in row] == [2, 4]
    assert all(row["seconds"] > 0 and "total_flos" not in row and "train_runtime" not in row for row in first)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("step ")]
    assert len(lines) == 6
    assert lines[0].startswith(f"step 1/4 · loss {first[0]['loss']:.3f} · 0:")
    assert lines[0].endswith("left")
    assert lines[2] == f"step 2/4 · held-out loss {first[2]['eval_loss']:.3f}" + lines[2][lines[2].rindex(" · ") :]

    with RunFolder(path) as run:
        resumed = run.open_or_resume("a" * 64)
        assert resumed == path / "checkpoint-4"
        mirror = WandbMirror(run, config)
        trainer = make_trainer(path, steps=6)
        with tracked(trainer, run, mirror):
            trainer.train(resume_from_checkpoint=str(resumed))
        mirror.summary({"generation": {"metrics": {"win_rate": {"value": 0.7, "low": 0.6, "high": None, "n": 9}}}})
        side = {"text": "<b>", "reward": 1.0, "tokens": 3, "finished": True}
        mirror.samples([{"prompt": "p", "before": side, "after": side, "kl": 0.1}])
        (path / "report.html").write_text("a report")
        mirror.file(path / "report.html")
        sync = mirror.finish()
    rows = read_metrics(path / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "eval_loss" in row] == [2, 4, 6]
    assert rows[:6] == first[:6]

    files = sorted((path / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda p: p.stat().st_mtime)
    identity = run.manifest["wandb"]["id"]
    assert sync == f"wandb sync {path / 'wandb'}/offline-run-*" == run.manifest["wandb"]["sync"]
    assert [file.name for file in files] == [f"run-{identity}.wandb"] * 2
    records = wandb_records(files[-1])
    assert wandb_config(records)["loss"] == {"beta": 5.0}
    history = wandb_history(records)
    assert history[6]["loss"] == rows[-2]["loss"]
    assert history[6]["eval_loss"] == rows[-1]["eval_loss"]
    summary = {
        i.key: i.value_json for r in records if r.WhichOneof("record_type") == "summary" for i in r.summary.update
    }
    assert json.loads(summary["generation/win_rate"]) == 0.7
    assert "generation/win_rate_high" not in summary
    saved = {p.name for p in files[-1].parent.rglob("*") if p.is_file()}
    assert "report.html" in saved
    assert any(name.startswith("samples_") for name in saved)


def test_without_wandb_the_run_goes_on_and_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)  # what the import system does for a package that is not there
    with caplog.at_level(logging.WARNING), RunFolder(tmp_path / "run") as run:
        run.open_or_resume("a" * 64)
        mirror = WandbMirror(run, {})
        mirror.log(1, {"loss": 1.0})
        mirror.samples([])
        assert mirror.finish() is None
    assert [record.message for record in caplog.records] == [
        f"W&B is left out from here on (start: not installed); {run.metrics_path} is complete"
    ]
    assert run.manifest["wandb"]["error"] == "start: not installed"
    assert run.manifest["status"] == "finished"


def test_a_disabled_mirror_makes_nothing(tmp_path):
    with RunFolder(tmp_path / "run") as run:
        run.open_or_resume("a" * 64)
        mirror = WandbMirror(run, {}, mode="disabled")
        mirror.log(1, {"loss": 1.0})
        assert mirror.finish() is None
        assert run.manifest["wandb"] is None
    assert not (run.path / "wandb").exists()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Unlucky(TrainerCallback):
    """Ctrl-C at the end of step 3, before the progress bar hears of it."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_on_a_terminal_there_is_one_bar_and_the_terminal_is_given_back_after_ctrl_c(
    tmp_path, make_trainer, monkeypatch
):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "160")
    with RunFolder(tmp_path / "run") as run:
        run.open_or_resume("a" * 64)
        trainer = make_trainer(run.path, steps=4)
        trainer.add_callback(Unlucky())
        with pytest.raises(KeyboardInterrupt), tracked(trainer, run):
            trainer.train()
    rows = read_metrics(run.metrics_path)
    last, held_out = rows[1], rows[2]
    assert f"2/4 steps · loss {last['loss']:.3f} · held-out loss {held_out['eval_loss']:.3f} ·" in terminal.getvalue()
    assert terminal.getvalue().count("\x1b[?25l") == terminal.getvalue().count("\x1b[?25h") == 1  # cursor off, on
