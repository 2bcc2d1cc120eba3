"""The packaged cycles: pure, one criterion a pair, held-out ones of other sentences, and what the script makes."""

from __future__ import annotations

import json
import random
import runpy
from collections import Counter
from pathlib import Path

import pytest

import align.recipes
from align.data.pairs import read_pairs
from align.heldout import cycles_of

DATA = Path(align.recipes.__file__).parent / "data"
MADE = runpy.run_path(str(DATA / "make_cycles.py"))
SPLITS = {"train": 60, "heldout": 20}


@pytest.mark.parametrize("split", SPLITS)
def test_every_pair_is_in_a_pure_cycle(split: str):
    table = read_pairs(f"align:cycles/{split}")
    cycles = cycles_of(table.rows)
    assert (table.faults, table.counts["duplicates"], table.counts["contradictions"]) == ([], 0, 0)
    assert Counter(len(cycle.answers) for cycle in cycles) == dict.fromkeys((3, 4, 5), SPLITS[split])
    assert sum(len(cycle.answers) for cycle in cycles) == len(table.rows)


@pytest.mark.parametrize("split", SPLITS)
def test_the_winner_is_praised_for_what_the_loser_is_blamed_for_and_for_that_alone(split: str):
    of = {
        sentence: (criterion, sign)
        for criterion in MADE["SAID"]
        for sign in (0, 1)
        for sentence in MADE["sentences"](split, criterion, sign)
    }

    def said(answer: str) -> set[tuple[str, int]]:
        return {of[f"{sentence}."] for sentence in answer.strip().removesuffix(".").split(". ")}

    for row in read_pairs(f"align:cycles/{split}").rows:
        chosen, rejected = said(row.chosen), said(row.rejected)
        both = {criterion for criterion, _ in chosen} & {criterion for criterion, _ in rejected}
        assert len(both) == 1
        assert {(next(iter(both)), 0)} <= chosen
        assert {(next(iter(both)), 1)} <= rejected


def test_no_held_out_sentence_and_no_city_was_trained_on():
    words = {split: (DATA / f"cycles_{split}.jsonl").read_text(encoding="utf-8") for split in SPLITS}
    for split, other in (("train", "heldout"), ("heldout", "train")):
        for row in map(json.loads, words[split].splitlines()):
            sentences = f"{row['chosen']} {row['rejected']}".strip().removesuffix(".").split(". ")
            assert not [sentence for sentence in sentences if f"{sentence.strip()}." in words[other]]
            assert row["prompt"] not in words[other]


def test_the_files_are_what_the_script_makes():
    draw = random.Random(MADE["SEED"])
    for split, count in SPLITS.items():
        rows = MADE["cycles_of"](split, count, draw)
        kept = (DATA / f"cycles_{split}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in kept] == rows
