"""What reward costs in KL to the reference: training, decoders and the adapter's scale on the same prompts.

Answers are drawn at temperature 1, of which law the KL is. Models are loaded one after the other, the reference last;
Transfer-Q* has a model beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from peft.helpers import rescale_adapter_scale
from pydantic import AfterValidator, Field
from rich.text import Text

from align.answering import Kept
from align.config.section import Section
from align.errors import ConfigError
from align.evals.answers import paired
from align.evals.frontier import MODEL_KL, common, of_rows, point
from align.evals.result import compared_result
from align.evals.sampling import Sample
from align.models.load import load_run

from .asked import Asked
from .drawn import Reader
from .models import load_reference, name_of, precision, reference_of, steps_of
from .prompts import Prompts, Rewards, first_prompts, read_table
from .shown import estimate, plain_table, printer, show_comparisons
from .steered import best_of_points, transfer_points, weighted_points

Kind = Literal["checkpoints", "best-of-n", "transfer-q", "smc", "scaling"]
Positive = Annotated[float, Field(gt=0)]
Number = TypeVar("Number", int, float)


def _once(given: list[Any]) -> list[Any]:
    return list(dict.fromkeys(given))


Once = Annotated[list[Number], AfterValidator(_once)]
"""Each makes a point of its own; what is given twice makes one."""


class Settings(Section):
    """Which points, and how they are drawn."""

    reward: str | None = None
    """``module:function``, or the folder of a reward model."""
    judge: str | None = None
    """Another one, which judges what the first one chose; it takes part in nothing else."""
    points: list[Kind] = Field(default=["checkpoints", "best-of-n", "transfer-q", "smc", "scaling"])
    """Besides the models themselves and the reference."""
    prompts: int = Field(default=32, ge=2)
    """Held-out prompts to answer (the first ones)."""
    max_new_tokens: int = Field(default=48, ge=1)
    """Longest answer, tokens."""
    seed: int = Field(default=0, ge=0)
    """Seed of the draws."""
    best_of: Once[Annotated[int, Field(ge=1)]] = Field(default=[1, 2, 4, 8, 16], min_length=1)
    """n of best-of-n; the largest is drawn from the reference to each prompt."""
    strengths: Once[Positive] = Field(default=[2.0, 8.0], min_length=1)
    """Nats a unit of reward, of smc."""
    particles: int = Field(default=8, ge=2)
    """Of smc, a prompt."""
    alphas: Once[Positive] = Field(default=[0.3, 0.1], min_length=1)
    """Units of reward a nat, of transfer-q; small for more reward."""
    candidates: int = Field(default=5, ge=2)
    """Likeliest tokens that transfer-q tries."""
    rollout_length: int = Field(default=12, ge=1)
    """Tokens that the aligned model goes on with from each."""
    scales: Once[Annotated[float, Field(ge=0)]] = Field(default=[0.25, 0.5, 0.75, 1.0, 1.25], min_length=1)
    """Factors of an adapter's scale."""


@dataclass(frozen=True)
class _Drawn:
    """Answers of a model by itself, which the reference is still to score."""

    model: str
    kind: str
    label: str
    settings: Mapping[str, Any]
    tokens: str
    answers: list[Sample]
    logps: list[float]


