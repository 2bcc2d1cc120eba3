"""The tutorial's code runs as it stands, block after block, and the loss in it is as short as it says."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from align.losses import PairLogps, SequenceLogps

PAGE = (Path(__file__).parent.parent / "docs" / "adding-a-loss.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_page_runs(tmp_path, monkeypatch, table_as_before, capsys):
    monkeypatch.chdir(tmp_path)
    page = {}  # nothing beside what the page itself defines
    for block in BLOCKS:
        exec(block, page)
    said = capsys.readouterr().out
    assert said.count("ok   brier_dpo") == 12
    assert "MISS" not in said
    assert page["trainer"].state.global_step == 2
    assert page["trainer"].train_dataset["preference"] == pytest.approx([1.0, 1.0, 0.9, 0.7])
    # Log-ratios ln 3 and 0 at beta 1: the chosen answer has 3/4, and 0.9 (1/4)^2 + 0.1 (3/4)^2 = 0.1125.
    policy, reference = (PairLogps(one_token(total), one_token(0.0)) for total in (math.log(3), 0.0))
    out = page["brier_dpo"](policy, reference, torch.tensor([0.9]), beta=1.0)
    assert out.loss.item() == pytest.approx(0.1125)


def one_token(total: float) -> SequenceLogps:
    return SequenceLogps(total=torch.tensor([total - 5]), length=torch.ones(1))


def test_the_loss_is_under_twenty_lines():
    lines = [line for line in BLOCKS[0].splitlines() if line.strip()]
    assert "brier_dpo" in BLOCKS[0]
    assert len(lines) < 20


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", PAGE):
        assert (Path(__file__).parent.parent / "docs" / target).exists(), target
