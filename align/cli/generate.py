"""``align generate``."""

from __future__ import annotations

import math
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from align.errors import AlignError, ConfigError

from .disk import writing_to

if TYPE_CHECKING:
    from align.generate import Answered

CONTROL = "Under a constraint or a reward"
TRANSFER = "Guided by a reward through an aligned baseline (Transfer-Q*)"


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
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Spread of the draws; 0 takes the likeliest token. 0.7, 1 with --n or under a constraint, 0 with "
            "--transfer-q.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 0,
    n: Annotated[
        int | None,
        typer.Option("--n", min=2, help="Independent answers a prompt of --input: one row, with lists of so many."),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Take text as it stands, without the chat template.")] = False,
    engine: Annotated[
        str, typer.Option(help="What computes: transformers, or vllm, which takes longer to start and is faster then.")
    ] = "transformers",
    constraint: Annotated[
        str | None,
        typer.Option(
            help="What an answer must be: json:schema.json, regex:PATTERN, grammar:file.lark, python:module:function, "
            "sql:schema.json\\[#name] or words:file.txt.",
            rich_help_panel=CONTROL,
        ),
    ] = None,
    constraint_field: Annotated[
        str | None,
        typer.Option(
            help="Column with each row's own constraint; with --constraint sql:FILE, with the name of its schema.",
            rich_help_panel=CONTROL,
        ),
    ] = None,
    constraint_timeout: Annotated[
        float | None,
        typer.Option(help="Seconds that a call of a python: constraint may take.", rich_help_panel=CONTROL),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="awrs-smc (the default), awrs, mask or rejection.", rich_help_panel=CONTROL),
    ] = None,
    particles: Annotated[
        int | None, typer.Option(min=1, help="Sequences a prompt; 8 by default.", rich_help_panel=CONTROL)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Draw from the k likeliest tokens.", rich_help_panel=CONTROL)
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Draw from the fewest tokens that hold this share of the mass.", rich_help_panel=CONTROL),
    ] = None,
    max_draws: Annotated[
        int | None,
        typer.Option(min=1, help="Questions about one token after which it is a dead end.", rich_help_panel=CONTROL),
    ] = None,
    take: Annotated[
        str | None,
        typer.Option(help="Answer: drawn by weight (the default), or the best.", rich_help_panel=CONTROL),
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            help="Rule (module:function) or reward model: answers in proportion to exp(strength * reward).",
            rich_help_panel=CONTROL,
        ),
    ] = None,
    reward_strength: Annotated[
        float | None, typer.Option(help="Nats a unit of reward; 1 by default.", rich_help_panel=CONTROL)
    ] = None,
    reward_every: Annotated[
        int | None,
        typer.Option(min=1, help="Also judge unfinished answers, every so many tokens.", rich_help_panel=CONTROL),
    ] = None,
    transfer_q: Annotated[
        str | None,
        typer.Option(
            metavar="BASELINE",
            help="Choose tokens by what --reward says of where this aligned model goes from them; named as --model, "
            "or the URL of a server.",
            rich_help_panel=TRANSFER,
        ),
    ] = None,
    q_candidates: Annotated[
        int | None, typer.Option(help="Likeliest tokens to try at each step; 10.", rich_help_panel=TRANSFER)
    ] = None,
    q_rollouts: Annotated[
        int | None, typer.Option(help="Rollouts of each; 1, greedy; more are drawn.", rich_help_panel=TRANSFER)
    ] = None,
    q_length: Annotated[
        str | None,
        typer.Option(
            help="Tokens of a rollout, or end; 20. With 0 the unfinished text is judged.", rich_help_panel=TRANSFER
        ),
    ] = None,
    q_alpha: Annotated[
        float | None,
        typer.Option(help="Units of reward that weigh as much as a nat of the model; 1.", rich_help_panel=TRANSFER),
    ] = None,
    q_value: Annotated[
        str | None, typer.Option(help="mean (the default) or soft, of the rollouts.", rich_help_panel=TRANSFER)
    ] = None,
    q_range: Annotated[
        str | None,
        typer.Option(
            metavar="LO,HI",
            help="Least and largest reward: spares rollouts, and changes no choice.",
            rich_help_panel=TRANSFER,
        ),
    ] = None,
    q_block: Annotated[
        int | None,
        typer.Option(
            help="Choose among drawn blocks of so many tokens instead; another law.", rich_help_panel=TRANSFER
        ),
    ] = None,
) -> None:
    """Answer a prompt, a file of prompts, or you; under a constraint or a reward where one is named."""
    _check_one_task(prompt, source, output, chat)
    guiding = {
        "transfer_q": transfer_q,
        "q_candidates": q_candidates,
        "q_rollouts": q_rollouts,
        "q_length": q_length,
        "q_alpha": q_alpha,
        "q_value": q_value,
        "q_range": q_range,
        "q_block": q_block,
    }
    guided: dict[str, Any] = {name: value for name, value in guiding.items() if value is not None}
    asked = {
        "constraint": constraint,
        "constraint_field": constraint_field,
        "constraint_timeout": constraint_timeout,
        "method": method,
        "particles": particles,
        "top_k": top_k,
        "top_p": top_p,
        "max_draws": max_draws,
        "take": take,
        "reward": reward,
        "reward_strength": reward_strength,
        "reward_every": reward_every,
    }
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    if guided:
        _check_transfer(guided, given, temperature, chat)
    else:
        _check_control(given, temperature, source, chat)
    _check_engine(engine, chat)
    if n is not None and (source is None or given or guided):
        what = "goes with --input, without a constraint, a reward or --transfer-q"
        raise ConfigError("align generate", [("--n", what)])
    if n is not None and temperature == 0:
        raise ConfigError("align generate", [("--temperature", "is over 0 with --n: all answers would be one")])
    from align.controlled import Control, check
    from align.generate import Settings, answer_controlled, answer_file, answer_prompt
    from align.generate import chat as talk
    from align.transfer import Transfer

    control = Transfer(**guided, **given) if guided else Control(**given) if given else None
    if temperature is None:
        temperature = 0.0 if guided else 1.0 if given or n is not None else 0.7
    drawn_by: Literal["transformers", "vllm"] = "vllm" if engine == "vllm" else "transformers"
    settings = Settings(model, max_new_tokens, temperature, seed, raw, drawn_by, n)
    if isinstance(control, Transfer):
        problems = control.problems(temperature)
    else:
        problems = check(control, temperature) if control is not None else []
    if problems:
        raise ConfigError("align generate", problems)
    if prompt is not None and control is not None:
        _show_answer(answer_controlled(settings, control, prompt))
    elif prompt is not None:
        answer_prompt(settings, prompt)
    elif source is not None and output is not None:
        try:
            with writing_to(output), closing(_Progress()) as progress:
                answered = answer_file(settings, source, output, progress, control)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted: {output} keeps what is done; the same command goes on") from None
        _report(output, answered)
    else:
        talk(settings, lambda: input("> " if sys.stdin.isatty() else ""))


