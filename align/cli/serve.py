"""``align serve``."""

from __future__ import annotations

from typing import Annotated

import typer

from align.errors import ConfigError

LIMITS = "Limits"


def serve(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL|RECIPE",
            help="Run folder, adapter folder, model folder, packaged name, hub id, or a recipe that was run.",
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="ALIGN_API_KEY", show_envvar=True, help="Key that requests must bear."),
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=REWARD", help="A rule (module:function) or reward model; requests say its NAME."),
    ] = None,
    predicate: Annotated[
        list[str] | None,
        typer.Option(metavar="MODULE:FUNCTION", help="A Python function that constraints of requests may call."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    max_model_len: Annotated[
        int | None, typer.Option(min=2, help="Most tokens, prompt and answer.", rich_help_panel=LIMITS)
    ] = None,
    max_num_seqs: Annotated[
        int, typer.Option(min=1, help="Particles that are drawn at a time; more wait.", rich_help_panel=LIMITS)
    ] = 64,
    max_particles: Annotated[
        int | None,
        typer.Option(min=1, help="Most particles of a request; as --max-num-seqs.", rich_help_panel=LIMITS),
    ] = None,
    max_waiting: Annotated[
        int, typer.Option(min=0, help="Particles that may wait; beyond: 429.", rich_help_panel=LIMITS)
    ] = 256,
    max_plain: Annotated[
        int,
        typer.Option(min=1, help="Answers without our settings drawn at a time; beyond: 429.", rich_help_panel=LIMITS),
    ] = 32,
    max_body: Annotated[
        int, typer.Option(min=1024, help="Largest body of a request, bytes.", rich_help_panel=LIMITS)
    ] = 1 << 20,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds a request may take, its wait counted.", rich_help_panel=LIMITS)
    ] = 120.0,
) -> None:
    """Serve a model: vLLM's OpenAI-compatible API, with constraints, rewards and particles in it."""
    from align.serve.launch import Serve, launch
    from align.serve.options import Options

    if dtype not in ("auto", "bfloat16", "float16", "float32"):
        raise ConfigError("align serve", [("--dtype", f"{dtype!r} is none of auto, bfloat16, float16, float32")])
    options = Options(
        rewards=_rewards(reward or []),
        predicates=tuple(predicate or ()),
        max_particles=max_particles or max_num_seqs,
        max_running=max_num_seqs,
        max_waiting=max_waiting,
        max_plain=max_plain,
        max_body=max_body,
        timeout=timeout,
    )
    launch(
        Serve(
            source,
            host=host,
            port=port,
            api_key=api_key or None,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            dtype=dtype,
            options=options,
        )
    )


def _rewards(given: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    problems = []
    for text in given:
        name, equals, reward = text.partition("=")
        if not (name and equals and reward):
            problems.append(("--reward", f"{text!r} is not of the form NAME=REWARD"))
        elif name in found:
            problems.append(("--reward", f"{name} stands twice"))
        found[name] = reward
    if problems:
        raise ConfigError("align serve", problems)
    return found
