"""The page's text: what it shows, what it escapes, and what it says where there is nothing to show."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from transformers import Trainer, TrainingArguments

from align.errors import AlignError
from align.reports.drawing import Series, bars, curve, histogram
from align.reports.report import render_report
from align.tracking.callback import tracked
from align.tracking.metrics import read_metrics
from align.tracking.run_folder import RunFolder

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;\u202e\ud83d{{ 7*7 }}"


class Page(HTMLParser):
    """Elements, their ids and their text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def page_of(run: Path) -> Page:
    return Page(render_report(run).read_text(encoding="utf-8"))


def test_a_finished_run_shows_every_part(finished_run):
    page = page_of(finished_run)
    evaluation = json.loads((finished_run / "eval" / "generation.json").read_text())
    win = evaluation["metrics"]["win_rate"]
    assert f"{100 * win['value']:.1f} %" in page.text
    assert f"{100 * win['low']:.1f} to {100 * win['high']:.1f}" in page.text
    assert "the interval lies above 50 %" in page.text
    titles = [
        attrs["aria-label"].split(" by step")[0].split(", hist")[0].split(".")[0]
        for tag, attrs in page.tags
        if tag == "svg"
    ]
    assert titles == [
        *("Loss", "Accuracy", "Margin", "Log-prob change", "Chosen answers that fell", "Largest fall"),
        *("Gradient norm", "Rewards of held-out pairs", "Log-prob change, held-out"),
        *("Tokens that gained, held-out", "Scores of the answers", "Answer length"),
    ]
    assert page.count("article") == 20
    assert "-log sigma(beta (r_w/n_w - r_l/n_l))" in page.text
    assert ("a", {"href": "https://arxiv.org/abs/2407.15229"}) in page.tags
    assert "align generate --model runs/quickstart --chat" in page.text
    assert "grad_norm at 1 step." in page.text
    assert "80 steps, 6 min 12 s of training" in page.text
    assert "rows set aside" in page.text
    assert "1,902 tokens, over 1,024" in page.text  # two rows, one reason: numbers do not make a reason another
    assert "2,001 tokens" not in page.text
    assert "This run" not in page.text


def test_speed_says_what_ran_and_what_it_took(finished_run):
    """Keys that the page does not know are shown as they are; a run that knows nothing has no table."""
    for words in (
        *("Padding, of all positions12.3 %", "Threads2: one for each of 2 cores", "estimated3.3 GB", "training3.5 GB"),
        "Gradient checkpointingoff: 2.4 GB are needed, and 20.1 GB of this machine are free",
        "Referencelog-probs of 300 rows read, of 340 computed; 48.2 s before the first step",
    ):
        assert words in page_of(finished_run).text
    path = finished_run / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "speed": {"rows": "separate: it is so", "newer": "<b>"}}))
    page = page_of(finished_run)
    assert "Rowsseparate: it is so" in page.text
    assert "newer<b>" in page.text
    path.write_text(json.dumps({key: value for key, value in manifest.items() if key != "speed"}))
    assert "Speed" not in page_of(finished_run).text


def test_ids_are_unique_and_every_reference_to_one_is_kept(finished_run):
    text = render_report(finished_run).read_text(encoding="utf-8")
    page = Page(text)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) > 20
    used = set(re.findall(r'(?:xlink:href="#|url\(#|aria-labelledby=")([\w-]+)', text))
    assert used <= set(ids)


def test_the_page_points_at_nothing_that_a_browser_would_load(finished_run):
    page = page_of(finished_run)
    assert [attrs["href"] for tag, attrs in page.tags if tag == "link"] == ["data:,"]
    assert not any("src" in attrs or "srcset" in attrs for _, attrs in page.tags)
    assert not re.search(r"@import|url\((?!#)", render_report(finished_run).read_text(encoding="utf-8"))


def test_text_of_models_and_data_is_text(finished_run):
    """Each place where words of others are shown gets hostile ones; the page keeps its elements."""
    clean = page_of(finished_run)
    samples = finished_run / "samples.jsonl"
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    rows[0]["prompt"] += HOSTILE
    rows[0]["before"]["text"] = rows[0]["after"]["text"] = HOSTILE
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (finished_run / "config.resolved.yaml").open("a") as recipe:
        recipe.write("# <script>alert(1)</script>\n")
    displacement = finished_run / "eval" / "displacement.json"
    result = json.loads(displacement.read_text())
    result["gained"][0]["token"] = HOSTILE
    displacement.write_text(json.dumps(result))
    manifest = json.loads((finished_run / "manifest.json").read_text())
    manifest["model"]["name"] = manifest["data"]["train"]["source"] = manifest["hardware"]["cpu"] = HOSTILE
    (finished_run / "manifest.json").write_text(json.dumps(manifest))
    (finished_run / "rejected_rows.jsonl").write_text(
        json.dumps({"source": HOSTILE, "row": 1, "field": HOSTILE, "reason": HOSTILE}) + "\n"
    )
    page = page_of(finished_run)
    for tag in ("script", "img", "svg", "article", "form", "a"):
        assert page.count(tag) == clean.count(tag), tag
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert page.text.count("<script>alert(1)</script>") >= 8
    assert "{{ 7*7 }}" in page.text
    assert "?{{" in page.text  # the lone surrogate, which UTF-8 cannot hold


