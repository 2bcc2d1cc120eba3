"""``align score``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from align.errors import ConfigError

from .disk import writing_to

if TYPE_CHECKING:
    from align.score.run import Outcome
    from align.score.scorers import AnswerScorer, Policy, Scorer


def score(
    source: Annotated[
        str,
        typer.Argument(metavar="DATA", help="JSONL, JSON, CSV, Parquet, a folder, a hub id, or align:NAME/SPLIT."),
    ],
    specs: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="[NAME=]SPEC",
            help="A rule (module:function), a reward model (its folder, its run, a hub id; FOLDER@WHO where each "
            "annotator has a reward), or what --model says: logps, ches, ches_ln, last_inner, edit; several with "
            "commas, or by giving the option again.",
        ),
    ] = None,
    annotator: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="Add scores and win_rates of several answers against each other: a rule, a reward model, or YAML, "
            "as it stands or in a file, such as '{gpm: runs/gpm}'.",
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="What to write: .jsonl or .parquet.")] = Path(
        "scored.jsonl"
    ),
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Policy, for logps, ches and reference answers: run, folder, name or hub id."
        ),
    ] = None,
    quantile: Annotated[
        float | None,
        typer.Option(
            "--reference-quantile",
            metavar="Q",
            help="Add NAME_reference: this quantile of the rewards of the model's own answers to the prompt.",
        ),
    ] = None,
    canned: Annotated[
        str | None,
        typer.Option(
            "--reference-canned", metavar="TEXT", help="Add NAME_reference: the reward of this answer to the prompt."
        ),
    ] = None,
    regression: Annotated[
        str | None,
        typer.Option(
            "--reference-regression",
            metavar="DATA",
            help="Add NAME_reference: predicted from the prompt, as the model sees it, by a regression on the prompts "
            "of DATA, which has this column.",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=2, help="Reference answers a prompt.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest reference answer, tokens.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the reference answers.")] = 0,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Limit of prompt and answer under --model, tokens; else its own.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of one forward pass.")] = 16,
    dtype: Annotated[str, typer.Option(help="Of all models: auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Add columns of rewards, log-probs and similarity to a data set.

    A pair gets NAME_chosen and NAME_rejected, a single answer NAME_completion; ches and its kin compare the answers of
    a pair, and get one column NAME. An annotator compares the answers of align generate --n. Rows that cannot be
    scored are set aside with the reason. The same command goes on with what was interrupted.

        align score pairs.jsonl --with align.rewards.rules:everyday_answer,runs/reward_bt -o scored.jsonl

        align score pairs.jsonl --with ches,ches_ln,logps --model smollm2-135m-instruct -o scored.jsonl

        align score answers.jsonl --annotator runs/reward_gpm -o groups.jsonl
    """
    _check_options(source, output, dtype, quantile, canned, regression)
    from align.score.run import check_columns, identity_at, processes, score_data
    from align.score.scorers import OF_THE_MODEL, Policy, named_specs
    from align.tracking.files import make_room

    parts = [part for given in specs or [] for part in given.split(",") if part]
    named = named_specs(parts) if parts or annotator is None else {}
    judging = _annotator(annotator) if annotator is not None else []
    asked = {"--reference-quantile": quantile, "--reference-regression": regression}
    needy = [spec for spec in named.values() if spec in OF_THE_MODEL]
    needy += [option for option, value in asked.items() if value is not None]
    if needy and model is None:
        raise ConfigError("align score", [("--model", f"is missing: {needy[0]} needs it")])
    check_columns(source, named)
    make_room(output)
    identity_at(output)  # refuses a file that is none of ours
    policy = None
    if model is not None and needy:
        device = processes().device
        policy = Policy.load(model, dtype=dtype, max_length=max_length, batch_size=batch_size, device=device)
    scorers = [*_scorers(named, policy, dtype, batch_size), *judging]
    if (quantile, canned, regression) != (None, None, None):
        from align.score.references import CannedReferences, PredictedReferences, SampledReferences
        from align.trainers.references import Draws

        rewards = _with_references(scorers)
        if canned is not None:
            scorers.append(CannedReferences(rewards, canned))
        elif policy is not None and regression is not None:
            scorers.append(PredictedReferences(rewards, policy, regression))
        elif policy is not None and quantile is not None:
            draws = Draws(samples, max_new_tokens, seed, batch_size)
            scorers.append(SampledReferences(rewards, policy, quantile, draws))
    try:
        with writing_to(output):
            outcome = score_data(source, scorers, output, batch_size=batch_size)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted: whole shards are kept; the same command goes on") from None
    if outcome is not None:
        _show(outcome)


