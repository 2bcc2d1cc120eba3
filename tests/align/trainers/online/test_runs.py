"""Online training that is interrupted, spread over processes, given a faulty annotator, or asked how it does."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig

from align.data.prompts import ROW_ID
from align.errors import AlignError
from align.rewards.annotators import AnnotatorError, annotator_of
from align.trainers.online import OnlineTrainer

TrainerOf = Callable[..., OnlineTrainer]
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
SAVED = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5}


@pytest.mark.parametrize("step", [2, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "mdpo", "inner_steps": 2, "kl_penalty": 0.1},
        {"reference": "ema", "decay": 0.5, "drawing": {"mixture": 0.3}},
        {"reference": "previous", "every": 2, "peft_config": LORA, "labels": "drawn", "drawing": {"mixture": 0.3}},
        {"peft_config": LORA, "inner_steps": 2, "drawing": {"mixture": 0.3}},
    ],
    ids=["mdpo", "ema", "previous, lora", "ipo-md, lora"],
)
def test_gone_on_is_uninterrupted(
    trainer_of: TrainerOf, assert_equal: Any, samples: Any, settings: Any, step: int
) -> None:
    """From a checkpoint at the beginning or in the middle of a window: the same weights, samples and metrics."""
    whole = trainer_of(arguments=SAVED, **settings)
    whole.train()
    kept = samples(whole)
    path = Path(whole.args.output_dir) / "samples.jsonl"
    path.write_text(path.read_text() + '{"step": 9, "torn')
    again = trainer_of(arguments=SAVED, **settings)
    again.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / f"checkpoint-{step}"))
    assert_equal(whole, again)
    assert samples(again) == kept
    left, right = (
        [entry for entry in trainer.state.log_history if "loss" in entry and entry["step"] > step]
        for trainer in (whole, again)
    )
    for one, other in zip(left, right, strict=True):
        for name in one.keys() - {"perf/tokens_per_s", "perf/peak_rss_gb"}:
            assert one[name] == other[name], name


def test_two_processes_equal_one(
    trainer_of: TrainerOf, tmp_path: Path, two_processes: Any, train_and_log: Any, by_letters: Any
) -> None:
    """The same loss, gradient and metrics of the same prompts; some stand twice, and some pairs have no verdict."""
    twice = Dataset.from_dict({"prompt": ["the cat", "an inn", "her hat"] * 3, ROW_ID: [str(n) for n in range(9)]})

    def train(folder: str, batch: int) -> None:
        for loss in ("ipo", "mdpo"):
            trainer = trainer_of(
                f"{folder}-{loss}",
                loss=loss,
                inner_steps=2,
                annotator=by_letters(silent=["an inn"]),
                drawing={"mixture": 0.25 if loss == "ipo" else 0.0},
                train_dataset=twice,
                arguments={"per_device_train_batch_size": batch, "max_steps": 3},
            )
            train_and_log(trainer, tmp_path / f"{folder}-{loss}.json")

    train("one", 4)
    two_processes(lambda: train("two", 2))
    for loss in ("ipo", "mdpo"):
        one, two = (json.loads((tmp_path / f"{name}-{loss}.json").read_text()) for name in ("one", "two"))
        assert len(one) == len(two) == 3
        for whole, halves in zip(one, two, strict=True):
            assert whole.keys() == halves.keys()
            for key in whole.keys() - {"perf/tokens_per_s", "perf/peak_rss_gb"}:
                assert halves[key] == pytest.approx(whole[key], rel=1e-3, abs=1e-5), (loss, key)
        kept = [(tmp_path / f"{name}-{loss}" / "samples.jsonl").read_text() for name in ("one", "two")]
        entries = [[json.loads(line) for line in part.split("\n")[:-1]] for part in kept]
        drawn = [[(entry["step"], entry["row_id"], entry["answers"]) for entry in part] for part in entries]
        assert drawn[0] == drawn[1]
        assert len({str(answers) for step, _, answers in drawn[0] if step == 1}) == 4  # whatever the prompts are


class Faulty:
    """Answers twice, and then has a fault, once."""

    name = "faulty"

    def __init__(self, inner: Any, fault: Callable[[Any], Any]) -> None:
        self.inner, self.fault, self.calls = inner, fault, 0

    def __call__(self, *given: Any) -> Any:
        self.calls += 1
        found = self.inner(*given)
        return self.fault(found) if self.calls == 3 else found


RELEASED = threading.Event()


def _raise(error: BaseException) -> Callable[[Any], Any]:
    def fault(_: Any) -> Any:
        raise error

    return fault


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (_raise(AnnotatorError("judge", "the server is gone", 1)), "the server is gone"),
        (_raise(ZeroDivisionError("division by zero")), "ZeroDivisionError: division by zero"),
        (lambda found: RELEASED.wait(20), "has not answered in 0.5 s"),
        (_raise(SystemExit(3)), "SystemExit: 3"),
        (lambda found: None, "it gave a NoneType, not Verdicts"),
        (lambda found: replace(found, preference=found.preference[1:]), r"shape \(3, 2, 2\), and 2 answers to 4"),
        (lambda found: replace(found, preference=found.preference + 0.7), "no probabilities"),
        (lambda found: replace(found, scores=found.scores * math.inf), "infinite|NaN"),
        (lambda found: replace(found, scores=found.scores.abs() + 1), "not antisymmetric"),
    ],
    ids=["fails", "raises", "hangs", "exits", "nothing", "short", "over 1", "infinite", "one-sided"],
)
def test_a_faulty_annotator_ends_in_a_message_and_a_run_that_goes_on(
    trainer_of: TrainerOf, assert_equal: Any, by_letters: Any, fault: Any, why: str
) -> None:
    arguments = {"save_strategy": "steps", "save_steps": 100, "max_steps": 4}
    annotator = Faulty(by_letters(), fault)
    trainer = trainer_of(arguments=arguments, annotator=annotator, annotator_seconds=0.5)
    with pytest.raises(AlignError, match=f"(?s)online.annotator, at step 3: .*{why}.*goes on from step 2"):
        trainer.train()
    again = trainer_of(arguments=arguments, annotator=annotator)
    again.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-2"))
    whole = trainer_of("whole", arguments=arguments)
    whole.train()
    assert_equal(whole, again)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("return [float('nan')] * len(completions)", "not a finite number"),
        ("return [1.0]", "gave 1 numbers for 2 answers"),
        ("return [len(text) / 0 for text in completions]", "ZeroDivisionError"),
        ("return 'none'", "wanted a list"),
    ],
    ids=["NaN", "another length", "raises", "no list"],
)
def test_a_faulty_rule_is_told_by_name(
    trainer_of: TrainerOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, why: str
) -> None:
    name = f"faulty_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(f"def rule(prompts, completions):\n    {body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    trainer = trainer_of(annotator=annotator_of(f"{name}:rule"))
    with pytest.raises(AlignError, match=f"online.annotator, at step 1: .*rule.*{why}"):
        trainer.train()


@pytest.mark.parametrize(
    "lora", [None, LoraConfig(r=16, lora_alpha=64, target_modules="all-linear")], ids=["full", "lora"]
)
def test_how_it_does_is_asked_on_held_out_prompts(trainer_of: TrainerOf, prompts: Any, lora: Any) -> None:
    """At first half of the answers win and the KL is 0, but for chance; then it learns what the annotator wants."""
    steps = 20 if lora is None else 40
    trainer = trainer_of(
        loss="dpo",
        peft_config=lora,
        eval_dataset=prompts.select([0, 1, 2, 3] * 20),
        drawing={"answers": 6, "max_new_tokens": 1},
        arguments={
            "max_steps": steps,
            "learning_rate": 2e-2,
            "eval_strategy": "steps",
            "eval_steps": steps,
            "eval_on_start": True,
        },
    )
    trainer.train()
    before, after = (entry for entry in trainer.state.log_history if "eval_win_rate" in entry)
    assert before["eval_kl"] == pytest.approx(0, abs=1e-5)
    assert before["eval_win_rate"] == pytest.approx(0.5, abs=4 * before["eval_win_rate_se"])
    assert after["eval_win_rate"] > before["eval_win_rate"] + 2 * after["eval_win_rate_se"]
    assert after["eval_kl"] > 0.1
    assert {"eval_entropy", "eval_length", "eval_truncated"} <= after.keys()