def run(asked: Asked, settings: Settings) -> dict[str, Any]:
    """The points.

    Args:
        asked: models, of a run its checkpoints too, prompts, and the reference.
        settings: which points.

    Returns:
        ``compared_result`` with ``models``: of each, and of the reference, ``{n, metrics, points}``, a point as
        ``align.evals.frontier.point`` has it; comparisons of points' rewards and
        of what the judge says with the reference's, by label (best of 1 and an adapter at scale 1 are the reference
        and the run again, and left out); ``notes``.

    Raises:
        ConfigError: there is no reward.
        AlignError: a model, the data or the reward cannot be used.
    """
    asked.require_policies("frontier")
    if settings.reward is None:
        raise ConfigError("align eval", [("reward", "is missing: reward=module:function, or the folder of a model")])
    rewards = Rewards(settings.reward)
    judge = Rewards(settings.judge, "judge") if settings.judge else None
    table = read_table(asked, [settings.reward, *([settings.judge] if settings.judge else [])])
    origin = reference_of(asked.models, asked.reference)
    base = name_of(origin)
    models = [model for model in asked.models if model != base]
    dtype, compute = precision(models, origin)
    kept = Kept(asked.kept)
    prompts: Prompts | None = None
    drawn: list[_Drawn] = []
    for model in models:
        steps = steps_of(model) if "checkpoints" in settings.points else [model]
        for step in steps:
            loaded = load_run(step, dtype=dtype)
            prompts = prompts or first_prompts(asked, table, loaded, settings.prompts, settings.max_new_tokens)
            reader = Reader(step, loaded, compute, prompts, kept, settings.seed)
            drawn += _of_model(model, step, reader, settings, model in asked.recipes)
            del loaded, reader
    loaded = load_reference(origin, dtype)
    prompts = prompts or first_prompts(asked, table, loaded, settings.prompts, settings.max_new_tokens)
    reference = Reader(base, loaded, compute, prompts, kept, settings.seed)
    points = {base: _of_reference(reference, prompts, rewards, judge, settings)}
    notes = _chosen_by(settings)
    for one in drawn:
        if one.tokens != reference.tokens:
            notes.append(f"{one.label}: no KL to {base}, which reads other tokens")
            continue
        theirs = reference.logps(one.answers, f"answers of {one.label}")
        nats = [own - other for own, other in zip(one.logps, theirs, strict=True)]
        rows = _rows(prompts, one.answers, rewards, judge, nats)
        points.setdefault(one.model, []).append(point(one.kind, one.label, rows, MODEL_KL, settings=one.settings))
    if "transfer-q" in settings.points:
        for model in models:
            aligned = Reader(model, load_run(model, dtype=dtype), compute, prompts, kept, settings.seed)
            points.setdefault(model, []).extend(
                transfer_points(
                    reference,
                    aligned,
                    prompts,
                    rewards,
                    settings.alphas,
                    settings.candidates,
                    settings.rollout_length,
                    judge,
                )
            )
            del aligned
    about = {**settings.model_dump(), "prompts": len(prompts.rows), "temperature": 1.0}
    found = {name: _model(own, len(prompts.rows)) for name, own in points.items()}
    return compared_result("frontier", found, _compared(points, base), prompts.facts, base, about, notes=notes)


def show(result: Mapping[str, Any]) -> None:
    """Print a line a point."""
    console = printer()
    console.print(
        f"{result['n']:,} prompts of {result['data']['source']} against {result['reference']}", soft_wrap=True
    )
    judge = ["by the judge"] if result["settings"].get("judge") else []
    table = plain_table("", "reward", *judge, "KL, nats", "at most", "tokens a prompt")
    for found in result["models"].values():
        for one in found["points"]:
            bound = one.get("kl_bound")
            judged = [estimate(one["judge"], ".3f")] if judge else []
            cells = estimate(one["reward"], ".3f"), *judged, estimate(one["kl"], ".2f")
            table.add_row(
                Text(one["label"], no_wrap=True),
                *cells,
                "" if bound is None else f"{bound['value']:.2f}",
                f"{one['cost']['tokens']:.0f}",
            )
    console.print(table)
    show_comparisons(console, result["comparisons"], "+.3f")
    for note in result["notes"]:
        console.print(note, soft_wrap=True)


def _of_model(model: str, step: str, reader: Reader, settings: Settings, is_run: bool) -> list[_Drawn]:
    """A model's own answers, and those at other scales of its adapter where it is no checkpoint of a run."""

    def drawn(kind: str, label: str, about: Mapping[str, Any], **other: Any) -> _Drawn:
        answers = reader.answers(1.0, **other)
        return _Drawn(model, kind, label, about, reader.tokens, answers, reader.logps(answers, label))

    ends = step == model
    kind = ("run" if is_run else "model") if ends else "checkpoint"
    found = [drawn(kind, step, {})]
    if ends and "scaling" in settings.points and hasattr(reader.loaded.model, "peft_config"):
        for scale in settings.scales:
            with rescale_adapter_scale(reader.loaded.model, scale):
                other = {} if scale == 1 else {"scale": scale}
                found.append(drawn("scaling", f"{model} times {scale:g}", {"scale": scale}, **other))
    return found


