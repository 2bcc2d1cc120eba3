"""Tasks of lm-evaluation-harness before and after training: what did alignment cost elsewhere (its tax)?

The harness draws the prompts, asks our loaded model and scores each document (its public API, ``simple_evaluate``);
intervals and paired comparisons by document are ours. Task data come from where the task says: most from the hub.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from rich.table import Table
from rich.text import Text

from align.config.explain import nearest
from align.config.section import Section
from align.config.section import Text as Name
from align.errors import AlignError, ConfigError
from align.evals.result import compared_result, suite_result
from align.evals.statistics import Estimate, bootstrap_interval, comparisons, share_interval
from align.models.load import load_run
from align.models.memory import release_freed

from .asked import Asked
from .models import load_reference, name_of, precision, reference_of
from .shown import estimate, printer

PACKAGE = "lm_eval"
RATIOS: dict[str, Callable[[float], float]] = {
    "word_perplexity": lambda nats: math.exp(-nats),
    "byte_perplexity": lambda nats: math.exp(-nats),
    "bits_per_byte": lambda nats: -nats / math.log(2),
}
"""Metrics that the harness makes of all log-probs over all words or bytes."""


class Settings(Section):
    """What is asked; names are those of ``simple_evaluate``."""

    tasks: Annotated[list[Name], Field(min_length=1)]
    """Tasks, groups or tags of the harness, or of ``include_path``."""
    include_path: Path | None = Field(default=None, strict=False)
    """A folder of YAML tasks of your own."""
    limit: int | None = Field(default=None, ge=1)
    """Documents of each task; null: all."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples before each question; null: as many as the task says."""
    apply_chat_template: bool = False
    """Ask in turns of a chat, as chat models were trained."""
    batch_size: int = Field(default=16, ge=1)
    """Rows that are read at once."""
    seed: int = Field(default=0, ge=0)
    """Of few-shot examples, and of answers of tasks that sample."""


def run(asked: Asked, settings: Settings) -> dict[str, Any]:
    """Every task with the reference and with each model; models against the reference, document by document.

    Returns:
        ``align.evals.result.compared_result`` with the reference among the models. Metrics are called ``TASK.METRIC``,
        with the harness's filter behind it where there is one. Of perplexities and bits, which are ratios of sums,
        ``TASK.nats`` of a document is compared. Other metrics that are no mean of numbers by document have neither
        interval nor comparison. ``higher_is_better`` is the harness's own, by metric.

    Raises:
        AlignError: lm-eval is not installed, or a model cannot be loaded.
        ConfigError: an unknown task, or no model.
    """
    asked.require_policies("lm-eval")
    if find_spec(PACKAGE) is None:
        raise AlignError("--suite lm-eval needs lm-evaluation-harness: pip install 'align-lm[lm-eval]'")
    tasks = _tasks(settings)
    names = list(asked.models)
    reference = reference_of(names, asked.reference)
    dtype, compute = precision(names, reference)
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys([name_of(reference), *names]):
        loaded = load_reference(reference, dtype) if name == name_of(reference) else load_run(name, dtype=dtype)
        found[name] = _asked(loaded, tasks, compute, asked.max_length, settings)
        del loaded
        release_freed()
    first = next(iter(found.values()))
    scored = {name: documents(result) for name, result in found.items()}
    for name, (_, rows) in scored.items():
        if _digest(rows) != _digest(scored[name_of(reference)][1]):
            raise AlignError(f"{name} was asked other prompts than the reference (another chat template?)")
    return compared_result(
        "lm-eval",
        {name: _result(found[name], *both, settings) for name, both in scored.items()},
        comparisons({name: values for name, (values, _) in scored.items()}, against=name_of(reference)),
        {"source": " ".join(settings.tasks), "sha256": _digest(next(iter(scored.values()))[1])},
        name_of(reference),
        {**settings.model_dump(mode="json"), "lm_eval": first["lm_eval_version"], "versions": first["versions"]},
        higher_is_better=directions(first),
    )


def documents(result: Mapping[str, Any]) -> tuple[dict[str, list[float]], list[dict[str, Any]]]:
    """What the harness's result says of each document: ``({metric: values}, rows)``.

    Where it gives log-prob and length, the value is ``nats``, minus the log-prob. Other values that are not
    single finite numbers are left out.
    """
    values: dict[str, list[float]] = {}
    rows = []
    for task, samples in sorted(result["samples"].items()):
        for sample in sorted(samples, key=lambda sample: (sample["filter"], sample["doc_id"])):
            row = {"row_id": f"{task}/{sample['doc_id']}", "prompt_sha256": sample["prompt_hash"]}
            found = {}
            for metric in sample["metrics"]:
                value = sample[metric]
                if metric in RATIOS:
                    found[f"{task}.nats"] = -float(value[0])
                elif isinstance(value, bool | int | float) and math.isfinite(value):
                    found[_metric(task, f"{metric},{sample['filter']}")] = float(value)
            for name, value in found.items():
                values.setdefault(name, []).append(value)
            rows.append({**row, **found})
    return values, rows


