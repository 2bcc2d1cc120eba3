"""CHES of the same pairs by ``align score``'s scorer and by a plain loop: pairs a second, memory, and how exact.

Run it with ``make bench-ches``. The plain loop is what the definition reads: one pair at a time, two forward passes
over prompt and answer, all hidden states. All take turns on the same pairs, so that what else the machine does meets
them alike; ratios are medians over the rounds, at equal dtype and, apart, of our default against the loop in float32.
Peak memory is that of a process for each. A small random model shows what rows cost: seconds in proportion, memory
not.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from transformers import LlamaConfig, LlamaForCausalLM

from align.data.pairs import read_pairs
from align.data.tokenize import tokenize_pair
from align.models.hardware import best_dtype
from align.models.load import LoadedModel, load_model, load_tokenizer
from align.score.policy import PolicyScorer
from align.score.run import score_data, score_rows
from align.score.scorers import Policy

MODEL = "smollm2-135m-instruct"
AIM = 2.5
"""Times as fast as the plain loop, at equal dtype."""
WORDS = (
    "the",
    "a",
    "house",
    "river",
    "light",
    "old",
    "small",
    "said",
    "went",
    "under",
    "before",
    "many",
    "people",
    "day",
)
Pairs = Sequence[dict[str, Any]]
Way = Callable[[Pairs], list[float]]


def make_pairs(tokenizer: Any, count: int, prompt: int, answer: int, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs of ``prompt`` and two answers of ``answer`` tokens, of words that are a token each."""
    rng = random.Random(seed)

    def text(tokens: int) -> str:
        return "".join(f" {rng.choice(WORDS)}" for _ in range(tokens))

    pairs = [{"prompt": text(prompt), "chosen": text(answer), "rejected": text(answer)} for _ in range(count)]
    assert len(tokenizer(pairs[0]["prompt"])["input_ids"]) == prompt
    return pairs


def scorer_of(model: Any, tokenizer: Any, batch: int) -> PolicyScorer:
    """What ``align score --with ches_ln`` scores with."""
    return PolicyScorer({"ches_ln": "ches_ln"}, Policy.of(MODEL, LoadedModel(model, tokenizer, ""), None, batch))


def ours(model: Any, tokenizer: Any, batch: int = 16) -> Way:
    """The scorer and its batches."""
    scorer = scorer_of(model, tokenizer, batch)

    def score(pairs: Pairs) -> list[float]:
        lines = score_rows([scorer], [(n, ("", n, pair)) for n, pair in enumerate(pairs, start=1)], batch)
        return [line["columns"]["ches_ln"] for line in lines]

    return score


def loop(model: Any, tokenizer: Any, head: bool = True) -> Way:
    """The plain loop; with ``head`` it calls the whole model, logits too, as scripts do."""

    def states(prompt: list[int], answer: list[int]) -> torch.Tensor:
        with torch.no_grad():
            out = (model if head else model.model)(torch.tensor([prompt + answer]), output_hidden_states=True)
        return out.hidden_states[-1][0, len(prompt) - 1 : -1].double()

    def score(pairs: Pairs) -> list[float]:
        scores = []
        for pair in pairs:
            ids = tokenize_pair(pair["prompt"], pair["chosen"], pair["rejected"], tokenizer, None)
            w, r = (states(ids.prompt_ids, answer).mean(0) for answer in (ids.chosen_ids, ids.rejected_ids))
            scores.append(float(w @ r - w @ w))
        return scores

    return score


WAYS: dict[str, Callable[..., Way]] = {
    "ours": ours,
    "plain loop": loop,
    "plain loop, no logits": lambda model, tokenizer: loop(model, tokenizer, head=False),
}


def speed(options: argparse.Namespace, dtypes: Sequence[str]) -> None:
    """Pairs a second of every way at every dtype, in turns, and ratios of the turns."""
    tokenizer = load_tokenizer(MODEL)
    ways = {}
    for dtype in dtypes:
        model = load_model(MODEL, dtype=dtype)[0]
        ways |= {(name, dtype): make(model, tokenizer) for name, make in WAYS.items()}
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in ways}
    of_cpu: dict[tuple[str, str], list[float]] = {key: [] for key in ways}
    for turn in range(options.rounds + 1):
        pairs = make_pairs(tokenizer, options.pairs if turn else 2, options.prompt, options.answer, seed=turn)
        for key, score in ways.items():
            began, worked = time.perf_counter(), time.process_time()
            score(pairs)
            if turn:
                seconds[key].append(time.perf_counter() - began)
                of_cpu[key].append(time.process_time() - worked)
    print(
        f"{options.rounds} rounds of {options.pairs} pairs, prompts of {options.prompt}, answers of {options.answer}"
    )
    for (name, dtype), taken in seconds.items():
        print(f"  {name:<22} {dtype:<9} {options.pairs / statistics.median(taken):6.2f} pairs/s")
    for other in list(WAYS)[1:]:
        for mine, its in [*((dtype, dtype) for dtype in dtypes), *([(dtypes[0], dtypes[1])] if dtypes[1:] else [])]:
            whole, work = (
                [b / a for a, b in zip(taken["ours", mine], taken[other, its], strict=True)]
                for taken in (seconds, of_cpu)
            )
            aim = f", and {AIM:g} is the aim" if mine == its else ""
            print(
                f"  ours in {mine} against the {other} in {its}: {statistics.median(whole):.2f} times "
                f"({min(whole):.2f} to {max(whole):.2f}){aim}; by CPU time {statistics.median(work):.2f}"
            )


