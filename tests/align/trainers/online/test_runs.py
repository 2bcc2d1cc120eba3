"""Online training that is interrupted, spread over processes, given a faulty annotator, or asked how it does."""

from __future__ import annotations

import json
import math
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor

from align.data.prompts import ROW_ID
from align.errors import AlignError
from align.rewards.annotators import AnnotatorError, Problem, Verdicts, annotator_of
from align.trainers.judging import asked
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
            for key in whole.keys() - {"perf/tokens_per_s", "perf/peak_rss_gb", "perf/padding"}:
                assert halves[key] == pytest.approx(whole[key], rel=1e-3, abs=1e-5), (loss, key)
        kept = [(tmp_path / f"{name}-{loss}" / "samples.jsonl").read_text() for name in ("one", "two")]
        entries = [[json.loads(line) for line in part.split("\n")[:-1]] for part in kept]
        drawn = [[(entry["step"], entry["row_id"], entry["answers"]) for entry in part] for part in entries]
        assert drawn[0] == drawn[1]
        assert len({str(answers) for step, _, answers in drawn[0] if step == 1}) == 4  # whatever the prompts are


def test_a_fault_on_one_process_ends_all_of_them(
    trainer_of: TrainerOf, tmp_path: Path, two_processes: Any, by_letters: Any
) -> None:
    """Each with a message, and one checkpoint; one may not take longer than the others would wait."""

    def train() -> None:
        arguments = {"per_device_train_batch_size": 2, "max_steps": 3, "save_strategy": "steps", "save_steps": 100}
        trainer = trainer_of("two", arguments=arguments)
        place = trainer.accelerator.process_index
        if place == 1:
            trainer.annotator = Faulty(by_letters(), _raise(ValueError("gone")), 2)
        said = "ValueError: gone" if place == 1 else "it failed on another process"
        with pytest.raises(AlignError, match=rf"at step 2: {said}\. Nothing is lost: .* goes on from step 1"):
            trainer.train()
        with pytest.raises(ValueError, match=r"annotator_seconds is 1800, and the other processes wait for 1,800 s"):
            trainer_of("two", arguments=arguments, annotator_seconds=1800.0)
        (tmp_path / f"ended-{place}").touch()

    two_processes(train)
    assert sorted(path.name for path in tmp_path.glob("ended-*")) == ["ended-0", "ended-1"]
    trainer_of("two", arguments={"max_steps": 3}).train(resume_from_checkpoint=True)


class Faulty:
    """Has a fault, once, when it is called the third time."""

    name = "faulty"

    def __init__(self, inner: Any, fault: Callable[[Any], Any], call: int = 3) -> None:
        self.inner, self.fault, self.call, self.calls = inner, fault, call, 0

    def __call__(self, *given: Any) -> Any:
        self.calls += 1
        found = self.inner(*given)
        return self.fault(found) if self.calls == self.call else found


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
        (_raise(SystemExit(3)), r"would have ended the process \(SystemExit: 3\)"),
        (lambda found: replace(found, scores=found.scores.numpy()), "scores must be a tensor"),
    ],
    ids=["fails", "raises", "hangs", "exits", "malformed"],
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


def _over_diagonal(table: Tensor, value: float) -> Tensor:
    """The table of two answers with another value in one order of them."""
    return table.masked_fill(torch.tensor([[False, True], [False, False]]), value)


def _on_diagonal(table: Tensor, value: float) -> Tensor:
    return table.masked_fill(torch.eye(2, dtype=torch.bool), value)


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (lambda found: None, "it gave a NoneType, not Verdicts"),
        (lambda found: replace(found, preference=found.preference.numpy()), "preference must be a tensor .* ndarray"),
        (lambda found: replace(found, scores=found.scores.tolist()), "scores must be a tensor .* list"),
        (lambda found: replace(found, scores=found.scores.long()), "scores must be .* floating type.* torch.int64"),
        (lambda found: replace(found, preference=found.preference[1:]), r"shape \(3, 2, 2\), and 2 answers to 4"),
        (lambda found: replace(found, scores=_over_diagonal(found.scores, math.inf)), "its scores are infinite"),
        (lambda found: replace(found, scores=_over_diagonal(found.scores, math.nan)), "NaN in one order"),
        (lambda found: replace(found, preference=_over_diagonal(found.preference, 1.7)), "no probabilities"),
        (lambda found: replace(found, scores=_over_diagonal(found.scores, 90.0)), "not antisymmetric"),
        (lambda found: replace(found, preference=_on_diagonal(found.preference, math.nan)), "itself must be 0.5"),
        (lambda found: replace(found, scores=_on_diagonal(found.scores, 1.0)), "itself must be 0"),
        (lambda found: replace(found, problems=None), "problems are a NoneType"),
        (lambda found: replace(found, problems=["no"]), "no is no problem of"),
        (lambda found: replace(found, problems=[Problem(9, 0, 1, "")]), "prompt=9.* one of 4 prompts"),
        (lambda found: replace(found, problems=[Problem(0, 1, 2, "")]), "second=2.* two of 2 answers"),
        (lambda found: replace(found, problems=[Problem("a", 0, 1, "")]), "TypeError"),
    ],
)
def test_malformed_verdicts_are_told(by_letters: Any, fault: Any, why: str) -> None:
    rows = [{"prompt": prompt} for prompt in ("the cat", "an inn", "her hat", "tea")]
    answers = [["a", "b"], ["b", "c"], ["c", "a"], ["a", "a"]]
    assert isinstance(asked(by_letters(), rows, answers, 10.0), Verdicts)
    said = asked(lambda *given: fault(by_letters()(*given)), rows, answers, 10.0)  # type: ignore[arg-type]
    assert isinstance(said, str)
    assert re.search(why, said), said


