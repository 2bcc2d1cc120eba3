"""``align train --sweep``: several runs of one recipe, one pass of the reference, one table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from align import run as run_module
from align.config.load import load_recipe
from align.reports.drawing import COLOURS
from align.sweep import _split
from align.trainers import reference_host

Align = Callable[..., Result]
SHORT = {"training": {"max_steps": 3, "save_steps": 1}, "evals": ["preference", "displacement"]}


@pytest.fixture
def write_short(write_recipe, tmp_path, monkeypatch) -> Callable[..., Path]:
    """A recipe of three steps, with a cache of its own."""
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    return lambda **changes: write_recipe(**{**SHORT, "output": str(tmp_path / "sweep"), **changes})


def manifest(run: Path) -> dict:
    return json.loads((run / "manifest.json").read_text())


def test_a_sweep(align, write_short, tmp_path, monkeypatch):
    """Three betas: the 24 rows meet the reference once; what each run measured stands in one table."""
    asked, real = [], reference_host.score

    def score(model, rows):
        asked.append(rows.answers // 2)
        return real(model, rows)

    monkeypatch.setattr(reference_host, "score", score)
    output, path = tmp_path / "sweep", write_short(tracking={"wandb": {"mode": "disabled"}})
    words = ("train", path, "training.seed=5", "--sweep", "loss.beta=0.5,2,5.0")
    done = align(*words)
    assert done.exit_code == 0, done.stderr
    assert sum(asked) == 24
    runs = [output / f"loss.beta={beta}" for beta in ("0.5", "2", "5.0")]
    assert [manifest(run)["speed"]["reference"]["computed"] for run in runs] == [24, 0, 0]
    assert [manifest(run)["speed"]["reference"]["cached"] for run in runs] == [0, 24, 24]
    assert [manifest(run)["status"] for run in runs] == ["finished"] * 3
    command = ["align", "train", str(path), "training.seed=5", "loss.beta=2", f"output={runs[1]}"]
    assert manifest(runs[1])["command"] == command
    alone = load_recipe(command[2], command[3:])
    assert (alone.loss, alone.training["seed"]) == ({"beta": 2}, 5)
    recipe = load_recipe(str(runs[2] / "config.resolved.yaml"))
    assert recipe.tracking.wandb is not None
    assert (recipe.tracking.wandb.group, recipe.tracking.wandb.name) == ("sweep", "sweep loss.beta=5.0")

    kept = json.loads((output / "sweep.json").read_text())
    assert (kept["recipe"], kept["keys"]) == (str(path), ["loss.beta"])
    assert [run["values"] for run in kept["runs"]] == [{"loss.beta": 0.5}, {"loss.beta": 2}, {"loss.beta": 5.0}]
    for run, folder in zip(kept["runs"], runs, strict=True):
        measured = json.loads((folder / "eval" / "preference.json").read_text())["metrics"]["accuracy"]
        assert run["metrics"]["preference/accuracy"] == measured
        assert run["train_seconds"] == manifest(folder)["timings"]["train_seconds"]
        assert (run["run"], run["status"]) == (str(folder), "finished")
    head, rule, *lines = (output / "sweep.md").read_text().splitlines()
    heads = [cell.strip() for cell in head.strip("|").split("|")]
    assert heads[:2] == ["loss.beta", "Preference accuracy on held-out pairs, n = 24"]
    assert heads[-3:] == ["training, s", "reference rows read", "computed"]
    assert rule == "|" + " --- |" * len(heads)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [(line[0], line[-2], line[-1]) for line in cells] == [
        ("0.5", "0", "24"),
        ("2", "24", "0"),
        ("5.0", "24", "0"),
    ]
    accuracy = kept["runs"][0]["metrics"]["preference/accuracy"]
    low, high = (f"{100 * accuracy[end]:.1f}" for end in ("low", "high"))
    assert cells[0][1] == f"{100 * accuracy['value']:.1f} % ({low} to {high})"
    for cell in (cells[0][1], "training, s"):
        assert cell in done.stdout
    assert (output / "compare.html").exists()
    assert "run 2 of 3: loss.beta=2 · begins · " in done.stderr

    # Called again nothing is trained, and the table is the same.
    before = (output / "sweep.md").read_text()
    monkeypatch.setattr(run_module, "train", None)
    again = align(*words)
    assert again.exit_code == 0, again.stderr
    assert (output / "sweep.md").read_text() == before
    assert again.stderr.count("finished, stays as it is") == 3


def test_an_interrupted_sweep_goes_on(align, write_short, tmp_path, monkeypatch):
    """Stopped in the second of three runs, after its training: the first is kept, the second not trained again."""
    output, path = tmp_path / "sweep", write_short()
    words = ("train", path, "--sweep", "loss.beta=1,2,3")
    real, calls = run_module.evaluate, []

    def evaluate(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(run_module, "evaluate", evaluate)
    stopped = align(*words)
    assert stopped.exit_code == 130
    assert f"interrupted: {output} keeps what is done; to go on from there:" in stopped.stderr
    assert stopped.stderr.rstrip().endswith(f"align train {path} --sweep loss.beta=1,2,3")
    assert not (output / "sweep.md").exists()
    first = (output / "loss.beta=1" / "manifest.json").read_text()
    done = align(*words)
    assert done.exit_code == 0, done.stderr
    assert "run 1 of 3: loss.beta=1 · finished, stays as it is" in done.stderr
    assert "run 2 of 3: loss.beta=2 · goes on from step 3" in done.stderr
    assert (output / "loss.beta=1" / "manifest.json").read_text() == first
    assert manifest(output / "loss.beta=2")["resumed"][0]["from_step"] == 3
    assert len((output / "sweep.md").read_text().splitlines()) == 5


def test_a_run_that_fails_is_told_and_the_others_go_on(align, write_short, tmp_path, pairs_file, monkeypatch):
    """One fails in words and one with a bug; mended, the same command trains these two."""
    data = tmp_path / "pairs.jsonl"
    data.write_text(pairs_file.read_text() + '{"prompt": "a", "chosen": "", "rejected": "c"}\n')
    output, path = tmp_path / "sweep", write_short(data={"train": str(data)}, evals=["preference"])
    words = ("train", path, "--sweep", "data.max_bad_fraction=0.0,0.5", "--sweep", "loss.beta=1,2")
    real = run_module.evaluate

    def evaluate(recipe, *rest):
        if recipe.loss["beta"] == 2:
            raise ZeroDivisionError("a bug")
        return real(recipe, *rest)

    monkeypatch.setattr(run_module, "evaluate", evaluate)
    failed = align(*words)
    assert failed.exit_code == 1
    assert "data.max_bad_fraction=0.0,loss.beta=1 failed: " in failed.stderr
    assert "ZeroDivisionError: a bug" in failed.stderr
    assert "3 of 4 runs failed: data.max_bad_fraction=0.0,loss.beta=1; " in failed.stderr
    lines = (output / "sweep.md").read_text().splitlines()
    assert [line.count("| failed |") for line in lines[2:6]] == [1, 1, 0, 1]
    assert any(line.startswith("data.max_bad_fraction=0.5,loss.beta=2 failed: ZeroDivisionError") for line in lines)
    kept = json.loads((output / "sweep.json").read_text())["runs"]
    assert [run["status"] for run in kept] == ["failed", "failed", "finished", "failed"]
    assert kept[3]["error"] == "ZeroDivisionError: a bug"
    assert not (output / "compare.html").exists()  # of one run there is nothing to compare

    data.write_text(pairs_file.read_text())
    monkeypatch.setattr(run_module, "evaluate", real)
    mended = align("train", path, "data.max_bad_fraction=0.5", "--sweep", "loss.beta=1,2", f"output={tmp_path / 'b'}")
    assert mended.exit_code == 0, mended.stderr
    assert (tmp_path / "b" / "compare.html").exists()


def test_a_dry_run_says_what_would_run(align, write_short, tmp_path):
    shown = align("train", write_short(), "--dry-run", "--sweep", "loss.beta=1,2", "--sweep", "model.lora.r=2,4")
    assert shown.exit_code == 0, shown.stderr
    assert "memory, estimated" in shown.stdout
    names = [f"loss.beta={beta},model.lora.r={r}" for beta in (1, 2) for r in (2, 4)]
    assert shown.stdout.splitlines()[-4:] == [f"{name} · begins · {tmp_path / 'sweep' / name}" for name in names]
    assert not (tmp_path / "sweep").exists()


def test_values_that_make_no_name_of_a_folder(align, write_short, tmp_path, pairs_file, heldout_file):
    shown = align(
        *("train", write_short(), "--dry-run", "--sweep", f"data.train={pairs_file},{pairs_file.parent}"),
        *("--sweep", "model.lora.target_modules=[q_proj, v_proj],all-linear"),
    )
    assert shown.exit_code == 0, shown.stderr
    folders = {line.rpartition(" · ")[2] for line in shown.stdout.splitlines()[-4:]}
    assert len(folders) == 4
    assert all(Path(folder).parent == tmp_path / "sweep" for folder in folders)


@pytest.mark.parametrize(
    ("words", "where", "what"),
    [
        (["loss.beta"], "loss.beta", "is not key=value,value, such as loss.beta=0.05,0.1,0.2"),
        (["=1,2"], "=1,2", "is not key=value,value, such as loss.beta=0.05,0.1,0.2"),
        (["loss.beta=1,,2"], "loss.beta", "has an empty value in '1,,2'; null is written out"),
        (["loss.beta="], "loss.beta", "has an empty value in ''; null is written out"),
        (["loss.beta=1,2,1"], "loss.beta", "has '1' twice"),
        (["loss.beta=1,2,1.0"], "loss.beta", "'1' and '1.0' are the same value"),
        (["loss.beta=1,{a: 1,}}"], "loss.beta", "'{a: 1,}}' is not YAML: expected"),
        (["loss.beta=1", "loss.beta=2"], "loss.beta", "is swept twice; give all of its values in one --sweep"),
        (["training.seed=1,2"], "training.seed", "is set by training.seed=... too; leave that out"),
        (["output=a,b"], "output", "is where all runs go, a folder each; give it once, as output=FOLDER"),
        (["tracking.wandb.mode=offline,online"], "tracking.wandb.mode", "does not change what a run comes to; give"),
        (["data.reference_cache=true,false"], "data.reference_cache", "does not change what a run comes to; give"),
        (["loss.betaa=1,2"], "loss.betaa", "unknown"),
        (["loss.beta=1,many"], "loss.beta", "'many' is not a number (loss.beta=many)"),
        (["method=dpo,dqo"], "method", "did you mean dpo? (method=dqo)"),
        (["model.lora.r=1,0"], "model.lora.r", "is 0; it must be at least 1 (model.lora.r=0)"),
        (["model.lora.alpha=2,8"], None, "--sweep"),
    ],
)
def test_what_is_wrong_is_told_before_anything_starts(align, write_short, tmp_path, words, where, what):
    path = write_short()
    options = [word for option in words for word in ("--sweep", option)]
    result = align("train", path, "training.seed=3", *options, *(() if where else ("--preflight",)))
    assert result.exit_code == 2
    assert what in " ".join(result.stderr.split())
    if where is not None:
        assert f"\n  {where}  " in result.stderr
    assert not (tmp_path / "sweep").exists()


def test_values_that_come_to_the_same_run(align, write_short):
    """A tracking section that is written whole is not seen by its name."""
    result = align("train", write_short(), "--sweep", "model.lora={r: 4},{r: 4, alpha: null}")
    assert result.exit_code == 2
    assert "model.lora={r: 4, alpha: null}  comes to the same run as model.lora={r: 4}" in result.stderr


def test_a_folder_that_holds_a_run_is_no_place_for_a_sweep(align, write_short, tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "manifest.json").write_text("{}")
    result = align("train", write_short(), "--sweep", "loss.beta=1,2")
    assert result.exit_code == 1
    assert "holds a run, and a sweep makes a folder of runs: choose another output" in result.stderr


def test_commas_in_brackets_and_quotes():
    assert _split("1, 2,3") == ["1", "2", "3"]
    assert _split("[q, v],'a,b',{x: [1, 2], y: ','},it's,") == ["[q, v]", "'a,b'", "{x: [1, 2], y: ','}", "it's", ""]
    assert len(COLOURS) == 6  # as the README says of the page
