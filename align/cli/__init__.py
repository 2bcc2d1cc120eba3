"""The command line: one file per command, heavy imports inside the commands, so that ``align --help`` is quick.

- ``train``, ``validate``, ``generate``, ``serve``, ``score``, ``filter``, ``eval``, ``models``, ``recipes``,
  ``report``, ``doctor``, ``verify``: the commands; what they do is elsewhere (``align.run``, ``align.sweep``,
  ``align.data``, ``align.generate``, ``align.serve``, ``align.score``, ``align.models``, ``align.config``,
  ``align.reports``, ``align.doctor``, ``align.evals.exact``, ``align.suites``).
- ``diff``: ``align report diff``; ``logic``: ``align recipes logic``; ``disk``: a full disk, as libraries say it.

Exit codes: 0; 1 it failed, the data is not good enough, or a result is worse; 2 usage or configuration; 130
interrupted. How a command ends is decided here, in one place, by ``CommandLine``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from align.errors import AlignError
from align.tracking.telemetry import disable_telemetry

from . import diff, doctor, eval, filter, generate, models, recipes, report, score, serve, train, validate, verify
from .disk import full_message, is_full


class CommandLine(TyperGroup):
    """Turns what a command raises into a message and an exit code; an unexpected error keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except AlignError as error:
            _end(str(error), error.exit_code)
        except KeyboardInterrupt as interrupt:
            _end(str(interrupt) or "interrupted", 130)
        except Exception as error:
            if is_full(error):
                _end(full_message(error, Path.cwd()), 1)
            raise


app = typer.Typer(
    cls=CommandLine,
    help="Align language models with preferences: train, look at data, sample, score, report.",
    epilog="Start with: align train quickstart --dry-run",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(train.train)
app.command()(validate.validate)
app.command()(generate.generate)
app.command()(serve.serve)
app.command()(score.score)
app.command("filter")(filter.filter_)
app.command("eval", epilog=eval.EPILOG)(eval.evaluate)
app.add_typer(models.app, name="models")
app.add_typer(recipes.app, name="recipes")
reports = typer.Typer(
    cls=diff.ReportGroup, help="Pages of runs, and what two results differ in.", no_args_is_help=True
)
reports.command(diff.PAGE)(report.report)
reports.command("diff")(diff.diff)
app.add_typer(reports, name="report")
app.command()(doctor.doctor)
app.command()(verify.verify)


def main() -> None:
    """Entry point of ``align`` and ``python -m align``."""
    disable_telemetry()
    if not sys.stderr.isatty():  # the bars of transformers and datasets fill a log with lines
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    app(prog_name="align")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"align-lm {version('align-lm')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None: ...


def _end(message: str, code: int) -> NoReturn:
    sys.stdout.flush()  # what was printed before comes before, also in a log that holds both streams
    print(message, file=sys.stderr)
    raise typer.Exit(code)
