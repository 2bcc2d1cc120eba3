"""Make a small data set of preferences that run in a circle: pure cycles of 3, 4 and 5 hotels.

A cycle of K hotels has K criteria, one for each edge: hotel i is praised for criterion i, and blamed for criterion
i - 1 (the first one for the last). Of hotels i and i + 1 the first is praised, and the second blamed, for criterion i,
and no other criterion is spoken of in both: i is preferred to i + 1, and the last hotel to the first. No reward, one
number a hotel, has more than K - 1 of the K pairs right.

    python recipes/data/make_cycles.py

writes ``cycles_train.jsonl`` and ``cycles_heldout.jsonl`` beside this file. The held-out cycles have other cities and
other sentences, of the same words: of 48 sentences of each kind 12 are held out. Nothing is sampled from a model; the
same seed gives the same files.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

HERE = Path(__file__).parent
SEED, LENGTHS = 0, (3, 4, 5)
TRAINED, TESTED = 60, 20  # cycles of each length
SENTENCES = 2  # of blame, and of praise, in an answer
HELD_OUT = 4  # one sentence in so many, and as many cities

# What is said of a hotel, by criterion: of what, in praise, and in blame.
SAID = {
    "price": (
        ("A night here", "The room", "Your stay", "A double", "Half board", "A week"),
        (
            "costs next to nothing",
            "is a real bargain",
            "is cheap",
            "is very good value",
            "saves you money",
            "is easy on the wallet",
            "costs less than elsewhere",
            "is affordable",
        ),
        (
            "costs a fortune",
            "is a rip-off",
            "is overpriced",
            "is poor value",
            "is far too expensive",
            "empties your wallet",
            "costs more than elsewhere",
            "is hard to afford",
        ),
    ),
    "quiet": (
        ("The night", "Every floor", "The corridor", "The courtyard", "The lobby", "The street outside"),
        (
            "is silent",
            "is wonderfully quiet",
            "lets you sleep in peace",
            "is free of noise",
            "is calm",
            "never wakes you up",
            "is as still as a library",
            "is peaceful",
        ),
        (
            "is loud",
            "is terribly noisy",
            "keeps you awake",
            "is full of shouting",
            "roars with traffic",
            "wakes you up all the time",
            "is as loud as a factory",
            "shakes with music",
        ),
    ),
    "cleanliness": (
        ("The bathroom", "The carpet", "The bed linen", "The shower", "The floor", "The mirror"),
        (
            "is spotless",
            "is perfectly clean",
            "shines",
            "smells fresh",
            "is scrubbed every day",
            "is without a stain",
            "is hygienic",
            "is free of dust",
        ),
        (
            "is filthy",
            "is really dirty",
            "is mouldy",
            "smells foul",
            "has not been scrubbed for weeks",
            "is full of stains",
            "is unhygienic",
            "is covered in dust",
        ),
    ),
    "location": (
        ("The house", "The building", "The entrance", "The hotel", "The address", "This place"),
        (
            "is right in the centre",
            "is next to the station",
            "is two steps from the sights",
            "is close to everything",
            "is on the main square",
            "is around the corner from the beach",
            "is within walking distance of the museums",
            "could not be nearer to the old town",
        ),
        (
            "is far from the centre",
            "is miles from the station",
            "is an hour from the sights",
            "is close to nothing",
            "is in an industrial suburb",
            "is a long drive from the beach",
            "is nowhere near the museums",
            "could not be further from the old town",
        ),
    ),
    "breakfast": (
        ("The breakfast", "The morning buffet", "The coffee", "The bread", "The omelette", "The first meal"),
        (
            "is delicious",
            "tastes wonderful",
            "is fresh and plentiful",
            "is a feast",
            "is superb",
            "is worth getting up for",
            "pleases every palate",
            "is lovingly cooked",
        ),
        (
            "is disgusting",
            "tastes awful",
            "is stale and meagre",
            "is inedible",
            "is dreadful",
            "is not worth getting up for",
            "pleases no palate",
            "is badly cooked",
        ),
    ),
}
CITIES = (
    *("Lyon", "Porto", "Ghent", "Turin", "Bergen", "Seville", "Riga", "Gdansk"),
    *("Leipzig", "Utrecht", "Cork", "Split", "Malmo", "Basel", "Bath", "Brno"),
)
QUESTION = "Which hotel in {}?"


def sentences(split: str, criterion: str, sign: int) -> list[str]:
    """Those of a split: praise (sign 0) or blame (1). Every word is in some sentence of either split."""
    things, praise_and_blame = SAID[criterion][0], SAID[criterion][1:]
    return [
        f"{thing} {what}."
        for i, thing in enumerate(things)
        for j, what in enumerate(praise_and_blame[sign])
        if ((i + j) % HELD_OUT == 0) is (split == "heldout")
    ]


def cycle_of(length: int, split: str, draw: random.Random) -> list[dict[str, str]]:
    """The edges of one cycle, in order."""
    criteria = list(SAID)[:length]
    answers = []
    for i in range(length):
        praise = draw.sample(sentences(split, criteria[i], 0), SENTENCES)
        blame = draw.sample(sentences(split, criteria[i - 1], 1), SENTENCES)
        answers.append(" " + " ".join(blame + praise))
    prompt = QUESTION.format(draw.choice(CITIES[-HELD_OUT:] if split == "heldout" else CITIES[:-HELD_OUT]))
    return [
        {"prompt": prompt, "chosen": answers[edge], "rejected": answers[(edge + 1) % length]} for edge in range(length)
    ]


def cycles_of(split: str, count: int, draw: random.Random) -> list[dict[str, str]]:
    """Cycles of each length; of two that share an answer to the same question the second is drawn again."""
    rows: list[dict[str, str]] = []
    said: set[tuple[str, str]] = set()
    for length in LENGTHS:
        made = 0
        while made < count:
            edges = cycle_of(length, split, draw)
            answers = {(edge["prompt"], edge["chosen"]) for edge in edges}
            if said.isdisjoint(answers):
                said |= answers
                rows += edges
                made += 1
    return rows


def main() -> None:
    """Write both files."""
    draw = random.Random(SEED)
    for split, count in (("train", TRAINED), ("heldout", TESTED)):
        rows = cycles_of(split, count, draw)
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (HERE / f"cycles_{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{split}: {len(rows)} pairs in {count * len(LENGTHS)} cycles")


if __name__ == "__main__":
    main()
