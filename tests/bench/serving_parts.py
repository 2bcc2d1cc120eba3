"""The parts of ``serving.py``, each in a process of its own that is started with the environment that it needs."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from serving_load import load, resident, server, speed
from serving_transfer import BEST, SETTINGS, against_naive, ours
from serving_ways import ANYTHING, DTYPE, FREE, GREEDY, LONGEST, RECORD, ROWS, WAYS, Bench, Made, person

from align.decoding.constraints import Vocabulary
from align.decoding.vllm.machine import vllm_version
from align.decoding.vllm.rows import Rows
from align.decoding.vllm.settings import read
from align.models.hardware import has_bf16_cpu
from align.tracking.manifest import hardware

COUNTS = {1: 2, 8: 16, 32: 64}
"""Requests of a round, by how many are under way at a time; of requests with particles as many as that."""
QUICK = {2: 2}
TRANSFER = "Transfer-Q*, 10 candidates, 20 tokens, range"
Say = Callable[[dict[str, Any]], None]


def counts(options: argparse.Namespace) -> dict[int, int]:
    """As many requests as are asked for."""
    return QUICK if options.quick else COUNTS


def row(way: str, at: int, turn: int, made: Made) -> dict[str, Any]:
    """What is kept of a measurement."""
    return {"way": way, "at": at, "round": turn, **asdict(made), "load": os.getloadavg()[0]}


def turns(bench: Bench, options: argparse.Namespace, names: Sequence[str], say: Say) -> None:
    """The ways in turns, another first in each round, after a short one of each to warm up."""
    longest = 12 if options.quick else LONGEST
    for name in names:
        if name in WAYS:
            bench.run(WAYS[name], 1, 1, 0, 8)
    for turn in range(options.rounds):
        first = turn % len(names)
        for at, count in counts(options).items():
            for name in [*names[first:], *names[:first]]:
                if name == TRANSFER and turn and at > 1:
                    continue  # minutes each, and the same every time
                if name == TRANSFER:
                    made, _ = ours(bench, SETTINGS[BEST], at, longest // 2, 100 * turn)
                elif WAYS[name].particles * at > 2 * ROWS and WAYS[name].prompt is not person:
                    continue  # the other constraint says enough of so many particles
                else:
                    way = WAYS[name]
                    made = bench.run(way, at, count if way.particles == 1 else at, turn + 1, longest)
                say(row(name, at, turn, made))


def offline(options: argparse.Namespace, say: Say) -> None:
    """All ways."""
    turns(Bench(), options, [*WAYS, TRANSFER], say)


def threads(options: argparse.Namespace, say: Say) -> None:
    """Some, on as many threads as the environment says."""
    names = [FREE, GREEDY, "AWRS, cheap regex", "AWRS, record regex", "AWRS-SMC, 24 particles, record regex"]
    turns(Bench(), options, names, say)


def guidance(options: argparse.Namespace, say: Say) -> None:
    """VLLM's other backend of structured outputs: one an engine."""
    bench = Bench(structured_outputs_config={"backend": "guidance"})
    turns(bench, options, [FREE, *(name for name in WAYS if name.startswith("structured"))], say)


def memory(options: argparse.Namespace, say: Say) -> None:
    """The peak of each way, from where the engine stands."""
    names = [FREE, *(name for name in WAYS if "record" in name), TRANSFER]
    for name in names:
        command = [sys.executable, __file__, f"memory of {name}", "--output", str(options.output)]
        subprocess.run([*command, *(["--quick"] if options.quick else [])], check=True)


def memory_of(name: str, options: argparse.Namespace, say: Say) -> None:
    """In this process: resident with the engine started and nothing asked, and the most from there on."""
    bench, mine = Bench(), psutil.Process()
    (before,) = resident(mine)
    for at in counts(options):
        Path("/proc/self/clear_refs").write_text("5")
        if name == TRANSFER:
            ours(bench, SETTINGS[BEST], at, 2 if options.quick else 8)
        else:
            bench.run(WAYS[name], at, at, 1, 12 if options.quick else LONGEST)
        lines = Path("/proc/self/status").read_text().splitlines()
        most = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
        say({"way": name, "at": at, "before": before, "peak": most})


