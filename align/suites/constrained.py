"""Answers under a constraint: which share is valid, what it takes, and how the samplers differ, of several models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
from pydantic import Field

from align.answering import Kept
from align.config.section import Section
from align.controlled import Control, Controller, Inputs, check, spec_of
from align.decoding.constraints import Constraint, ConstraintError, Vocabulary, parse
from align.decoding.request import satisfies
from align.errors import AlignError, ConfigError
from align.evals.answers import paired
from align.evals.frontier import common
from align.evals.result import compared_result, suite_result
from align.evals.statistics import bootstrap_interval, share_interval
from align.generate import Answerer
from align.generate import Settings as Answering
from align.models.load import load_run
from align.tracking.progress import progress

from .asked import Asked
from .drawn import Reader
from .prompts import Prompts, Rewards, first_prompts, read_table
from .shown import printer, show_comparisons, show_metrics
from .steered import engine_of

PLAIN = "plain"
NUMBERS = ("log_normaliser", "ess", "calls_per_token", "masks", "dead_ends", "resamplings")


class Settings(Section):
    """What answers must be, and how they are drawn: at temperature 1, the model's own law."""

    constraint: str | None = None
    """As for ``align generate``: ``regex:PATTERN``, ``json:FILE``, ``grammar:FILE``, ``python:module:function`` …"""
    constraint_field: str | None = None
    """Column with each row's own constraint."""
    methods: list[Literal["awrs-smc", "awrs", "mask", "rejection", "plain"]] = Field(
        default=["plain", "awrs-smc", "awrs", "mask"], min_length=1
    )
    """How answers are drawn; plain is the model without the constraint, whose answers are checked afterwards."""
    particles: int = Field(default=8, ge=1)
    """Sequences a prompt, of which one is drawn by weight."""
    reward: str | None = None
    """``module:function`` or the folder of a reward model, of the valid answers."""
    prompts: int = Field(default=32, ge=2)
    """Prompts to answer (the first ones)."""
    max_new_tokens: int = Field(default=96, ge=1)
    """Longest answer, tokens."""
    seed: int = Field(default=0, ge=0)
    """Seed of the draws."""


def run(asked: Asked, settings: Settings) -> dict[str, Any]:
    """Validity, weights and costs of each method with each model.

    Args:
        asked: models and prompts.
        settings: the constraint and the methods.

    Returns:
        ``compared_result``; its models are ``MODEL · METHOD``, each compared with the first, or the first that
        has such a number. Metrics, by prompt:
        ``valid`` (share), ``tokens``, ``reward`` (of valid answers), and, of the prompts that have them,
        ``log_normaliser`` (log of the estimated probability that the model by itself answers within the constraint),
        ``ess``, ``calls_per_token``, ``masks``, ``dead_ends``, ``resamplings``. Rows have ``log_weights`` too.

    Raises:
        ConfigError: there is no constraint, or it cannot be read.
        AlignError: a model or the data cannot be used.
    """
    asked.require_policies("constrained")
    controls = {method: _control(settings, method) for method in settings.methods}
    rewards = Rewards(settings.reward) if settings.reward else None
    field = settings.constraint_field
    table = read_table(asked, filter(None, [settings.reward]), {field: "constraint_field"} if field else None)
    kept = Kept(asked.kept)
    prompts: Prompts | None = None
    found: dict[str, list[dict[str, Any]]] = {}
    for model in asked.models:
        loaded = load_run(model)
        prompts = prompts or first_prompts(asked, table, loaded, settings.prompts, settings.max_new_tokens)
        reader = Reader(model, loaded, torch.float32, prompts, kept, settings.seed)
        for method, control in controls.items():
            answers = _plain(reader, prompts, control) if method == PLAIN else _controlled(reader, prompts, control)
            found[f"{model} · {method}"] = _rows(prompts, answers, rewards)
        del loaded, reader
    assert prompts is not None
    results = {name: suite_result("constrained", _metrics(rows), rows, None) for name, rows in found.items()}
    first = next(iter(found))
    about = {**settings.model_dump(), "prompts": len(prompts.rows), "temperature": 1.0}
    return compared_result("constrained", results, _compared(found), prompts.facts, first, about)


def show(result: Mapping[str, Any]) -> None:
    """Print a line for each model and method."""
    console = printer()
    console.print(f"{result['n']:,} prompts of {result['data']['source']}", soft_wrap=True)
    columns = {
        "valid": ("valid", ".0%"),
        "log Z, nats": ("log_normaliser", ".2f"),
        "ESS": ("ess", ".1f"),
        "calls a token": ("calls_per_token", ".1f"),
        "tokens": ("tokens", ".1f"),
        "reward": ("reward", ".3f"),
    }
    show_metrics(console, result["models"], columns)
    show_comparisons(console, result["comparisons"], "+.3g")


