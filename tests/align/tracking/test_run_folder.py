"""The run folder under two processes, kills, resumes and disks that do not take it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from align.data.report import write_rejected
from align.data.rows import Fault
from align.errors import AlignError
from align.tracking.files import write_json, write_text
from align.tracking.metrics import metrics_line, read_metrics, truncate_metrics
from align.tracking.run_folder import RunFolder, checkpoint_is_complete, peak_rss_gb, read_manifest

HOLD = """
import sys, time
from align.tracking.run_folder import RunFolder
run = RunFolder(sys.argv[1]).__enter__()
run.open_or_resume("a" * 64)
run.log(1, {"loss": 0.5})
run.log(2, {"loss": 0.4})
print("held", flush=True)
time.sleep(60)
"""


def checkpoint(run: Path, step: int, state: str | None = None) -> Path:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    text = json.dumps({"global_step": step}) if state is None else state
    (folder / "trainer_state.json").write_text(text)
    return folder


def start(path: Path, steps: int = 0) -> None:
    """A run that logged ``steps`` steps and was interrupted."""
    with RunFolder(path) as run:
        run.open_or_resume("a" * 64)
        for step in range(1, steps + 1):
            run.log(step, {"loss": 1.0 / step})
        run.end("interrupted")


def test_a_second_process_is_told_who_holds_the_folder_and_a_kill_frees_it(tmp_path):
    path = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(AlignError, match=rf"in use by the run of process {holder.pid}\b"), RunFolder(path):
            pass
        # The refused attempt must not have wiped the holder's number.
        with pytest.raises(AlignError, match=rf"process {holder.pid}\b"), RunFolder(path):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert read_manifest(path)["status"] == "running"
    with RunFolder(path) as run:
        assert run.open_or_resume("a" * 64) is None
        assert read_metrics(run.metrics_path) == []  # no checkpoint: the run starts over, and so do its metrics
        assert len(run.manifest["resumed"]) == 1


def test_status_follows_how_the_block_ends(tmp_path):
    def stopped_by(error: type[BaseException], path: Path) -> None:
        with RunFolder(path) as run:
            run.open_or_resume("a" * 64)
            assert run.manifest["status"] == "running"
            raise error

    for error, status in ((KeyboardInterrupt, "interrupted"), (ValueError, "failed")):
        path = tmp_path / status
        with pytest.raises(error):
            stopped_by(error, path)
        assert read_manifest(path)["status"] == status
    with RunFolder(tmp_path / "done") as run:
        run.open_or_resume("a" * 64)
    manifest = read_manifest(tmp_path / "done")
    assert manifest["status"] == "finished"
    assert manifest["finished"] >= manifest["started"]
    with RunFolder(tmp_path / "done") as run, pytest.raises(ValueError, match="finished, not running"):
        run.end("failed")


def test_a_finished_run_is_not_run_again(tmp_path):
    with RunFolder(tmp_path / "run") as run:
        run.open_or_resume("a" * 64)
    with pytest.raises(AlignError, match=r"finished .*choose another output, or delete"), RunFolder(run.path) as again:
        again.open_or_resume("a" * 64)
    assert read_manifest(run.path)["status"] == "finished"


def test_a_refused_set_up_leaves_the_folder_to_the_mended_recipe(tmp_path):
    """And nothing of what the refused one had made of its own model and data."""
    start(tmp_path / "run")
    with RunFolder(tmp_path / "run") as run:
        run.update_manifest(filter={"kept": 3})
        (run.path / "references.jsonl").write_text("{}\n")
    with RunFolder(tmp_path / "run") as run:
        assert run.open_or_resume("b" * 64) is None
    manifest = read_manifest(run.path)
    assert (manifest["recipe_hash"], "filter" in manifest) == ("b" * 64, False)
    assert not (run.path / "references.jsonl").exists()


def test_another_recipe_is_refused_with_both_hashes(tmp_path):
    start(tmp_path / "run", steps=1)
    with pytest.raises(AlignError, match=r"a{12} there, b{12} here"), RunFolder(tmp_path / "run") as run:
        run.open_or_resume("b" * 64)
    assert read_manifest(run.path)["status"] == "interrupted"


def test_resume_never_refuses_an_unfinished_run_and_leaves_it_alone(tmp_path):
    start(tmp_path / "run", steps=3)
    checkpoint(tmp_path / "run", 2)
    with pytest.raises(AlignError, match="last checkpoint: step 2"), RunFolder(tmp_path / "run") as run:
        run.open_or_resume("a" * 64, resume="never")
    assert len(read_metrics(run.metrics_path)) == 3
    assert run.manifest["status"] == "interrupted"


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(AlignError, match=r"not empty and not a run \(thesis.tex\)"), RunFolder(tmp_path) as run:
        run.open_or_resume("a" * 64)
    with pytest.raises(AlignError, match="is a file"), RunFolder(tmp_path / "thesis.tex"):
        pass


@pytest.mark.parametrize("path", ["/sys/align-run", "/sys/kernel"])
def test_a_place_that_cannot_be_written_is_refused(path):
    """Nobody can make a folder (the first) or a lock (the second) there, not even root."""
    with pytest.raises(AlignError, match=rf"{path} cannot be written \(.+\): choose another output"), RunFolder(path):
        pass


def test_a_leftover_of_rejected_rows_is_swept(tmp_path, monkeypatch):
    def killed(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_rejected(tmp_path / "rejected.jsonl", [Fault("pairs.jsonl", 3, "chosen", "is empty", {})])
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 1
    with RunFolder(tmp_path) as run:
        assert run.open_or_resume("a" * 64) is None, "the leftover would be a file of something else"
    assert not list(tmp_path.glob("*rejected*"))


def test_resume_takes_the_newest_complete_checkpoint_and_cuts_the_metrics_there(tmp_path):
    """Checkpoints 2 and 10 are complete, 12 has half a state, 14 none: resume at 10, not at "9" by name order."""
    path = tmp_path / "run"
    start(path, steps=13)
    checkpoint(path, 2)
    checkpoint(path, 9)
    newest = checkpoint(path, 10)
    checkpoint(path, 12, state='{"global_step": 1')
    (path / "checkpoint-14").mkdir()
    (path / "checkpoint-best").mkdir()
    with (path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 14, "lo')
    with RunFolder(path) as run:
        assert run.open_or_resume("a" * 64) == newest
        assert [row["step"] for row in read_metrics(run.metrics_path)] == list(range(1, 11))
        before = read_metrics(run.metrics_path)[-1]["seconds"]
        run.log(11, {"loss": 0.1})
        rows = read_metrics(run.metrics_path)
        assert [row["step"] for row in rows] == list(range(1, 12))
        assert rows[-1]["seconds"] >= before
        assert run.manifest["resumed"][-1]["from_step"] == 10


def test_a_checkpoint_whose_state_is_of_another_step_is_not_complete(tmp_path):
    assert checkpoint_is_complete(checkpoint(tmp_path, 4))
    assert not checkpoint_is_complete(checkpoint(tmp_path, 5, state='{"global_step": 4}'))


def test_values_that_json_does_not_have_become_null_and_are_named():
    line = metrics_line(3, 1.23456, {"loss": float("nan"), "grad_norm": float("inf"), "rewards/margins": -0.5})
    row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row == {
        "step": 3,
        "seconds": 1.235,
        "loss": None,
        "grad_norm": None,
        "rewards/margins": -0.5,
        "nonfinite": ["loss", "grad_norm"],
    }


def test_a_torn_last_line_is_left_out_and_a_broken_middle_line_is_not(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n{"step": 3, "a"')
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    assert [row["step"] for row in truncate_metrics(path, 5)] == [1, 2]
    assert path.read_text() == '{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n'
    path.write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(AlignError, match="line 2 is not JSON"):
        read_metrics(path)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "manifest.json"
    write_json(path, {"loss": float("nan"), "rows": [1.0, float("inf")]})
    old = path.read_text()
    assert json.loads(old) == {"loss": None, "rows": [1.0, None]}
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "x" * 100_000 + "\ud800")  # half of the text is on disk when the encoder gives up
    assert path.read_text() == old
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


def test_a_folder_that_is_no_run_is_said_to_be_none(tmp_path):
    with pytest.raises(AlignError, match=r"has no manifest\.json"):
        read_manifest(tmp_path)
    with pytest.raises(AlignError, match="does not exist"):
        read_manifest(tmp_path / "nowhere")


def test_peak_memory_is_that_of_a_process_with_torch_loaded():
    """Between 0.1 and 100 GB whichever the unit of the system's counter: a slip of 1024 would leave the range."""
    assert 0.1 < peak_rss_gb() < 100
