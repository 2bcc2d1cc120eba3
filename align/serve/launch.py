"""From the command line to the server's process."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Thread
from typing import Any

from align.controlled import reward_fault
from align.decoding.constraints import ConstraintError, PythonPredicate
from align.decoding.constraints.wire import BYTES, SECONDS
from align.decoding.constraints.worker import shared
from align.decoding.engines.vllm import PROCESSOR, SCHEDULER, WORKER
from align.decoding.vllm.machine import Machine, settings, vllm_version
from align.errors import AlignError, ConfigError
from align.rewards.named import is_rule, reward_folder
from align.rewards.scorers import Scorer, load_scorer

from .models import Served, served
from .options import Options
from .structured import BACKEND

KEY_VARIABLE = "ALIGN_API_KEY"
ALLOWANCE = (2.0, 0.05)
"""Seconds that a request's constraint may take in the engine, where it holds up all rows: first, and a token."""
RULE_SECONDS = 60.0
"""Seconds that a rule may take when it is tried before the start: some load a model when they are first called."""


@dataclass(frozen=True)
class Serve:
    """What is asked of ``align serve``.

    Args:
        source: what to serve, see ``models.served``.
        host, port: where to listen.
        api_key: that requests must bear; None: no key.
        max_model_len: most tokens of a prompt and its answer; None: as many as the model reads and the cache holds.
        max_num_seqs: particles that the engine steps at a time, beside the plain answers.
        dtype: ``auto`` or a name.
        options: limits and names.
    """

    source: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 64
    dtype: str = "auto"
    options: Options = field(default_factory=Options)


def launch(asked: Serve) -> None:
    """Become the server's process: the same process id, with its settings in place before anything is imported.

    Raises:
        ConfigError: an option is wrong.
        AlignError: there is nothing to serve, or vLLM is missing or too old.
    """
    check(asked)
    try:
        name, version = vllm_version()
    except ValueError as error:
        raise AlignError(str(error)) from error
    machine = settings(asked.dtype)
    what = served(asked.source, str(machine.engine["dtype"]))
    lines = [("engine", f"{name} {version} on {machine.device}"), *machine.reasons, ("model", what.path)]
    for about, said in lines:
        print(f"align serve: {about}: {said}", file=sys.stderr)
    if asked.api_key is None and asked.host not in ("127.0.0.1", "localhost", "::1"):
        print(f"align serve: no --api-key: whoever reaches {asked.host} can use it", file=sys.stderr)
    sys.stderr.flush()
    plugins = ",".join(filter(None, (os.environ.get("VLLM_PLUGINS"), "align")))
    environment = {**machine.environment, **os.environ, "VLLM_PLUGINS": plugins}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    if asked.api_key is not None:
        environment[KEY_VARIABLE] = asked.api_key
    command = [sys.executable, "-P", "-m", "align.serve.server", *arguments(asked, machine, what)]
    os.execve(sys.executable, command, environment)


def check(asked: Serve) -> None:
    """The options by themselves.

    Raises:
        ConfigError: with all that is wrong.
    """
    problems = []
    options = asked.options
    if options.max_particles > asked.max_num_seqs:
        problems.append(
            (
                "--max-particles",
                f"{options.max_particles} is over --max-num-seqs {asked.max_num_seqs}: they run together",
            )
        )
    for name, reward in options.rewards.items():
        try:
            if is_rule(reward):
                _try(load_scorer(reward))
            else:
                reward_folder(reward)
        except (Exception, SystemExit) as error:  # a rule is anyone's code
            problems.append(("--reward", f"{name}: {error}"))
    for predicate in options.predicates:
        try:
            PythonPredicate(predicate, BYTES, timeout=SECONDS, shared=True)
        except ConstraintError as error:
            problems.append(("--predicate", str(error)))
    shared.cache_clear()  # ends their processes: the server has its own
    try:
        _listen(asked.host, asked.port)
    except OSError as error:
        problems.append(("--host, --port", f"{asked.host} {asked.port}: {error.strerror or error}; choose another"))
    if problems:
        raise ConfigError("align serve", problems)


def _try(rule: Scorer) -> None:
    """Call it once, if it needs no columns; it may refuse the row, and must end."""
    if any(rule.columns.values()):
        return
    failed: list[Exception] = []

    def call() -> None:
        try:
            rule(["How are you?"], ["Well, thank you."])
        except Exception as error:  # it belongs to whoever waits
            failed.append(error)

    thread = Thread(target=call, daemon=True)  # it cannot be stopped, and does not outlive a start that fails
    thread.start()
    thread.join(RULE_SECONDS)
    if thread.is_alive():
        raise ValueError(
            f"took over {RULE_SECONDS:g} s on one short answer: let it end, or load what it needs with its module"
        )
    if failed and not (isinstance(failed[0], ValueError) and not reward_fault(failed[0])):
        raise failed[0]


def _listen(host: str, port: int) -> None:
    """Whether one can, before minutes of loading; OSError where not."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    with socket.socket(family, kind) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        tried.bind(address)


def arguments(asked: Serve, machine: Machine, what: Served) -> list[str]:
    """Arguments of vLLM's own server."""
    ours = {
        "predicates": list(asked.options.predicates),
        "end_with_parent": True,
        "allowance": ALLOWANCE,
        "server": asked.options.to_json(),
    }
    given: dict[str, Any] = {
        **machine.engine,
        "model": what.path,
        "served_model_name": what.name,
        "host": asked.host,
        "port": asked.port,
        "max_model_len": asked.max_model_len if asked.max_model_len is not None else "auto",
        "max_num_seqs": asked.max_num_seqs + asked.options.max_plain,  # neither waits for the other
        "trust_remote_code": what.trusted,
        "logits_processors": PROCESSOR,
        "worker_extension_cls": WORKER,
        "scheduler_cls": SCHEDULER,
        "logprobs_mode": "processed_logits",
        "structured_outputs_config": json.dumps({"backend": BACKEND}),
        "additional_config": json.dumps({"align": ours}),
        "allowed_origins": "[]",  # other sites' pages have no business here; ours is served from the same place
        "disable_uvicorn_access_log": True,
        "enable_prompt_tokens_details": True,  # else a baseline that is served cannot tell what its cache has spared
    }
    return list(_flags(given))


def _flags(given: Mapping[str, Any]) -> Sequence[str]:
    flags: list[str] = []
    for name, value in given.items():
        flags.append(f"--{'no-' if value is False else ''}{name.replace('_', '-')}")
        if not isinstance(value, bool):
            flags.append(str(value))
    return flags
