"""Reward models on real judgements: BT, scaled BT, GPM and PAL on web arguments, and what carries over to other data.

    python tests/bench/reward_study.py --data FOLDER --output docs/results/reward_table.md

FOLDER holds ``convincing/`` (UKPConvArg1: ``arguments.jsonl.gz``, ``judgements.jsonl.gz``) and, as further tests,
``llmbar/`` and ``pandalm/``. Frozen embeddings (last token, bf16) are made once and kept in ``--cache``.

Protocol, the same for every model. Five folds by debate: both stances of a debate are on one side, and every debate is
tested once. Of a fold's training debates two are for validation, which chooses penalty, depth and epoch; test
debates choose nothing. A fifth of the annotators is left out of a fold's training: they are its unseen users, whose
few-shot judgements come from training debates, and whose test judgements from test debates. Intervals resample debates
(annotators for the macro averages, rows for the further tests).
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reward_data import Arguments, further_tests, part_of, read_arguments
from reward_heads import Head, Loss, bt_loss, gpm_loss, right_or_tie, scaled_loss, soft_loss, train_head
from reward_lora import train_lora
from reward_tables import Results, facts_of, lora_table, merged, table_of
from torch import Tensor

from align.models.embeddings import EmbeddingCache
from align.models.load import locate
from align.rewards.encoding import encode_rows
from align.rewards.models import RewardModel
from align.rewards.pal import Pal, PalA, PalB
from align.trainers.pal import Judgements, train_pal

FOLDS = 5
FEW = "(few judgements)"
LEAST_TRAINED = 10
DEPTHS = ((0, 3e-5), (2, 2e-4))  # of the maps, with their learning rates
SHOTS = (0, 5, 20, 50)
MODELS = (("PAL-A", 1), ("PAL-A", 2), ("PAL-A", 4), ("PAL-B", 1), ("PAL-B", 2))


def fold_sets(data: Arguments, fold: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks over arguments: training, validation, test."""
    debates = np.random.default_rng(0).permutation(sorted(set(data.debate)))
    test = set(debates[fold::FOLDS])
    rest = [debate for debate in debates if debate not in test]
    valid = set(rest[:2])
    in_test = np.isin(data.debate, list(test))
    in_valid = np.isin(data.debate, list(valid))
    return ~in_test & ~in_valid, in_valid, in_test


