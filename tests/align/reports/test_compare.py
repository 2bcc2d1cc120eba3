"""The page of several runs: what differs, numbers from the rows themselves, what it says where there is nothing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from align.cli import app
from align.errors import AlignError, ConfigError
from align.evals.calibration import calibration_suite
from align.evals.frontier import point
from align.evals.result import compared_result, suite_result
from align.evals.statistics import bootstrap_interval, comparisons
from align.reports.compare import render_comparison
from align.reports.eval_figures import result_images, result_pictures
from align.reports.report import render_report

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\ud83d{{ 7*7 }}"


class Page(HTMLParser):
    """Elements, texts of table rows by their first cell, and all text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.in_cell = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data

    def row(self, first: str) -> list[str]:
        return next(row for row in self.rows if row[0] == first)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture
def other_run(finished_run: Path, tmp_path: Path) -> Path:
    """The same run with beta 2 and other answers: all but the first three score 0.25 more and have two tokens less."""
    other = Path(shutil.copytree(finished_run, tmp_path / "other"))
    recipe = other / "config.resolved.yaml"
    recipe.write_text(recipe.read_text().replace("beta: 5.0", "beta: 2.0").replace("runs/quickstart", "runs/other"))
    path = other / "eval" / "generation.json"
    result = json.loads(path.read_text())
    for place, row in enumerate(result["rows"]):
        if place >= 3:
            row["after"] = {**row["after"], "text": f"Other: {row['after']['text']}"}
            row["after"]["reward"] += 0.25
            row["after"]["tokens"] -= 2
    path.write_text(json.dumps(result))
    return other


@pytest.fixture
def compared(finished_run: Path, other_run: Path, tmp_path: Path) -> Callable[..., Page]:
    def compare(*results: dict[str, Any]) -> Page:
        files = [tmp_path / f"{number}.json" for number in range(len(results))]
        for path, result in zip(files, results, strict=True):
            path.write_text(json.dumps(result))
        return Page(render_comparison([finished_run, other_run], files, tmp_path / "out" / "compare.html"))

    return compare


def test_what_differs(compared: Callable[..., Page]) -> None:
    """One key of the recipe; scores of 37 in 40 prompts by 0.25: 0.231 in the mean, clearly; nothing of the pairs."""
    page = compared()
    assert page.row("loss.beta") == ["loss.beta", "5.0", "2.0"]
    assert "Keys that differ; 16 others are the same" in page.text
    assert "Clopper-Pearson where a share is 0 or 100 %; jackknife of different n-grams" in page.text
    assert not any(row and row[0] == "output" for row in page.rows)
    assert page.row("training: source") == ["training: source", "align:quickstart/train", "align:quickstart/train"]
    assert not any(row and row[0].startswith("training: ties") for row in page.rows), "they do not differ"
    differences = {row[0]: row[1:] for row in page.rows if len(row) == 8}
    score = differences["Score of the answers"]
    assert score[:3] == ["other", "quickstart", "+0.231"]
    assert (score[4], score[6]) == ("40", "yes")
    assert differences["Answer length"][2] == "−1.9 tokens"
    accuracy = differences["Preference accuracy on held-out pairs"]
    assert (accuracy[2], accuracy[6]) == ("0.0 %", "no")
    win = page.row("Win rate against the model before training")
    assert win[-1] == "40"
    titles = [label.split(" by step")[0] for tag, a in page.tags if tag == "svg" and (label := a["aria-label"])]
    assert titles[:3] == ["Loss", "Accuracy", "Margin"]
    loss = next(a["aria-label"] for tag, a in page.tags if tag == "svg")
    assert loss is not None
    assert loss.count("at step 80") == 4
    assert "other, held-out:" in loss


def test_pairs_of_one_prompt_count_once(finished_run: Path, other_run: Path, tmp_path: Path) -> None:
    """Held-out pairs of which four have one prompt each: 10 are compared, not 40."""
    for run in (finished_run, other_run):
        path = run / "eval" / "displacement.json"
        found = json.loads(path.read_text())
        for number, row in enumerate(found["rows"]):
            row["group"] = number // 4
        path.write_text(json.dumps(found))
    page = Page(render_comparison([finished_run, other_run], [], tmp_path / "compare.html"))
    counts = {row[0]: row[5] for row in page.rows if len(row) == 8}
    assert counts["Log-prob change of chosen answers, per token"] == "10"
    assert counts["Preference accuracy on held-out pairs"] == "40"


