"""The study's windows are the paper's."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

window = runpy.run_path(str(Path(__file__).with_name("ches_windows.py")))["window"]


@pytest.mark.parametrize(
    ("rows", "size", "quantile", "expected"),
    [
        (10, 4, 0.0, (0, 4)),
        (10, 4, 0.25, (0, 4)),
        (10, 4, 0.5, (2, 6)),
        (10, 4, 0.75, (5, 9)),
        (10, 4, 1.0, (6, 10)),
        (374, 19, 0.0, (0, 19)),
        (3, 5, 0.5, (0, 3)),
    ],
)
def test_windows_of_the_paper(rows: int, size: int, quantile: float, expected: tuple[int, int]) -> None:
    """``i = round(q (N - 1))``, ``[i - n // 2, i - n // 2 + n)``, moved into [0, N]."""
    assert window(rows, size, quantile) == expected
