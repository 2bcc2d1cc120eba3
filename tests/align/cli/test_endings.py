"""How a command ends: messages and exit codes."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from align.cli import CommandLine
from align.cli.train import _interrupted
from align.errors import AlignError, ConfigError

Align = Callable[..., Result]
HELP = """
import sys
from align.cli import main
heavy = "torch transformers trl datasets pydantic omegaconf matplotlib pandas numpy yaml".split()
sys.argv = ["align", "--help"]
try:
    main()
finally:
    print([name for name in heavy if name in sys.modules])
"""


def ending(error: BaseException) -> Result:
    app = typer.Typer(cls=CommandLine)

    @app.callback()
    def options() -> None: ...

    @app.command()
    def fall() -> None:
        raise error

    return CliRunner().invoke(app, ["fall"])


def seconds_of(code: str) -> tuple[float, str]:
    """Processor time of a Python of its own, the best of three, and what it printed."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(seconds), done.stdout


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    """Half a second is the promise; of a machine that is busy, 2.5 times what its libraries for the terminal take."""
    seconds, printed = seconds_of(HELP)
    *shown, heavy = printed.splitlines()
    assert all(name in "".join(shown) for name in ("train", "validate", "generate", "recipes", "report", "doctor"))
    assert heavy == "[]"
    assert seconds < max(0.5, 2.5 * seconds_of("import typer, typer.rich_utils, rich.console")[0])


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (AlignError("no luck"), 1, "no luck\n"),
        (ConfigError("r.yaml", [("a", "is odd")]), 2, "r.yaml: 1 problem\n  a  is odd\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (KeyboardInterrupt("step 40 is saved"), 130, "step 40 is saved\n"),
    ],
)
def test_a_message_and_an_exit_code(error: BaseException, code: int, message: str) -> None:
    result = ending(error)
    assert (result.exit_code, result.stderr) == (code, message)


def test_an_unexpected_error_keeps_its_traceback() -> None:
    result = ending(ZeroDivisionError("a bug"))
    assert isinstance(result.exception, ZeroDivisionError)
    assert result.exit_code == 1


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),  # safetensors' words
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),  # torch.save's words
    ],
)
def test_a_full_disk_is_said_however_a_library_says_it(error: BaseException) -> None:
    result = ending(error)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"{Path.cwd()}: the disk is full (")
    assert "GB free)" in result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full, a disk that is always full, is Linux's")
def test_a_full_disk_names_the_file(align: Align) -> None:
    result = align("recipes", "cp", "sft", "/dev/full", "--force")
    assert result.exit_code == 1
    assert result.stderr.startswith("/dev/full: the disk is full (")


def test_what_an_interrupted_run_says(tmp_path: Path) -> None:
    """The newest complete checkpoint is named: checkpoint-30 has no state yet."""
    command = ["align", "train", "my recipe.yaml"]
    said = _interrupted(tmp_path, command, rounds=False)
    assert said.startswith("interrupted: no checkpoint was complete yet")
    assert _interrupted(tmp_path, command, rounds=True).startswith(f"interrupted: {tmp_path} keeps what is done")
    for step in (10, 20, 30):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (10, 20):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    message = _interrupted(tmp_path, command, rounds=False)
    assert message == (
        f"interrupted: {tmp_path}/checkpoint-20 is saved; to go on from there:\n  align train 'my recipe.yaml'"
    )


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("trian",), "Did you mean 'train'?"),
        (("train",), "Missing argument 'RECIPE'"),
        (("train", "sft", "--dryrun"), "No such option"),
        (("generate", "--prompt", "Hi"), "Missing option '--model'"),
        (("generate", "-m", "x"), "give exactly one of them"),
        (("generate", "-m", "x", "-p", "Hi", "--chat"), "give exactly one of them"),
        (("generate", "-m", "x", "-i", "prompts.jsonl"), "--input and --output go together"),
        (("generate", "-m", "x", "-p", "Hi", "--temperature", "-1"), "Invalid value for '--temperature'"),
    ],
)
def test_wrong_usage_ends_with_2(align: Align, words: tuple[str, ...], what: str) -> None:
    result = align(*words)
    assert result.exit_code == 2
    assert what in result.stderr


def test_the_version(align: Align) -> None:
    assert align("--version").stdout.startswith("align-lm 0.")