def _check_one_task(prompt: str | None, source: str | None, output: Path | None, chat: bool) -> None:
    tasks = [prompt is not None, source is not None, chat]
    if sum(tasks) != 1:
        raise ConfigError("align generate", [("--prompt, --input, --chat", "give exactly one of them")])
    if (source is None) != (output is None):
        missing = "--output" if output is None else "--input"
        raise ConfigError("align generate", [(missing, "is missing: --input and --output go together")])


def _check_control(given: dict[str, Any], temperature: float | None, source: str | None, chat: bool) -> None:
    problems = []

    def refuse(name: str, what: str) -> None:
        problems.append((f"--{name.replace('_', '-')}", what))

    if given and not given.keys() & {"constraint", "constraint_field", "reward"}:
        for name in given:
            refuse(name, "goes with --constraint, --constraint-field or --reward")
    if given and chat:
        refuse("chat", "has no constraints; use --prompt or --input")
    if temperature is not None and not math.isfinite(temperature):
        refuse("temperature", f"{temperature} is no finite number")
    if given and temperature == 0:
        refuse("temperature", "is over 0 under a constraint; --top-k 1 takes the likeliest token")
    if "constraint_field" in given and source is None:
        refuse("constraint_field", "is a column of the rows of --input")
    if "max_draws" in given and given.get("method") == "mask":
        refuse("max_draws", "goes with the other methods; mask asks about all tokens")
    for name in given.keys() & {"reward_strength", "reward_every"}:
        if "reward" not in given:
            refuse(name, "goes with --reward")
    for name, known in (("method", ("awrs-smc", "awrs", "mask", "rejection")), ("take", ("drawn", "best"))):
        if given.get(name, known[0]) not in known:
            refuse(name, f"{given[name]!r} is none of {', '.join(known)}")
    if problems:
        raise ConfigError("align generate", problems)