def ratio(metric: str, samples: Sequence[Sequence[float]]) -> Estimate:
    """One of ``RATIOS`` with its interval, from log-prob and length of each document."""
    nats, lengths = zip(*samples, strict=True)
    found, of = bootstrap_interval(nats, per=lengths), RATIOS[metric]
    low, high = (None if end is None else of(end) for end in (found.high, found.low))  # it falls as log-probs rise
    return Estimate(of(found.value), low, high, found.n)


def directions(result: Mapping[str, Any]) -> dict[str, bool | None]:
    """Whether higher is better, by metric; None where the harness does not say."""
    found: dict[str, bool | None] = {}
    for task in result["samples"]:
        for key in _metrics(result["results"][task]):
            metric = key.partition(",")[0]
            found[_metric(task, key)] = result["higher_is_better"].get(task, {}).get(metric)
            if metric in RATIOS:
                found[f"{task}.nats"] = False
    return found


def show(result: Mapping[str, Any]) -> None:
    """Print every metric of every model, and what training changed."""
    console = printer()
    console.print(Text(f"{result['n']:,} documents of {result['data']['source']}"), soft_wrap=True)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("")
    for name in result["models"]:
        table.add_column(Text(name), justify="right")
    for metric in result["higher_is_better"]:
        entries = [model["metrics"][metric] for model in result["models"].values()]
        table.add_row(Text(metric), *(estimate(entry, ".3f") for entry in entries))
    console.print(table)
    console.print(f"\nChange from {result['reference']}; p after Holm over all", style="dim", soft_wrap=True)
    for one in result["comparisons"]:
        line = f"{one['model']}  {one['metric']}  {estimate(one, '+.3f')}  p {one['p_holm']:.2g}"
        console.print(Text(line, "bold" if one["clear"] else ""), soft_wrap=True)


def _tasks(settings: Settings) -> Any:
    """The harness's table of tasks, once it was seen to hold those that are asked."""
    from lm_eval.tasks import TaskManager

    folder = settings.include_path
    if folder is not None and not folder.is_dir():
        raise ConfigError("align eval", [("include_path", f"'{folder}' is no folder")])
    tasks = TaskManager(include_path=folder)
    for name in settings.tasks:
        if name not in tasks.all_tasks:
            near = nearest(name, tasks.all_tasks)
            hint = f"; did you mean {near}?" if near else "; see lm-eval ls tasks"
            raise ConfigError("align eval", [("tasks", f"'{name}' is no task of lm-evaluation-harness{hint}")])
    return tasks


def _asked(loaded: Any, tasks: Any, compute: Any, max_length: int | None, settings: Settings) -> dict[str, Any]:
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = HFLM(
        pretrained=loaded.model,
        tokenizer=loaded.tokenizer,
        batch_size=settings.batch_size,
        max_length=max_length,
        mixed_precision_dtype=None if compute == torch.float32 else compute,
    )
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    found: dict[str, Any] = simple_evaluate(
        model=model,
        tasks=settings.tasks,
        task_manager=tasks,
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        apply_chat_template=settings.apply_chat_template,
        bootstrap_iters=0,
        **dict.fromkeys(seeds, settings.seed),
    )
    return found


def _result(
    result: Mapping[str, Any], values: Mapping[str, list[float]], rows: list[dict[str, Any]], settings: Settings
) -> dict[str, Any]:
    metrics = {
        name: (share_interval if set(several) <= {0.0, 1.0} else bootstrap_interval)(several)
        for name, several in values.items()
    }
    for task in result["samples"]:
        for key, value in _metrics(result["results"][task]).items():
            name, metric = _metric(task, key), key.partition(",")[0]
            if metric in RATIOS:
                metrics[name] = ratio(metric, [sample[metric] for sample in result["samples"][task]])
            elif name not in metrics:
                metrics[name] = Estimate(value, None, None, result["n-samples"][task]["effective"])
    return suite_result("lm-eval", metrics, rows, settings.model_dump(mode="json"))


def _metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """The ``METRIC,FILTER`` entries of one task's result, without its standard errors."""
    return {key: value for key, value in result.items() if "," in key and "_stderr," not in key}


def _metric(task: str, key: str) -> str:
    metric, _, kind = key.partition(",")
    return f"{task}.{metric}" if kind == "none" else f"{task}.{metric} ({kind})"


def _digest(rows: list[dict[str, Any]]) -> str:
    asked = json.dumps([(row["row_id"], row["prompt_sha256"]) for row in rows])
    return hashlib.sha256(asked.encode()).hexdigest()
