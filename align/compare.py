"""Runs, their checkpoints and other models on one pair data set: ``align eval``.

Models are loaded one after the other, so that memory holds one at a time. A run stands for its checkpoints, in their
order, and what it ended in. Pairs, token ids and log-probs are those of training and of a run's own evaluations.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from align.data.report import fault_report, write_rejected
from align.data.rows import Fault
from align.data.splits import Split, read_split
from align.data.tokenize import TokenizedPair, tokenize_pairs
from align.errors import AlignError, ConfigError
from align.evals.displacement import displacement_difference, displacement_suite, gained_tokens, largest_decreases
from align.evals.result import SCHEMA
from align.evals.statistics import bootstrap_interval
from align.heldout import first_tokens, pair_logps
from align.losses import PairLogps
from align.models.hardware import resolve_dtype
from align.models.load import LoadedModel, Origin, load_run, origin_of
from align.models.scoring import attach_scoring, why_not_shared_prompt
from align.tracking.run_folder import checkpoint_is_complete, checkpoint_step


@dataclass(frozen=True)
class Measured:
    """What one model says of the pairs.

    Attributes:
        logps: of both answers of each.
        first: probability of each token as an answer's first, mean over prompts, (V,).
    """

    logps: PairLogps
    first: torch.Tensor


def compare_displacement(
    models: Sequence[str], source: str, *, reference: str | None, max_length: int | None, rejected: Path
) -> dict[str, Any]:
    """Where each model moved the log-probs of the pairs of ``source``, against one reference.

    Args:
        models: run folders, checkpoints, adapters, model folders, packaged names or hub ids; of a run, its complete
            checkpoints and its end.
        source: pairs, as ``align.data.load.read_rows`` takes them.
        reference: the model that the others are compared with; None: what all of them were trained from.
        max_length: limit of prompt and answer, tokens; None: the reference's own.
        rejected: where to write rows that cannot be used, if there are any.

    Returns:
        ``{suite, schema, n, data, reference, models, decreases}``: ``models`` holds the suite's result of each, by
        name, with ``difference``: how much more it moved than the first one, paired; ``decreases`` has, of each run
        with a checkpoint, the largest decrease of the chosen answers' probability between two of its steps.

    Raises:
        AlignError: a model cannot be loaded, reads other tokens than the reference, or no row can be used.
    """
    steps = {name: _steps(name) for name in dict.fromkeys(models)}
    names = list(dict.fromkeys(step for several in steps.values() for step in several))
    origin = _reference(names, reference)
    dtype, compute = _precision(names, origin)
    base = load_run(origin, dtype=dtype) if isinstance(origin, str) else origin.load(dtype=dtype)
    limit = max_length or getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
    split = read_split(source, base.tokenizer, limit, kind="pairs")
    _tell_faults(split, rejected)
    pairs: list[TokenizedPair] = split.tokenized.rows  # type: ignore[assignment]
    ids, groups = [pair.row_id for pair in pairs], [json.dumps(row.prompt) for row in split.used]
    reference_name = origin if isinstance(origin, str) else " with ".join(filter(None, (origin.name, origin.adapter)))
    before = _measure(base, pairs, reference_name, compute)
    decode = base.tokenizer.decode
    del base
    found: dict[str, Any] = {}
    logps: dict[str, PairLogps] = {}
    for name in names:
        loaded = load_run(name, dtype=dtype)
        _check_tokens(name, loaded, split, limit)
        after = _measure(loaded, pairs, name, compute)
        del loaded
        logps[name] = after.logps
        gained = gained_tokens(before.first, after.first, decode)
        found[name] = displacement_suite(after.logps, before.logps, ids, groups=groups, gained=gained)
        found[name]["difference"] = (
            displacement_difference(after.logps, logps[names[0]], before.logps, groups=groups)
            if name != names[0]
            else None
        )
    return {
        "suite": "displacement",
        "schema": SCHEMA,
        "n": len(pairs),
        "data": split.facts,
        "reference": reference_name,
        "models": found,
        "decreases": {
            name: _decreases([before.logps, *(logps[step] for step in several)], groups)
            for name, several in steps.items()
            if len(several) > 1
        },
    }


def _steps(name: str) -> list[str]:
    """The checkpoints of a run and the run itself, which stands for its end; of anything else, itself."""
    folder = Path(name).expanduser()
    if not (folder / "config.resolved.yaml").is_file():
        return [name]
    checkpoints = sorted(filter(checkpoint_is_complete, folder.glob("checkpoint-*")), key=checkpoint_step)
    ended = (folder / "adapter").is_dir() or (folder / "model").is_dir()
    if not checkpoints and not ended:
        raise AlignError(f"{name}: this run has neither a checkpoint nor trained weights yet; wait for the first one")
    return [*map(str, checkpoints), *([name] if ended else [])]


def _reference(names: Sequence[str], given: str | None) -> Origin | str:
    if given is not None:
        return given
    origins = {name: origin_of(name) for name in names}
    plain = [name for name, origin in origins.items() if origin is None]
    if plain:
        what = f"is missing: {plain[0]} is neither a run nor an adapter, so what it was trained from is not known"
        raise ConfigError("align eval", [("--reference", what)])
    different = list(dict.fromkeys(origin for origin in origins.values() if origin is not None))
    if len(different) > 1:
        started = " and ".join(origin.adapter or origin.name for origin in different[:2])
        raise ConfigError("align eval", [("--reference", f"is missing: the models were trained from {started}")])
    return different[0]


def _precision(names: Sequence[str], reference: Origin | str) -> tuple[str, torch.dtype]:
    """The dtype of weights and the one of products, as in training and in its evaluations.

    Where whole models are compared, their weights are in float32: bf16 would round small steps of training away.
    """
    asked = next((origin.dtype for origin in map(origin_of, names) if origin is not None), "auto")
    compute, _ = resolve_dtype(asked)
    adapters = isinstance(reference, Origin) and all(map(_is_adapter, names))
    return asked if adapters else "float32", compute


def _is_adapter(name: str) -> bool:
    """Whether a run or a checkpoint of one ended in an adapter."""
    folder = Path(name).expanduser()
    return (folder / "adapter_config.json").is_file() or (folder / "adapter").is_dir()


def _tell_faults(split: Split, rejected: Path) -> None:
    faults: list[Fault] = split.faults
    rejected.unlink(missing_ok=True)  # of an earlier comparison under this name
    if faults:
        write_rejected(rejected, faults)
        print(fault_report(faults, split.table.counts["rows"], rejected))
    if not split.tokenized.rows:
        raise AlignError(f"{split.table.source}: no pair can be used, so there is nothing to compare")


def _check_tokens(name: str, loaded: LoadedModel, split: Split, max_length: int | None) -> None:
    """Log-probs of other tokens cannot be compared."""
    rows: Any = split.table.rows
    if tokenize_pairs(rows, loaded.tokenizer, max_length).rows != split.tokenized.rows:
        raise AlignError(
            f"{name} reads other tokens than the reference (another tokenizer or chat template), so that their "
            "log-probs are not of the same answers: compare models of one family"
        )


def _measure(loaded: LoadedModel, pairs: Sequence[TokenizedPair], name: str, compute: torch.dtype) -> Measured:
    model, pad = loaded.model, int(loaded.tokenizer.pad_token_id)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    attach_scoring(inner)
    with torch.autocast(model.device.type, compute, enabled=compute != torch.float32):
        shared = why_not_shared_prompt(inner) is None
        logps = pair_logps(model, pairs, name, pad_token_id=pad, shared_prompt=shared)
        return Measured(logps, first_tokens(model, pairs, pad_token_id=pad))


def _decreases(steps: Sequence[PairLogps], groups: Sequence[str]) -> dict[str, Any]:
    decreases = largest_decreases([step.chosen for step in steps])
    mean = bootstrap_interval(decreases, groups=groups)
    return {"steps": len(steps), "mean": mean.as_dict(), "largest": float(decreases.max())}
