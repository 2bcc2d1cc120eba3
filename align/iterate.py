"""Training in rounds: answers to all prompts, what they are worth, a run on them, and again from where it ended.

    output/round-1/prompts.jsonl    what is answered, with the columns that the annotator asks for
    output/round-1/answers.jsonl    K answers a prompt by the policy as it is then, at temperature 1
    output/round-1/scored.jsonl     with scores and win rates, each answer against the others
    output/round-1/run/             the run on them; its reference is the policy that gave the answers
    output/round-2/...
    output/metrics.jsonl            one line a round
    output/eval/generation.json     the model before the first round and after the last; a round's own is of that round

Every stage goes on where it stopped, so that the same command goes on with the whole.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from align.answering import kept_answers
from align.config.iterate import IterateSpec
from align.config.load import config_hash, resolved_yaml
from align.config.schema import ModelSpec, Recipe
from align.data.report import fault_report
from align.data.splits import Split
from align.errors import AlignError
from align.evaluate import TRAINED, UNTRAINED, compared_answers
from align.generate import Answerer, Settings, answer_file
from align.models.load import LoadedModel, load_policy, load_tokenizer
from align.models.memory import let_go
from align.run import read_splits, same_data, train
from align.score.annotated import AnnotatorScorer
from align.score.run import score_data
from align.tracking.files import write_json, write_text
from align.tracking.manifest import run_facts
from align.tracking.progress import progress
from align.tracking.run_folder import RunFolder, read_manifest

console = Console(stderr=True)

JUDGED_TOGETHER = 16
"""Prompts whose verdicts are kept at once, and asked for again where the stage stops among them."""


def train_rounds(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, source: str, command: Sequence[str]) -> Path:
    """Run a recipe with section ``iterate``.

    Args:
        source: where it was read, for messages and the manifests.
        command: the command line, for the manifests.

    Returns:
        The run folder of the last round.

    Raises:
        AlignError: a stage cannot start or go on; the message says what to do.
        KeyboardInterrupt: it was interrupted; what is done is kept.
    """
    assert recipe.iterate is not None
    with RunFolder(recipe.output) as folder:
        _check_rounds(folder, recipe)
        folder.open_or_resume(config_hash(recipe), recipe.resume)
        write_text(folder.path / "config.resolved.yaml", resolved_yaml(recipe))
        splits = read_splits(recipe, tokenizer, folder.path)
        same_data(folder, splits)
        seed = int(recipe.training.get("seed", 42))
        facts = {name: split.facts for name, split in splits.items()}
        folder.update_manifest(**run_facts(command, seed), recipe=source, data=facts)
        model, run = recipe.model, folder.path
        for number in range(1, recipe.iterate.rounds + 1):
            at = folder.path / f"round-{number}"
            console.print(f"round {number} of {recipe.iterate.rounds}: {at}", highlight=False)
            if not _is_finished(run := at / "run"):
                prompts = _write_prompts(splits["train"], recipe.iterate.prompts, number, seed, at)
                _answer(recipe.iterate, model, prompts, at / "answers.jsonl", seed * 1_000_003 + number)
                _judge(recipe.iterate, at)
                train(_of_round(recipe, model, number, at), source=source, command=command)
            folder.log(number, _summary(at))
            model = _trained(model, run)
        if "generation" in recipe.evals:
            _evaluate(recipe, folder.path, run)
        _link(run, folder.path)
        folder.end("finished")
    return run


def _check_rounds(folder: RunFolder, recipe: Recipe) -> None:
    """Rounds of another recipe are not gone on with, whatever they hold by now; finished ones are where more are asked
    for.
    """
    assert recipe.iterate is not None
    begun = folder.has_manifest and any(folder.path.glob("round-*"))
    if begun and (theirs := str(folder.manifest.get("recipe_hash"))) != config_hash(recipe):
        raise AlignError(
            f"{folder.path} holds rounds of another recipe ({theirs[:12]} there, {config_hash(recipe)[:12]} here): "
            "choose another output, or delete the folder"
        )
    wanted = folder.path / f"round-{recipe.iterate.rounds}" / "run"
    if begun and recipe.resume == "auto" and folder.manifest["status"] == "finished" and not _is_finished(wanted):
        folder.update_manifest(status="interrupted")


def _write_prompts(split: Split, count: int | None, number: int, seed: int, at: Path) -> Path:
    """The prompts of a round, with the columns that the annotator asks for."""
    rows: list[Any] = list(split.tokenized.rows)
    if count is not None:
        random.Random(seed).shuffle(rows)
        rows = [rows[place % len(rows)] for place in range((number - 1) * count, number * count)]
    at.mkdir(exist_ok=True)
    lines = (json.dumps({"prompt": row.prompt, **row.columns}, ensure_ascii=False, default=str) for row in rows)
    write_text(at / "prompts.jsonl", "".join(f"{line}\n" for line in lines))
    return at / "prompts.jsonl"


def _answer(spec: IterateSpec, model: ModelSpec, prompts: Path, output: Path, seed: int) -> None:
    """K answers to every prompt by the policy, drawn from the law that training scores them by."""
    settings = Settings(model.adapter or model.name, spec.max_new_tokens, 1.0, seed, raw=True, n=spec.answers)

    def load(settings: Settings, _: object) -> Answerer:
        own: dict[str, Any] = model.model_dump(include={"dtype", "attention", "trust_remote_code"})
        policy, reason = load_policy(model.name, model.adapter, **own)
        policy.to("cuda" if torch.cuda.is_available() else "cpu")
        tokenizer = load_tokenizer(model.name, trust_remote_code=model.trust_remote_code)
        return Answerer(settings, LoadedModel(policy, tokenizer, reason))

    total = sum(1 for _ in prompts.open(encoding="utf-8"))
    seen = 0
    with progress("answers to prompts", total) as advance:

        def tell(done: int, _: int) -> None:
            nonlocal seen
            advance(done - seen)
            seen = done

        answered = answer_file(settings, str(prompts), output, tell, make=load)
    if answered.faults:
        console.print(fault_report(answered.faults, total), highlight=False)
    let_go()


def _judge(spec: IterateSpec, at: Path) -> None:
    """What the answers are worth against each other."""
    where, seconds = "iterate.annotator", spec.annotator_seconds
    scorer = AnnotatorScorer(spec.annotator, "align train", where, seconds, sets_aside=False)
    outcome = score_data(str(at / "answers.jsonl"), [scorer], at / "scored.jsonl", shard_rows=JUDGED_TOGETHER)
    if outcome is not None and outcome.faults:
        console.print(fault_report(outcome.faults, outcome.counts["rows"], outcome.rejected), highlight=False)
    let_go()


def _of_round(recipe: Recipe, model: ModelSpec, number: int, at: Path) -> Recipe:
    """The recipe of a round's run: the method on the groups of the round, from the model of the round before."""
    tracking = recipe.tracking
    if tracking.wandb is not None:
        whole = tracking.wandb.name or Path(recipe.output).resolve().name
        own = {"group": tracking.wandb.group or whole, "name": f"{whole}-round-{number}"}
        tracking = tracking.model_copy(update={"wandb": tracking.wandb.model_copy(update=own)})
    data = recipe.data.model_copy(update={"train": str(at / "scored.jsonl")})
    changes = {"model": model, "data": data, "tracking": tracking, "output": str(at / "run"), "iterate": None}
    return recipe.model_copy(update=changes)


