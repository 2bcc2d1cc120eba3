"""The serving bench in short, on the packaged model: every way answers, and the tables have them all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.serving


def test_the_short_form_runs_and_fills_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    from serving_transfer import SETTINGS
    from serving_ways import WAYS

    command = [sys.executable, str(HERE / "serving.py"), "--quick", "--only", "offline", "transfer", "rows"]
    command += ["--kept", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "page.md")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:]
    found = [json.loads(line) for line in (tmp_path / "quick.jsonl").read_text().splitlines()]
    assert [row["of"] for row in found if "about" in row] == ["offline", "transfer", "rows"]
    rows = [row for row in found if "about" not in row]
    drawn = {row["way"]: row for row in rows if row["of"] == "offline"}
    for name, way in WAYS.items():
        assert drawn[name]["tokens"] == 2 * 12 * way.particles
        assert drawn[name]["reasons"] == [] or "record" in name or "JSON" in name  # for those it is too short
        assert drawn[name]["evaluations"] > 0 or way.plain is not None
    chosen = {row["way"]: row for row in rows if row["of"] == "transfer"}
    assert chosen.keys() == {"naive", *SETTINGS}
    assert all(row["rewards"] > 0 and row["tokens"] > 0 for name, row in chosen.items() if name != "naive")
    spared = chosen["the same, known range of the reward"]["rollout_tokens"]
    assert spared < chosen["10 candidates, 20 tokens"]["rollout_tokens"]
    assert all(0 < row["ms"] < 100 for row in rows if row["of"] == "rows")
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in page for name in (*WAYS, *SETTINGS))