def _check_engine(engine: str, chat: bool) -> None:
    problem = ""
    if engine not in ("transformers", "vllm"):
        problem = f"{engine!r} is none of transformers, vllm"
    elif engine == "vllm" and chat:
        problem = "vllm does not go with --chat; leave it out"
    if problem:
        raise ConfigError("align generate", [("--engine", problem)])


def _check_transfer(guided: dict[str, Any], given: dict[str, Any], temperature: float | None, chat: bool) -> None:
    problems = []
    if "transfer_q" not in guided:
        problems += [(f"--{name.replace('_', '-')}", "goes with --transfer-q") for name in guided]
    else:
        if "reward" not in given:
            problems.append(("--transfer-q", "goes with --reward, which judges where the baseline goes"))
        others = given.keys() - {"reward"}
        problems += [
            (f"--{name.replace('_', '-')}", "does not go with --transfer-q") for name in given if name in others
        ]
    if chat:
        problems.append(("--chat", "has no rewards; use --prompt or --input"))
    if temperature is not None and not math.isfinite(temperature):
        problems.append(("--temperature", f"{temperature} is no finite number"))
    if problems:
        raise ConfigError("align generate", problems)


def _show_answer(row: dict[str, Any]) -> None:
    """The text, and on the other stream what is to be known of it."""
    if row["completion"] is None or not row["valid"]:
        raise AlignError(f"no valid answer: {row['reason']}")
    print(row["completion"])
    if "costs" in row:
        costs = " · ".join(f"{name} {value:,}" for name, value in row["costs"].items() if value)
        print(f"reward {row['reward']:.4g} · {costs}", file=sys.stderr)
        return
    names = ("log_normaliser", "ess", "calls_per_token", *(("masks",) if row["masks"] else ()), "dead_ends")
    numbers = {name: row[name] for name in names}
    said = " · ".join(f"{name} {value:.4g}" for name, value in numbers.items() if value is not None)
    print(f"{said} · {len(row['samples'])} particles", file=sys.stderr)


def _report(output: Path, answered: Answered) -> None:
    """What was written, what could not be used, and what is not valid."""
    from align.data.report import fault_lines, fault_report

    print(output)
    if answered.again:
        print(f"made again: {answered.again:,} row{'s' if answered.again > 1 else ''} that had failed")
    if answered.faults:
        print(fault_report(answered.faults, answered.rows + len(answered.faults)))
    if answered.invalid:
        valid = answered.rows - len(answered.invalid)
        said = f"{output}: {valid:,} of {answered.rows:,} answers are valid"
        text = "\n".join([said, *fault_lines(answered.invalid)])
        if not valid:
            raise AlignError(text)
        print(text)


class _Progress:
    """A line that is written over, and ended whatever happens."""

    def __init__(self) -> None:
        self._begun = False

    def __call__(self, done: int, total: int) -> None:
        print(f"\r{done:,}/{total:,} answers", end="", file=sys.stderr, flush=True)
        self._begun = True

    def close(self) -> None:
        if self._begun:
            print(file=sys.stderr)
