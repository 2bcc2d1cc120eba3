"""Make a small data set of preferences that run in a circle: pure cycles of 3, 4 and 5 hotels.

A cycle of K hotels has K criteria, one for each edge: hotel i is praised for criterion i, and blamed for criterion
i - 1 (the first one for the last). Of hotels i and i + 1 the first is praised, and the second blamed, for criterion i,
and no other criterion is spoken of in both: i is preferred to i + 1, and the last hotel to the first. No reward, one
number a hotel, has more than K - 1 of the K pairs right.

    python recipes/data/make_cycles.py

writes ``cycles_train.jsonl`` and ``cycles_heldout.jsonl`` beside this file. The held-out cycles have other sentences
and other cities: what is learnt on the one is of use on the other only if it is what the sentences say. Nothing is
sampled from a model; the same seed gives the same files.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

HERE = Path(__file__).parent
SEED, LENGTHS = 0, (3, 4, 5)
TRAINED, TESTED = 60, 20  # cycles of each length
HELD_OUT = 4  # sentences of each criterion and sign, the last ones; as many cities

# What is said of a hotel: by criterion, praise and blame.
SAID = {
    "price": (
        (
            "The rooms are very cheap.",
            "It costs half of what others ask.",
            "You pay very little for a night here.",
            "The rates are the lowest in town.",
            "It is a bargain.",
            "A week here will not hurt your wallet.",
            "The bill was pleasantly small.",
            "Even students can afford it.",
            "It is by far the most affordable place around.",
            "A night costs less than a pizza.",
            "You save a lot of money by staying here.",
            "The price is wonderfully low.",
        ),
        (
            "The rooms are terribly expensive.",
            "It costs twice what others ask.",
            "You pay a fortune for a night here.",
            "The rates are the highest in town.",
            "It is a rip-off.",
            "A week here will empty your wallet.",
            "The bill was shockingly large.",
            "Hardly anyone can afford it.",
            "It is by far the most overpriced place around.",
            "A night costs more than a flight.",
            "You waste a lot of money by staying here.",
            "The price is outrageously high.",
        ),
    ),
    "quiet": (
        (
            "The rooms are perfectly quiet.",
            "No sound comes through the thick walls.",
            "At night you hear nothing at all.",
            "The street outside is silent after dark.",
            "You will sleep without earplugs.",
            "The windows keep all noise out.",
            "It is as still as a library.",
            "Nobody makes a noise in the corridors.",
            "Light sleepers will love the silence.",
            "There is no traffic to be heard.",
            "The nights are calm and soundless.",
            "It is the most peaceful house on the street.",
        ),
        (
            "The rooms are terribly noisy.",
            "Every sound comes through the thin walls.",
            "At night you hear the bar below.",
            "The street outside roars after dark.",
            "You will not sleep without earplugs.",
            "The windows let all the noise in.",
            "It is as loud as a factory.",
            "People shout in the corridors.",
            "Light sleepers will hate the racket.",
            "There is traffic to be heard all night.",
            "The nights are full of banging and music.",
            "It is the loudest house on the street.",
        ),
    ),
    "cleanliness": (
        (
            "The rooms are spotlessly clean.",
            "There is not a speck of dust.",
            "The sheets are fresh and white.",
            "The bathroom shines.",
            "Everything is scrubbed every morning.",
            "You could eat off the floor.",
            "The towels smell of fresh laundry.",
            "The carpets are without a stain.",
            "Hygiene is taken very seriously.",
            "Not one hair was in the shower.",
            "The housekeeping is immaculate.",
            "The whole place is polished and tidy.",
        ),
        (
            "The rooms are awfully dirty.",
            "There is dust on everything.",
            "The sheets are grey and smelly.",
            "The bathroom is full of mould.",
            "Nothing has been scrubbed for months.",
            "You would not walk on the floor barefoot.",
            "The towels smell of old sweat.",
            "The carpets are full of stains.",
            "Hygiene is a foreign word to them.",
            "Someone's hair was in the shower.",
            "The housekeeping is a disgrace.",
            "The whole place is filthy and sticky.",
        ),
    ),
    "location": (
        (
            "It is right in the centre.",
            "All the sights are two minutes away on foot.",
            "The station is just across the road.",
            "You can walk to everything.",
            "The old town begins at the door.",
            "The beach is around the corner.",
            "It could not be closer to the museums.",
            "The metro stops in front of it.",
            "It has the best location in the city.",
            "Shops and theatres are next door.",
            "From here every attraction is near.",
            "You step out and are on the main square.",
        ),
        (
            "It is far out of the centre.",
            "All the sights are an hour away by bus.",
            "The station is miles away.",
            "You cannot walk to anything.",
            "The old town is at the other end of the city.",
            "The beach is a long drive away.",
            "It could not be further from the museums.",
            "No metro or bus stops anywhere near it.",
            "It has the worst location in the city.",
            "There is only a motorway next door.",
            "From here every attraction is remote.",
            "You step out and are in an industrial suburb.",
        ),
    ),
    "breakfast": (
        (
            "The breakfast is delicious.",
            "Warm bread and fresh fruit are served every morning.",
            "The coffee and pastries are superb.",
            "The buffet has everything you could wish to eat.",
            "The cook makes wonderful omelettes.",
            "The pancakes alone are worth the stay.",
            "The morning meal is generous and tasty.",
            "The food at the table is excellent.",
            "You start the day with a feast.",
            "The eggs and the juice are first-rate.",
            "The kitchen serves the tastiest croissants.",
            "Guests rave about what is on their plates at eight.",
        ),
        (
            "The breakfast is disgusting.",
            "Stale bread and tinned fruit are served every morning.",
            "The coffee and pastries are dreadful.",
            "The buffet has nothing that you would wish to eat.",
            "The cook makes rubbery omelettes.",
            "The pancakes taste of cardboard.",
            "The morning meal is meagre and bland.",
            "The food at the table is awful.",
            "You start the day hungry.",
            "The eggs and the juice are third-rate.",
            "The kitchen serves the driest croissants.",
            "Guests moan about what is on their plates at eight.",
        ),
    ),
}
CITIES = (
    *("Lyon", "Porto", "Ghent", "Turin", "Bergen", "Seville", "Riga", "Gdansk"),
    *("Leipzig", "Utrecht", "Cork", "Split", "Malmo", "Basel", "Bath", "Brno"),
)
QUESTION = "Which hotel in {}?"


def sentences(split: str, criterion: str, sign: int) -> tuple[str, ...]:
    """Those of a split: praise (sign 0) or blame (1)."""
    said = SAID[criterion][sign]
    return said[-HELD_OUT:] if split == "heldout" else said[:-HELD_OUT]


def cycle_of(length: int, split: str, draw: random.Random) -> list[dict[str, str]]:
    """The edges of one cycle, in order."""
    criteria = list(SAID)[:length]
    answers = [
        f" {draw.choice(sentences(split, criteria[i], 0))} {draw.choice(sentences(split, criteria[i - 1], 1))}"
        for i in range(length)
    ]
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
