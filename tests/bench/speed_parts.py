"""One part of the speed bench: what is measured, and its rows."""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import speed_flops
import torch
import transformers
import trl
from speed_data import config_of, make_pairs, model_folder
from speed_profile import profiled
from speed_sweep import sweep
from speed_tables import BEST, OURS
from speed_ways import EMULATED, RANK, TRIED, WAYS, WITHOUT, Setup, Way
from speed_worker import Worker

from align.models.hardware import best_dtype

Keep = Callable[[dict[str, Any]], None]
TUNINGS = ("lora", "full")
# What a part is: (what is done, model, tuning, lengths).
PARTS = {
    "lora/hh": "adapter, prompts of 200 and answers of 70 tokens",
    "full/hh": "all weights, the same",
    "lora/tldr": "adapter, 350 and 35",
    "full/tldr": "all weights, the same",
    "lora/uf": "adapter, 120 and 250",
    "full/uf": "all weights, the same",
    "lora/dialogues": "adapter, real dialogues",
    "full/dialogues": "all weights, the same",
    "tiny/hh": "a model of 13 M, all weights: what does not grow with the model",
    "profile/lora": "where the time of a step goes, with an adapter",
    "profile/full": "the same, all weights",
    "sweep": "five betas over an epoch, with and without the reference cache",
    "without/lora": "what each of ours gives, with an adapter",
    "without/full": "the same, all weights",
    "tried/lora": "settings of TRL, to find the best, with an adapter",
    "tried/full": "the same, all weights",
    "curves/lora": "losses of 20 steps beside TRL's, in float32, with an adapter",
    "curves/full": "the same, all weights",
}


def matmul_rate(dtype: torch.dtype, size: int = 2048, repeats: int = 4) -> float:
    """GFLOP a second of a product of large square matrices: the best of several."""
    left, right = (torch.randn(size, size, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds) / 1e9


def rates() -> dict[str, float]:
    """Of float32 and bfloat16."""
    small = 1024  # where bf16 is emulated a large one takes seconds
    return {"float32": matmul_rate(torch.float32), "bfloat16": matmul_rate(torch.bfloat16, small)}


def machine() -> str:
    """Versions, cores and dtype, in words."""
    return (
        f"TRL {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {best_dtype()[1]}"
    )


def set_up(model: str, tuning: str, lengths: str, options: argparse.Namespace, **more: Any) -> Callable[[int], Setup]:
    """The pairs and the model of a part; the setup of its n-th process."""
    steps = options.rounds + 1
    pairs = make_pairs(lengths, options.dialogues, steps, options.pairs, options.seed, options.folder / "pairs.jsonl")
    folder = model_folder(model, options.folder / "model")
    return lambda n: Setup(folder, tuning == "lora", pairs, steps, options.folder / f"run{n}", **more)


def in_turns(ways: dict[str, Way], setup: Callable[[int], Setup], keep: Keep, again: Callable[[], float]) -> None:
    """A step of each way, then the next, each way in a process of its own; the first step of each is not kept."""
    first = setup(0)
    shape, pairs = speed_flops.Shape.of(config_of(first.model)), first.pairs
    rank = RANK if first.lora else None
    with ExitStack() as stack:
        workers = []
        for n, name in enumerate(ways):
            workers.append(stack.enter_context(Worker(name, setup(n))))
            ready = workers[-1].ready
            tokens = sum(map(sum, pairs.sizes))
            keep({"way": name, **ready, "pairs": len(pairs.sizes), "tokens": tokens})
            print(f"  {name}: ready after {ready['built']:.0f} s", flush=True)
        for turn in range(first.steps):
            sizes, rate = pairs.of_step(turn), again()
            for worker in workers[turn % len(workers) :] + workers[: turn % len(workers)]:
                way, answer = ways[worker.way], worker.turn()
                needed = speed_flops.step(shape, sizes, shared=way.shared, rank=rank, reference=way.reference)
                row = {"way": worker.way, "round": turn, **answer, "pairs": pairs.batch}
                row |= {"tokens": sum(map(sum, sizes)), "flops": needed, "rate": rate}
                if turn:
                    keep(row)
                print(f"  {turn} {worker.way}: {answer['seconds']:.1f} s", flush=True)


def measure(part: str, options: argparse.Namespace, keep: Keep) -> None:
    """Measure a part; ``keep`` is given its rows."""
    kind, _, rest = part.partition("/")
    found = rates()
    fastest = torch.bfloat16 if found["bfloat16"] > found["float32"] else torch.float32
    if kind == "curves":
        options.rounds, options.pairs = 19, 2
    keep({"about": machine(), "rates": found, "pairs": options.pairs, "rounds": options.rounds})

    def again() -> float:
        return matmul_rate(fastest)

    options.folder = Path(tempfile.mkdtemp(prefix="speed-"))
    # TRL's defaults in bf16 that the processor emulates take longer than all the others: of the first lengths alone.
    ways = {name: way for name, way in WAYS.items() if rest == "hh" or name not in EMULATED}
    if kind in TUNINGS:
        in_turns(ways, set_up("smollm2", kind, rest, options), keep, again)
    elif kind == "tiny":
        in_turns(ways, set_up("tiny", "full", rest, options), keep, again)
    elif kind == "without":
        in_turns(WITHOUT, set_up("smollm2", rest, "hh", options), keep, again)
    elif kind == "tried":
        in_turns(TRIED, set_up("smollm2", rest, "hh", options), keep, again)
    elif kind == "curves":
        curves(rest, options, keep)
    elif kind == "profile":
        setup = set_up("smollm2", rest, "hh", options)
        for name in (OURS, f"{OURS}, reference in each step", BEST):
            for row in profiled(name, setup(0)):
                keep({"way": name, **row})
    else:
        sweep(set_up("smollm2", "lora", "hh", options)(0), options.betas, keep)


def curves(tuning: str, options: argparse.Namespace, keep: Keep) -> None:
    """Losses of the same steps in float32, at a rate of learning at which they move."""
    rate = 1e-4 if tuning == "lora" else 1e-5
    setup = set_up("smollm2", tuning, "hh", options, training={"learning_rate": rate, "lr_scheduler_type": "constant"})
    names = (f"{BEST}: float32", f"{OURS} in float32")
    with Worker(names[0], setup(0)) as theirs, Worker(names[1], setup(1)) as ours:
        for step in range(options.rounds + 1):
            keep({"step": step, "theirs": theirs.turn()["loss"], "ours": ours.turn()["loss"]})