def run_fold(data: Arguments, table: Tensor, prompts: Tensor, fold: int, others: dict[str, Any]) -> Results:
    out = Results()
    train, valid, test = fold_sets(data, fold)
    unseen = np.array([part_of(user, FOLDS) == fold for user in data.users])
    clear = data.label != 0

    # Pairs, by the annotators' majority. A tie of the votes is nobody's preference and is not tested.
    margin = data.votes[:, 1] - data.votes[:, 0]
    decided = margin != 0
    at = data.ends[:, 0]
    fit, val, tst = (np.flatnonzero(part[at] & decided) for part in (train, valid, test))
    sign = np.sign(margin)

    def accuracy(head: Head) -> float:
        scores = head.scores(table, data.ends[val, 0], data.ends[val, 1])
        return float(right_or_tie(scores, sign[val]).mean())

    preferred = np.where(margin > 0, data.ends[:, 1], data.ends[:, 0])
    other = np.where(margin > 0, data.ends[:, 0], data.ends[:, 1])
    share = (np.max(data.votes[:, :2], 1) + data.votes[:, 2] / 2) / data.votes.sum(1)
    kinds: dict[str, tuple[Loss, np.ndarray, int]] = {
        "BT": (bt_loss, share, 1),
        "BT, shares of votes": (soft_loss, share, 1),
        "scaled BT, by agreement": (scaled_loss, np.clip(abs(margin), 0, 5).astype(float), 1),
        "GPM, d = 2": (gpm_loss, share, 2),
        "GPM, d = 4": (gpm_loss, share, 4),
        "GPM, d = 8": (gpm_loss, share, 8),
    }
    out.rows["pair_debate"] = data.debate[at[tst]].tolist()
    out.pairs["longer answer"] = longer(data, data.ends[tst, 0], data.ends[tst, 1], sign[tst]).tolist()
    for name, (loss, weight, width) in kinds.items():
        began = time.perf_counter()
        head, chosen = train_head(table, preferred[fit], other[fit], weight[fit], loss, accuracy, width=width)
        out.seconds[name] += time.perf_counter() - began
        out.choices[name].append(round(chosen, 4))
        out.pairs[name] = right_or_tie(head.scores(table, data.ends[tst, 0], data.ends[tst, 1]), sign[tst]).tolist()
        for test_name, (answers, left, right, label) in others.items():
            out.further[name][test_name] = right_or_tie(head.scores(answers, left, right), label).tolist()

    # Judgements of annotators.
    judged_at = data.left
    fit, val, tst = (np.flatnonzero(part[judged_at] & clear & ~unseen) for part in (train, valid, test))
    counts = Counter(data.users[fit])
    known = {user for user, count in counts.items() if count >= LEAST_TRAINED}
    names = np.array([user if user in known else FEW for user in data.users])
    seen = tst[np.isin(data.users[tst], list(known))]
    few_shot = np.flatnonzero(train[judged_at] & clear & unseen)
    strange = np.flatnonzero(test[judged_at] & clear & unseen)
    shots = {user: few_shot[data.users[few_shot] == user] for user in set(data.users[strange])}
    able = {user: rows for user, rows in shots.items() if len(rows) >= SHOTS[-1]}
    strange = strange[np.isin(data.users[strange], list(able))]
    out.rows["seen_debate"] = data.debate[judged_at[seen]].tolist()
    out.rows["seen_user"] = data.users[seen].tolist()
    out.rows["unseen_debate"] = data.debate[judged_at[strange]].tolist()
    out.rows["unseen_user"] = data.users[strange].tolist()
    for where, rows in ((out.judged, seen), (out.unseen, strange)):
        where["longer answer"] = longer(data, data.left[rows], data.right[rows], data.label[rows]).tolist()

    def judged_accuracy(head: Head) -> float:
        scores = head.scores(table, data.left[val], data.right[val])
        return float(right_or_tie(scores, data.label[val]).mean())

    wins = np.where(data.label > 0, data.right, data.left)
    loses = np.where(data.label > 0, data.left, data.right)
    began = time.perf_counter()
    head, chosen = train_head(table, wins[fit], loses[fit], np.ones(len(fit)), bt_loss, judged_accuracy)
    out.seconds["BT, judgements"] += time.perf_counter() - began
    out.choices["BT, judgements"].append(round(chosen, 4))
    for where, rows in ((out.judged, seen), (out.unseen, strange)):
        where["BT"] = right_or_tie(head.scores(table, data.left[rows], data.right[rows]), data.label[rows]).tolist()

    def judgements(rows: np.ndarray, users: Sequence[str] | None = None) -> Judgements:
        left, right, label = (torch.as_tensor(x[rows]) for x in (data.left, data.right, data.label))
        return Judgements(table, prompts, left, right, label, list(names[rows] if users is None else users))

    fitted, valid_set = judgements(fit), judgements(val)
    users = sorted(set(fitted.users))
    kinds_of: dict[str, type[PalA] | type[PalB]] = {"PAL-A": PalA, "PAL-B": PalB}

    def make(kind: str, groups: int, depth: int) -> Pal:
        return kinds_of[kind](table.shape[1], users, groups=groups, dimension=64, depth=depth)

    for kind, groups in MODELS:
        name = f"{kind}, K = {groups}"
        began = time.perf_counter()
        model, chosen, spread = best_pal(partial(make, kind, groups), fitted, valid_set)
        out.seconds[name] += time.perf_counter() - began
        out.choices[name].append([round(chosen, 4), round(spread, 3)])
        print(f"  {name}: validation {chosen:.4f}, {time.perf_counter() - began:.0f} s", flush=True)
        out.judged[name] = right_or_tie(deltas(model, judgements(seen), "error"), data.label[seen]).tolist()
        unknown = judgements(strange, ["?"] * len(strange))
        out.unseen[f"{name}, mean weights"] = right_or_tie(
            deltas(model, unknown, "mean"), data.label[strange]
        ).tolist()
        if groups > 1:
            began = time.perf_counter()
            for count in SHOTS[1:]:
                right = np.zeros(len(strange))
                for user, rows in able.items():
                    here = np.flatnonzero(data.users[strange] == user)
                    shown = np.random.default_rng(part_of(user, 2**32)).permutation(rows)[:count]
                    left_x, right_x, prompt_x = judgements(shown).pairs()
                    label = torch.as_tensor(data.label[shown])
                    w = model.fit_user(left_x, right_x, label, prompt_x, prior="mean", steps=40, learning_rate=0.1)
                    a, b, p = judgements(strange[here]).pairs()
                    with torch.no_grad():
                        delta = model.reward(b, w, p) - model.reward(a, w, p)
                    right[here] = right_or_tie(delta, data.label[strange[here]])
                out.unseen[f"{name}, {count} judgements"] = right.tolist()
            out.seconds[f"{name}, new users"] += time.perf_counter() - began
    return out


def longer(data: Arguments, left: np.ndarray, right: np.ndarray, label: np.ndarray) -> np.ndarray:
    lengths = np.array([len(text) for text in data.texts])
    return right_or_tie(torch.as_tensor(lengths[right] - lengths[left]).float(), label)


