"""The command line, called in this process: a subprocess would import torch anew for every test."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from typer.testing import CliRunner, Result

from align.cli import app

Align = Callable[..., Result]


@pytest.fixture
def align() -> Align:
    """``align("recipes", "ls", input=None)``: the result has ``exit_code``, ``stdout`` and ``stderr``."""

    def run(*words: object, input: str | None = None) -> Result:
        return CliRunner().invoke(app, [str(word) for word in words], input=input)

    return run