def _control(settings: Settings, method: str) -> Control:
    if settings.constraint is None and settings.constraint_field is None:
        raise ConfigError("align eval", [("constraint", "is missing: constraint=regex:PATTERN, or constraint_field")])
    sampler: Any = {} if method == PLAIN else {"method": method}
    control = Control(settings.constraint, settings.constraint_field, particles=settings.particles, **sampler)
    if problems := check(control, 1.0):
        raise ConfigError("align eval", [(name.lstrip("-").replace("-", "_"), what) for name, what in problems])
    return control


def _data(prompts: Prompts) -> dict[int, dict[str, Any]]:
    return {number: {**row.columns, "prompt": row.prompt} for number, row in enumerate(prompts.rows)}


def _controlled(reader: Reader, prompts: Prompts, control: Control) -> list[dict[str, Any]]:
    """The columns of ``align generate`` for each prompt."""
    rows, inputs = _data(prompts), Inputs(control)
    key = reader.key(control=asdict(control), inputs=[inputs.of(row) for row in rows.values()])
    missing = reader.kept.missing(key, len(rows))
    with progress(f"answers, {reader.name}, {control.method}", len(missing)) as advance:

        def keep(made: Mapping[int, dict[str, Any]]) -> None:
            reader.kept.add(key, made)
            advance(len(made))

        if missing:
            answering = Answering(reader.name, prompts.max_new_tokens, 1.0, reader.seed, raw=False)
            controller = Controller(Answerer(answering, reader.loaded), control)
            controller.answer({row: reader.ids[row] for row in missing}, rows, keep)
    return reader.kept.of(key, len(rows))


def _plain(reader: Reader, prompts: Prompts, control: Control) -> list[dict[str, Any]]:
    """The model's own answers, and whether the constraint takes them; an answer that was cut is not whole."""
    _, vocabulary = engine_of(reader.name, reader.loaded)
    parsed: dict[str, Constraint] = {}
    found = []
    for row, answer in zip(_data(prompts).values(), reader.answers(1.0), strict=True):
        spec = spec_of(control, row) or ""
        if spec not in parsed:
            parsed[spec] = _parsed(spec, vocabulary)
        valid = satisfies(parsed[spec], answer.tokens, vocabulary)
        reason = "" if valid else "the constraint refuses it" if answer.finished else "it has no end"
        found.append({"completion": answer.text, "tokens": len(answer.tokens), "valid": valid, "reason": reason})
    return found


def _parsed(spec: str, vocabulary: Vocabulary) -> Constraint:
    try:
        return parse(spec, vocabulary)
    except ConstraintError as error:
        raise AlignError(str(error)) from error


def _rows(prompts: Prompts, answers: Sequence[Mapping[str, Any]], rewards: Rewards | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"row_id": row_id, "prompt": prompt, "text": answer["completion"]}
        | {name: answer[name] for name in ("valid", "reason", "tokens")}
        | {name: answer.get(name) for name in NUMBERS}
        | {"log_weights": [sample["log_weight"] for sample in answer.get("samples", ())]}
        for row_id, prompt, answer in zip(prompts.ids, prompts.texts, answers, strict=True)
    ]
    if rewards is not None:
        valid = [number for number, row in enumerate(rows) if row["valid"]]
        scores = rewards.of(prompts, valid, [rows[number]["text"] for number in valid]) if valid else []
        for number, score in zip(valid, scores, strict=True):
            rows[number]["reward"] = score
    return rows


def _metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    values = {name: [row[name] for row in rows if row.get(name) is not None] for name in ("reward", *NUMBERS)}
    return {
        "valid": share_interval([row["valid"] for row in rows]),
        "tokens": bootstrap_interval([row["tokens"] for row in rows]),
        **{name: bootstrap_interval(column) for name, column in values.items() if column},
    }


def _compared(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """With the first that has such a number, on the prompts that both have one for."""
    pairs = []
    for metric in ("valid", "tokens", "log_normaliser", "reward"):
        values = {
            name: {row["row_id"]: float(row[metric]) for row in rows if row.get(metric) is not None}
            for name, rows in found.items()
        }
        base, *others = [name for name, own in values.items() if own] or [""]
        for name in others:
            one, other = common(values[base], values[name])
            if len(one):
                pairs.append((metric, name, base, one, other))
    return paired(pairs)
