"""Published human labels as rows of ``align eval --suite judges``: ``human_labels.py DATA OUTPUT``.

DATA holds ``llmbar/`` (natural.jsonl.gz and adversarial_*.jsonl.gz: input, output_1, output_2, label) and ``pandalm/``
(test.jsonl.gz: instruction, input, response1, response2, annotator1 to annotator3), both published. Questions and
answers become chats; PandaLM's three votes on a pair become three judgements.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reward_data import read


def row(prompt: str, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    turns = {"prompt": ("user", prompt), "chosen": ("assistant", chosen), "rejected": ("assistant", rejected)}
    return {name: [{"role": role, "content": text}] for name, (role, text) in turns.items()} | more


def llmbar(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*.jsonl.gz")):
        for one in read(path):
            answers = [one["output_1"], one["output_2"]]
            chosen, rejected = answers if one["label"] == 1 else answers[::-1]
            yield row(one["input"], chosen, rejected, subset=path.name.removesuffix(".jsonl.gz"))


def pandalm(path: Path) -> Iterator[dict[str, Any]]:
    for one in read(path):
        prompt = "\n\n".join(part for part in (one["instruction"], one["input"]) if part.strip())
        for number in (1, 2, 3):
            preference = {0: 0.5, 1: 1.0, 2: 0.0}[one[f"annotator{number}"]]
            answers = str(one["response1"]), str(one["response2"])
            yield row(prompt, *answers, preference=preference, annotator=f"{number}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    rows = list(llmbar(options.data / "llmbar"))
    sets = {
        "llmbar_natural": [one for one in rows if one["subset"] == "natural"],
        "llmbar_adversarial": [one for one in rows if one["subset"] != "natural"],
        "pandalm": list(pandalm(options.data / "pandalm" / "test.jsonl.gz")),
    }
    for name, several in sets.items():
        text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in several)
        (options.output / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{options.output / name}.jsonl: {len(several):,} rows")


if __name__ == "__main__":
    main()