def exactness(options: argparse.Namespace, dtypes: Sequence[str]) -> None:
    """Scores of real pairs at every dtype against float64, or float32 for the many."""
    tokenizer = load_tokenizer(MODEL)
    found = read_pairs("align:quickstart/heldout").rows[: options.real]
    pairs = [{"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected} for row in found]
    model = load_model(MODEL, dtype="float32")[0]
    exact = ours(model, tokenizer)(pairs)
    few = pairs[::8]
    wide = dict(zip(range(0, len(pairs), 8), loop(model.double(), tokenizer)(few), strict=True))
    errors = [abs(exact[place] / value - 1) for place, value in wide.items()]
    print(
        f"float32 against float64, {len(few)} pairs: relative error {statistics.median(errors):.1e} in the median, "
        f"{max(errors):.1e} at most"
    )
    model = model.float()
    alone = ours(model, tokenizer, batch=1)(few)
    errors = [abs(exact[place] / value - 1) for place, value in zip(wide, alone, strict=True)]
    print(f"float32, batches of 16 against 1: relative difference {max(errors):.1e} at most")
    for dtype in dtypes:
        if dtype != "float32":
            rounded = ours(load_model(MODEL, dtype=dtype)[0], tokenizer)(pairs)
            errors = sorted(abs(a / b - 1) for a, b in zip(rounded, exact, strict=True))
            print(
                f"{dtype} against float32, {len(pairs)} pairs: rank correlation {spearmanr(rounded, exact)[0]:.4f}, "
                f"relative error {statistics.median(errors):.1e} in the median, {max(errors):.1e} at most"
            )


def resident(field: str) -> float:
    """``VmRSS``, what this process has in memory, or ``VmHWM``, the most since ``forget_peak``; MiB, on Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def forget_peak() -> None:
    """What loading a model took is not what scoring takes."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def in_process(what: str, *words: object) -> dict[str, float]:
    """What a process of its own says of its last line."""
    command = [sys.executable, __file__, "--only", what, *(str(word) for word in words)]
    return dict(
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    )


def peak_of(options: argparse.Namespace) -> dict[str, float]:
    """Score in this process: what it has with the model loaded and nothing computed, and its peak from there on."""
    model, tokenizer = load_model(MODEL, dtype=options.dtype)[0], load_tokenizer(MODEL)
    pairs = make_pairs(tokenizer, options.pairs, options.prompt, options.answer)
    score = WAYS[options.way](model, tokenizer)
    forget_peak()
    loaded = resident("VmRSS")
    score(pairs)
    return {"loaded": loaded, "peak": resident("VmHWM")}


def cost_of(rows: int) -> dict[str, float]:
    """Score ``rows`` pairs of 60 and 2 x 20 tokens by a small model, from file to file, in this process."""
    tokenizer = load_tokenizer(MODEL)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).eval()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "pairs.jsonl"
        with source.open("w", encoding="utf-8") as file:
            for seed in range(0, rows, 500):
                made = make_pairs(tokenizer, min(500, rows - seed), 60, 20, seed)
                file.writelines(json.dumps(pair) + "\n" for pair in made)
        forget_peak()
        began = time.perf_counter()
        score_data(str(source), [scorer_of(model, tokenizer, 16)], Path(folder) / "scored.jsonl")
        return {"seconds": time.perf_counter() - began, "peak": resident("VmHWM")}


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["speed", "memory", "exact", "rows", "peak-of", "cost-of"])
    parser.add_argument("--rounds", type=int, default=4, help="turns of each, after one to warm up")
    parser.add_argument("--pairs", type=int, default=16, help="pairs a turn")
    parser.add_argument("--prompt", type=int, default=200, help="tokens")
    parser.add_argument("--answer", type=int, default=60, help="tokens")
    parser.add_argument("--real", type=int, default=128, help="pairs whose scores are compared between dtypes")
    parser.add_argument("--way", default="ours", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    options = parser.parse_args()
    default = str(best_dtype()[0]).removeprefix("torch.")
    dtypes = list(dict.fromkeys((default, "float32")))
    if options.only in ("peak-of", "cost-of"):
        print(json.dumps(peak_of(options) if options.only == "peak-of" else cost_of(options.pairs)))
        return
    print(f"{MODEL}, default dtype {best_dtype()[1]}, {torch.get_num_threads()} threads")
    if options.only in (None, "speed"):
        speed(options, dtypes)
    if options.only in (None, "memory"):
        sizes = ["--pairs", options.pairs, "--prompt", options.prompt, "--answer", options.answer]
        for dtype in dtypes:
            for way in WAYS:
                found = in_process("peak-of", "--way", way, "--dtype", dtype, *sizes)
                before = f"{found['loaded']:.0f} of them before scoring"
                print(f"  {way:<22} {dtype:<9} {found['peak']:6.0f} MiB at most, {before}")
    if options.only in (None, "exact"):
        exactness(options, dtypes)
    if options.only in (None, "rows"):
        for rows in (1000, 4000, 16000):
            found = in_process("cost-of", "--pairs", rows)
            each = found["seconds"] / rows * 1000
            print(f"  {rows:>6,} rows: {each:.2f} s a thousand, {found['peak']:.0f} MiB at most")


if __name__ == "__main__":
    main()
