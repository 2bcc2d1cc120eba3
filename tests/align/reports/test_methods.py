"""The page of methods is what the table of losses says, and the copy in the checkout is that page."""

from __future__ import annotations

import re
from pathlib import Path

from typer.testing import CliRunner

from align.cli import app
from align.losses import LOSSES
from align.losses.catalogue import find_loss
from align.losses.laws import LAWS
from align.reports.methods import methods_page, settings_of, soft_labels_of

PAGE = Path(__file__).parents[3] / "docs" / "methods.md"


def test_the_committed_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == methods_page(), "align recipes methods --markdown > docs/methods.md"


def test_one_row_a_loss_with_its_facts():
    """Unescaped bars would make more cells than columns; a law that a loss breaks is named under its table."""
    page = methods_page()
    rows = {re.match(r"\| `(\w+)`", line).group(1): line for line in page.splitlines() if line.startswith("| `")}
    assert set(rows) == set(LOSSES)
    for name, info in LOSSES.items():
        cells = re.split(r"(?<!\\)\|", rows[name])[1:-1]
        assert len(cells) == 8
        assert info.paper.removeprefix("arXiv:") in cells[6]
        assert (cells[3].strip() == "no") == (not info.soft)
        assert re.findall(r"`(\w+)` ", cells[5]) == [setting for setting in info.parameters if setting != "beta"]
        for law in info.laws.fails if info.laws else ():
            assert f"`{law}`" in re.search(rf"^- `{name}`: (.*)$", page, re.MULTILINE).group(1)
    assert all(f"- `{law}`: {statement}." in page for law, statement in LAWS.items())


def test_settings_stand_with_their_defaults():
    """As a recipe writes them: numbers without a trailing .0, truth in lower case."""
    found = {name: settings_of(find_loss(name)) for name in ("dpop", "simpo", "scaled_bradley_terry", "logic", "ipo")}
    assert found["dpop"] == [("penalty", "50")]
    assert found["simpo"] == [("gamma", "1")]
    assert found["scaled_bradley_terry"] == [("normalize_weights", "false")]
    assert found["logic"][:2] == [("logic", "(to be given)"), ("where", "true")]
    assert found["ipo"] == []


def test_soft_labels_are_taken_or_needed():
    """A thumb is of one answer; Nash-MD's gradient is of the preference itself."""
    words = {name: soft_labels_of(find_loss(name)) for name in ("dpo", "nash_md_pg", "bradley_terry", "kto")}
    assert words == {"dpo": "yes", "nash_md_pg": "always", "bradley_terry": "yes", "kto": "no"}


def test_the_command_prints_it():
    result = CliRunner().invoke(app, ["recipes", "methods", "--markdown"])
    assert result.exit_code == 0
    assert result.stdout == methods_page()
