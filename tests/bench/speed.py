"""Seconds, memory and utilisation of training on pairs, beside TRL's DPOTrainer.

``make bench`` measures one part, an adapter on pairs as long as those of HH, in a quarter of an hour on two cores;
``make bench-full`` all of them. Each part is a process of its own; in it each way has one too, and they take turns, a
step each, on the same pairs, so that what else the machine does meets them alike. Ratios are of the same round,
medians with their range. Rows are kept in ``--kept`` as they come; a part that is measured again replaces its own; the
tables at the end of ``--output`` are written anew from all that were measured to their end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from speed_parts import PARTS, measure
from speed_tables import MARK, tables

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}


def read_rows(file: Path) -> list[dict[str, Any]]:
    """What was kept."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def chosen(only: list[str], file: Path) -> list[str]:
    """Parts that start with one of ``only``, or those that have not been measured to their end."""
    if only:
        unknown = [name for name in only if not any(part.startswith(name) for part in PARTS)]
        if unknown:
            raise SystemExit(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
        return [part for part in PARTS if any(part == name or part.startswith(f"{name}/") for name in only)]
    done = {row["part"] for row in read_rows(file) if "finished" in row}
    return [part for part in PARTS if part not in done]


def run(part: str, options: argparse.Namespace) -> None:
    """Measure a part in this process, and keep its rows as they come."""
    others = [json.dumps(row) for row in read_rows(options.kept) if row["part"] != part]
    options.kept.write_text("".join(f"{line}\n" for line in others))

    def keep(row: dict[str, Any]) -> None:
        with options.kept.open("a") as file:
            file.write(json.dumps({"part": part, **row}) + "\n")

    began = time.perf_counter()
    measure(part, options, keep)
    keep({"finished": time.perf_counter() - began})


def write(options: argparse.Namespace) -> None:
    """Print the tables, and put them in the place of those before."""
    lines = tables(read_rows(options.kept), PARTS)
    print("\n".join(lines))
    if options.output is not None:
        prose = options.output.read_text(encoding="utf-8").split(MARK)[0] if options.output.exists() else ""
        options.output.write_text(prose + MARK + "\n\n" + "\n".join(lines), encoding="utf-8")


def main() -> None:
    """Run the parts, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="PART", help=f"of {', '.join(PARTS)}, or their starts"
    )
    parser.add_argument("--curves", action="store_true", help="the parts curves alone")
    parser.add_argument("--rounds", type=int, default=4, help="steps of each way, after one to warm up")
    parser.add_argument("--pairs", type=int, default=4, help="pairs a step")
    parser.add_argument("--betas", type=float, nargs="+", default=[0.03, 0.05, 0.1, 0.2, 0.5], help="of the sweep")
    parser.add_argument("--dialogues", help="a folder of pairs for the parts dialogues; without it these are left out")
    parser.add_argument("--seed", type=int, default=0, help="of lengths and order")
    parser.add_argument("--kept", type=Path, default=Path("runs/bench-speed/rows.jsonl"))
    parser.add_argument("--output", type=Path, help="a Markdown file whose tables are replaced; else they are printed")
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.kept.parent.mkdir(parents=True, exist_ok=True)
    if options.part:
        run(options.part, options)
        return
    for part in [] if options.tables else chosen(["curves"] if options.curves else options.only, options.kept):
        if part.endswith("dialogues") and options.dialogues is None:
            print(f"{part}: left out, as no --dialogues FOLDER is given")
            continue
        print(f"{part}: {PARTS[part]}", flush=True)
        command = [sys.executable, __file__, *sys.argv[1:], "--part", part]
        failed = subprocess.run(command, env={**os.environ, **ENVIRONMENT}).returncode
        if failed:
            raise SystemExit(f"{part} ended with {failed}")
    write(options)


if __name__ == "__main__":
    main()
