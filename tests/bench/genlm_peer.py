"""AWRS-SMC by genlm-control, as a process of its own: one JSON line in for each run, one out.

``serving.py`` starts it by ``--peer-python``, a Python that has ``genlm-control`` and nothing of ours. The first line
holds model, prompt and pattern; each one after it particles and a seed. Prompt and answers are forgotten between runs,
and the prompt's keys and values are computed again before the clock starts, which is its best setting. A batch goes
off as soon as all particles have asked, and without the 20 ms that it waits for more by default.
"""

import asyncio
import json
import random
import sys
import time

import numpy as np
import regex
import torch
from genlm.control import PromptedLLM
from genlm.control.potential import Potential
from genlm.control.sampler import AWRS
from genlm.control.sampler.sequence import SMC


class Pattern(Potential):
    """Whether bytes can become, or are, a full match."""

    def __init__(self, vocabulary, pattern):
        self.pattern, self.checks = regex.compile(pattern.encode()), 0
        super().__init__(vocabulary)

    async def prefix(self, context):
        """0 or -inf."""
        self.checks += 1
        return 0.0 if self.pattern.fullmatch(b"".join(map(bytes, context)), partial=True) else -np.inf

    async def complete(self, context):
        """0 or -inf."""
        self.checks += 1
        return 0.0 if self.pattern.fullmatch(b"".join(map(bytes, context))) else -np.inf


class Counted(AWRS):
    """Counts the tokens that it draws."""

    drawn = 0

    async def sample(self, context, draw=None, verbosity=0):
        """As it is."""
        self.drawn += 1
        return await super().sample(context, draw, verbosity)


def ask(condition, llm, given, *, particles, seed, default):
    """One run: its tokens, checks, seconds and evidence."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    llm.model.batch_size, llm.model.timeout = (20, 0.02) if default else (particles, 0.0)
    llm.model.clear_cache()
    llm.model.cache_kv(given["prompt"])
    condition.checks = 0
    sampler = Counted(llm, condition, seed=seed, prune_logws=False)
    smc = SMC(sampler)
    began, worked = time.perf_counter(), time.process_time()
    found = asyncio.run(smc(particles, 0.5, given["max_tokens"], resampling_method="systematic"))
    wall, cpu = time.perf_counter() - began, time.process_time() - worked
    best = found.contexts[int(np.argmax(found.log_weights))]
    return {
        "tokens": sampler.drawn,
        "evaluations": condition.checks,
        "wall": wall,
        "cpu": cpu,
        "log_normaliser": float(found.log_ml),
        "ess": float(found.ess),
        "text": b"".join(bytes(token) for token in best[:-1]).decode(errors="replace"),
    }


def main():
    """Answer the lines."""
    given = json.loads(sys.stdin.readline())
    llm = PromptedLLM.from_name(
        given["model"], backend="hf", hf_opts={"dtype": getattr(torch, given["dtype"]), "device_map": "cpu"}
    )
    llm.prompt_ids = given["prompt"]
    condition = Pattern(llm.vocab, given["pattern"])
    print(json.dumps({"ready": True, "threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        print(json.dumps(ask(condition, llm, given, **json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
