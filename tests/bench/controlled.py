"""Answers under constraints on SmolLM2: how many are valid and right, how often the constraint is asked, and the time.

    python tests/bench/controlled.py --data FOLDER --cache FOLDER --output table.md

``--data`` holds ``spider/dev.jsonl.gz`` and ``spider/schemas.jsonl.gz``; without it, only the two tasks that are
written here are run. Every answer is kept in ``--cache`` as soon as it is there, and the same command goes on; tables
are of the questions that every way has answered.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.data.tokenize import encode_prompt
from align.decoding.constraints import Constraint, Memo, Sql, Vocabulary, json_schema, read_schemas, regex
from align.decoding.engines import TransformersEngine
from align.decoding.generate import generate
from align.decoding.request import Answer, Method, Request, satisfies
from align.models.ends import end_tokens
from align.models.load import LoadedModel, load_run

MODEL = "smollm2-135m-instruct"
PATTERNS = {
    r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])": "a date of the year 2021, written as YYYY-MM-DD",
    r"([01][0-9]|2[0-3]):[0-5][0-9]": "the time of a lunch break, on a 24-hour clock as HH:MM",
    r"#[0-9a-f]{6}": "a dark blue as a hexadecimal colour code, in small letters",
    r"\+[0-9]{2} [0-9]{3} [0-9]{3} [0-9]{3}": "a phone number such as +34 600 123 456",
    r"[a-z]+\.[a-z]+@example\.(com|org)": "an e-mail address at example.com, of a first name, a dot and a last name",
    r"(25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])(\.(25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])){3}": "the IPv4 address of a router",
    r"[A-Z]{3}-[0-9]{4}": "a licence plate of three capital letters, a hyphen and four digits",
    r"[A-Z][a-z]+, [A-Z][a-z]+, [A-Z][a-z]+": "three capitals of Europe, with commas between them",
    r"(yes|no), because [a-z ]{10,60}\.": "whether cats are mammals: yes or no, because and a reason in small letters",
    r"v[0-9]+\.[0-9]+\.[0-9]+(-(alpha|beta|rc)\.[0-9]+)?": "a version number such as v1.4.0-beta.2",
    r"\$[1-9][0-9]{0,2}(,[0-9]{3})*\.[0-9]{2}": "the price of a used car in dollars and cents, such as $4,250.00",
    r"\([0-9]{1,2}, [0-9]{1,2}\)( -> \([0-9]{1,2}, [0-9]{1,2}\)){2}": "three points as (1, 2) -> (3, 4) -> (5, 6)",
}
WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
TEXT, WHOLE = {"type": "string", "maxLength": 40}, {"type": "integer", "minimum": 0, "maximum": 99999}
EXTRACTIONS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("Anna is 34 years old and lives in Rome.", {"name": TEXT, "age": WHOLE, "city": TEXT},
     {"name": "Anna", "age": 34, "city": "Rome"}),
    ("The museum opens at 9 and closes at 17; tickets cost 12 euros.",
     {"opens": WHOLE, "closes": WHOLE, "price": WHOLE}, {"opens": 9, "closes": 17, "price": 12}),
    ("Order 5512: two lamps, paid.", {"order": WHOLE, "item": TEXT, "count": WHOLE, "paid": {"type": "boolean"}},
     {"order": 5512, "item": "lamp", "count": 2, "paid": True}),
    ("The film was wonderful, I would see it again.",
     {"sentiment": {"enum": ["positive", "negative", "neutral"]}, "recommended": {"type": "boolean"}},
     {"sentiment": "positive", "recommended": True}),
    ("Flight LH204 leaves Berlin for Oslo at gate 12.", {"flight": TEXT, "from": TEXT, "to": TEXT, "gate": WHOLE},
     {"flight": "LH204", "from": "Berlin", "to": "Oslo", "gate": 12}),
    ("The recipe needs flour, sugar and eggs.", {"ingredients": {"type": "array", "items": TEXT, "maxItems": 5}},
     {"ingredients": ["flour", "sugar", "eggs"]}),
    ("Tom owes Mary 250 dollars until May.", {"debtor": TEXT, "creditor": TEXT, "amount": WHOLE, "month": TEXT},
     {"debtor": "Tom", "creditor": "Mary", "amount": 250, "month": "May"}),
    ("The tower is 324 metres high and was finished in 1889.", {"height": WHOLE, "year": WHOLE},
     {"height": 324, "year": 1889}),
    ("A red bicycle, size M, out of stock.",
     {"colour": TEXT, "size": {"enum": ["S", "M", "L"]}, "available": {"type": "boolean"}},
     {"colour": "red", "size": "M", "available": False}),
    ("Contact Ben Ode, ben@example.org, in the sales department.", {"name": TEXT, "email": TEXT, "department": TEXT},
     {"name": "Ben Ode", "email": "ben@example.org", "department": "sales"}),
]  # fmt: skip


@dataclass(frozen=True)
class Item:
    """A question, what an answer must be, the right one where there is one, and how it is compared."""

    name: str
    prompt: str
    constraint: Constraint
    gold: str | None
    normal: Callable[[str], str]


@dataclass(frozen=True)
class Way:
    """How answers are made; ``free`` draws without the constraint and takes the first answer that satisfies it.

    Of several free samples that is reranking: a constraint gives them ranks 1 and 0.
    """

    method: Method
    particles: int
    free: bool = False


WAYS = {
    "unconstrained": Way("awrs", 1, free=True),
    "8 samples, reranked": Way("awrs", 8, free=True),
    "masking": Way("mask", 1),
    "rejection of tokens": Way("rejection", 1),
    "AWRS, 1": Way("awrs", 1),
    "AWRS-SMC, 8": Way("awrs-smc", 8),
}
LONGEST = {"pattern": 40, "json": 90, "sql": 80}


def items_of(task: str, vocabulary: Vocabulary, options: argparse.Namespace) -> Iterator[Item]:
    """The questions of a task."""
    data: Path | None = options.data
    if task == "pattern":
        for pattern, what in PATTERNS.items():
            for copy in range(options.copies):
                prompt = f"Write {what}. Write nothing else."
                yield Item(f"{pattern}/{copy}", prompt, regex(pattern, vocabulary), None, str)
    if task == "json":
        for copy, (text, properties, gold) in ((c, e) for e in EXTRACTIONS for c in range(options.copies)):
            schema = {"type": "object", "properties": properties, "required": list(properties),
                      "additionalProperties": False, "x-guidance": WRITTEN}  # fmt: skip
            keys = ", ".join(properties)
            prompt = f"{text}\nWrite this as one line of JSON with the keys {keys}. Write nothing else."
            constraint = json_schema(schema, vocabulary)
            yield Item(f"{text}/{copy}", prompt, constraint, json.dumps(gold, sort_keys=True), normal_json)
    if task == "sql" and data is not None:
        schemas = read_schemas(data / "spider" / "schemas.jsonl.gz")
        with gzip.open(data / "spider" / "dev.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        for number in np.linspace(0, len(rows) - 1, options.questions).astype(int).tolist():
            row = rows[number]
            schema = schemas[row["db_id"]]
            tables = "\n".join(f"{table}({', '.join(columns)})" for table, columns in schema.items())
            prompt = (
                f"Tables:\n{tables}\nQuestion: {row['question']}\n"
                "Write one SQLite query that answers it, on one line. Write nothing else."
            )
            yield Item(f"{number}", prompt, Sql(schema, vocabulary), normal_sql(row["query"]), normal_sql)


def normal_json(text: str) -> str:
    """The same value in one way of writing."""
    try:
        return json.dumps(json.loads(text), sort_keys=True)
    except ValueError:
        return text


def normal_sql(text: str) -> str:
    """Small letters but in quotes, single quotes, one way of spacing, no semicolon."""
    parts = re.split(r"('[^']*'|\"[^\"]*\")", text.strip().rstrip("; "))
    parts = [f"'{part[1:-1]}'" if number % 2 else part.lower() for number, part in enumerate(parts)]
    return re.sub(r" ?([(),=<>!]+) ?", r"\1", " ".join("".join(parts).split()))


class LateError(Exception):
    """The minutes are over."""


class Bench:
    """The model, and where answers are kept."""

    def __init__(self, cache: Path, minutes: float) -> None:
        self.cache, self.until = cache, time.monotonic() + 60 * minutes
        loaded: LoadedModel = load_run(MODEL)
        self.tokenizer, self.dtype = loaded.tokenizer, str(loaded.model.dtype).removeprefix("torch.")
        size = loaded.model.get_output_embeddings().weight.shape[0]
        ends = end_tokens(loaded.model, self.tokenizer)
        self.vocabulary = Vocabulary.of(self.tokenizer, size=size, ends=ends)
        self.engine = TimedEngine(loaded.model)
        cache.mkdir(parents=True, exist_ok=True)

    def prompt(self, text: str) -> list[int]:
        """A user's message, up to where the answer begins."""
        return encode_prompt([{"role": "user", "content": text}], self.tokenizer)

    def run(self, task: str, items: Sequence[Item], name: str) -> list[dict[str, Any]]:
        """Answers of one way to one task, those that are kept not made again."""
        path, way = self.cache / f"{task}-{name.replace(' ', '_').replace(',', '')}.jsonl", WAYS[name]
        kept = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        wanted = {item.name for item in items}
        rows = [row for row in kept if row["item"] in wanted]
        done = {row["item"] for row in rows}
        todo = [(number, item) for number, item in enumerate(items) if item.name not in done]
        requests = [
            Request(
                self.prompt(item.prompt),
                None if way.free else Memo(item.constraint),
                way.method,
                way.particles,
                seed=number,
                max_new_tokens=LONGEST[task],
            )
            for number, item in todo
        ]
        with path.open("a") as file:
            spent = time.process_time()

            def keep(place: int, answer: Answer) -> None:
                nonlocal spent
                row = self.row(todo[place][1], way, answer)
                # Questions share batches: what was spent since the last answer, to add up over all of them.
                row["seconds"], spent = time.process_time() - spent, time.process_time()
                rows.append(row)
                file.write(json.dumps(row) + "\n")
                file.flush()
                if time.monotonic() > self.until:
                    raise LateError

            with suppress(LateError):
                generate(
                    self.engine, requests if time.monotonic() < self.until else [], self.vocabulary, on_answer=keep
                )
        return rows

    def row(self, item: Item, way: Way, answer: Answer) -> dict[str, Any]:
        """What is kept of an answer."""
        taken = answer.result.drawn if answer.result is not None else None
        if way.free and answer.result is not None:
            samples = [sample.tokens for sample in answer.result.samples]
            valid = [tokens for tokens in samples if satisfies(item.constraint, tokens, self.vocabulary)]
            tokens = valid[0] if valid else samples[0]
        else:
            valid = [taken.tokens] if taken is not None and answer.valid else []
            tokens = taken.tokens if taken is not None else ()
        text = self.vocabulary.text(tokens)
        return {
            "item": item.name,
            "text": text,
            "valid": bool(valid),
            "right": item.gold is not None and bool(valid) and item.normal(text) == item.gold,
            "judged": item.gold is not None,
            "tokens": len(tokens),
            "evaluations": list(answer.evaluations),
            "masks": answer.masks,
            "ess": answer.result.ess if answer.result is not None else None,
            "reason": answer.reason,
        }

    def speed(self, rounds: int, steps: int = 32) -> list[dict[str, Any]]:
        """Ways in turns on the same eight prompts, one sequence each: CPU seconds a step, and what is not the model's.

        CPU time of one thread, because a shared machine's clock says more of the others.
        """
        path = self.cache / "speed.jsonl"
        kept = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        cheap = regex("(?s).{0,4000}", self.vocabulary)
        object_of = {"type": "object", "properties": {"story": {"type": "string"}}, "required": ["story"]}
        json_one = json_schema(object_of, self.vocabulary)
        ways: list[tuple[str, Constraint | None, Method]] = [
            ("unconstrained", None, "awrs"),
            ("cheap regex, AWRS", cheap, "awrs"),
            ("cheap regex, rejection of tokens", cheap, "rejection"),
            ("cheap regex, masking", cheap, "mask"),
            ("JSON string, AWRS", json_one, "awrs"),
            ("JSON string, masking", json_one, "mask"),
        ]
        prompts = [self.prompt(f"Tell a long story about {n} ships on a dark and stormy sea.") for n in range(2, 10)]
        for number in range(len({row["round"] for row in kept}), rounds):
            if time.monotonic() > self.until:
                break
            made = []
            for name, constraint, method in ways[number % len(ways) :] + ways[: number % len(ways)]:
                requests = [
                    Request(prompt, constraint, method, 1, seed=number, max_new_tokens=steps) for prompt in prompts
                ]
                self.engine.reset()
                begin = time.process_time()
                generate(self.engine, requests, self.vocabulary)
                spent = time.process_time() - begin - self.engine.opening
                outside = (spent - self.engine.forward) / self.engine.steps
                # Opening computes the first step's logits.
                step = outside + self.engine.forward / (self.engine.steps - 1)
                made.append({"round": number, "way": name, "step": step, "outside": outside})
            with path.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in made)
            kept += made
        return kept


