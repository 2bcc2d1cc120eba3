"""The page of methods is what the table of losses says, and the copy in the checkout is that page."""

from __future__ import annotations

import re
from pathlib import Path

from typer.testing import CliRunner

from align.cli import app
from align.losses import LOSSES
from align.losses.laws import LAWS
from align.reports.methods import methods_page

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
        assert len(cells) == 6
        assert info.paper.removeprefix("arXiv:") in cells[4]
        for law in info.laws.fails if info.laws else ():
            assert f"`{law}`" in re.search(rf"^- `{name}`: (.*)$", page, re.MULTILINE).group(1)
    assert all(f"- `{law}`: {statement}." in page for law, statement in LAWS.items())


def test_the_command_prints_it():
    result = CliRunner().invoke(app, ["recipes", "methods", "--markdown"])
    assert result.exit_code == 0
    assert result.stdout == methods_page()
