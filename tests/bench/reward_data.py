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


def further_tests(data: Path) -> dict[str, list[tuple[str, str, str, int]]]:
    """``(prompt, first, second, label)`` of sets that no model here is trained on; ties of the annotators left out."""
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