def test_scores_by_criterion_are_shown_where_the_samples_have_them(finished_run):
    assert "brevity" not in page_of(finished_run).text
    samples = finished_run / "samples.jsonl"
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    rows[3]["after"]["criteria"] = {"brevity": 0.25, "on task": 1.0}
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "brevity 0.25 · on task 1.00" in page_of(finished_run).text


def test_the_same_folder_gives_the_same_bytes(finished_run):
    first = render_report(finished_run).read_bytes()
    (finished_run / "report.html").unlink()
    assert render_report(finished_run).read_bytes() == first


def test_a_run_that_did_nothing_says_so_in_every_section(make_run):
    page = page_of(make_run())
    assert [tag for tag, attrs in page.tags if tag in ("svg", "table", "article")] == ["table"]  # the manifest's
    assert "This run was interrupted" in page.text
    for words in (
        "Nothing was evaluated",
        "No step was logged",
        "No evaluation",
        "No answers",
        "before its data was read",
    ):
        assert words in page.text


def test_a_killed_run_without_a_recipe_still_has_a_page(make_run):
    path = make_run()
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "status": "running"}))
    (path / "config.resolved.yaml").unlink()
    page = page_of(path)
    assert "or was killed" in page.text
    assert "unknown method on unknown model" in page.text


def test_combined_losses_and_sft_are_described(make_run):
    combined = (
        "losses: [{name: dpo, weight: 0.8, beta: 0.1}, {name: sft, weight: 0.2}]\nmodel: {name: m}\noutput: runs/a\n"
    )
    page = page_of(make_run(combined, name="combined"))
    assert "0.8 dpo + 0.2 sft on m" in page.text
    assert page.text.count("weight 0.") == 2
    assert ("a", {"href": "https://arxiv.org/abs/2305.18290"}) in page.tags
    page = page_of(make_run("method: sft\nmodel: {name: m}\noutput: runs/b\n", name="sft"))
    assert "-log pi(answer | prompt)" in page.text


def test_a_real_training_run_has_its_curves(tmp_path, make_tiny_model):
    with RunFolder(tmp_path / "run") as run:
        run.open_or_resume("a" * 64)
        rows = [{"input_ids": [1, 2, 3, index], "labels": [1, 2, 3, index]} for index in range(8)]
        arguments = TrainingArguments(
            output_dir=str(run.path), max_steps=3, logging_steps=1, report_to=[], use_cpu=True, save_strategy="no"
        )
        trainer = Trainer(model=make_tiny_model(), args=arguments, train_dataset=rows)
        with tracked(trainer, run):
            trainer.train()
    logged = read_metrics(run.metrics_path)
    page = page_of(run.path)
    labels = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert labels[0] == (
        f"Loss by step. training: {logged[0]['loss']:.4g} at step 1, {logged[2]['loss']:.4g} at step 3."
    )
    assert labels[1].startswith("Gradient norm by step.")


def test_broken_files_are_named(finished_run, tmp_path):
    path = finished_run / "eval" / "generation.json"
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(AlignError, match=r"eval/generation\.json: not JSON"):
        render_report(finished_run)
    with pytest.raises(AlignError, match="does not exist"):
        render_report(tmp_path / "nowhere")


def test_a_drawing_takes_its_colours_from_the_page_and_names_its_numbers():
    picture = curve(
        "Loss", "", "", [Series("training", [0.7, float("nan"), 0.5], [1, 2, 3]), Series("held-out", [0.6], [3])]
    )
    assert "training: 0.7 at step 1, 0.5 at step 3. held-out: 0.6 at step 3." in picture.svg
    assert "var(--first)" in picture.svg
    assert "var(--second)" in picture.svg
    colours = set(re.findall(r"#[0-9a-f]{6}", picture.svg))
    assert colours == set(), "a fixed colour is unreadable on one of the two pages"
    assert "<g id" not in picture.svg
    assert "<style" not in picture.svg


def test_bars_name_both_values_and_begin_at_the_top():
    """The first of the names is the first to be read: its label stands above the other's."""
    picture = bars(
        "Gain", "probability", "", ["'I'", "'$<'"], [Series("before", [0.1, 0.2]), Series("after", [0.3, 0.25])]
    )
    assert "Gain. &#39;I&#39;: before 0.1, after 0.3. &#39;$&lt;&#39;: before 0.2, after 0.25." in picture.svg
    first, second = (float(re.search(rf' y="([\d.]+)"[^>]*>{name}<', picture.svg)[1]) for name in ("'I'", r"'\$&lt;'"))
    assert first < second


def test_a_histogram_counts_every_value_also_when_they_are_all_the_same():
    """Four equal values make one bin with a bar of four: the axis reaches 4."""
    picture = histogram("Scores", "score", "", [Series("before", [1.0] * 4), Series("after", [1.0] * 4)])
    assert "before: mean 1, from 1 to 1." in picture.svg
    assert ">4</text>" in picture.svg
    empty = histogram("Scores", "score", "", [Series("before", []), Series("after", [])])
    assert "mean" not in empty.svg
