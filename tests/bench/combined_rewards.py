"""Runs of method grpo side by side: KL, each reward, and answers that are good in all, of several answers a prompt.

    python tests/bench/combined_rewards.py runs/grpo_lsc runs/grpo_raw

Each model (the one before training first) answers all held-out prompts of the first run's recipe, at temperature 1,
with seeds 0, 1, ...; intervals and differences are by prompt, since the models answer the same ones. The references
that say what is good are the first run's. Answers are kept beside the run, in ``answers_SEED.json``.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from align.data.prompts import read_prompts
from align.data.tokenize import encode_prompt
from align.evals.sampling import Sample, sample
from align.evals.statistics import Estimate, bootstrap_interval
from align.models.ends import end_tokens
from align.models.load import load_run
from align.models.scoring import attach_scoring, sequence_logps
from align.rewards.encoding import as_answer
from align.rewards.functions import RewardFunction

BATCH = 32


def drawn(run: Path, adapted: bool, seed: int, prompts: list[list[int]], longest: int, loaded: Any) -> Any:
    """Answers of one model with one seed, and their log-ratios to the model before training."""
    kept = run / (f"answers_{seed}.json" if adapted else f"answers_before_{seed}.json")
    if kept.exists():
        found = json.loads(kept.read_text())
        return [Sample(**answer) for answer in found["answers"]], found["nats"]
    model, tokenizer = loaded.model, loaded.tokenizer
    options = {"max_new_tokens": longest, "temperature": 1.0, "seed": seed, "batch_size": BATCH}
    nats: list[float] = []
    if adapted:
        answers = sample(model, tokenizer, prompts, eos_ids=end_tokens(model, tokenizer), **options)
        for start in range(0, len(prompts), BATCH):
            rows = prompts[start : start + BATCH], [answer.tokens for answer in answers[start : start + BATCH]]
            policy = sequence_logps(model, *rows, pad_token_id=int(tokenizer.pad_token_id))
            with model.disable_adapter():
                reference = sequence_logps(model, *rows, pad_token_id=int(tokenizer.pad_token_id))
            nats += (policy.total - reference.total).double().tolist()
    else:
        with model.disable_adapter():
            answers = sample(model, tokenizer, prompts, eos_ids=end_tokens(model, tokenizer), **options)
        nats = [0.0] * len(answers)
    kept.write_text(json.dumps({"answers": [asdict(answer) for answer in answers], "nats": nats}))
    return answers, nats


def shown(estimate: Estimate, factor: float = 1.0, digits: int = 1) -> str:
    """``36.7 (28.3 to 45.8)``."""
    low, high = (end if end is not None else estimate.value for end in (estimate.low, estimate.high))
    return f"{estimate.value * factor:.{digits}f} ({low * factor:.{digits}f} to {high * factor:.{digits}f})"


def main() -> None:
    """Print the table, and the differences of the first run to the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--answers", type=int, default=4, help="answers a prompt")
    options = parser.parse_args()
    recipe = yaml.safe_load((options.runs[0] / "config.resolved.yaml").read_text())
    reward = RewardFunction.of(recipe["grpo"]["rewards"])
    prompts = [row.prompt for row in read_prompts(recipe["data"]["eval"], reward.expression.data_columns).rows]
    longest = recipe["grpo"]["max_completion_length"]
    groups = [number for _ in range(options.answers) for number in range(len(prompts))]
    good: dict[str, Any] = {}
    print(f"n = {len(prompts)} prompts, {options.answers} answers each")
    for run, adapted in [(options.runs[0], False), *((run, True) for run in options.runs)]:
        loaded = load_run(str(run))
        attach_scoring(loaded.model.get_base_model())
        ids = [encode_prompt(prompt, loaded.tokenizer) for prompt in prompts]
        answers, nats = [], []
        for seed in range(options.answers):
            some, ratios = drawn(run, adapted, seed, ids, longest, loaded)
            answers, nats = [*answers, *some], [*nats, *ratios]
        asked = [prompts[number] for number in groups]
        texts = [as_answer(prompt, answer.text) for prompt, answer in zip(asked, answers, strict=True)]
        columns = reward.columns(asked, texts, {})
        shares = {name: values.double().numpy() for name, values in reward.good(asked, columns).items()}
        name = str(run) if adapted else "before"
        good[name] = shares["all"]
        print(f"\n{name}\n  KL, nats an answer    {shown(bootstrap_interval(nats, groups=groups), 1, 2)}")
        for part in reward.expression.parts:
            print(f"  {part.name:<21} {shown(bootstrap_interval(columns[part.name].numpy(), groups=groups))}")
        for what, values in shares.items():
            print(f"  {'good in ' + what + ', %':<21} {shown(bootstrap_interval(values, groups=groups), 100)}")
        tokens = [len(answer.tokens) for answer in answers]
        print(f"  {'tokens':<21} {shown(bootstrap_interval(tokens, groups=groups))}")
    first, *others = good
    for name in [first, *others[1:]]:
        change = bootstrap_interval(np.asarray(good[others[0]]) - np.asarray(good[name]), groups=groups)
        print(f"\ngood in all, {others[0]} less {name}: {shown(change, 100)} points")


if __name__ == "__main__":
    main()
