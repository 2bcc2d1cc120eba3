"""``align eval --suite lm-eval``: what is made of the harness's results, and a run of it where it is installed."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from align.cli import app
from align.evals.statistics import bootstrap_interval
from align.suites.lm_eval import directions, documents, ratio

# As lm-eval 0.4.13 gives it, less the fields that are not read.
RESULT: dict[str, Any] = {
    "results": {
        "animals": {"name": "animals", "sample_len": 2, "acc,none": 0.5, "acc_stderr,none": "N/A"},
        "says": {"name": "says", "sample_len": 1, "exact_match,first": 1.0, "exact_match_stderr,first": "N/A"},
        "surprise": {"name": "surprise", "sample_len": 2, "bits_per_byte,none": 3.2},
    },
    "samples": {
        "animals": [
            {"doc_id": 1, "filter": "none", "metrics": ["acc"], "prompt_hash": "b", "acc": 0.0},
            {"doc_id": 0, "filter": "none", "metrics": ["acc"], "prompt_hash": "a", "acc": 1.0},
        ],
        "says": [
            {"doc_id": 0, "filter": "first", "metrics": ["exact_match"], "prompt_hash": "c", "exact_match": True},
        ],
        "surprise": [
            {
                "doc_id": 0,
                "filter": "none",
                "metrics": ["bits_per_byte"],
                "prompt_hash": "d",
                "bits_per_byte": (-8, 4),
            },
            {
                "doc_id": 1,
                "filter": "none",
                "metrics": ["bits_per_byte"],
                "prompt_hash": "e",
                "bits_per_byte": (-2, 1),
            },
        ],
    },
    "higher_is_better": {"animals": {"acc": True}, "says": {}, "surprise": {"bits_per_byte": False}},
}


def test_documents_of_a_result() -> None:
    """In the order of the documents; log-probs become nats."""
    values, rows = documents(RESULT)
    assert values == {"animals.acc": [1.0, 0.0], "says.exact_match (first)": [1.0], "surprise.nats": [8.0, 2.0]}
    assert rows[0] == {"row_id": "animals/0", "prompt_sha256": "a", "animals.acc": 1.0}
    assert directions(RESULT) == {
        "animals.acc": True,
        "says.exact_match (first)": None,
        "surprise.bits_per_byte": False,
        "surprise.nats": False,
    }


def test_ratios_of_sums() -> None:
    """10 nats over 5 bytes are 2 / ln 2 bits a byte; either document alone is 2 nats a byte too, so it is a point."""
    pairs = [sample["bits_per_byte"] for sample in RESULT["samples"]["surprise"]]
    assert ratio("bits_per_byte", pairs).value == pytest.approx(2 / math.log(2))
    assert ratio("bits_per_byte", pairs).high == pytest.approx(2 / math.log(2))
    words = ratio("word_perplexity", [(-8, 4), (-1, 1)])
    interval = bootstrap_interval([8, 1], per=[4, 1])
    assert (words.value, words.low, words.high) == pytest.approx(
        tuple(map(math.exp, (9 / 5, interval.low, interval.high)))
    )
    assert words.low < words.high


TASK = """task: animals
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/animals.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: ["cat", "garden"]
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def test_a_task_of_ones_own(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Where the harness is installed: its result, whatever the batch size; elsewhere: what to install, at once."""
    rows = [{"question": f"say {n}", "answer": n % 2} for n in range(8)]
    (tmp_path / "animals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "animals.yaml").write_text(TASK.format(folder=tmp_path))

    def evaluate(task: str, batch: int) -> Any:
        words = ["eval", tiny_model_dir, "--reference", tiny_model_dir, "--suite", "lm-eval", f"tasks=[{task}]"]
        words += [f"include_path={tmp_path}", "limit=6", f"batch_size={batch}", "-o", tmp_path / f"{batch}.json"]
        return CliRunner().invoke(app, list(map(str, words)))

    done = evaluate("animals", 4)
    if find_spec("lm_eval") is None:
        assert (done.exit_code, "pip install 'align-lm[lm-eval]'" in done.stderr) == (1, True)
        return
    assert done.exit_code == 0, done.stderr
    assert evaluate("animals", 1).exit_code == 0
    four, one = (json.loads((tmp_path / f"{batch}.json").read_text())["models"] for batch in (4, 1))
    model = four[str(tiny_model_dir)]
    assert [row["row_id"] for row in model["rows"]] == [f"animals/{n}" for n in range(6)]
    assert model["metrics"]["animals.acc"]["n"] == 6
    assert one[str(tiny_model_dir)]["metrics"] == model["metrics"]
    wrong = evaluate("animal", 4)
    assert (wrong.exit_code, "did you mean animals?" in wrong.stderr) == (2, True)


def test_tasks_are_asked_for(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["eval", "m", "--suite", "lm-eval", "-o", str(tmp_path / "l.json")])
    assert (done.exit_code, "tasks" in done.stderr) == (2, True)
