"""The tutorial's code runs as it stands, block after block, and the loss in it is as short as it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from datasets import Dataset

from align.losses import LOSSES

PAGE = (Path(__file__).parent.parent / "docs" / "adding-a-loss.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def table_as_before():
    """The loss that the page enters is taken out again."""
    before = dict(LOSSES)
    yield
    LOSSES.clear()
    LOSSES.update(before)


def test_the_page_runs(tmp_path, monkeypatch, tiny_tokenizer, make_tiny_model, table_as_before, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "the inner", "chosen": " thing", "rejected": " cat"}] * 4
    page = {"model": make_tiny_model(), "tokenizer": tiny_tokenizer, "dataset": Dataset.from_list(rows)}
    for block in BLOCKS:
        exec(block, page)
    said = capsys.readouterr().out
    assert said.count("ok   brier_dpo") == 12
    assert "MISS" not in said
    assert page["trainer"].state.global_step == 2


def test_the_loss_is_under_twenty_lines():
    lines = [line for line in BLOCKS[0].splitlines() if line.strip()]
    assert "brier_dpo" in BLOCKS[0]
    assert len(lines) < 20


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", PAGE):
        assert (Path(__file__).parent.parent / "docs" / target).exists(), target