def test_answers_side_by_side(compared: Callable[..., Page], finished_run: Path) -> None:
    page = compared()
    assert page.count("article") == 40
    facts = [json.loads(str(attrs["data-facts"])) for tag, attrs in page.tags if tag == "article"]
    rows = json.loads((finished_run / "eval" / "generation.json").read_text())["rows"]
    for place, (row, fact) in enumerate(zip(rows, facts, strict=True)):
        more = 0.25 if place >= 3 else 0.0
        gain = row["after"]["reward"] - row["before"]["reward"]
        assert fact["gains"] == pytest.approx([gain, gain + more])
        assert fact["lengths"] == [row["after"]["tokens"], row["after"]["tokens"] - 2 * (place >= 3)]
        assert fact["changed"] == [True, True]
    assert len(re.findall(r"Beforescore|Before\s*score", page.text)) == 40, "one baseline, which both runs share"


def generation(hostile: str = "") -> dict[str, Any]:
    """Two models and their baseline on three prompts."""
    scores = {"base": [0.0, 0.5, 1.0], "runs/a": [1.0, 0.5, 0.0], "runs/b": [1.0, 1.0, 1.0]}
    models = {}
    for name, values in scores.items():
        rows = [
            {"row_id": f"r{i}", "prompt": f"p{i}{hostile}", "text": f"{name} {i}", "tokens": i, "finished": True}
            | {"reward": value}
            for i, value in enumerate(values)
        ]
        metrics = {"reward": bootstrap_interval(values)}
        if name != "base":
            metrics["win_rate"] = bootstrap_interval(np.array(values) > scores["base"])
        models[name + hostile] = suite_result("generation", metrics, rows, {})
    table = comparisons({name + hostile: {"reward": v} for name, v in scores.items()}, against="base" + hostile)
    return compared_result("generation", models, table, {"source": f"d{hostile}"}, "base" + hostile, {})


def calibration() -> dict[str, Any]:
    rng = torch.Generator().manual_seed(0)
    one = calibration_suite(torch.randn(60, generator=rng) + 1, [str(i) for i in range(60)], bins=4)
    return compared_result("calibration", {"runs/a": one, "runs/b": one}, [], {"source": "d"}, None, {})


def preference() -> dict[str, Any]:
    metrics = {name: bootstrap_interval([1.0, 0.0, 1.0]) for name in ("accuracy", "accuracy/easy", "ties/easy")}
    one = suite_result("preference", metrics, [{"row_id": str(i)} for i in range(3)], {})
    return compared_result("preference", {"m:f": one, "m:g": one}, [], {"source": "d"}, None, {"by": "subset"})


def frontier() -> dict[str, Any]:
    """A reference with best-of-n, and a run with a checkpoint before it."""

    def at(kind: str, label: str, reward: float, kl: float, **more: Any) -> dict[str, Any]:
        rows = [{"row_id": f"r{i}", "reward": reward + i, "kl": kl + i, "tokens": 9} for i in range(3)]
        return point(kind, label, rows, "k1", **more)

    bound = {"kl_bound": {"value": 1.4, "how": "bound"}}
    points = {
        "base": [at("reference", "base", 0, -1), at("best-of-n", "best of 8", 2, 0.2, **bound)],
        "runs/a": [at("checkpoint", "runs/a/checkpoint-2", 1, 1), at("run", "runs/a", 2, 3)],
    }
    models = {name: {"n": 3, "metrics": {}, "points": own} for name, own in points.items()}
    return compared_result("frontier", models, [], {"source": "d"}, "base", {}, notes=[])


def test_a_frontier(compared: Callable[..., Page]) -> None:
    """A checkpoint and its run are one line; the point of best-of-n also stands at its bound."""
    page = compared(frontier())
    (label,) = (
        a["aria-label"] for tag, a in page.tags if tag == "svg" and str(a["aria-label"]).startswith("Frontier")
    )
    assert label == (
        "Frontier. reward by KL, nats per answer. reference: 1 at 0. best-of-n: 3 at 1.2. best-of-n, bound: 3 at 1.4. "
        "training: 2 at 2, 3 at 4."
    )
    assert page.row("best of 8") == ["best of 8", "3.0002.000 to 4.000", "1.2000.200 to 2.200", "1.400", "9", "3"]


