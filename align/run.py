"""A run, from a recipe to a report.

The order: lock the folder, read and check the data, load the model, train, evaluate, write adapter and merged model,
report and model card. Whatever was finished is kept: a second call with the same recipe goes on where the first one
stopped, from the last checkpoint, past evaluations that are already on disk.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedTokenizerBase, Trainer, set_seed

from align.config.load import config_hash, resolved_yaml
from align.config.schema import Recipe
from align.data.report import fault_report, write_rejected
from align.data.splits import Split, read_split
from align.errors import AlignError
from align.evaluate import check_testable, evaluate
from align.losses import SequenceLogps
from align.models.load import load_tokenizer
from align.models.scoring import sequence_logps
from align.models.threads import choose_threads
from align.reports.card import write_card
from align.reports.eval_figures import result_images
from align.reports.report import render_report
from align.rewards.models import RewardModel
from align.run_pal import COMPARED, compare_trained, run_pal
from align.score.preflight import preflight as describe_risk
from align.score.training import filter_training
from align.tracking.callback import tracked
from align.tracking.files import write_json, write_text
from align.tracking.manifest import run_facts
from align.tracking.run_folder import RunFolder
from align.tracking.telemetry import disable_telemetry
from align.tracking.wandb import WandbMirror
from align.tracking.wandb_eval import send_evaluation
from align.trainers.build import build, training_arguments
from align.trainers.interrupt import interruptible
from align.trainers.plan import choose_checkpointing, rows_of

console = Console(stderr=True)
PROBED = 16  # answers


def train(recipe: Recipe, *, source: str, command: Sequence[str], dry_run: bool = False) -> Path:
    """Run a recipe.

    Args:
        recipe: from ``align.config.load.load_recipe``.
        source: where it was read, for messages and the manifest.
        command: the command line, for the manifest.
        dry_run: show eight tokenised rows with their masks, the steps and a memory estimate, and write nothing.

    Returns:
        The run folder; with section ``iterate`` that of the last round.

    Raises:
        AlignError: the run cannot start or go on; the message says what to do.
        KeyboardInterrupt: it was interrupted; the checkpoint is complete.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise AlignError(
            "align train runs in one process; for several, give the trainer (PairTrainer, ThumbsTrainer) to "
            "accelerate launch from a script"
        )
    disable_telemetry()
    set_seed(recipe.training.get("seed", 42))
    tokenizer = load_tokenizer(recipe.model.name, trust_remote_code=recipe.model.trust_remote_code)
    if dry_run:
        from .dry_run import show_plan  # it reads data by this module

        show_plan(recipe, tokenizer)
        return Path(recipe.output)
    if recipe.iterate is not None:
        from .iterate import train_rounds  # it trains each round by this function

        return train_rounds(recipe, tokenizer, source, command)
    with RunFolder(recipe.output) as run:
        checkpoint = run.open_or_resume(config_hash(recipe), recipe.resume)
        _run(recipe, tokenizer, run, checkpoint, source, command)
    return run.path


def _run(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    run: RunFolder,
    checkpoint: Path | None,
    source: str,
    command: Sequence[str],
) -> None:
    began = time.monotonic()
    write_text(run.path / "config.resolved.yaml", resolved_yaml(recipe))
    splits = read_splits(recipe, tokenizer, run.path)
    if checkpoint is None:
        for leftover in ("eval", COMPARED):  # of weights that are gone
            shutil.rmtree(run.path / leftover, ignore_errors=True)
    else:
        same_data(run, splits)
    before = run.manifest.get("speed", {}) if checkpoint is not None else {}
    threads = choose_threads(before)
    run.update_manifest(speed=threads.facts)
    console.print(f"threads {threads}", highlight=False, soft_wrap=True)
    if recipe.data.filter is not None:
        splits["train"] = _filter(recipe, tokenizer, splits["train"], run, resumed=checkpoint is not None)
    if recipe.pal is not None and recipe.pal.frozen:
        _run_pal(recipe, splits, run, source, command)
        return
    held_out = splits.get("eval")
    recipe = _decided(recipe, tokenizer, splits["train"], run, before)
    built = build(
        recipe,
        tokenizer,
        splits["train"].dataset(),
        held_out.dataset() if held_out else None,
        run.path,
    )
    trainer = built.trainer
    if checkpoint is not None:
        _same_weights(run, built.facts)
    run.update_manifest(
        **run_facts(command, int(trainer.args.seed)),
        recipe=source,
        data={name: split.facts | built.data.get(name, {}) for name, split in splits.items()},
        **built.facts,
    )
    mirror = _mirror(recipe, run)
    ready = time.monotonic()
    with tracked(trainer, run, mirror), interruptible(trainer):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trained = time.monotonic()
    results = {}
    if held_out and recipe.pal is not None and recipe.evals:
        results = {"pal": compare_trained(recipe, built, held_out, run.path)}
    elif held_out and recipe.evals:
        results = evaluate(recipe, built, tokenizer, held_out, run.path)
    evaluated = time.monotonic()
    _save(recipe, trainer, tokenizer, run)
    timings = {"set_up": ready - began, "train": trained - ready, "eval": evaluated - trained}
    timings["total"] = time.monotonic() - began
    _finish(run, mirror, timings, results)


