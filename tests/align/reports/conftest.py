"""Run folders as a run leaves them: written through RunFolder, with results from the evaluation suites themselves."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from align.evals.displacement import displacement_suite
from align.evals.generation import compare
from align.evals.preference import preference_suite
from align.evals.sampling import Sample
from align.losses import PairLogps, SequenceLogps
from align.tracking.manifest import run_facts
from align.tracking.run_folder import RunFolder

RECIPE = """\
method: ln_dpo
model:
  name: smollm2-135m-instruct
  dtype: auto
  lora: {r: 16, target_modules: all-linear}
data: {train: align:quickstart/train, eval: align:quickstart/heldout, max_length: 256}
loss: {beta: 5.0}
training: {learning_rate: 2.0e-05, max_steps: 80, per_device_train_batch_size: 8, seed: 7}
evals: [preference, generation, displacement]
generation: {reward: 'align.rewards.rules:everyday_answer', prompts: 40, max_new_tokens: 96}
output: runs/quickstart
"""
PROMPTS = (
    "Suggest a name for a small bakery that sells only sourdough bread.",
    "Rewrite politely: send me the file now.",
    "What should I pack for a two-day hike in autumn?\nKeep the list short.",
    "Explain to a child why the sky is blue.",
    "Write a two-line birthday message for a colleague.",
)
GAINED = [
    {"id": 57, "token": "I", "before": 0.12, "after": 0.31},
    {"id": 9, "token": '\n<"$', "before": 0.02, "after": 0.08},
]


@pytest.fixture(scope="session")
def _finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with RunFolder(tmp_path_factory.mktemp("runs") / "quickstart") as run:
        run.open_or_resume("5f0c" * 16)
        (run.path / "config.resolved.yaml").write_text(RECIPE)
        run.update_manifest(**run_facts(["align", "train", "quickstart"], seed=7), **sections())
        log_curves(run, steps=80)
        write_evals(run.path)
        write_faults(run.path)
        (run.path / "adapter").mkdir()
    return run.path


@pytest.fixture
def finished_run(_finished_run: Path, tmp_path: Path) -> Path:
    """A run of 80 steps with every part that a run can have; the test's own copy."""
    return Path(shutil.copytree(_finished_run, tmp_path / "quickstart"))


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """``make_run(recipe)``: a run that was started and did nothing else."""

    def make(recipe: str = RECIPE, name: str = "bare") -> Path:
        with RunFolder(tmp_path / name) as run:
            run.open_or_resume("5f0c" * 16)
            (run.path / "config.resolved.yaml").write_text(recipe)
            run.end("interrupted")
        return run.path

    return make


def sections() -> dict[str, object]:
    counts = {"rows": 1204, "pairs": 1188, "set_aside": 12, "ties": 4, "truncated": 3}
    return {
        "model": {
            "name": "smollm2-135m-instruct",
            "weights_sha256": "ab" * 32,
            "dtype": "bfloat16",
            "dtype_reason": "bfloat16: this CPU multiplies bf16 in hardware (AMX or AVX512-BF16)",
            "attention": "sdpa",
            "parameters": 139_400_000,
            "trainable": 4_884_480,
        },
        "reference": {"kind": "adapters-off", "weights_sha256": "ab" * 32},
        "data": {
            "train": {"source": "align:quickstart/train", "sha256": "cd" * 32, **counts},
            "eval": {"source": "align:quickstart/heldout", "sha256": "ef" * 32, "rows": 160, "pairs": 160},
        },
        "speed": {
            "threads": {"count": 2, "reason": "one for each of 2 cores"},
            "checkpointing": {"on": False, "reason": "2.4 GB are needed, and 20.1 GB of this machine are free"},
            "estimated_peak_gb": 3.27,
            "rows": "packed",
            "padding": 0.1234,
            "reference": {"cached": 300, "computed": 340, "seconds": 48.2},
            "peak_rss_gb": 3.485,
        },
        "timings": {"train_seconds": 372.4, "eval_seconds": 141.0, "total_seconds": 530.2},
    }


