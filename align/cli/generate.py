"""``align generate``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from align.errors import ConfigError

from .disk import writing_to


def generate(
    model: Annotated[
        str, typer.Option("--model", "-m", help="Run folder, adapter folder, model folder, packaged name or hub id.")
    ],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="One prompt; its answer is printed.")] = None,
    source: Annotated[
        str | None, typer.Option("--input", "-i", help="JSONL with a prompt per row (text or chat messages).")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSONL to write; rows that it holds are not made again.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Talk: /reset starts anew, /quit or Ctrl-D ends.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="Spread of the draws; 0 takes the likeliest token.")] = 0.7,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Take text as it stands, without the chat template.")] = False,
) -> None:
    """Answer a prompt, a file of prompts, or you."""
    _check_one_task(prompt, source, output, chat)
    from align.generate import Settings, answer_file, answer_prompt
    from align.generate import chat as talk

    settings = Settings(model, max_new_tokens, temperature, seed, raw)
    if prompt is not None:
        answer_prompt(settings, prompt)
    elif source is not None and output is not None:
        try:
            with writing_to(output):
                faults = answer_file(settings, source, output, _show_progress)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted: {output} keeps what is done; the same command goes on") from None
        print(output)
        if faults:
            from align.data.report import fault_report

            print(fault_report(faults, sum(1 for _ in output.open()) + len(faults)))
    else:
        talk(settings, lambda: input("> " if sys.stdin.isatty() else ""))


def _check_one_task(prompt: str | None, source: str | None, output: Path | None, chat: bool) -> None:
    tasks = [prompt is not None, source is not None, chat]
    if sum(tasks) != 1:
        raise ConfigError("align generate", [("--prompt, --input, --chat", "give exactly one of them")])
    if (source is None) != (output is None):
        missing = "--output" if output is None else "--input"
        raise ConfigError("align generate", [(missing, "is missing: --input and --output go together")])


def _show_progress(done: int, total: int) -> None:
    print(f"\r{done:,}/{total:,} answers", end="\n" if done == total else "", file=sys.stderr, flush=True)