def _run_pal(recipe: Recipe, splits: dict[str, Split], run: RunFolder, source: str, command: Sequence[str]) -> None:
    """Method pal on a frozen backbone: no trainer of transformers, and no checkpoints, since embeddings are kept."""
    began = time.monotonic()
    facts = run_facts(command, int(recipe.training.get("seed", 42)))
    run.update_manifest(**facts, recipe=source, data={name: split.facts for name, split in splits.items()})
    mirror = _mirror(recipe, run)

    def log(step: int, values: dict[str, float]) -> None:
        run.log(step, values)
        if mirror is not None:
            mirror.log(step, values)

    done = run_pal(recipe, splits, log)
    run.update_manifest(**done.facts)
    results = {} if done.result is None else {"pal": done.result}
    for name, result in results.items():
        (run.path / "eval").mkdir(exist_ok=True)
        write_json(run.path / "eval" / f"{name}.json", result)
    _write_folder(run.path / "model", done.model)
    _finish(run, mirror, {**done.seconds, "total": time.monotonic() - began}, results)


def _finish(run: RunFolder, mirror: WandbMirror | None, timings: dict[str, float], results: dict[str, Any]) -> None:
    """Timings, status, card, report and mirror of a run that has trained and evaluated."""
    run.update_manifest(timings={f"{name}_seconds": round(value, 1) for name, value in timings.items()})
    run.end("finished")
    write_card(run.path)
    report = render_report(run.path)
    if mirror is not None:
        mirror.summary(results)
        if "generation" in results:
            mirror.samples(results["generation"]["rows"][:20])
        mirror.file(report)
        sync = mirror.finish()
        if mirror.place.mode != "disabled":
            for name, result in results.items():
                place = replace(mirror.place, name=f"{mirror.place.name}-{name}")
                send_evaluation(result, [run.path / "eval" / f"{name}.json"], result_images(result), place)
        if sync:
            console.print(f"W&B, offline: {sync}", soft_wrap=True)


def preflight(recipe: Recipe, rows: int) -> str:
    """What ``rows`` of the training pairs say of likelihood displacement, in words; nothing is written."""
    disable_telemetry()
    tokenizer = load_tokenizer(recipe.model.name, trust_remote_code=recipe.model.trust_remote_code)
    return describe_risk(recipe, tokenizer, read_splits(recipe, tokenizer, None)["train"], rows)


def read_splits(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, run: Path | None) -> dict[str, Split]:
    """Training and held-out data, checked. With a run folder, what is set aside is written there first.

    Raises:
        AlignError: a source cannot be read, or too much of it is bad.
    """
    spec = recipe.data
    sources = {"train": spec.train, **({"eval": spec.eval} if spec.eval else {})}
    wanted = {"train": (recipe.data_kind, recipe.data_rules), "eval": recipe.held_out}
    splits = {
        name: read_split(path, tokenizer, spec.max_length, kind=wanted[name][0], rules=wanted[name][1])
        for name, path in sources.items()
    }
    faults = [fault for split in splits.values() for fault in split.faults]
    kept_in = run / "rejected_rows.jsonl" if run is not None else None
    if kept_in is not None:
        kept_in.unlink(missing_ok=True)  # of a first call, before the data was mended
        if faults:
            write_rejected(kept_in, faults)
    for split in splits.values():
        if split.faults:
            console.print(fault_report(split.faults, split.table.counts["rows"], kept_in), highlight=False)
        split.check(spec.max_bad_fraction)
    if "eval" in splits:
        check_testable(recipe, splits)
    return splits


def _filter(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, split: Split, run: RunFolder, *, resumed: bool
) -> Split:
    """What ``data.filter`` keeps; a run goes on with the rows that it started with, or not at all."""
    kept, facts, words = filter_training(recipe, tokenizer, split, run.path)
    before = run.manifest.get("filter", {}).get("kept_ids")
    if resumed and before is not None and before != facts["kept_ids"]:
        raise AlignError(
            f"{split.table.source}: data.filter keeps other rows than when {run.path} was started: bring the old "
            "scores back, or choose another output"
        )
    run.update_manifest(filter=facts)
    console.print(words, highlight=False, soft_wrap=True)
    kept.check(recipe.data.max_bad_fraction)
    return kept


def _decided(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, split: Split, run: RunFolder, before: Mapping[str, Any]
) -> Recipe:
    """The recipe with what it leaves to the run; ``before``: section ``speed`` of the run that is gone on with."""
    arguments = training_arguments(recipe, run.path, tokenizer)
    checkpointing = choose_checkpointing(recipe, arguments, rows_of(recipe, split), before)
    run.update_manifest(speed=checkpointing.facts)
    console.print(f"gradient checkpointing {checkpointing}", highlight=False, soft_wrap=True)
    return checkpointing.applied(recipe)