def _is_finished(run: Path) -> bool:
    return (run / "manifest.json").exists() and read_manifest(run).get("status") == "finished"


def _trained(model: ModelSpec, run: Path) -> ModelSpec:
    """What the next round starts from."""
    if model.lora is None and model.adapter is None:
        return model.model_copy(update={"name": str(run / "model")})
    return model.model_copy(update={"lora": None, "adapter": str(run / "adapter")})


def _evaluate(recipe: Recipe, folder: Path, last: Path) -> None:
    """What all rounds together changed: the generation suite from before the first to after the last; no KL.

    Both runs have kept their answers, so that nothing is drawn again.
    """
    first = folder / "round-1" / "run"
    shown = json.loads((first / "eval" / "generation.json").read_text(encoding="utf-8"))
    prompts = [row["prompt"] for row in shown["rows"]]
    before, after = (kept_answers(run / "eval" / "answers.jsonl") for run in (first, last))
    places = range(len(prompts))
    result = compared_answers(
        recipe,
        prompts,
        [before[UNTRAINED, place] for place in places],
        [after[TRAINED, place] for place in places],
    )
    (folder / "eval").mkdir(exist_ok=True)
    write_json(folder / "eval" / "generation.json", result | {"data": shown["data"]})


def _link(run: Path, folder: Path) -> None:
    """The weights of the last round as those of the whole, where ``align generate`` looks for them."""
    for name in ("adapter", "merged", "model"):
        if (run / name).is_dir():
            (folder / name).unlink(missing_ok=True)  # to the last round of fewer
            (folder / name).symlink_to((run / name).relative_to(folder), target_is_directory=True)


def _summary(at: Path) -> dict[str, float]:
    """Of a round's answers: how many tokens, how many ended, how far the best and the worst are apart."""
    rows = [json.loads(line) for line in (at / "scored.jsonl").read_text("utf-8").split("\n")[:-1]]
    answers = [ids for row in rows for ids in row["completion_ids"]]
    finished = [one for row in rows for one in row["finished"]]
    return {
        "answers/prompts": float(len(rows)),
        "answers/tokens": sum(map(len, answers)) / len(answers),
        "answers/finished": sum(finished) / len(finished),
        "answers/distinct": sum(len(set(row["completions"])) for row in rows) / len(answers),
        "answers/score_range": sum(max(row["scores"]) - min(row["scores"]) for row in rows) / len(rows),
        "answers/win_rate_range": sum(max(row["win_rates"]) - min(row["win_rates"]) for row in rows) / len(rows),
    }
