"""The reward trainer on a tiny model: equal to TRL's where TRL has the loss, and right where it has not."""

from __future__ import annotations

import copy
import itertools
import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig
from trl import RewardTrainer as TrlRewardTrainer

from align.data.rewards import RewardRules
from align.errors import AlignError
from align.losses import Loss
from align.losses.preference import MASKED, bradley_terry, scaled_bradley_terry
from align.rewards.models import RewardModel
from align.rewards.pal import PalA
from align.rewards.pal_model import PalRewardModel
from align.trainers.pal_backbone import PalTrainer
from align.trainers.reward import TRAINED, RewardTrainer, start_at_mean_ratings

ROWS = [
    {"prompt": "the inner", "chosen": " thing is there", "rejected": " cat"},
    {"prompt": "an apple", "chosen": " fell", "rejected": " in the garden, then another"},
    {"prompt": "there", "chosen": " she is", "rejected": " they are an ant"},
    {"prompt": "a hint then:", "chosen": " think again", "rejected": " no"},
]
LORA = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear")


def arguments(tmp_path, **changes) -> RewardConfig:
    settings = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_length": 64,
        "seed": 3,
    }
    return RewardConfig(**{**settings, **changes})


def model(folder, seed: int = 0, **settings) -> RewardModel:
    torch.manual_seed(seed)
    return RewardModel.create(folder, **settings)


def trainer(folder, tmp_path, rows=ROWS, loss="bradley_terry", model_settings=None, **more) -> RewardTrainer:
    own = ("centering", "rules", "eval_dataset", "shared_prompt", "packing")
    given = {name: more.pop(name) for name in own if name in more}
    reward = model(folder, **(model_settings or {}))
    data = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    return RewardTrainer(reward, arguments(tmp_path, **more), loss=loss, train_dataset=data, **given)


def steps(made) -> list[dict[str, float]]:
    made.train()
    return [entry for entry in made.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("rows", "loss", "centering"),
    [
        (ROWS, "bradley_terry", 0.0),
        (ROWS, "bradley_terry", 0.3),
        ([{**row, "margin": m} for row, m in zip(ROWS, (1, 2, 3, 0.5), strict=True)], "margin_bradley_terry", 0.0),
    ],
)
def test_training_equals_trls(tmp_path, tiny_model_dir, rows, loss, centering):
    """The same rows, classifier and seed: loss, gradient norm and accuracy of every step."""
    ours = trainer(tiny_model_dir, tmp_path, rows, loss, centering=centering)
    ours.reward.save_pretrained(tmp_path / "start")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "start", dtype=torch.float32)
    theirs = TrlRewardTrainer(
        classifier,
        arguments(tmp_path, center_rewards_coefficient=centering or None),
        train_dataset=Dataset.from_list(rows),
        processing_class=copy.deepcopy(ours.reward.tokenizer),
    )
    for one, other in zip(steps(ours), steps(theirs), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert one["rewards/accuracies"] == other["accuracy"]
        assert one["rewards/margins"] == pytest.approx(other["margin"], abs=1e-4)


def test_strengths_are_divided_by_the_mean_of_all_of_them(tmp_path, tiny_model_dir):
    """One step on all four rows, at once and in four micro-batches of unequal mean strength: the same gradient."""
    rows = [{**row, "strength": s} for row, s in zip(ROWS, (1.0, 0.1, 0.2, 0.3), strict=True)]
    loss = Loss.of("scaled_bradley_terry", normalize_weights=True)
    parts = [(4, 1), (1, 4)]
    found = [
        steps(
            trainer(
                tiny_model_dir,
                tmp_path,
                rows,
                loss,
                max_steps=1,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulated,
            )
        )[0]
        for batch, accumulated in parts
    ]
    assert found[0]["grad_norm"] == pytest.approx(found[1]["grad_norm"], rel=1e-5)
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], abs=2e-4)


