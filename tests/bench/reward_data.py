"""Real judgements for ``reward_study.py``: web arguments judged by crowd workers, and two sets of judged answers."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

FOLDS = 5
FEW = "(few judgements)"
LEAST_TRAINED = 10
SHOTS = (0, 5, 20, 50)
Further = dict[str, list[tuple[str, str, str, int]]]  # rows of prompt, first answer, second, and label


def read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@dataclass
class Arguments:
    """Arguments as rows of a table, and judgements of annotators on pairs of them."""

    texts: list[str]
    prompts: list[str]
    debate: np.ndarray  # (M,)
    left: np.ndarray  # (N,)
    right: np.ndarray
    label: np.ndarray  # -1, 0, 1
    users: np.ndarray
    pair: np.ndarray  # number of the pair
    votes: np.ndarray = field(init=False)  # (P, 3): for the left, the right, none
    ends: np.ndarray = field(init=False)  # (P, 2)

    def __post_init__(self) -> None:
        count = int(self.pair.max()) + 1
        self.votes = np.zeros((count, 3), int)
        self.ends = np.zeros((count, 2), int)
        for row, pair in enumerate(self.pair):
            self.votes[pair, {-1: 0, 1: 1, 0: 2}[int(self.label[row])]] += 1
            self.ends[pair] = self.left[row], self.right[row]


def read_arguments(folder: Path) -> Arguments:
    arguments = read(folder / "arguments.jsonl.gz")
    index = {row["id"]: number for number, row in enumerate(arguments)}
    pairs: dict[str, int] = {}
    judged = read(folder / "judgements.jsonl.gz")
    return Arguments(
        texts=[row["text"].replace("<br/>", "\n") for row in arguments],
        prompts=[f"{row['title']}\nArgue for: {row['stance']}" for row in arguments],
        debate=np.array([row["title"] for row in arguments]),
        left=np.array([index[row["a1"]] for row in judged]),
        right=np.array([index[row["a2"]] for row in judged]),
        label=np.array([{"a1": -1, "a2": 1, "equal": 0}[row["label"]] for row in judged]),
        users=np.array([row["annotator"] for row in judged]),
        pair=np.array([pairs.setdefault(row["pair"], len(pairs)) for row in judged]),
    )


def further_tests(data: Path) -> Further:
    """Sets that no model here is trained on; ties of the annotators left out."""
    found = {}
    if (data / "llmbar").is_dir():
        for name in ("natural", "adversarial"):
            rows = [row for path in sorted((data / "llmbar").glob(f"{name}*.gz")) for row in read(path)]
            found[f"LLMBar {name}"] = [
                (row["input"], row["output_1"], row["output_2"], -1 if row["label"] == 1 else 1) for row in rows
            ]
    if (data / "pandalm").is_dir():
        kept = []
        for row in read(data / "pandalm" / "test.jsonl.gz"):
            label, votes = Counter(row[f"annotator{i}"] for i in (1, 2, 3)).most_common(1)[0]
            first, second = (str(row[f"response{i}"]) for i in (1, 2))
            if label == 0 or votes < 2 or not first.strip() or not second.strip():
                continue
            prompt = "\n\n".join(part for part in (row["instruction"], row["input"]) if part.strip())
            kept.append((prompt, first, second, -1 if label == 1 else 1))
        found["PandaLM"] = kept
    return found


def part_of(name: str, count: int) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % count


def fold_sets(data: Arguments, fold: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks over arguments: training, validation, test."""
    debates = np.random.default_rng(0).permutation(sorted(set(data.debate)))
    test = set(debates[fold::FOLDS])
    rest = [debate for debate in debates if debate not in test]
    valid = set(rest[:2])
    in_test = np.isin(data.debate, list(test))
    in_valid = np.isin(data.debate, list(valid))
    return ~in_test & ~in_valid, in_valid, in_test


def majority(data: Arguments) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Preferred and other argument of each pair, and by how many votes the right one wins, (P,) each; 0 is a tie."""
    margin = data.votes[:, 1] - data.votes[:, 0]
    left, right = data.ends.T
    return np.where(margin > 0, right, left), np.where(margin > 0, left, right), margin


@dataclass
class JudgedSets:
    """Rows of judgements: for training, validation, and tests of seen and of unseen annotators.

    Args:
        able: rows of training debates that an unseen annotator's weights may be fitted to.
        names: who judged each row of the data; one name for all who judged too little.
    """

    fit: np.ndarray
    valid: np.ndarray
    seen: np.ndarray
    unseen: np.ndarray
    able: dict[str, np.ndarray]
    names: np.ndarray


def judged_sets(data: Arguments, fold: int) -> JudgedSets:
    """Clear judgements of a fold; a fifth of the annotators is unseen."""
    train, valid, test = fold_sets(data, fold)
    unseen = np.array([part_of(user, FOLDS) == fold for user in data.users])
    clear = data.label != 0
    fit, val, tst = (np.flatnonzero(part[data.left] & clear & ~unseen) for part in (train, valid, test))
    counts = Counter(data.users[fit])
    known = {user for user, count in counts.items() if count >= LEAST_TRAINED}
    names = np.array([user if user in known else FEW for user in data.users])
    seen = tst[np.isin(data.users[tst], list(known))]
    few_shot = np.flatnonzero(train[data.left] & clear & unseen)
    strange = np.flatnonzero(test[data.left] & clear & unseen)
    shots = {user: few_shot[data.users[few_shot] == user] for user in set(data.users[strange])}
    able = {user: rows for user, rows in shots.items() if len(rows) >= SHOTS[-1]}
    return JudgedSets(fit, val, seen, strange[np.isin(data.users[strange], list(able))], able, names)
