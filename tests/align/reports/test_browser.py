"""The page in a real browser: it renders, its filter works, nothing complains, and nothing leaves the machine."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from align.reports.compare import render_comparison
from align.reports.report import render_report

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-extensions"),
    "--host-resolver-rules=MAP * ~NOTFOUND",  # the browser's own calls home find nobody
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-default-apps"),
    *("--enable-logging=stderr", "--v=0", "--virtual-time-budget=3000", "--dump-dom"),
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium")

USE_FILTER = """
<script>
addEventListener("load", () => {
  const visible = () => [...document.querySelectorAll(".sample")].filter((s) => s.checkVisibility()).length;
  const type = (id, value) => {
    const field = document.getElementById(id);
    field.value = value;
    field.dispatchEvent(new Event("input", { bubbles: true }));
    return visible();
  };
  const found = [visible(), type("find", "SOURDOUGH"), type("find", "no such word"), type("find", "")];
  const counts = [...found, type("change", "down")];
  document.body.dataset.counts = counts.join();
});
</script>
"""


USE_COMPARISON = """
<script>
addEventListener("load", () => {
  const visible = () => [...document.querySelectorAll(".sample")].filter((s) => s.checkVisibility());
  const type = (id, value) => {
    const field = document.getElementById(id);
    field.value = value;
    field.dispatchEvent(new Event("input", { bubbles: true }));
  };
  const place = () => visible().map((s) => Number(s.querySelector(".index").textContent));
  const seen = {};
  const look = (name, ...changes) => {
    for (const [id, value] of changes) type(id, value);
    seen[name] = place();
  };
  look("all");
  look("found", ["find", "SOURDOUGH"]);
  look("won", ["find", ""], ["outcome", "won"], ["who", "1"]);
  look("lost", ["outcome", "lost"]);
  look("changed", ["outcome", "changed"], ["who", "0"]);
  look("best first", ["outcome", ""], ["who", "1"], ["order", "scores-1"]);
  look("shortest first", ["order", "lengths1"]);
  look("again", ["order", "data"]);
  seen.count = document.getElementById("shown").value;
  document.body.dataset.seen = JSON.stringify(seen);
});
</script>
"""
PHONE = """<body><iframe src="%s" width="360" height="800"></iframe><script>
addEventListener("load", () => {
  const page = document.querySelector("iframe").contentDocument.documentElement;
  const wide = [...page.querySelectorAll("main *")].filter((e) => !e.closest(".scroll, svg, pre, .formula, details"))
    .filter((e) => e.getBoundingClientRect().right > 360.5).map((e) => e.outerHTML.slice(0, 60));
  document.body.dataset.width = `${page.scrollWidth} of ${page.clientWidth}`;
  document.body.dataset.wide = JSON.stringify(wide);
});</script>"""
WIDE = """<body><iframe src="" width="1300" height="800"></iframe><script>
addEventListener("load", () => {
  const page = document.querySelector("iframe").contentDocument;
  const widths = [...page.querySelectorAll("figure")].map((e) => Math.round(e.getBoundingClientRect().width));
  document.body.dataset.widths = JSON.stringify(widths);
});</script>"""
WITHOUT_POLICY = r'<meta http-equiv="Content-Security-Policy"[^>]*>'


@dataclass
class Visit:
    """What the browser made of a page."""

    dom: str
    console: list[str]
    hosts: set[str]


def visit(page: Path, scratch: Path) -> Visit:
    """Open a page in a browser with an empty profile."""
    net_log = scratch / "net.json"
    done = subprocess.run(
        [str(CHROMIUM), *FLAGS, f"--user-data-dir={scratch / 'profile'}", f"--log-net-log={net_log}", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return Visit(
        dom=done.stdout,
        console=re.findall(r"CONSOLE[:(]\S+\] (.*)", done.stderr),
        hosts=requested_hosts(net_log.read_text(encoding="utf-8")),
    )


def requested_hosts(log: str) -> set[str]:
    """Hosts that the page began a request for. The browser's own requests (updates, time) come from no origin."""
    params = [event["params"] for event in json.loads(log)["events"] if "url" in event.get("params", {})]
    urls = [urlsplit(p["url"]) for p in params if p.get("initiator", "not an origin") != "not an origin"]
    return {url.netloc for url in urls if url.scheme not in ("file", "data", "blob")}


@needs_chromium
def test_the_page_renders_in_silence(finished_run, tmp_path):
    seen = visit(render_report(finished_run), tmp_path)
    assert seen.console == []
    assert seen.hosts == set()
    assert seen.dom.count("<article") == 20
    assert seen.dom.count("<svg") == 12
    assert "20 of 20 shown" in seen.dom, "the filter's script did not run"


@needs_chromium
def test_the_filter_hides_what_does_not_match(finished_run, tmp_path):
    """A script that types into the boxes stands in for the reader; the page's policy is taken out to let it run."""
    page = render_report(finished_run)
    rows = [json.loads(line) for line in (finished_run / "samples.jsonl").read_text().splitlines()]
    worse = sum(row["after"]["reward"] < row["before"]["reward"] for row in rows)
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    page.write_text(text.replace("</body>", USE_FILTER + "</body>"), encoding="utf-8")
    assert f'data-counts="20,4,0,20,{worse}"' in visit(page, tmp_path).dom
    assert 0 < worse < 20