def test_scaled_loss_is_the_functions_own(tmp_path, tiny_model_dir):
    rows = [{**row, "strength": s} for row, s in zip(ROWS, (1.0, 0.1, 0.2, 0.3), strict=True)]
    loss = Loss.of("scaled_bradley_terry", normalize_weights=True)
    made = trainer(tiny_model_dir, tmp_path, rows, loss, per_device_train_batch_size=4)
    chosen, rejected = (
        made.reward.score([row["prompt"] for row in rows], [row[side] for row in rows])
        for side in ("chosen", "rejected")
    )
    strengths = torch.tensor([1.0, 0.1, 0.2, 0.3])
    wanted = scaled_bradley_terry(chosen, rejected, strengths, normalize_weights=True).loss.mean()
    batch = made.data_collator(list(made.train_dataset))
    assert made.compute_loss(made.model, batch).item() == pytest.approx(wanted.item(), abs=1e-6)


@pytest.mark.parametrize("name", ["bradley_terry", "scaled_bradley_terry"])
def test_ties_are_half_of_a_vote_for_either_answer(tmp_path, tiny_model_dir, name):
    """A tie is pulled to equal scores and counts in no accuracy."""
    rows = [{**row, "preference": 0.5} for row in ROWS[:2]]
    made = trainer(tiny_model_dir, tmp_path, rows, name, per_device_train_batch_size=2)
    batch = made.data_collator(list(made.train_dataset))
    chosen, rejected = made.of_batch(batch).values.chunk(2)
    wanted = (bradley_terry(chosen, rejected).loss + bradley_terry(rejected, chosen).loss).mean() / 2
    assert made.compute_loss(made.model, batch).item() == pytest.approx(wanted.item(), abs=1e-6)
    found = steps(trainer(tiny_model_dir, tmp_path, rows, name, max_steps=60))
    assert "rewards/accuracies" not in found[-1]
    assert abs(found[-1]["rewards/margins"]) < 0.1 < abs(found[0]["rewards/margins"])


def test_a_gpm_learns_a_cycle_and_a_scalar_cannot(tmp_path, tiny_model_dir):
    """One beats two beats three beats one: all right for a gpm, two of three at most for one number an answer."""
    answers = [" the cat", " an ant", " a hint"]
    rows = [{"prompt": "say", "chosen": answers[i], "rejected": answers[(i + 1) % 3]} for i in range(3)] * 2
    learnt = {}
    for loss, settings in (("gpm", {"kind": "gpm", "dimension": 4}), ("bradley_terry", {})):
        made = trainer(tiny_model_dir, tmp_path, rows, loss, settings, max_steps=80, per_device_train_batch_size=6)
        steps(made)
        matrix = made.reward.score_groups(["say"], [answers])[0]
        learnt[loss] = sum(bool(matrix[i, (i + 1) % 3] > 0) for i in range(3))
    assert learnt["gpm"] == 3
    assert learnt["bradley_terry"] <= 2


def test_a_gate_is_trained(tmp_path, tiny_model_dir):
    made = trainer(tiny_model_dir, tmp_path, loss="gpm", model_settings={"kind": "gpm", "dimension": 4, "gate": True})
    steps(made)
    assert made.reward.gate.weight.abs().max() > 0


def test_regression_reads_ratings_of_which_some_are_missing(tmp_path, tiny_model_dir):
    rows = [
        {"prompt": "the", "completion": " cat", "kind": 1.0, "long": None},
        {"prompt": "the", "completion": " garden", "kind": 3.0, "long": 4.0},
        {"prompt": "an", "completion": " ant", "kind": None, "long": 0.5},
    ] * 2
    settings = {"kind": "attributes", "attributes": ["kind", "long"], "ranking": "kind"}
    found = steps(
        trainer(tiny_model_dir, tmp_path, rows, "regression", settings, max_steps=60, per_device_train_batch_size=6)
    )
    assert {"ratings/mse_kind", "ratings/mse_long"} <= set(found[0])
    assert found[-1]["loss"] < 0.2 < found[0]["loss"]


def test_a_new_model_of_attributes_says_the_mean_ratings(tiny_model_dir):
    """Means of what is rated, (1 + 3)/2 and (4 + 0.5)/2, of any answer: states are far larger than ratings."""
    made = model(tiny_model_dir, kind="attributes", attributes=["kind", "long"], ranking="kind")
    ratings = [[1.0, MASKED], [3.0, 4.0], [MASKED, 0.5]]
    start_at_mean_ratings(made, Dataset.from_dict({"ratings": ratings}))
    assert made.score(["the", "an"], [" cat", " apple fell"]).tolist() == [[2.0, 2.25]] * 2