def test_a_silent_step_is_passed(
    trainer_of: TrainerOf, by_letters: Any, samples: Any, assert_equal: Any, caplog: Any, monkeypatch: Any
) -> None:
    """Steps without a verdict before, between and after others; one in front of which the run is gone on with too.
    After two in a row the run ends, and gets past them.
    """
    first = {"per_device_train_batch_size": 1, "max_steps": 5}
    order = trainer_of("order", arguments=first)
    order.train()
    asked_for = [line["prompt"] for line in samples(order)]
    arguments = {**first, "save_strategy": "steps", "save_steps": 1}
    annotator = by_letters(silent=[asked_for[place] for place in (0, 2, 3)])
    whole = trainer_of("whole", arguments=arguments, annotator=annotator)
    whole.train()
    assert "at step 1: it has nothing to say of any pair: nothing to say" in caplog.text
    again = trainer_of("whole", arguments=arguments, annotator=annotator)
    again.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-2"))
    assert_equal(whole, again)
    monkeypatch.setattr("align.trainers.judging.SILENT", 2)
    ended = trainer_of("ended", arguments=arguments, annotator=annotator)
    with pytest.raises(AlignError, match=r"at step 4: .*any pair, 2 times in a row.* goes on from step 3"):
        ended.train()
    past = trainer_of("ended", arguments=arguments, annotator=annotator)
    past.train(resume_from_checkpoint=True)
    assert_equal(whole, past)


def test_a_run_that_learnt_nothing_does_not_end_well(
    trainer_of: TrainerOf, by_letters: Any, samples: Any, monkeypatch: Any
) -> None:
    """However often it is gone on with; where one step had a verdict, a silent last one is no fault."""
    arguments = {"per_device_train_batch_size": 1, "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    order = trainer_of("order", arguments=arguments)
    order.train()
    asked_for = [line["prompt"] for line in samples(order)]
    monkeypatch.setattr("align.trainers.judging.SILENT", 3)
    for resume in (None, True, True):
        trainer = trainer_of("silent", arguments=arguments, annotator=by_letters(silent=asked_for))
        with pytest.raises(AlignError, match="any pair"):
            trainer.train(resume_from_checkpoint=resume)
    with pytest.raises(AlignError, match="nor had it at any step of this run, which has learnt nothing"):
        trainer_of("silent", arguments=arguments, annotator=by_letters(silent=asked_for)).train(
            resume_from_checkpoint=True
        )
    trainer_of("spoken", arguments=arguments, annotator=by_letters(silent=asked_for[2:])).train()


def test_an_evaluation_that_failed_is_made_up(trainer_of: TrainerOf, by_letters: Any, prompts: Any) -> None:
    """The fourth call is the evaluation at step 2, and so is the next run's first: it fails twice."""
    arguments = {
        "save_strategy": "steps",
        "save_steps": 100,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "max_steps": 3,
    }
    settings: dict[str, Any] = {"arguments": arguments, "eval_dataset": prompts}
    fault = _raise(AnnotatorError("judge", "gone"))
    failed = r"in the evaluation at step 2: judge: gone. Nothing is lost: the same command goes on from step 2"
    with pytest.raises(AlignError, match=failed):
        trainer_of(annotator=Faulty(by_letters(), fault, 4), **settings).train()
    with pytest.raises(AlignError, match=failed):
        trainer_of(annotator=Faulty(by_letters(), fault, 1), **settings).train(resume_from_checkpoint=True)
    again, whole = trainer_of(**settings), trainer_of("whole", **settings)
    again.train(resume_from_checkpoint=True)
    whole.train()
    curves = [
        [(entry["step"], entry["eval_win_rate"]) for entry in one.state.log_history if "eval_win_rate" in entry]
        for one in (again, whole)
    ]
    assert [step for step, _ in curves[0]] == [1, 2, 3]
    assert curves[0] == curves[1]


def test_without_checkpoints_none_is_promised(trainer_of: TrainerOf, by_letters: Any) -> None:
    trainer = trainer_of(annotator=Faulty(by_letters(), _raise(ValueError("gone")), 2))
    with pytest.raises(AlignError, match=r"at step 2: ValueError: gone. No checkpoint is kept \(save_strategy: no\)$"):
        trainer.train()
    assert not list(Path(trainer.args.output_dir).glob("checkpoint-*"))
    with pytest.raises(AlignError, match=r"in the evaluation at step 0: ValueError: gone$"):
        trainer_of(annotator=Faulty(by_letters(), _raise(ValueError("gone")), 1)).evaluate(trainer.train_dataset)


def test_the_last_checkpoint_is_gone_on_with(trainer_of: TrainerOf, samples: Any, assert_equal: Any) -> None:
    """``True`` is the last one; without one, or with a folder that is none, nothing is started and nothing lost."""
    whole = trainer_of(arguments={**SAVED, "max_steps": 2})
    with pytest.raises(ValueError, match="resume_from_checkpoint: no checkpoint in"):
        whole.train(resume_from_checkpoint=True)
    whole.train()
    kept, output = samples(whole), Path(whole.args.output_dir)
    again = trainer_of(arguments={**SAVED, "max_steps": 2})
    shutil.rmtree(output / "checkpoint-2")
    (output / "checkpoint-1").rename(output / "final")
    for folder in ("final/nowhere", "runs"):
        with pytest.raises(ValueError, match=r"is no checkpoint: trainer_state.json"):
            again.train(resume_from_checkpoint=str(output / folder))
    with pytest.raises(ValueError, match="resume_from_checkpoint: no checkpoint in"):
        again.train(resume_from_checkpoint=True)
    assert samples(whole) == kept
    (output / "final").rename(output / "checkpoint-1")
    again.train(resume_from_checkpoint=True)
    assert samples(again) == kept
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