class TimedEngine(TransformersEngine):
    """Counts steps and the time within the model, since ``reset``."""

    opening = forward = 0.0
    steps = 0

    def reset(self) -> None:
        """From 0."""
        self.opening = self.forward = 0.0
        self.steps = 0

    def open(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """As it is, timed."""
        begin = time.process_time()
        handles = super().open(prompts)
        self.opening += time.process_time() - begin
        return handles

    def next_logits(self, handles: Sequence[int]) -> tuple[Tensor, list[int]]:
        """As it is, timed."""
        begin = time.process_time()
        found = super().next_logits(handles)
        self.forward += time.process_time() - begin
        self.steps += 1
        return found


def share(values: Sequence[bool]) -> str:
    """Per cent, and of how many."""
    return f"{100 * sum(values) / len(values):.0f} % of {len(values)}" if values else ""


def task_table(task: str, answers: dict[str, list[dict[str, Any]]], size: int) -> list[str]:
    """Validity, matches, questions and time of one task, over what every way has answered."""
    common = set.intersection(*({row["item"] for row in rows} for rows in answers.values()))
    steps = {
        name: sum(len(row["evaluations"]) for row in rows) / WAYS[name].particles for name, rows in answers.items()
    }
    seconds = {name: sum(row["seconds"] for row in rows) / max(1, steps[name]) for name, rows in answers.items()}
    lines = [
        f"### {task}, {len(common)} questions", "",
        "| way | valid | right | questions a token: median, mean, p99 | median of the vocabulary | tokens by a mask "
        "| mean ESS | CPU ms a step |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for name, kept in answers.items():
        rows = [row for row in kept if row["item"] in common]
        calls = np.array([count for row in rows for count in row["evaluations"]])
        asked = not WAYS[name].free and len(calls) > 0
        numbers = f"{np.median(calls):.0f}, {calls.mean():.1f}, {np.percentile(calls, 99):.0f}" if asked else ""
        part = f"{100 * np.median(calls) / size:.4f} %" if asked else ""
        masks = f"{100 * sum(row['masks'] for row in rows) / len(calls):.1f} %" if asked else ""
        ess = [row["ess"] or 0.0 for row in rows] if name.startswith("AWRS-SMC") else []
        lines.append(
            f"| {name} | {share([row['valid'] for row in rows])} | {share([r['right'] for r in rows if r['judged']])} "
            f"| {numbers} | {part} | {masks} | {f'{np.mean(ess):.1f}' if ess else ''} | {1e3 * seconds[name]:.0f} |"
        )
    return [*lines, ""]


def speed_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Medians over the rounds; ratios within a round."""
    by = {
        way: {row["round"]: row for row in rows if row["way"] == way} for way in dict.fromkeys(r["way"] for r in rows)
    }
    plain = by.get("unconstrained", {})
    lines = [
        "### CPU time of a step, 8 sequences, one thread", "",
        "| way | ms a step | of these outside of the model | against unconstrained, median (range) |",
        "| --- | --- | --- | --- |",
    ]  # fmt: skip
    for name, found in sorted(by.items(), key=lambda pair: pair[0] != "unconstrained"):
        ratios = [row["step"] / plain[number]["step"] for number, row in found.items()]
        lines.append(
            f"| {name} | {1e3 * statistics.median(row['step'] for row in found.values()):.1f} "
            f"| {1e3 * statistics.median(row['outside'] for row in found.values()):.1f} "
            f"| {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}), n = {len(ratios)} |"
        )
    return [*lines, ""]


def main() -> None:
    """Run what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--questions", type=int, default=40, help="of Spider")
    parser.add_argument("--copies", type=int, default=4, help="how often each of the other tasks is asked")
    parser.add_argument("--minutes", type=float, default=600, help="then the tables of what is there")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="*", default=["speed", "sql", "json", "pattern"])
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    bench = Bench(options.cache, options.minutes)
    lines: list[str] = [f"{MODEL}, {bench.dtype}, {bench.vocabulary.size:,} tokens", ""]
    if "speed" in options.only:
        lines += speed_table(bench.speed(options.rounds))
    for task in ("pattern", "json", "sql"):
        items = list(items_of(task, bench.vocabulary, options)) if task in options.only else []
        if items:
            answers = {name: bench.run(task, items, name) for name in WAYS}
            lines += task_table(task, answers, bench.vocabulary.size)
    print("\n".join(lines))
    if options.output is not None:
        options.output.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