@contextmanager
def peer_of(python: Path, given: dict[str, Any]) -> Iterator[Callable[..., dict[str, Any]]]:
    """genlm-control, started and waiting."""
    script = Path(__file__).with_name("genlm_peer.py")
    process = subprocess.Popen([python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None

    def ask(**asked: Any) -> dict[str, Any]:
        print(json.dumps(asked), file=process.stdin, flush=True)
        return dict(json.loads(process.stdout.readline()))  # type: ignore[union-attr]

    try:
        ask(**given)
        yield ask
    finally:
        process.stdin.close()
        process.wait(60)


def peer(options: argparse.Namespace, say: Say) -> None:
    """Ours and theirs in turns: the same prompt, pattern, length, particles and threshold; unconstrained beside."""
    bench = Bench()
    prompt = bench.prompt("Write a JSON record of a person.")
    longest = 40 if options.quick else 64
    given = {"model": str(bench.folder), "prompt": prompt, "pattern": RECORD, "max_tokens": longest, "dtype": DTYPE}
    with peer_of(options.peer_python, given) as ask:
        for turn in range(-1, 2 * options.rounds):  # the first of each is to warm up
            for particles in (8, 24):
                name = f"AWRS-SMC, {particles} particles, record regex"
                (request,) = bench.requests(WAYS[name], 1, turn + 1, longest)
                object.__setattr__(request, "prompt", prompt)
                bench.engine.llm.reset_prefix_cache()
                mine = asdict(bench.ours([request], particles, 1))
                lengths = [max(1, length) for length in mine["lengths"]]
                bench.engine.llm.reset_prefix_cache()
                free = asdict(bench.plain(WAYS[GREEDY], particles, particles, lengths))
                theirs = {
                    "genlm-control": ask(particles=particles, seed=turn + 1, default=False),
                    "genlm-control, default batching": ask(particles=particles, seed=turn + 1, default=True),
                }
                if turn >= 0:
                    for way, made in {"ours": mine, "unconstrained, of the same lengths": free, **theirs}.items():
                        say({"way": way, "particles": particles, "round": turn, **made, "load": os.getloadavg()[0]})


def transfer(options: argparse.Namespace, say: Say, dtype: str = "bfloat16") -> None:
    """Transfer-Q*."""
    rounds, steps = (1, 1) if options.quick else (2, 4)
    for made in against_naive(Bench(dtype), rounds, 6 if options.quick else 64, steps, lambda text: None):
        say({**made, "dtype": dtype, "load": os.getloadavg()[0]})


def exact(options: argparse.Namespace, say: Say) -> None:
    """The same in float32, where a batch's other rows have no say."""
    transfer(options, say, "float32")


def rows(options: argparse.Namespace, say: Say) -> None:
    """Milliseconds a row of our part of a step: random logits of a chat model's spread, any text allowed."""
    from vllm import SamplingParams

    torch.manual_seed(0)
    for size in (49_152,) if options.quick else (49_152, 151_936):
        letters = [bytes([first, second]) for first in range(32, 127) for second in range(32, 127)]
        tokens = [*letters, *(b"%06d" % number for number in range(size - len(letters) - 1))]
        vocabulary = Vocabulary([*tokens, None], frozenset({size - 1}))
        for spec in (None, {"regex": ANYTHING}):
            for batch in (1, 8, 32):
                times = 10 if options.quick else 100
                logits = 3 * torch.randn(batch, size)
                drawn = Rows(vocabulary, None)
                made = []
                for turn in range(times + 3):
                    given = [
                        read(
                            SamplingParams(max_tokens=100, extra_args={"align": {"constraint": spec, "seed": number}})
                        )
                        for number in range(batch)
                    ]
                    asked = {n: (drawn.open(one, ()), ()) for n, one in enumerate(given) if one is not None}
                    copy = logits.clone()
                    began = time.process_time()
                    drawn.draw(copy, asked)
                    made += [1e3 * (time.process_time() - began) / batch] if turn > 2 else []
                deciles = statistics.quantiles(made, n=10)
                say(
                    {
                        "vocabulary": size,
                        "constraint": "any text, as a regex" if spec else "none",
                        "batch": batch,
                        "ms": statistics.median(made),
                        "low": deciles[0],
                        "high": deciles[-1],
                    }
                )


def over_http(options: argparse.Namespace, say: Say) -> None:
    """A server, and closed loops of clients."""
    with server() as (url, process):
        for made in asyncio.run(speed(url, process, options.rounds, counts(options), print)):
            say(made)


def under_load(options: argparse.Namespace, say: Say) -> None:
    """A server, and clients of which some do harm."""
    with server() as (url, process):
        say(asyncio.run(load(url, process, options.load_minutes, print)))


def about() -> str:
    """What it was measured on."""
    name, version = vllm_version()
    threads = torch.get_num_threads()
    processor = f"{hardware()['cpu']}, {DTYPE}{'' if has_bf16_cpu() else ', as it has no hardware for bfloat16'}"
    return (
        f"{name} {version}, torch {torch.__version__}, Python {platform.python_version()}; {processor}, "
        f"{len(os.sched_getaffinity(0))} cores shared with others, {threads} thread{'s' if threads > 1 else ''}"
    )


def main() -> None:
    """One part."""
    parser = argparse.ArgumentParser()
    parser.add_argument("part")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--load-minutes", type=float, default=5.0)
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    part = options.part.partition(" of ")[0]

    def say(found: dict[str, Any]) -> None:
        with options.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"of": part, **found}) + "\n")
        short = {k: round(v, 3) if isinstance(v, float) and math.isfinite(v) else v for k, v in found.items()}
        print({k: v for k, v in short.items() if not isinstance(v, list | dict)}, flush=True)

    if part == "memory" and part != options.part:
        memory_of(options.part.partition(" of ")[2], options, say)
        return
    work: dict[str, Callable[[argparse.Namespace, Say], None]] = {
        "offline": offline,
        "peer": peer,
        "transfer": transfer,
        "exact": exact,
        "rows": rows,
        "threads": threads,
        "guidance": guidance,
        "memory": memory,
        "server": over_http,
        "load": under_load,
    }
    say({"about": about()})
    work[part](options, say)


if __name__ == "__main__":
    main()
