"""The command line, called in this process."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from typer.testing import CliRunner, Result

from align.cli import app


@pytest.fixture
def align() -> Callable[..., Result]:
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])
