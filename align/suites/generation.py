"""Models answer the same held-out prompts, and an annotator or a reward compares the answers with a baseline's.

Models are loaded one after the other, so that memory holds one at a time; the baseline comes last, and scores the
answers that the others have drawn for their KL to it: at temperature 1, apart from those that are judged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from align.answering import Kept
from align.config.schema import GenerationSpec
from align.errors import AlignError, ConfigError
from align.evals.answers import compare_answers
from align.evals.kl import LogRatios
from align.evals.result import compared_result
from align.evals.sampling import Sample
from align.models.load import load_run
from align.rewards.annotators import Annotator, AnnotatorError, ParsedAnnotator, parse_annotator
from align.rewards.encoding import as_answer
from align.rewards.expression import ExpressionError
from align.tracking.progress import progress

from .asked import Asked
from .drawn import Reader
from .models import load_reference, name_of, precision, reference_of
from .prompts import Prompts, Rewards, first_prompts, read_table
from .shown import printer, show_comparisons, show_metrics

SHOWN = (
    {
        "win rate": ("win_rate", ".1%"),
        "at equal length": ("length_controlled_win_rate", ".1%"),
        "reward": ("reward", ".3f"),
        "KL, nats": ("kl_to_reference", ".2f"),
    },
    {
        "tokens": ("length", ".1f"),
        "unfinished": ("unfinished", ".0%"),
        "repetition": ("repetition", ".1%"),
        "distinct-2": ("distinct_2", ".2f"),
    },
)
TOGETHER = 16
"""Prompts that an annotator is asked about at once."""


class Settings(GenerationSpec):
    """How answers are drawn and judged."""

    reward: str | None = None
    """``module:function`` or the folder of a reward model: their mean, and without an annotator a hard win rate."""
    annotator: str | dict[str, Any] | None = None
    """Who compares answers (``align.rewards.annotators``): its probabilities are the win rate."""


def run(asked: Asked, settings: Settings) -> dict[str, Any]:
    """Win rate, plain and at equal length, reward, KL, length, repetition and diversity of each model.

    Args:
        asked: models, prompts, and the baseline: ``--reference``, else what the models were trained from.
        settings: who judges, and how answers are drawn.

    Returns:
        ``align.evals.result.compared_result`` of what ``align.evals.answers.compare_answers`` says, with ``notes``.

    Raises:
        ConfigError: nobody judges.
        AlignError: a model, the data, the annotator or the reward cannot be used.
    """
    asked.require_policies("generation")
    parsed = _annotator(settings)
    rewards = Rewards(settings.reward) if settings.reward else None
    table = read_table(asked, [*(parsed.rules if parsed else ()), *([settings.reward] if settings.reward else [])])
    origin = reference_of(asked.models, asked.reference)
    baseline = name_of(origin)
    names = [*(model for model in asked.models if model != baseline), baseline]
    if len(names) == 1:
        raise ConfigError("align eval", [("MODEL", f"is {baseline} alone, which the others are compared with")])
    annotator = parsed.load() if parsed else None
    dtype, compute = precision(asked.models, origin)
    kept = Kept(asked.kept)
    prompts: Prompts | None = None
    answers: dict[str, list[Sample]] = {}
    drawn: dict[str, tuple[str, list[Sample], list[float]]] = {}
    for name in names:
        loaded = load_reference(origin, dtype) if name == baseline else load_run(name, dtype=dtype)
        if prompts is None:
            prompts = first_prompts(asked, table, loaded, settings.prompts, settings.max_new_tokens)
        reader = Reader(name, loaded, compute, prompts, kept, settings.seed)
        answers[name] = reader.answers(settings.temperature)
        if name == baseline:
            kl, notes = _kl_to(reader, drawn)
        else:
            own = answers[name] if settings.temperature == 1 else reader.answers(1.0)
            drawn[name] = reader.tokens, own, reader.logps(own)
        del loaded, reader  # before the next one is loaded
    assert prompts is not None
    answers = {baseline: answers[baseline], **answers}
    scores = {name: rewards(prompts, own) for name, own in answers.items()} if rewards else None
    preferences = {
        name: _hard(scores[baseline], scores[name])
        if annotator is None and scores is not None
        else _judged(annotator, prompts, answers[baseline], answers[name], name)
        for name in answers
        if name != baseline
    }
    try:
        models, compared = compare_answers(prompts.ids, prompts.texts, answers, baseline, preferences, scores, kl)
    except ValueError as error:
        raise AlignError(str(error)) from error
    about = {
        **settings.model_dump(),
        "prompts": len(prompts.rows),
        "length_control": "sigmoid(theta + phi tanh(d / sd(d))) at d = 0, characters",
        "kl_estimator": "mean of log pi - log pi_ref over answers drawn at temperature 1 (k1)",
    }
    return compared_result("generation", models, compared, prompts.facts, baseline, about, notes=notes)


def show(result: Mapping[str, Any]) -> None:
    """Print a line a model, and what is clear."""
    console = printer()
    console.print(
        f"{result['n']:,} prompts of {result['data']['source']} against {result['reference']}", soft_wrap=True
    )
    for columns in SHOWN:
        show_metrics(console, result["models"], columns)
        console.print()
    show_comparisons(console, result["comparisons"], "+.3g")
    for name, found in result["models"].items():
        aside = found["metrics"].get("set_aside", {"value": 0})["value"]
        if aside:
            console.print(f"{name}: the annotator set aside {aside:.1%} of its pairs", soft_wrap=True)
    for note in result["notes"]:
        console.print(note, soft_wrap=True)


def _annotator(settings: Settings) -> ParsedAnnotator | None:
    if settings.annotator is None:
        if settings.reward is None:
            what = "is missing: who judges? annotator.reward=module:function annotator.temperature=0.1, or reward=…"
            raise ConfigError("align eval", [("annotator", what)])
        return None
    try:
        return parse_annotator(settings.annotator)
    except ExpressionError as error:
        where = ".".join(filter(None, ("annotator", error.where)))
        raise ConfigError("align eval", [(where, error.problem)]) from error


def _kl_to(
    baseline: Reader, drawn: Mapping[str, tuple[str, Sequence[Sample], Sequence[float]]]
) -> tuple[dict[str, LogRatios], list[str]]:
    """Log-ratios of answers that models drew, and why there are none of some.

    Args:
        drawn: of each model by which tokens it reads, its answers, and their log-probs.
    """
    found, notes = dict[str, LogRatios](), list[str]()
    for name, (tokens, answers, logps) in drawn.items():
        if tokens != baseline.tokens:
            notes.append(f"{name}: no KL to {baseline.name}, which reads other tokens")
            continue
        theirs = baseline.logps(answers, f"answers of {name}")
        nats = [one - other for one, other in zip(logps, theirs, strict=True)]
        found[name] = LogRatios(nats, [len(answer.tokens) for answer in answers], 1.0)
    return found, notes


def _hard(before: Sequence[float], after: Sequence[float]) -> list[float | None]:
    return [0.5 if new == old else float(new > old) for old, new in zip(before, after, strict=True)]


def _judged(
    annotator: Annotator | None, prompts: Prompts, before: Sequence[Sample], after: Sequence[Sample], name: str
) -> list[float | None]:
    """Probability that the answer after is preferred to the one before; None where the pair was set aside."""
    assert annotator is not None
    found: list[float | None] = []
    contents, columns = prompts.contents, prompts.columns
    with progress(f"judging, {name}", len(contents)) as advance:
        for start in range(0, len(contents), TOGETHER):
            part = slice(start, start + TOGETHER)
            groups = [
                [as_answer(prompt, one.text), as_answer(prompt, two.text)]
                for prompt, one, two in zip(contents[part], before[part], after[part], strict=True)
            ]
            try:
                verdicts = annotator(contents[part], groups, {key: values[part] for key, values in columns.items()})
            except AnnotatorError as error:
                raise AlignError(f"annotator {error}") from error
            values = verdicts.preference[:, 1, 0].tolist()
            found += [None if value != value else value for value in values]
            advance(len(groups))
    return found
