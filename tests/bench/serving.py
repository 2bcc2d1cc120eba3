"""Tokens a second, waits and memory of decoding inside vLLM, beside vLLM's own and genlm-control's, and under load.

Run it with ``make bench-serve``. Every part is a process of its own with one engine of SmolLM2, in which the ways take
turns, so that what else the machine does meets them alike; ratios are medians over the rounds. Rows are kept in
``--kept``, and a part that is run again replaces its own. At the end of ``--output`` the tables of the parts that were
run are written anew, and those of others stay. A quick run writes none, unless it is told where.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from serving_tables import page, tables

PARTS = {
    "offline": "ways at 1, 8 and 32 requests at a time",
    "peer": "AWRS-SMC against genlm-control's",
    "transfer": "Transfer-Q* against its naive loop",
    "exact": "the same in float32",
    "rows": "the sampler alone",
    "threads": "some ways on two threads",
    "guidance": "structured outputs by llguidance",
    "memory": "peak memory of each way, in processes of their own",
    "server": "over HTTP",
    "load": "32 clients, one request in ten bad",
}
PAGE = Path("docs/results/serving.md")
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def run(part: str, options: argparse.Namespace, file: Path) -> None:
    """A part, in a process of its own; its rows take the place of those that it made before."""
    made = file.with_name(f"{part}.part")
    command = [sys.executable, str(Path(__file__).with_name("serving_parts.py")), part, "--output", str(made)]
    command += ["--rounds", str(options.rounds), "--load-minutes", str(options.load_minutes)]
    command += ["--peer-python", str(options.peer_python)] if options.peer_python is not None else []
    command += ["--quick"] if options.quick else []
    threads = {"OMP_NUM_THREADS": "2"} if part == "threads" else {}
    made.unlink(missing_ok=True)
    failed = subprocess.run(command, env={**os.environ, **ENVIRONMENT, **threads}).returncode
    if failed:
        raise SystemExit(f"{part} ended with {failed}")
    kept = file.read_text().splitlines() if file.exists() else []
    others = [line for line in kept if json.loads(line)["of"] != part]
    file.write_text("\n".join([*others, *made.read_text().splitlines()]) + "\n")
    made.unlink()


def main() -> None:
    """Run the parts, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument(
        "--quick", action="store_true", help="few and short requests, and no load, to see that it runs"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each way")
    parser.add_argument("--load-minutes", type=float, default=5.0)
    parser.add_argument("--peer-python", type=Path, help="a Python that has genlm-control 0.4.1; without it no peer")
    parser.add_argument("--kept", type=Path, default=Path("runs/bench-serve/rows.jsonl"))
    parser.add_argument("--output", type=Path, help=f"a Markdown file whose tables are replaced; {PAGE} by default")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.kept = 1, options.kept.with_name("quick.jsonl")
    elif options.output is None:
        options.output = PAGE
    options.kept.parent.mkdir(parents=True, exist_ok=True)
    fresh = set()
    for part in options.only:
        if (part == "peer" and options.peer_python is None) or (part in ("load", "memory", "exact") and options.quick):
            continue
        print(f"{part}: {PARTS[part]}", flush=True)
        run(part, options, options.kept)
        made = tables([json.loads(line) for line in options.kept.read_text().splitlines()])
        fresh.add(part)
        print("\n".join(made[part]))
        if options.output is not None:  # now, and not in the end: parts take long, and the next may fail
            before = options.output.read_text(encoding="utf-8") if options.output.exists() else ""
            options.output.write_text(page(before, made, fresh), encoding="utf-8")


if __name__ == "__main__":
    main()