def same_data(run: RunFolder, splits: dict[str, Split]) -> None:
    """A run goes on with the data that it started with, or not at all."""
    known = run.manifest.get("data", {})
    for name, split in splits.items():
        before = known.get(name, {}).get("sha256")
        if before is not None and before != split.table.fingerprint():
            raise AlignError(
                f"{split.table.source} has changed since {run.path} was started ({before[:12]} then, "
                f"{split.table.fingerprint()[:12]} now): bring the old data back, or choose another output"
            )


def _same_weights(run: RunFolder, facts: dict[str, Any]) -> None:
    """A run goes on from the weights that it started from, or not at all."""
    for part in ("model", "reference"):
        before, now = (section.get(part, {}).get("weights_sha256") for section in (run.manifest, facts))
        if before is not None and before != now:
            raise AlignError(
                f"{facts['model']['name']}: the {part} has other weights than when {run.path} was started "
                f"({before[:12]} then, {str(now)[:12]} now; in {facts['model']['dtype']}): bring the old ones back, "
                "or choose another output"
            )


def _mirror(recipe: Recipe, run: RunFolder) -> WandbMirror | None:
    wandb = recipe.tracking.wandb
    if wandb is None:
        return None
    return WandbMirror(
        run, recipe.model_dump(), mode=wandb.mode, project=wandb.project, group=wandb.group, name=wandb.name
    )


def _save(recipe: Recipe, trainer: Trainer, tokenizer: PreTrainedTokenizerBase, run: RunFolder) -> None:
    """The adapter and the merged model, or the model alone after full training; each folder whole or not at all.

    Merging rounds the weights to their dtype: what that does to the log-probs of training answers is measured
    and stands in the manifest as ``merged.mean_change``, nats a token.
    """
    if recipe.reward is not None or recipe.pal is not None:
        _save_reward(trainer.reward, trainer, run)
        return
    model = trainer.model
    if not isinstance(model, PeftModel):
        _write_folder(run.path / "model", model, tokenizer)
        return
    # The name that the recipe gave, not where this machine keeps it.
    model.peft_config["default"].base_model_name_or_path = recipe.model.name
    options = {"selected_adapters": ["default"], "save_embedding_layers": False}
    _write_folder(run.path / "adapter", model, tokenizer, **options)
    model.set_adapter("default")
    before = _probe(model, trainer, tokenizer)
    merged = model.merge_and_unload(adapter_names=["default"])
    after = _probe(merged, trainer, tokenizer)
    if before is not None and after is not None:
        change = float(((before.mean - after.mean).abs()).mean())
        run.update_manifest(merged={"mean_change": round(change, 6), "answers": len(before.total)})
    _write_folder(run.path / "merged", merged, tokenizer)


def _save_reward(model: RewardModel, trainer: Trainer, run: RunFolder) -> None:
    """The whole model, an adapter merged into its backbone; ``merged.mean_change`` is in units of its values."""
    if model.config.training == "lora":
        rows = trainer.train_dataset[:PROBED]
        answers = rows["chosen_ids" if "chosen_ids" in rows else "completion_ids"]
        with trainer.accelerator.autocast():
            before = model.score_ids(rows["prompt_ids"], answers)
            after = model.merge().score_ids(rows["prompt_ids"], answers)
        change = float((before - after).abs().mean())
        run.update_manifest(merged={"mean_change": round(change, 6), "answers": len(answers)})
    _write_folder(run.path / "model", model, model.tokenizer)


def _probe(model: Any, trainer: Trainer, tokenizer: PreTrainedTokenizerBase) -> SequenceLogps | None:
    """Log-probs of the first (chosen) answers that the trainer holds; None where it holds prompts alone."""
    rows = trainer.train_dataset[:PROBED]
    known = ("chosen_ids", "completion_ids", "answer_ids")
    answers = next((name for name in known if name in rows), None)
    if answers is None:
        return None
    if answers == "answer_ids":
        rows[answers] = [several[0] for several in rows[answers]]
    model.eval()
    with trainer.accelerator.autocast():
        return sequence_logps(model, rows["prompt_ids"], rows[answers], pad_token_id=int(tokenizer.pad_token_id))


def _write_folder(folder: Path, model: Any, tokenizer: PreTrainedTokenizerBase | None = None, **options: Any) -> None:
    """Model and, if given, tokenizer, written aside and then named: a kill leaves no half of it."""
    aside = folder.with_name(f".{folder.name}.partial")
    for leftover in (aside, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        model.save_pretrained(aside, **options)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    (aside / "README.md").unlink(missing_ok=True)  # peft's blank form; the run's card stands beside this folder
    aside.replace(folder)
