"""``report.html``: the run on one page that needs nothing but itself."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from align.tracking.files import write_text

from .facts import (
    REFERENCES,
    capitalise,
    commands,
    data_rows,
    filter_words,
    judge,
    method_name,
    model_name,
    notation,
    speed_rows,
    terms,
)
from .figures import evaluation_pictures, training_pictures
from .measures import headline, interval_words, measures
from .record import RunRecord, read_run
from .results import read_result, shown_result

STATUS = {
    "running": "This run has not ended, or was killed: what follows is what was on disk when the page was made.",
    "interrupted": "This run was interrupted: what follows is what it had done by then.",
    "failed": "This run failed: what follows is what it had done by then.",
}


def render_report(run: Path, results: Sequence[Path] = ()) -> Path:
    """Write ``report.html`` into a run folder; sections that the run did not come to say so.

    The page holds its styles, script and drawings, asks the network for nothing, and forbids the browser to. The same
    folder gives the same bytes.

    Args:
        run: a run folder, whatever its state.
        results: files of ``align eval``, to show too.

    Returns:
        The path of the page.

    Raises:
        AlignError: the folder is no run, or a file is broken.
    """
    record = read_run(run)
    further = [shown_result(read_result(path)) for path in results]
    target = run / "report.html"
    # Text that a model or a data set wrote may hold lone surrogates, which no encoding can write.
    write_text(target, _page(record, further).encode("utf-8", "replace").decode("utf-8"))
    return target


def html_environment() -> Environment:
    """Templates of pages: what they are given is text, and is escaped."""
    return Environment(
        loader=PackageLoader("align.reports", package_path=""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )


def _page(record: RunRecord, further: Sequence[Mapping[str, Any]]) -> str:
    environment = html_environment()
    environment.filters["decimals"] = decimals
    environment.filters["capitalise"] = capitalise
    script = asset("report.js")
    data = record.section("data")
    return environment.get_template("report.html.j2").render(
        title=f"{method_name(record.recipe)} on {model_name(record)}",
        css=Markup(asset("report.css")),
        js=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        status_note=STATUS.get(record.manifest.get("status", ""), ""),
        what=_what(record),
        headline=headline(record),
        intervals=interval_words(record),
        judge=judge(record),
        terms=terms(record.recipe),
        notation=notation(record.recipe),
        training_pictures=training_pictures(record),
        evaluation_pictures=evaluation_pictures(record.evals),
        nonfinite=_nonfinite(record),
        speed=speed_rows(record.section("speed")),
        measures=measures(record),
        annotators=_annotators(record),
        further=further,
        samples=[_sample(row) for row in record.samples],
        data=list(data),
        data_rows=data_rows(data),
        filtered=filter_words(record),
        faults=record.faults,
        commands=commands(record),
        recipe_text=record.recipe_text,
        provenance=_provenance(record),
    )


def asset(name: str) -> str:
    """Styles or script of the pages."""
    return files("align.reports").joinpath(name).read_text(encoding="utf-8")


def _what(record: RunRecord) -> list[tuple[str, str]]:
    """The header's facts; those that the run did not come to are left out."""
    model, data, timings = record.section("model"), record.section("data"), record.section("timings")
    found = [("Method", method_name(record.recipe)), ("Model", _model_words(record))]
    if kind := record.section("reference").get("kind"):
        found.append(("Reference", REFERENCES.get(kind, kind)))
    if name := record.section("annotator").get("name"):
        settings = record.recipe.get("online") or {}
        drawn = f", {settings['answers']} answers a prompt" if settings.get("answers") else ""
        mixed = f", of a mixture with {settings['mixture']:g} of the reference" if settings.get("mixture") else ""
        found.append(("Answers compared by", f"{name}{drawn}{mixed}"))
    for name, label in (("train", "Training data"), ("eval", "Held-out data")):
        if part := data.get(name):
            pairs = part.get("kept", part.get("pairs", part.get("completions", part.get("rows"))))
            found.append(
                (label, f"{part.get('source', '')}, {pairs:,} examples" if pairs is not None else part["source"])
            )
    steps = f"{record.last_step} steps" if record.metrics else ""
    spent = f"{duration(timings['train_seconds'])} of training" if timings.get("train_seconds") else ""
    if steps or spent:
        found.append(("Training", ", ".join(part for part in (steps, spent) if part)))
    if hardware := record.section("hardware"):
        found.append(("Machine", _machine_words(hardware, record.manifest.get("peak_rss_gb"))))
    if started := record.manifest.get("started"):
        found.append(("Started", _moment(started)))
    if resumed := record.manifest.get("resumed"):
        found.append(("Resumed", ", ".join(f"from step {r['from_step']}" for r in resumed)))
    if model.get("dtype_reason"):
        found.append(("Precision", str(model["dtype_reason"])))
    return found


