"""Make a small data set of annotators who disagree: two opposed groups, so that no one reward suits both.

Every question has a brief answer and a detailed one. Annotators of the larger group (7 in 10) prefer the detailed one,
the others the brief one; each judgement is turned with probability 0.1. So one reward for all is right in at most
0.7 x 0.9 + 0.3 x 0.1 = 66 % of the judgements, and one that knows the group in 90 %.

    python recipes/data/make_annotators.py

writes ``annotators_train.jsonl`` and ``annotators_heldout.jsonl`` beside this file: the held-out questions are other
ones, judged by the annotators of training and by ten new ones. Nothing is sampled from a model; the same seed gives
the same files.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SEED, NOISE, MAJORITY = 0, 0.1, 0.7
SEEN, NEW = 20, 10  # annotators
TRAINED, TESTED, TESTED_NEW = 24, 10, 24  # judgements of each
HELD_OUT = 6  # tasks

# What to do, the brief answer, what comes after it, and why.
TASKS = (
    ("boil an egg", "Boil it for eight minutes", "put it into cold water at once", "the cold stops the cooking"),
    ("clean a window", "Wipe it with vinegar and water", "dry it with newspaper", "paper leaves no streaks"),
    ("keep bread fresh", "Keep it in a paper bag", "freeze what you do not eat", "a fridge makes bread stale"),
    ("sharpen a pencil", "Turn it slowly in a sharpener", "stop when the tip is fine", "a thin tip breaks early"),
    ("water a cactus", "Water it every two weeks", "let the soil dry in between", "wet roots rot quickly"),
    ("fall asleep sooner", "Go to bed at the same time", "leave your phone outside", "bright screens keep you awake"),
    ("peel garlic", "Crush it with a flat knife", "pull the skin off", "the skin loosens when it cracks"),
    ("remove a stain", "Rub it with soap at once", "rinse it with cold water", "heat would set the stain"),
    ("learn new words", "Repeat them every day", "use them in a sentence", "use fixes them in memory"),
    ("save battery", "Dim the screen", "close what you do not use", "the screen takes most power"),
    ("ripen a banana", "Put it in a bag with an apple", "wait for two days", "apples give off a ripening gas"),
    ("stop hiccups", "Hold your breath", "drink a glass of water slowly", "this calms the diaphragm"),
    ("fold a shirt", "Fold the sleeves in", "fold it in half twice", "straight folds leave few creases"),
    ("pack a suitcase", "Roll your clothes", "put shoes at the bottom", "rolls take less room"),
    ("cool a room", "Close the blinds by day", "open the windows at night", "the night air is cooler"),
    ("plant a seed", "Cover it with a little soil", "keep the soil moist", "a dry seed does not sprout"),
    ("cook rice", "Use two cups of water a cup", "leave the lid on", "the steam finishes the rice"),
    ("clean a kettle", "Boil vinegar in it", "rinse it three times", "vinegar dissolves the lime"),
    ("ride in the rain", "Ride slowly", "brake earlier than usual", "wet brakes grip late"),
    ("store apples", "Keep them cool and dark", "check them every week", "one bad apple spoils the rest"),
    ("wake up early", "Put the alarm far away", "open the curtains at once", "light ends the sleepiness"),
    ("chop an onion", "Cut it with a sharp knife", "chill it for ten minutes first", "cold onions sting less"),
    ("remember names", "Say the name aloud", "link it to a picture", "pictures stay in the mind"),
    ("warm cold feet", "Put on dry socks", "move your toes", "moving brings the blood back"),
)
QUESTIONS = ("How do I {}?", "What is a good way to {}?", "Tell me how to {}.", "What should I do to {}?")


def items(tasks: tuple[tuple[str, str, str, str], ...]) -> list[tuple[str, str, str]]:
    """Questions with the brief and the detailed answer."""
    return [
        (
            question.format(what),
            f"{first}.",
            f"{first}, and then {then}. This works because {why}, so take your time with it and do not skip a step.",
        )
        for what, first, then, why in tasks
        for question in QUESTIONS
    ]


def rows_of(
    names: list[str], count: int, pool: list[tuple[str, str, str]], draw: random.Random
) -> list[dict[str, Any]]:
    """``count`` judgements of each annotator, on questions of the pool."""
    rows = []
    for name in names:
        likes_detail = name.startswith("detail")
        for question, brief, detailed in draw.sample(pool, count):
            turned = draw.random() < NOISE
            chosen, rejected = (detailed, brief) if likes_detail is not turned else (brief, detailed)
            rows.append({"prompt": question, "chosen": chosen, "rejected": rejected, "annotator": name})
    draw.shuffle(rows)
    return [{**row, **{key: _turn(key, row[key]) for key in ("prompt", "chosen", "rejected")}} for row in rows]


def _turn(key: str, text: str) -> list[dict[str, str]]:
    return [{"role": "user" if key == "prompt" else "assistant", "content": text}]


def names_of(count: int, start: int) -> list[str]:
    """Names that say the group, for people to check the result by; no model reads them as text."""
    most = round(MAJORITY * count)
    return [f"{'detail' if number < most else 'brief'}-{start + number:02d}" for number in range(count)]


def main() -> None:
    """Write both files."""
    draw = random.Random(SEED)
    seen, new = names_of(SEEN, 0), names_of(NEW, SEEN)
    shown, held_out = items(TASKS[HELD_OUT:]), items(TASKS[:HELD_OUT])
    train = rows_of(seen, TRAINED, shown, draw)
    heldout = rows_of(seen, TESTED, held_out, draw) + rows_of(new, TESTED_NEW, held_out, draw)
    for name, rows in (("train", train), ("heldout", heldout)):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (HERE / f"annotators_{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{name}: {len(rows)} judgements")


if __name__ == "__main__":
    main()