def log_curves(run: RunFolder, steps: int) -> None:
    noise = torch.randn(steps + 1, 4, generator=torch.Generator().manual_seed(0)).tolist()
    for step in range(1, steps + 1):
        margin = 0.9 * (1 - math.exp(-step / 30)) + 0.08 * noise[step][0]
        values = {
            "loss": math.log1p(math.exp(-margin)) + 0.02 * noise[step][1],
            "grad_norm": 1.2 + 0.2 * noise[step][2] if step != 13 else float("nan"),
            "rewards/accuracies": min(1.0, max(0.0, 0.5 + 0.35 * (1 - math.exp(-step / 25)) + 0.08 * noise[step][3])),
            "rewards/margins": margin,
            "displacement/chosen_delta": 2.0 * (1 - math.exp(-step / 40)) + 0.4 * noise[step][1],
            "displacement/rejected_delta": -7.5 * (1 - math.exp(-step / 40)) + 0.6 * noise[step][2],
            "displacement/frac_chosen_down": 0.3 + 0.1 * noise[step][3],
            "displacement/largest_fall": abs(noise[step][0]),
            "epoch": step / 150,
        }
        run.log(step, values)
        if step % 20 == 0:
            run.log(step, {"eval_loss": values["loss"] + 0.03, "eval_rewards/margins": margin - 0.05, "epoch": 0.1})


def write_evals(path: Path, hostile: str = "") -> None:
    """Evaluations of 40 held-out rows; ``hostile`` text is put into the first prompt and its answers."""
    generator = torch.Generator().manual_seed(1)
    ids = [f"{i:016x}" for i in range(40)]
    chosen, rejected = torch.randn(2, 40, generator=generator).double() * 0.4
    lengths = torch.randint(12, 90, (40,), generator=generator)
    zero = SequenceLogps(total=torch.zeros(40), length=lengths)
    moved = PairLogps(
        chosen=SequenceLogps(total=3 * chosen + 1.5, length=lengths),
        rejected=SequenceLogps(total=4 * rejected - 6, length=lengths),
    )
    prompts = [f"{PROMPTS[i % len(PROMPTS)]}{' (again)' * (i // len(PROMPTS))}" for i in range(40)]
    before = [answer(f"Sure! Here is what I think about it. {'It is good. ' * (4 + i % 7)}", i) for i in range(40)]
    short = "Crumb & Crust", "Could you send me the file, please?", "A map, a rain jacket, water and bread."
    after = [answer(f"{short[i % 3]} {'It says what it is. ' * (i % 9)}", i) for i in range(40)]
    prompts[0] += hostile
    before[0] = answer(before[0].text + hostile, 0)
    after[0] = answer(after[0].text + hostile, 0)
    generation = compare(
        prompts,
        before,
        after,
        lambda _, answers: [round(1 - min(len(a), 200) / 250 + 0.1 * (len(a) % 3), 3) for a in answers],
        settings={"reward": "align.rewards.rules:everyday_answer", "temperature": 0.7},
    )
    (path / "eval").mkdir()
    for result in (
        generation,
        preference_suite(chosen + 0.5, rejected, ids),
        displacement_suite(moved, PairLogps(chosen=zero, rejected=zero), ids, gained=GAINED),
    ):
        (path / "eval" / f"{result['suite']}.json").write_text(json.dumps(result))
    rows = [json.dumps(row, ensure_ascii=True) + "\n" for row in generation["rows"][:20]]
    (path / "samples.jsonl").write_text("".join(rows))


def answer(text: str, index: int) -> Sample:
    return Sample(tokens=list(range(len(text) // 4)), text=text, finished=index % 9 != 4)


def write_faults(path: Path) -> None:
    faults = [
        {"source": "data/pairs.jsonl", "row": 17, "field": "rejected", "reason": "empty completion", "content": {}},
        {
            "source": "data/pairs.jsonl",
            "row": 90,
            "field": "prompt",
            "reason": "1,902 tokens, over 1,024",
            "content": {},
        },
        {
            "source": "data/pairs.jsonl",
            "row": 91,
            "field": "prompt",
            "reason": "2,001 tokens, over 1,024",
            "content": {},
        },
    ]
    (path / "rejected_rows.jsonl").write_text("".join(json.dumps(fault) + "\n" for fault in faults))