def _model_words(record: RunRecord) -> str:
    model = record.section("model")
    words = model_name(record)
    if model.get("parameters"):
        words += f", {model['parameters'] / 1e6:,.1f} M parameters"
        words += f", {model['trainable'] / 1e6:,.1f} M trained" if model.get("trainable") else ""
    return words


def _machine_words(hardware: dict[str, Any], peak: float | None) -> str:
    what = ", ".join(hardware.get("gpus") or []) or f"{hardware.get('cpu')}, {hardware.get('cores')} cores"
    return f"{what}, {hardware.get('ram_gb')} GB of memory" + (f" ({peak} GB used at most)" if peak else "")


def _annotators(record: RunRecord) -> dict[str, Any]:
    """Of each annotator: whether new, judgements, what each model got right of them, and the weights of the groups."""
    suite = record.evals.get("pal", {})
    rows = suite.get("rows", [])
    weights = suite.get("settings", {}).get("weights", {})
    models = list(dict.fromkeys(name for row in rows for name in row if name not in ("annotator", "part", "n")))
    lines = [
        (
            row["annotator"],
            "known" if row["part"] == "seen" else "new",
            f"{row['n']:,}",
            *(f"{100 * row[name]:.1f} %" if name in row else "—" for name in models),
            " · ".join(f"{weight:.2f}" for weight in weights.get(row["annotator"], ())) or "—",
        )
        for row in rows
    ]
    return {"columns": ["Annotator", "In training", "Judgements", *models, "Groups' weights"], "lines": lines}


def _sample(row: dict[str, Any]) -> dict[str, Any]:
    before, after = row["before"]["reward"], row["after"]["reward"]
    change = "same" if before == after else "up" if after > before else "down"
    sides = {side: {"criteria": {}, **row[side]} for side in ("before", "after")}
    return {"prompt": row["prompt"], "change": change, **sides}


def _nonfinite(record: RunRecord) -> str:
    lost: dict[str, int] = {}
    for row in record.metrics:
        for name in row.get("nonfinite", []):
            lost[name] = lost.get(name, 0) + 1
    return ", ".join(f"{name} at {count} step{'s' if count > 1 else ''}" for name, count in lost.items())


def _provenance(record: RunRecord) -> list[tuple[str, str]]:
    manifest = record.manifest
    found = [("Align", manifest.get("align")), ("Status", manifest.get("status"))]
    found += [(name, _moment(manifest[name])) for name in ("started", "finished") if manifest.get(name)]
    if git := manifest.get("git"):
        found.append(("Commit", f"{git['commit']}{' with local changes' if git.get('dirty') else ''}"))
    found += [("Seed", manifest.get("seed")), ("Recipe hash", manifest.get("recipe_hash"))]
    found.append(("Model weights, sha256", record.section("model").get("weights_sha256")))
    found.append(("Reference weights, sha256", record.section("reference").get("weights_sha256")))
    found += [(f"Data, {name}, sha256", part.get("sha256")) for name, part in record.section("data").items()]
    found += [(name.replace("_", " ").capitalize(), value) for name, value in record.section("timings").items()]
    found += [
        (name.replace("_", " ").capitalize(), _listed(value)) for name, value in record.section("hardware").items()
    ]
    found += list(record.section("versions").items())
    if problem := record.section("wandb").get("error"):
        found.append(("Weights & Biases", f"left out: {problem}"))
    return [(name, str(value)) for name, value in found if value not in (None, "")]


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def decimals(value: float | None) -> str:
    """Two of them."""
    return "—" if value is None else f"{value:.2f}"


def _moment(iso: str) -> str:
    return iso.replace("T", " ").replace("+00:00", " UTC")


def duration(seconds: float) -> str:
    """``48 s``, ``6 min 12 s`` or ``2 h 5 min``."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