def deltas(model: Pal, data: Judgements, unknown: Any) -> Tensor:
    left, right, prompts = data.pairs()
    with torch.no_grad():
        weights = model.weights(data.users, unknown=unknown)
        return model.reward(right, weights, prompts) - model.reward(left, weights, prompts)


def best_pal(make: Callable[[int], Pal], fitted: Judgements, valid: Judgements) -> tuple[Pal, float, float]:
    """The depth and epoch that do best on validation, and how much the users' weights differ there."""
    known = set(fitted.users)
    names = [user if user in known else FEW for user in valid.users]
    valid = Judgements(valid.answers, valid.prompts, valid.left, valid.right, valid.label, names)
    best: dict[str, Any] = {"accuracy": -1.0}
    for depth, learning_rate in DEPTHS:
        torch.manual_seed(0)
        model = make(depth)
        here = {"accuracy": -1.0, "epoch": 0}

        def after_epoch(epoch: int, loss: float, model: Pal = model, here: dict[str, Any] = here) -> bool:
            with torch.no_grad():
                found = float(right_or_tie(deltas(model, valid, "mean"), valid.label.numpy()).mean())
            if found > here["accuracy"]:
                here.update(accuracy=found, epoch=epoch, state=copy.deepcopy(model.state_dict()), model=model)
            return epoch - int(here["epoch"]) >= 4

        train_pal(
            model, fitted, epochs=25, batch_size=512, projectors=learning_rate, users=5e-2, after_epoch=after_epoch
        )
        if here["accuracy"] > best["accuracy"]:
            best = here
    model = best["model"]
    model.load_state_dict(best["state"])
    with torch.no_grad():
        spread = float(torch.softmax(model.logits.weight, -1).std(0).mean()) if model.groups > 1 else 0.0
    return model, best["accuracy"], spread


def main() -> None:
    """Run what is not on disk yet, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with convincing/, llmbar/, pandalm/")
    parser.add_argument("--output", type=Path, required=True, help="markdown file to write")
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/reward_study"), help="embeddings and results of folds"
    )
    parser.add_argument("--model", default="smollm2-135m-instruct", help="frozen backbone")
    parser.add_argument("--folds", type=int, default=FOLDS, help="how many of the five")
    parser.add_argument("--lora", type=int, nargs="*", default=[], help="folds in which LoRA is trained as well")
    parser.add_argument("--epochs", type=int, default=3, help="of LoRA")
    options = parser.parse_args()
    data = read_arguments(options.data / "convincing")
    model = RewardModel.create(locate(options.model), frozen=True, max_length=1024, dtype=torch.bfloat16)
    cache = EmbeddingCache(options.cache, model)
    began = time.perf_counter()

    def embed(prompts: Sequence[str], answers: Sequence[str]) -> tuple[Tensor, Tensor]:
        asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
        return cache.embed_ids(*encode_rows(model.tokenizer, asked, list(answers)))

    table, prompts = embed(data.prompts, data.texts)
    others = {}
    for name, rows in further_tests(options.data).items():
        answers, _ = embed([row[0] for row in rows for _ in range(2)], [text for row in rows for text in row[1:3]])
        place = np.arange(len(rows)) * 2
        others[name] = answers, place, place + 1, np.array([row[3] for row in rows])
    if cache.computed:
        took = time.perf_counter() - began
        print(f"{cache.computed:,} answers embedded in {took:.0f} s", flush=True)
        (options.cache / "embedding.json").write_text(json.dumps({"answers": cache.computed, "seconds": took}))
    folds = []
    for fold in range(options.folds):
        path = options.cache / f"fold{fold}.json"
        if not path.exists():
            print(f"fold {fold}", flush=True)
            path.write_text(json.dumps(run_fold(data, table, prompts, fold, others).__dict__))
        folds.append(Results(**json.loads(path.read_text())))
    trained = {}
    for fold in options.lora:
        path = options.cache / f"lora{fold}.json"
        if not path.exists():
            train, valid, test = fold_sets(data, fold)
            lora = train_lora(data, options.model, train | valid, test, epochs=options.epochs)
            lora["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            path.write_text(json.dumps(lora))
        trained[fold] = json.loads(path.read_text())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    found = merged(folds)
    for name, rows in further_tests(options.data).items():
        gap = torch.tensor([float(len(second) - len(first)) for _, first, second, _ in rows])
        found.further["longer answer"][name] = [right_or_tie(gap, np.array([row[3] for row in rows])).tolist()]
    text = table_of(found, facts_of(data), {name: len(rows[1]) for name, rows in others.items()})
    text += lora_table([(folds[fold], found) for fold, found in trained.items()])
    options.output.write_text(f"{text}\nPeak memory of this process: {peak:.1f} GB.\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