def _of_reference(
    reference: Reader, prompts: Prompts, rewards: Rewards, judge: Rewards | None, settings: Settings
) -> list[dict[str, Any]]:
    """The reference itself, and what decoders make of it alone."""
    answers = reference.answers(1.0)
    rows = _rows(prompts, answers, rewards, judge, [0.0] * len(answers))
    found = [point("reference", reference.name, rows, "0: it is the reference")]
    if "best-of-n" in settings.points:
        copies = max(settings.best_of)
        several = reference.answers(1.0, copies)
        judged = judge(prompts, several, copies) if judge else None
        found += best_of_points(prompts, several, rewards(prompts, several, copies), settings.best_of, judged)
    if "smc" in settings.points:
        found += weighted_points(reference, prompts, rewards, settings.strengths, settings.particles, judge)
    return found


def _rows(
    prompts: Prompts, answers: Sequence[Sample], rewards: Rewards, judge: Rewards | None, nats: Sequence[float]
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"row_id": row_id, "prompt": prompt, "text": answer.text, "finished": answer.finished}
        | {"reward": reward, "kl": kl, "tokens": len(answer.tokens)}
        for row_id, prompt, answer, reward, kl in zip(
            prompts.ids, prompts.texts, answers, rewards(prompts, answers), nats, strict=True
        )
    ]
    for row, value in zip(rows, judge(prompts, answers) if judge else (), strict=False):
        row["judge"] = value
    return rows


def _model(points: Sequence[Mapping[str, Any]], n: int) -> dict[str, Any]:
    """With the metrics of the model itself, which is the last point of its own answers at full scale."""
    itself = [one for one in points if one["kind"] in ("reference", "run", "model")]
    names = {"reward": "reward", "judge": "judge", "kl_to_reference": "kl"}
    metrics = {name: itself[-1][key] for name, key in names.items() if itself and key in itself[-1]}
    return {"n": n, "metrics": metrics, "points": list(points)}


def _chosen_by(settings: Settings) -> list[str]:
    """What to know of points that a reward chose and then judged, and of their KL."""
    deciding = {"best-of-n": "best of n", "smc": "SMC", "transfer-q": "Transfer-Q*"}
    chosen = [words for kind, words in deciding.items() if kind in settings.points]
    notes = []
    if chosen:
        other = (
            f"see what {settings.judge} says of them, which chose none"
            if settings.judge
            else "how good they are by another judge is not known (judge=...)"
        )
        notes.append(f"{', '.join(chosen)}: answers are chosen by {settings.reward}, which judges them too: {other}")
    if "best-of-n" in settings.points:
        notes.append("best of n: the KL is too large where few rewards differ, as those of a rule; the bound holds")
    if "smc" in settings.points:
        notes.append(
            f"SMC: the KL is an estimate for the target that few particles hold below it, at most log "
            f"{settings.particles} = {math.log(settings.particles):.2f} without resampling"
        )
    return notes


def _compared(points: Mapping[str, Sequence[Mapping[str, Any]]], base: str) -> list[dict[str, Any]]:
    """Every point against the reference but those that are one of the others again: best of 1, an adapter at 1."""
    reference = points[base][0]
    again = (("best-of-n", "n"), ("scaling", "scale"))
    others = [
        one
        for own in points.values()
        for one in own
        if one["kind"] != "reference"
        and not any(one["kind"] == kind and one["settings"][key] == 1 for kind, key in again)
    ]
    return paired(
        (name, one["label"], base, *common(of_rows(reference["rows"], name), of_rows(one["rows"], name)))
        for one in others
        for name in ("reward", "judge")
        if name in reference
    )
