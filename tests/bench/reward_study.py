"""Reward models on real judgements: BT, scaled BT, GPM and PAL on web arguments, and what carries over to other data.

    python tests/bench/reward_study.py --data FOLDER --output docs/results/reward_table.md

FOLDER holds ``convincing/`` (UKPConvArg1: ``arguments.jsonl.gz``, ``judgements.jsonl.gz``) and, as further tests,
``llmbar/`` and ``pandalm/``. Frozen embeddings (last token, bf16) are made once and kept in ``--cache``, as is what
each model got: a stopped study goes on. Every part runs in a process of its own, whose peak memory is then its own.

Protocol, the same for every model. Five folds by debate: both stances of a debate are on one side, and every debate is
tested once. Of a fold's training debates two are for validation, which chooses penalty, depth and epoch; test
debates choose nothing. A fifth of the annotators is left out of a fold's training: they are its unseen users, whose
few-shot judgements come from training debates, and whose test judgements from test debates. Intervals resample debates
(annotators for the macro averages, rows for the further tests).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reward_data import FOLDS, further_tests, read_arguments
from reward_frozen import FROZEN, Others, rows_of_fold, run_frozen
from reward_heads import right_or_tie
from reward_lora import TRAINED, train_lora
from reward_pal import Table
from reward_tables import Results, facts_of, lora_tables, merged, of_models, table_of
from torch import Tensor

from align.models.embeddings import EmbeddingCache
from align.models.load import locate
from align.rewards.encoding import encode_rows
from align.rewards.models import RewardModel

ARGUMENTS, OTHERS = "arguments", "others"


def embed(data: Path, cache: Path, backbone: str, what: str) -> dict[str, Any]:
    """Write the embeddings of the arguments, or of the further tests' answers, and say how many were computed."""
    model = RewardModel.create(locate(backbone), frozen=True, max_length=1024, dtype=torch.bfloat16)
    kept = EmbeddingCache(cache, model)
    began = time.perf_counter()

    def embedded(prompts: Sequence[str], answers: Sequence[str]) -> tuple[Tensor, Tensor]:
        asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
        return kept.embed_ids(*encode_rows(model.tokenizer, asked, list(answers)))

    found: Any = {}
    if what == ARGUMENTS:
        arguments = read_arguments(data / "convincing")
        found = embedded(arguments.prompts, arguments.texts)
    else:
        for name, rows in further_tests(data).items():
            states = embedded([r[0] for r in rows for _ in range(2)], [text for r in rows for text in r[1:3]])
            place = np.arange(len(rows)) * 2
            found[name] = Table(*states), place, place + 1, np.array([row[3] for row in rows])
    torch.save(found, cache / f"{what}.pt")
    return {"answers": kept.computed, "seconds": time.perf_counter() - began}


def frozen(data: Path, cache: Path, name: str, folds: int) -> dict[str, Any]:
    """What a model on the frozen backbone gets."""
    arguments = read_arguments(data / "convincing")
    table = Table(*torch.load(cache / f"{ARGUMENTS}.pt"))
    others: Others = torch.load(cache / f"{OTHERS}.pt", weights_only=False)
    return merged([run_frozen(arguments, table, others, fold, name) for fold in range(folds)]).__dict__


def trained(data: Path, cache: Path, backbone: str, name: str, fold: int, epochs: int) -> dict[str, Any]:
    """What a model with a trained backbone gets in one fold."""
    arguments = read_arguments(data / "convincing")
    table = Table(*torch.load(cache / f"{ARGUMENTS}.pt"))
    return train_lora(arguments, further_tests(data), backbone, name, table, fold, epochs=epochs)


def alone(path: Path, function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What a function gives, run in a process of its own, with that process's peak memory; kept in ``path``."""
    if not path.exists():
        print(path.stem, flush=True)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            path.write_text(json.dumps(pool.submit(with_peak, function, *arguments).result()))
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def with_peak(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    found = function(*arguments)
    # getrusage would count what the parent held when it started this process.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    return {"found": found, "peak_gb": int(peak[1]) * 1024 / 1e9}


def main() -> None:
    """Run what is not on disk yet, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with convincing/, llmbar/, pandalm/")
    parser.add_argument("--output", type=Path, required=True, help="markdown file to write")
    parser.add_argument("--cache", type=Path, default=Path("runs/reward_study"), help="embeddings and results")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="backbone")
    parser.add_argument("--folds", type=int, default=FOLDS, help="how many of the five")
    parser.add_argument("--lora", type=int, nargs="*", default=[], help="folds in which LoRA is trained as well")
    parser.add_argument("--epochs", type=int, default=1, help="of LoRA")
    options = parser.parse_args()
    cache = options.cache
    cache.mkdir(parents=True, exist_ok=True)
    costs = {
        what: alone(cache / f"{what}.json", embed, options.data, cache, options.model, what)
        for what in (ARGUMENTS, OTHERS)
    }
    parts = []
    for name in FROZEN:
        part = alone(cache / f"frozen_{slug(name)}.json", frozen, options.data, cache, name, options.folds)
        parts.append(Results(**{**part["found"], "peak": {name: part["peak_gb"]}}))
    lora: dict[str, dict[int, dict[str, Any]]] = {
        name: {
            fold: alone(
                cache / f"lora{fold}_{slug(name)}.json",
                trained,
                *(options.data, cache, options.model, name, fold, options.epochs),
            )
            for fold in options.lora
        }
        for name in TRAINED
    }
    data = read_arguments(options.data / "convincing")
    tests = further_tests(options.data)
    found = of_models([merged([rows_of_fold(data, fold) for fold in range(options.folds)]), *parts])
    for name, rows in tests.items():
        gap = torch.tensor([float(len(second) - len(first)) for _, first, second, _ in rows])
        found.further["longer answer"][name] = [right_or_tie(gap, np.array([row[3] for row in rows])).tolist()]
    text = table_of(found, facts_of(data), {name: len(rows) for name, rows in tests.items()}, costs)
    if options.lora:
        text += lora_tables(found, lora, [rows_of_fold(data, fold) for fold in options.lora])
    options.output.write_text(text, encoding="utf-8")
    print(text)


def slug(name: str) -> str:
    return re.sub(r"\W+", "_", name)


if __name__ == "__main__":
    main()