def test_results_of_align_eval(compared: Callable[..., Page]) -> None:
    """A result of generation brings its own answers: all of its models are asked the same."""
    page = compared(generation(), calibration(), preference())
    titles = [re.split(r"[.,]| by step", str(a["aria-label"]))[0] for tag, a in page.tags if tag == "svg"]
    assert titles[-8:] == [
        *("Win rate", "Score by model", "Scores of the answers", "Answer length"),
        *("Reliability", "Calibration error", "Accuracy", "Accuracy by subset"),
    ]
    assert page.row("easy") == ["easy", *["0.6670.000 to 1.000"] * 2, "3"]
    lines = [row for row in page.rows if len(row) == 8 and row[0] == "reward"]
    assert [row[1:4] for row in lines] == [["a", "base", "0.000"], ["b", "base", "+0.500"]]
    assert page.count("article") == 3
    assert "runs/a 0" in page.text
    facts = [json.loads(str(attrs["data-facts"]))["gains"] for tag, attrs in page.tags if tag == "article"]
    assert facts == [[1.0, 1.0], [0.0, 0.5], [-1.0, 0.0]]


def test_the_page_of_one_run_shows_them_too(finished_run: Path, tmp_path: Path) -> None:
    before = Page(render_report(finished_run))
    (tmp_path / "c.json").write_text(json.dumps(calibration()))
    page = Page(render_report(finished_run, [tmp_path / "c.json"]))
    assert page.count("svg") == before.count("svg") + 2
    assert "Further evaluations" in page.text
    assert "Further evaluations" not in before.text


def test_text_of_others_is_text(compared: Callable[..., Page], other_run: Path) -> None:
    clean = compared(generation())
    manifest = json.loads((other_run / "manifest.json").read_text())
    manifest["model"]["name"] = manifest["data"]["train"]["source"] = HOSTILE
    (other_run / "manifest.json").write_text(json.dumps(manifest))
    recipe = other_run / "config.resolved.yaml"
    recipe.write_text(recipe.read_text() + f"note: {json.dumps(HOSTILE)}\n")
    page = compared(generation(HOSTILE))
    for tag in ("script", "img", "svg", "article", "form", "a"):
        assert page.count(tag) == clean.count(tag), tag
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert "{{ 7*7 }}" in page.text
    assert not any("src" in attrs for _, attrs in page.tags)


def test_runs_that_did_nothing(make_run: Callable[..., Path], tmp_path: Path) -> None:
    runs = [make_run(name="one"), make_run(name="two")]
    page = Page(render_comparison(runs, [], tmp_path / "compare.html"))
    for words in ("None of the runs", "recipes are the same", "No run came", "No step", "No evaluation", "No prompt"):
        assert words in page.text
    assert page.text.count("This run was interrupted") == 2


def test_the_same_runs_give_the_same_bytes(finished_run: Path, other_run: Path, tmp_path: Path) -> None:
    pages = [render_comparison([finished_run, other_run], [], tmp_path / name).read_bytes() for name in ("a", "b")]
    assert pages[0] == pages[1]


def test_what_is_refused(finished_run: Path, other_run: Path, tmp_path: Path) -> None:
    target = tmp_path / "compare.html"
    for runs in ([finished_run], [finished_run] * 2, [finished_run, *(tmp_path / str(i) for i in range(6))]):
        with pytest.raises(ConfigError):
            render_comparison(runs, [], target)
    for content, message in (
        (None, "cannot be read"),
        ("{", "not JSON"),
        ('{"a": 1}', "no result"),
        ('{"suite": "preference", "schema": 99, "n": 1, "metrics": {}}', "of schema 99, and this reads 1"),
        ('{"suite": "preference", "schema": 1, "n": 1}', "it has no metrics"),
    ):
        path = tmp_path / "r.json"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content)
        with pytest.raises(AlignError, match=message):
            render_comparison([finished_run, other_run], [path], target)
    assert not target.exists()


def test_the_command(finished_run: Path, other_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    several = CliRunner().invoke(app, ["report", str(finished_run), str(other_run)])
    assert (several.exit_code, several.stdout) == (0, "compare.html\n")
    assert (tmp_path / "compare.html").stat().st_size > 0
    one = CliRunner().invoke(app, ["report", str(finished_run), "-o", "x.html"])
    assert (one.exit_code, "one run's page is its report.html" in one.stderr) == (2, True)


def test_images_are_those_of_the_page() -> None:
    for result in (generation(), calibration(), preference(), frontier()):
        images = result_images(result)
        assert [image.title for image in images] == [picture.title for picture in result_pictures(result)] != []
        assert all(image.png.startswith(b"\x89PNG") for image in images)