@pytest.mark.parametrize(
    ("settings", "trained"),
    [({}, "all"), ({"frozen": True}, "head"), ({"lora": LORA}, "adapter")],
    ids=["full", "frozen", "lora"],
)
def test_what_is_trained_and_what_a_checkpoint_holds(tmp_path, tiny_model_dir, settings, trained):
    """Two steps, then one more from the checkpoint of the second: the weights of three steps without a break."""

    def made(folder, **changes):
        more = {"save_strategy": "steps", "save_steps": 1, **changes}
        return trainer(tiny_model_dir, tmp_path / folder, model_settings=settings, **more)

    whole = made("whole")
    before = {name: weight.clone() for name, weight in whole.reward.named_parameters()}
    steps(whole)
    changed = {n for n, w in whole.reward.named_parameters() if not torch.equal(w, before[n])}
    if trained == "head":
        assert changed == {"carrier.score.weight"}
    elif trained == "adapter":
        assert all("lora_" in name or name == "carrier.score.weight" for name in changed)
        assert len(changed) > 10
    else:
        assert changed == set(before)
    broken = made("broken", max_steps=2)
    steps(broken)
    resumed = made("broken")
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-2"))
    for (name, one), (_, other) in zip(
        whole.reward.named_parameters(), resumed.reward.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    size = (tmp_path / "whole" / "checkpoint-3" / TRAINED).stat().st_size
    assert (size < 50_000) == (trained != "all")


def test_gradient_checkpointing_changes_nothing(tmp_path, tiny_model_dir):
    found = [
        steps(
            trainer(
                tiny_model_dir, tmp_path, model_settings={"lora": LORA}, max_steps=2, gradient_checkpointing=switch
            )
        )
        for switch in (False, True)
    ]
    for one, other in zip(*found, strict=True):
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert one["grad_norm"] > 0


def test_evaluation_gives_the_same_metrics(tmp_path, tiny_model_dir):
    made = trainer(tiny_model_dir, tmp_path, eval_dataset=Dataset.from_list(ROWS))
    found = made.evaluate()
    chosen, rejected = (
        made.reward.score([row["prompt"] for row in ROWS], [row[side] for row in ROWS])
        for side in ("chosen", "rejected")
    )
    assert found["eval_loss"] == pytest.approx(float(bradley_terry(chosen, rejected).loss.mean()), abs=1e-5)
    assert found["eval_rewards/accuracies"] == pytest.approx(float((chosen > rejected).float().mean()))


def test_over_long_rows_are_told(tmp_path, tiny_model_dir, caplog):
    with caplog.at_level(logging.WARNING):
        made = trainer(tiny_model_dir, tmp_path, max_length=16)
    assert "answers were cut at 16 tokens" in caplog.text
    assert len(made.train_dataset) == 4
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        made = trainer(tiny_model_dir, tmp_path, max_length=16, rules=RewardRules(over_long="set_aside"))
    assert "cannot be used" in caplog.text
    assert len(made.train_dataset) < 4


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"loss": "gpm"}, ValueError, "gpm is for models of kind gpm, and this one is scalar"),
        ({"loss": "dpo"}, ValueError, "dpo trains no reward model"),
        ({"loss": "centering"}, ValueError, "centering trains no reward model"),
        ({"loss": "margin_bradley_terry"}, AlignError, "no row can be used"),
        ({"centering": -1.0}, ValueError, "centering is -1.0"),
        ({"model_settings": {"kind": "gpm"}, "loss": "gpm", "centering": 0.1}, ValueError, "centering is for scalar"),
        ({"model_settings": {"kind": "gpm"}, "loss": Loss.of("gpm", tau=1.0)}, ValueError, "train with the tau"),
        ({"center_rewards_coefficient": 0.1}, ValueError, "give RewardTrainer"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, tiny_model_dir, changes, error, message):
    with pytest.raises(error, match=message):
        trainer(tiny_model_dir, tmp_path, **changes)


def test_the_rows_of_a_batch_do_not_move_each_other(tmp_path, tiny_model_dir):
    made = trainer(tiny_model_dir, tmp_path)
    together = made.data_collator(list(made.train_dataset))
    alone = [made.data_collator([row]) for row in made.train_dataset]
    values = made.of_batch(together).values
    single = [made.of_batch(batch).values for batch in alone]
    for row, side in itertools.product(range(4), range(2)):
        assert values[row + 4 * side].item() == pytest.approx(single[row][side].item(), abs=1e-5)


