"""An evaluation's own W&B run, read back from its offline file with W&B's protobuf classes."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align.evals.result import compared_result, suite_result
from align.evals.statistics import bootstrap_interval, comparisons
from align.reports.eval_figures import result_images
from align.tracking.wandb import Place
from align.tracking.wandb_eval import Image, place_of, send_evaluation

TEXT = "<b>\ud800"
"""With half of a surrogate pair, which no encoding can write."""
PNG = b"\x89PNG\r\n\x1a\n"
SECTIONS = {"tracking": {"wandb": {"mode": "offline", "project": "p", "group": "ours"}}}


def result() -> dict[str, Any]:
    """Two models on four prompts; the second is longer by 1, 2, 3 and 4."""
    lengths = {"runs/a": [3.0, 4.0, 5.0, 6.0], "runs/b": [4.0, 6.0, 8.0, 10.0]}
    models = {
        name: suite_result(
            "generation",
            {"length_after": bootstrap_interval(values)},
            [
                {"row_id": f"r{i}", "after": {"text": "<b>\ud800", "tokens": v, "reward": v}}
                for i, v in enumerate(values)
            ],
            {},
        )
        for name, values in lengths.items()
    }
    compared = comparisons({name: {"length": v} for name, v in lengths.items()}, against="runs/a")
    question = [{"role": "system", "content": "s"}, {"role": "user", "content": "why?"}]
    pairs = [{"row_id": "r1", "prompt": question, "chosen": "so", "rejected": "no"}]
    return compared_result("generation", models, compared, {"source": "d.jsonl", "pairs": pairs}, "base", {"seed": 5})


def found_in(folder: Path, records: Callable[[Path], list[Any]]) -> dict[str, Any]:
    """What one offline run under ``folder`` holds, in words."""
    (file,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    every = records(file)

    def of(kind: str) -> list[Any]:
        return [getattr(record, kind) for record in every if record.WhichOneof("record_type") == kind]

    (run,) = of("run")
    logged: dict[str, Any] = {}
    for item in (item for history in of("history") for item in history.item):
        name, *inside = item.nested_key or [item.key]
        value = json.loads(item.value_json)
        logged[name] = {**logged.get(name, {}), inside[0]: value} if inside else value
    artefacts = {one.type: list(one.manifest.contents) for one in of("artifact")}
    return {
        "run": run,
        "config": {item.key: json.loads(item.value_json) for item in run.config.update},
        "summary": {item.key: json.loads(item.value_json) for s in of("summary") for item in s.update},
        "logged": logged,
        "artefacts": artefacts,
        "files": file.parent / "files",
    }


def test_what_the_offline_run_holds(tmp_path: Path, wandb_records: Callable[[Path], list[Any]]) -> None:
    """Every metric with its interval, rows and comparisons as tables, pictures as images, the files as an artefact.

    The texts of pairs are in the table of rows, and not in the config.
    """
    output = tmp_path / "compared.json"
    output.write_text(json.dumps(result()))
    place = place_of({"runs/a": {}, "runs/b": SECTIONS}, None, output)
    assert place == Place(tmp_path, "offline", "p", "ours", "compared")
    sync = send_evaluation(result(), [output, tmp_path / "not there.jsonl"], result_images(result()), place)
    assert sync == f"wandb sync {tmp_path}/wandb/offline-run-*"
    found = found_in(tmp_path, wandb_records)
    run = found["run"]
    assert (run.project, run.run_group, run.job_type, run.display_name) == ("p", "ours", "eval", "compared")
    assert found["config"]["settings"]["seed"] == 5
    assert (found["config"]["suite"], found["config"]["data"]) == ("generation", {"source": "d.jsonl"})

    length = result()["models"]["runs/b"]["metrics"]["length_after"]
    summary = found["summary"]
    assert [summary[f"b/length_after{end}"] for end in ("", "_low", "_high", "_n")] == list(length.values())
    assert summary["a/length_after"] == 4.5

    rows = json.loads((found["files"] / found["logged"]["rows"]["path"]).read_text())
    about = ["prompt", "chosen", "rejected"]
    assert rows["columns"] == ["model", "row_id", "after.text", "after.tokens", "after.reward", *about]
    assert [line[0] for line in rows["data"]] == ["a"] * 4 + ["b"] * 4
    assert rows["data"][5] == ["b", "r1", "<b>?", 6, 6, "why?", "so", "no"]
    assert rows["data"][4][-3:] == [None] * 3
    compared = json.loads((found["files"] / found["logged"]["comparisons"]["path"]).read_text())
    assert dict(zip(compared["columns"], compared["data"][0], strict=True)) == result()["comparisons"][0]

    pictures = {key: value for key, value in found["logged"].items() if key.startswith("pictures/")}
    assert set(pictures) == {"pictures/Scores of the answers", "pictures/Answer length"}
    for picture in pictures.values():
        assert picture["_type"] == "image-file"
        assert (found["files"] / picture["path"]).read_bytes().startswith(PNG)
    (kept,) = found["artefacts"]["evaluation"]
    assert kept.path == "compared.json"
    staged = Path(kept.local_path)
    assert staged.is_relative_to(tmp_path), "what is to be sent lies with the result, not in the user's home"
    assert json.loads(staged.read_text()) == result()


def test_texts_of_circles_and_of_single_answers(tmp_path: Path, wandb_records: Callable[[Path], list[Any]]) -> None:
    """A row of a circle has the texts of all its pairs; what says how many pairs there were stays in the config."""
    pairs = [{"row_id": name, "prompt": "best?", "chosen": name, "rejected": name.upper()} for name in "ab"]
    answers = [{"row_id": "c", "prompt": "good?", "completion": "yes"}]
    rows: list[dict[str, Any]] = [{"row_ids": ["a", "b"], "scores": [1, 2]}, {"row_id": "c"}]
    circles = suite_result("cycles", {"accuracy": bootstrap_interval([1.0])}, rows, {})
    own = suite_result("generation", {"reward": bootstrap_interval([1.0])}, [{"prompt": "p"}], {})
    expected = (
        ({"pairs": pairs, "answers": answers}, {}, ['["best?", "best?"]', '["a", "b"]', '["A", "B"]', None]),
        ({"pairs": 24}, {"pairs": 24}, ["p"]),
    )
    for name, one, (data, config, last) in zip("xy", (circles, own), expected, strict=True):
        place = Place(tmp_path / name, "offline", "p", None, name)
        assert send_evaluation({**one, "data": data}, [], [], place) is not None
        found = found_in(tmp_path / name, wandb_records)
        table = json.loads((found["files"] / found["logged"]["rows"]["path"]).read_text())
        shown = dict(zip(table["columns"], table["data"][0], strict=True))
        assert [shown[key] for key in ("prompt", "chosen", "rejected", "completion") if key in shown] == last
        assert found["config"]["data"] == config
        if name == "x":
            assert (table["data"][1][-1], table["columns"][-1]) == ("yes", "completion")


def test_where_it_goes(tmp_path: Path) -> None:
    """The first run with tracking.wandb decides; its folder's name is the group where it has none."""
    output = tmp_path / "d.json"
    unnamed = {"tracking": {"wandb": {"mode": "disabled", "project": "p"}}}
    assert place_of({"runs/a": {}}, None, output) is None
    assert place_of({}, None, output) is None
    assert place_of({}, "online", output) == Place(tmp_path, "online", "align", None, "d")
    assert place_of({"runs/a": {}}, "offline", output) == Place(tmp_path, "offline", "align", "a", "d")
    assert place_of({"runs/a": {}, "runs/b": unnamed}, None, output) == Place(tmp_path, "disabled", "p", "b", "d")
    assert place_of({"runs/b": unnamed}, "offline", output) == Place(tmp_path, "offline", "p", "b", "d")


def test_disabled_makes_nothing_and_what_goes_wrong_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "d.json"
    assert send_evaluation(result(), [output], [], Place(tmp_path, "disabled")) is None
    assert list(tmp_path.iterdir()) == []
    with caplog.at_level(logging.WARNING):
        assert send_evaluation(result(), [output], [Image("t", "c", b"no image")], Place(tmp_path)) is None
        monkeypatch.setitem(sys.modules, "wandb", None)
        assert send_evaluation(result(), [output], [], Place(tmp_path)) is None
    first, second = (record.getMessage() for record in caplog.records)
    assert "W&B is left out for generation (UnidentifiedImageError" in first
    assert second == f"W&B is left out for generation (not installed); {output} is complete"