@needs_chromium
def test_a_broken_page_would_be_caught(finished_run, tmp_path):
    """Console errors and requests are seen where there are some: the test above is able to fail."""
    page = render_report(finished_run)
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    bad = '<script>console.error("broken on purpose")</script><img src="http://reports.invalid/pixel.png">'
    page.write_text(text.replace("</body>", bad + "</body>"), encoding="utf-8")
    seen = visit(page, tmp_path)
    assert any("broken on purpose" in line for line in seen.console)
    assert "reports.invalid" in seen.hosts


@needs_chromium
def test_the_policy_of_the_page_stops_a_script_and_a_request_that_got_in(finished_run, tmp_path):
    """A script and a picture in the page as it is are refused by the browser: a second wall behind the escaping."""
    page = render_report(finished_run)
    bad = '<script>document.title = "taken over"</script><img src="http://reports.invalid/pixel.png">'
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", bad + "</body>"), encoding="utf-8")
    seen = visit(page, tmp_path)
    assert seen.hosts == set()
    assert "<title>taken over" not in seen.dom
    assert sum("Content Security Policy" in line for line in seen.console) >= 2


@pytest.fixture
def comparison(finished_run, tmp_path) -> Path:
    """Two runs and a result of align eval; the second run's answers are the first one's turned round."""
    other = Path(shutil.copytree(finished_run, tmp_path / "other"))
    path = other / "eval" / "generation.json"
    result = json.loads(path.read_text())
    for row in result["rows"]:
        row["after"] = {**row["after"], "reward": 1 - row["after"]["reward"]}
    path.write_text(json.dumps(result))
    kept = [finished_run / "eval" / f"{name}.json" for name in ("preference", "displacement")]
    return render_comparison([finished_run, other], kept, tmp_path / "compare.html")


@needs_chromium
def test_the_comparison_renders_in_silence(comparison, tmp_path):
    seen = visit(comparison, tmp_path)
    assert (seen.console, seen.hosts) == ([], set())
    assert "40 of 40 shown" in seen.dom
    assert seen.dom.count("<article") == 40


@needs_chromium
def test_answers_are_found_filtered_and_sorted(comparison, tmp_path):
    rows = json.loads((tmp_path / "other" / "eval" / "generation.json").read_text())["rows"]
    text = re.sub(WITHOUT_POLICY, "", comparison.read_text(encoding="utf-8"))
    comparison.write_text(text.replace("</body>", USE_COMPARISON + "</body>"), encoding="utf-8")
    (found,) = re.findall(r'data-seen="([^"]*)"', visit(comparison, tmp_path).dom)
    seen = json.loads(html.unescape(found))
    gains = [row["after"]["reward"] - row["before"]["reward"] for row in rows]
    every = list(range(1, 41))
    assert seen["all"] == seen["again"] == seen["changed"] == every
    assert seen["count"] == "40 of 40 shown"
    assert seen["found"] == [place for place in every if "sourdough" in rows[place - 1]["prompt"]]
    assert seen["won"] == [place for place in every if gains[place - 1] > 0]
    assert seen["lost"] == [place for place in every if gains[place - 1] < 0]
    assert 0 < len(seen["won"]) < 40
    assert seen["best first"] == sorted(every, key=lambda place: -rows[place - 1]["after"]["reward"])
    assert seen["shortest first"] == sorted(every, key=lambda place: rows[place - 1]["after"]["tokens"])


@needs_chromium
def test_a_picture_alone_is_no_larger_than_others(comparison, tmp_path):
    """On a wide page, where the pictures of a result stand in columns, a single one keeps the width of a column."""
    text = re.sub(WITHOUT_POLICY, "", comparison.read_text(encoding="utf-8"))
    alone = re.sub(r"(<figure.*?</figure>)(.*?</figure>)+", r"\1", text, count=1, flags=re.DOTALL)
    widths = []
    for page in (text, alone):
        frame = tmp_path / "wide.html"
        frame.write_text(WIDE.replace('src=""', f'srcdoc="{html.escape(page, quote=True)}"'), encoding="utf-8")
        (found,) = re.findall(r'data-widths="([^"]*)"', visit(frame, tmp_path).dom)
        widths.append(json.loads(found))
    assert len(set(widths[0])) == 1
    assert widths[1][0] == widths[0][0] < 700


@needs_chromium
def test_pages_fit_a_phone(comparison, finished_run, tmp_path):
    """At 360 px neither page can be moved sideways: what is wide scrolls inside."""
    for page in (comparison, render_report(finished_run)):
        text = re.sub(WITHOUT_POLICY, "", page.read_text(encoding="utf-8"))
        escaped = html.escape(text, quote=True)
        frame = tmp_path / "phone.html"
        frame.write_text((PHONE % "").replace('src=""', f'srcdoc="{escaped}"'), encoding="utf-8")
        dom = visit(frame, tmp_path).dom
        assert re.findall(r'data-width="([^"]*)"', dom) in (["360 of 360"], ["345 of 345"])
        assert re.findall(r'data-wide="([^"]*)"', dom) == ["[]"]