def _check_options(
    source: str, output: Path, dtype: str, quantile: float | None, canned: str | None, regression: str | None
) -> None:
    problems = []
    if dtype not in (known := ("auto", "float32", "bfloat16", "float16")):
        problems.append(("--dtype", f"{dtype!r} is none of {', '.join(known)}"))
    if quantile is not None and not 0 < quantile < 1:
        problems.append(("--reference-quantile", f"{quantile} is not between 0 and 1, without the ends"))
    if sum(option is not None for option in (quantile, canned, regression)) > 1:
        what = "quantile, canned answer and regression are three ways to one column: give one"
        problems.append(("--reference-...", what))
    if canned is not None and not canned.strip():
        problems.append(("--reference-canned", "is empty: the text of an answer"))
    if output.suffix not in (".jsonl", ".parquet"):
        problems.append(("--output", f"{output}: end it in .jsonl or .parquet"))
    if Path(source).absolute() == output.absolute():
        problems.append(("--output", f"{output} is the data itself; name another file"))
    if problems:
        raise ConfigError("align score", problems)


def _scorers(named: dict[str, str], policy: Policy | None, dtype: str, batch_size: int) -> list[Scorer]:
    from align.score.policy import PolicyScorer
    from align.score.run import processes
    from align.score.scorers import OF_THE_MODEL, ModelScorer, RuleScorer, reward_folder

    scorers: list[Scorer] = []
    words = {name: spec for name, spec in named.items() if spec in OF_THE_MODEL}
    if words and policy is not None:
        scorers.append(PolicyScorer(words, policy))
    for name, spec in named.items():
        if name in words:
            continue
        folder = reward_folder(spec)
        if folder is None:
            scorers.append(RuleScorer(name, spec))
        else:
            device = processes().device
            scorers.append(ModelScorer(name, folder, dtype=dtype, batch_size=batch_size, device=device))
    return scorers


def _annotator(given: str) -> list[Scorer]:
    """The annotator of ``--annotator``: YAML as it stands, or the file that holds it."""
    from align.config.read import parse_yaml
    from align.score.annotated import AnnotatorScorer

    path = Path(given).expanduser()
    is_file = given.endswith((".yaml", ".yml"))
    if is_file and not path.is_file():
        raise ConfigError("align score", [("--annotator", f"{given}: no such file")])
    text = path.read_text("utf-8") if is_file else given
    return [AnnotatorScorer(parse_yaml(text, given), "align score", "--annotator")]


def _with_references(scorers: list[Scorer]) -> list[AnswerScorer]:
    """The rewards of which one answer by itself can be the reference."""
    from align.score.scorers import ModelScorer, RuleScorer

    rewards = [one for one in scorers if isinstance(one, RuleScorer | ModelScorer)]
    problems = [
        (f"--with {one.name}", "is a gpm, which compares answers and has no reference: leave out --reference-...")
        for one in rewards
        if one.reward.compares
    ]
    if not rewards:
        problems = [("--with", "names no reward of which a reference can be taken: a rule or a reward model")]
    if problems:
        raise ConfigError("align score", problems)
    return list(rewards)


def _show(outcome: Outcome) -> None:
    from align.data.report import fault_report
    from align.score.rows import ONE_TOKEN
    from align.score.run import MOVED, OTHER_FLAGS

    counts = outcome.counts
    cut = f" · {counts['cut']:,} answers cut to fit" if counts["cut"] else ""
    left = f" · {counts['left_out']:,} reference answers without a reward left out" if counts["left_out"] else ""
    print(f"{counts['scored']:,} of {counts['rows']:,} rows scored · {counts['set_aside']:,} set aside{cut}{left}")
    if counts["moved"]:
        print(f"{counts['moved']:,} rows {MOVED}")
    if (flagged := outcome.columns.pop(ONE_TOKEN, None)) and (count := round(flagged["n"] * flagged["mean"])):
        print(f"{count:,} pairs whose answers are single tokens: CHES says little of them (column {ONE_TOKEN})")
    if counts["other_flags"]:
        print(f"{counts['other_flags']:,} pairs {OTHER_FLAGS}")
    width = max((len(name) for name in outcome.columns), default=0)
    for name, found in outcome.columns.items():
        nulls = f"{found['null']:,} without a number" if found["null"] else ""
        numbers = f"mean {found['mean']:.4g}  ({found['min']:.4g} to {found['max']:.4g})" if found["n"] else ""
        print(f"  {name:<{width}}  {'  '.join(filter(None, (numbers, nulls)))}")
    if outcome.faults:
        print(fault_report(outcome.faults, counts["rows"], outcome.rejected))
    print(outcome.output)