@pytest.mark.parametrize(
    ("loss", "settings"),
    [("bradley_terry", {}), ("gpm", {"kind": "gpm", "dimension": 4, "gate": True})],
)
def test_a_frozen_backbone_reads_each_answer_once(tmp_path, tiny_model_dir, monkeypatch, loss, settings):
    """Four pairs in six steps of two: 4 rows of a prompt with both answers, not 12, and the losses of these."""
    settings, seen = {"frozen": True, **settings}, []
    made = trainer(tiny_model_dir, tmp_path, loss=loss, model_settings=settings, max_steps=6)
    made.reward._backbone.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    kept = steps(made)
    assert sum(seen) == 4
    monkeypatch.setattr(made._host.__class__, "keep", lambda self, rows: None)
    anew = steps(trainer(tiny_model_dir, tmp_path, loss=loss, model_settings=settings, max_steps=6))
    assert [step["loss"] for step in kept] == pytest.approx([step["loss"] for step in anew], abs=1e-5)
    assert kept[0]["loss"] != pytest.approx(kept[-1]["loss"], abs=1e-4)


def test_over_long_judgements_are_told_too(tmp_path, tiny_model_dir, caplog):
    judge = PalRewardModel.create(tiny_model_dir, kind="pal", frozen=False)
    judge.attach(PalA(judge.hidden_size, ["ann"], groups=2, dimension=4))
    rows = Dataset.from_list([{**row, "annotator": "ann"} for row in ROWS])
    with caplog.at_level(logging.WARNING):
        made = PalTrainer(judge, arguments(tmp_path, max_length=16), train_dataset=rows)
    assert "answers were cut at 16 tokens" in caplog.text
    assert made.train_dataset["annotator"] == ["ann"] * 4


# --- the layout of rows


@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        ({}, "bradley_terry"),
        ({"lora": LORA}, "bradley_terry"),
        ({"kind": "gpm", "dimension": 4, "gate": True}, "gpm"),
        ({"kind": "attributes", "attributes": ("helpful", "brief"), "ranking": "helpful"}, "regression"),
    ],
    ids=["scalar", "lora", "gpm", "attributes"],
)
def test_packed_pairs_train_as_separate_rows(tmp_path, tiny_model_dir, settings, loss):
    """Three steps with gradient checkpointing: losses and gradients of both layouts, and fewer tokens read."""
    rows = ROWS
    if loss == "regression":
        rows = [
            {"prompt": row["prompt"], "completion": row["rejected"], "helpful": 1.0, "brief": place}
            for place, row in enumerate(ROWS)
        ]
    found = []
    for packing in (True, False):
        made = trainer(
            tiny_model_dir,
            tmp_path,
            rows,
            loss,
            model_settings=settings,
            per_device_train_batch_size=4,
            gradient_checkpointing=True,
            shared_prompt=packing,
            packing=packing,
        )
        found.append((made, steps(made)))
    (packed, ours), (separate, theirs) = found
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    assert packed.speed_facts["rows"] == "packed"
    assert packed.speed_facts["padding"] < separate.speed_facts["padding"]
    assert separate.speed_facts["rows"] == "separate: shared_prompt is off"
    if loss != "regression":
        assert ours[-1]["num_tokens"] < theirs[-1]["num_tokens"]


def test_a_frozen_backbone_has_a_row_an_answer(tmp_path, tiny_model_dir):
    made = trainer(tiny_model_dir, tmp_path, model_settings={"frozen": True})
    assert made.layout == {"shared_prompt": False, "row_tokens": None}
    assert made.speed_facts == {}


def test_evaluation_of_packed_rows(tmp_path, tiny_model_dir):
    """Five pairs in batches of four: the mean over pairs, as with separate rows."""
    rows = Dataset.from_list([*ROWS, {"prompt": "the", "chosen": " ant", "rejected": " cat"}])
    losses = [
        trainer(
            tiny_model_dir,
            tmp_path,
            eval_dataset=rows,
            per_device_eval_batch_size=4,
            shared_prompt=packing,
            packing=packing,
        ).evaluate()
        for packing in (True, False)
    ]
    for name in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"):
        assert losses[0][name] == pytest.approx(losses[1][name], rel=1e-4), name
