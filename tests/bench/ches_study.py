"""Likelihood displacement in miniature, on real data: does CHES tell which pairs will lower their chosen answers?

    python tests/bench/ches_study.py --data FOLDER --output docs/results/ches_table.md

FOLDER holds ``personas/ends-justify-means.jsonl.gz`` and ``hh_harmless/part.jsonl.gz``; the quickstart's pairs come
with the package. Every piece is kept in ``--cache`` when it is done: the same command goes on where it was stopped,
and ``--minutes`` stops it in time. The table and the plots are made of what is there.

- ``no_never``  one prompt, No over Never by one token: does Yes rise?
- ``windows``   pairs around the 0, 25, 50, 75 and 100 % quantile of a measure, trained apart: does the change of the
  chosen answers' log-prob follow the measure?
- ``filter``    the pairs of lowest length-normalised CHES against as many random ones.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from ches_no_never import SEEDS, one_prompt, warm_up
from ches_tables import write_results
from ches_train import Policy, adapted, load_policy, read_set, scores, totals, train
from ches_windows import window
from torch import Tensor

from align.data.tokenize import TokenizedPair

SETS = ("quickstart", "hh_harmless", "personas")
RUNS = (0, 1, 2)
POOL, WINDOW, QUANTILES = 300, 32, (0.0, 0.25, 0.5, 0.75, 1.0)
KEPT, HELD_OUT = 48, 48
Piece = dict[str, Any]


class Study:
    """What the pieces share, each made when the first piece asks for it."""

    def __init__(self, data: Path, cache: Path) -> None:
        self.data, self.cache = data, cache
        self._sets: dict[str, list[TokenizedPair]] = {}

    @cached_property
    def policy(self) -> Policy:
        return load_policy()

    @cached_property
    def warm(self) -> Policy:
        return warm_up(load_policy(), self.data, self.cache / "warm_up")

    def rows(self, name: str) -> list[TokenizedPair]:
        """The pairs of a set that are drawn from."""
        if name not in self._sets:
            found = read_set(name, self.data, self.policy)
            self._sets[name] = random.Random(0).sample(found, min(len(found), 2 * POOL))
        return self._sets[name]

    def known(self, name: str) -> tuple[Piece, Tensor]:
        """Scores and log-probs of a set before training."""
        piece = json.loads((self.cache / f"scores-{name}.json").read_text())
        return piece["scores"], torch.tensor(piece["reference"])

    # --- the pieces

    def score(self, name: str) -> Piece:
        rows = self.rows(name)
        reference = totals(self.policy.model, rows, self.policy.pad).tolist()
        return {"rows": len(rows), "scores": scores(self.policy, rows), "reference": reference}

    def no_never(self, seed: int, better: str, worse: str, whole: bool) -> Piece:
        return one_prompt(self.warm, self.data, seed, better, worse, whole=whole)

    def quantile_windows(self, name: str, measure: str, run: int) -> Piece:
        """The mean change of the chosen answers, by window; a run has pairs, an order and an adapter of its own."""
        known, reference = self.known(name)
        pool = random.Random(run).sample(range(len(reference)), min(POOL, len(reference)))
        ranked = sorted(pool, key=lambda row: known[measure][row])
        found = []
        for quantile in QUANTILES:
            start, stop = window(len(ranked), WINDOW, quantile)
            chosen = ranked[start:stop]
            change = self.trained(name, chosen, run)[0]
            lengths = torch.tensor([len(self.rows(name)[row].chosen_ids) for row in chosen])
            found.append(
                {
                    "quantile": quantile,
                    "score": sum(known[measure][row] for row in chosen) / len(chosen),
                    "tokens": float(lengths.float().mean()),
                    **_changes(change, lengths),
                }
            )
        return {"windows": found}

    def filtered(self, name: str, how: str, run: int) -> Piece:
        """Change on training and on held-out pairs, after training on the lowest ches_ln or on random pairs."""
        known, reference = self.known(name)
        order = random.Random(run).sample(range(len(reference)), len(reference))
        held_out, pool = order[:HELD_OUT], order[HELD_OUT:]
        kept = sorted(pool, key=lambda row: known["ches_ln"][row])[:KEPT] if how == "lowest" else pool[:KEPT]
        lengths = torch.tensor([len(self.rows(name)[row].chosen_ids) for row in [*kept, *held_out]])
        changes = self.trained(name, kept, run, held_out)
        return {
            part: {**_changes(change, lengths[rows]), "accuracy": float((change[:, 0] > change[:, 1]).float().mean())}
            for part, change, rows in zip(
                ("train", "held_out"), changes, (slice(KEPT), slice(KEPT, None)), strict=True
            )
        }

    def trained(self, name: str, places: list[int], run: int, held_out: list[int] | None = None) -> list[Tensor]:
        """Changes of log-probs, (N, 2) each, of the trained pairs and of the others."""
        rows, (_, reference) = self.rows(name), self.known(name)
        model = adapted(self.policy, run)
        train(model, [rows[row] for row in places], reference[places], self.policy.pad, run)
        parts = [places] if held_out is None else [places, held_out]
        after = [totals(model, [rows[row] for row in part], self.policy.pad) - reference[part] for part in parts]
        model.unload()
        return after


def _changes(change: Tensor, lengths: Tensor) -> dict[str, float]:
    return {
        "chosen": float(change[:, 0].mean()),
        "chosen_per_token": float((change[:, 0] / lengths).mean()),
        "rejected": float(change[:, 1].mean()),
        "fell": float((change[:, 0] < 0).float().mean()),
    }


def pieces(study: Study) -> Iterator[tuple[str, Callable[[], Piece]]]:
    """Every piece with its name, those that the others need first."""
    for name in SETS:
        yield f"scores-{name}", partial(study.score, name)
    for run in RUNS:
        for name in SETS:
            yield f"windows-{name}-ches-{run}", partial(study.quantile_windows, name, "ches", run)
        for how in ("lowest", "random"):
            yield f"filter-quickstart-{how}-{run}", partial(study.filtered, "quickstart", how, run)
        for measure in ("last_inner", "edit"):
            yield f"windows-hh_harmless-{measure}-{run}", partial(study.quantile_windows, "hh_harmless", measure, run)
    for seed in SEEDS:
        yield f"no_never-lora-{seed}", partial(study.no_never, seed, "No", "Never", False)
    for seed in SEEDS[:3]:
        yield f"no_never-whole-{seed}", partial(study.no_never, seed, "No", "Never", True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with personas/ and hh_harmless/")
    parser.add_argument("--output", type=Path, required=True, help="table to write (Markdown); plots go beside it")
    parser.add_argument("--cache", type=Path, default=Path("runs/ches_study"), help="where done pieces are kept")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no piece after so many minutes")
    parser.add_argument("--only", default="", help="pieces whose name begins so")
    given = parser.parse_args()
    given.cache.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    study = Study(given.data, given.cache)
    for name, make in pieces(study):
        path = given.cache / f"{name}.json"
        if path.exists() or not name.startswith(given.only):
            continue
        if time.monotonic() - began > 60 * given.minutes:
            print(f"stopped before {name}: the same command goes on", flush=True)
            break
        start = time.monotonic()
        found = make()
        seconds = round(time.monotonic() - start, 1)
        path.write_text(json.dumps({**found, "seconds": seconds}))
        print(f"{name}: {seconds} s", flush=True)
    write_results(given.cache, given.output)


if __name__ == "__main__":
    main()
