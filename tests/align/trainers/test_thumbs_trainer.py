"""The thumbs trainer on a tiny model: equal to TRL's KTO, and BCO with its state right where TRL has none."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import KTOConfig, KTOTrainer

from align.errors import AlignError
from align.losses import Loss
from align.losses.binary import RewardShift, kto
from align.trainers import thumbs
from align.trainers.thumbs import ThumbsTrainer
from align.trainers.thumbs_collate import with_mismatched
from align.trainers.thumbs_metrics import batch_sums

ROWS = [
    {"prompt": "the inner", "completion": " thing is there", "label": True},
    {"prompt": "an apple", "completion": " fell", "label": True},
    {"prompt": "there", "completion": " they are an ant", "label": False},
    {"prompt": "a hint then:", "completion": " no", "label": False},
    {"prompt": "the garden", "completion": " is another", "label": True},
    {"prompt": "an ant", "completion": " cat", "label": False},
    {"prompt": "a thing", "completion": " in there", "label": True},
    {"prompt": "then", "completion": " and then", "label": True},
]


def arguments(tmp_path, **changes) -> KTOConfig:
    settings = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 4,
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
    return KTOConfig(**{**settings, **changes})


def steps(trainer, **kwargs) -> list[dict[str, float]]:
    trainer.train(**kwargs)
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def make(tmp_path, tiny_tokenizer, make_tiny_model):
    """``make(loss="bco", **changes)``: a trainer; what is no argument of it goes to KTOConfig."""
    ours = ("loss", "shift", "decay", "match_prompts", "density_ratio", "density_prompts", "starts_at_reference")

    def build(rows=ROWS, *, model=None, ref_model=None, peft_config=None, eval_dataset=None, **changes):
        settings = {name: changes.pop(name) for name in ours if name in changes}
        return ThumbsTrainer(
            model=make_tiny_model() if model is None else model,
            ref_model=ref_model,
            args=arguments(tmp_path, **changes),
            train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
            eval_dataset=eval_dataset,
            processing_class=tiny_tokenizer,
            peft_config=peft_config,
            **settings,
        )

    return build


# --- KTO, as TRL has it


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_kto_agrees_with_trl(tmp_path, tiny_tokenizer, make_tiny_model, make, lora):
    """Three steps of both trainers on the same rows: loss and KL to 1e-4, gradient norm to 1e-3, float32."""
    torch.manual_seed(0)
    peft = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    theirs = KTOTrainer(
        model=make_tiny_model(),
        ref_model=None if lora else make_tiny_model(),
        args=arguments(tmp_path, beta=0.3, desirable_weight=1.5),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tiny_tokenizer,
        peft_config=peft,
    )
    want = steps(theirs)
    torch.manual_seed(0)
    got = steps(make(loss=Loss.of("kto", beta=0.3, desirable_weight=1.5), peft_config=peft))
    assert len(want) == len(got) == 3
    for one, other in zip(want, got, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
        for name in ("kl", "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected", "entropy"):
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name
    assert want[0]["loss"] != pytest.approx(want[-1]["loss"], rel=1e-3)
    assert want[-1]["kl"] > 0


def test_mismatched_answers_are_rotated_within_their_batch(caplog):
    """Batches of three: 0 1 2 | 3 4 5 | 6; the last row has no other in its batch and takes the one before."""
    rows = Dataset.from_dict({"prompt_ids": [[n] for n in range(7)], "completion_ids": [[n, n, n] for n in range(7)]})
    column = with_mismatched(rows, 3, 3)["KL_completion_ids"]
    assert [ids[0] for ids in column] == [2, 0, 1, 5, 3, 4, 5]
    assert {len(ids) for ids in column} == {2}
    assert caplog.text == ""
    with_mismatched(Dataset.from_dict({"prompt_ids": [[1], [1]], "completion_ids": [[2], [3]]}), 2, None)
    assert "in 2 of 2 rows the mismatched answer is one to the same prompt" in caplog.text


def test_kto_keeps_trls_rules(make):
    with pytest.raises(
        ValueError, match="per_device_train_batch_size is 1: kto scores each prompt with the answer of"
    ):
        make(loss="kto", per_device_train_batch_size=1)
    with pytest.raises(ValueError, match="'sequential' keeps rows together; shuffle the data set before"):
        make(loss=kto, train_sampling_strategy="random")


def test_unequal_numbers_of_thumbs_are_told(make, caplog):
    """Five up and three down: 5/3 = 1.67 is over 1.5; with a weight of 0.6 on the ups both weigh the same."""
    make(loss="kto")
    assert "5 thumbs up weigh 1.67 times as much as 3 thumbs down" in caplog.text
    assert "multiply desirable_weight by 0.6" in caplog.text
    caplog.clear()
    make(loss=Loss.of("kto", desirable_weight=0.6))
    make(loss="bco")
    assert "weigh" not in caplog.text


# --- BCO


def test_bco_starts_at_log_two_and_falls(make):
    """Policy and reference agree, so every reward and the shift are 0: -log sigma(0) for every row."""
    log = steps(make(max_steps=6))
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert log[0]["bco/shift"] == pytest.approx(0, abs=1e-5)
    assert log[0]["thumbs/accuracy"] == 0.5  # each reward is the shift, exactly, and counts for half
    assert log[-1]["loss"] < log[0]["loss"]
    last = log[-1]
    assert last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"], rel=1e-5)
    assert last["bco/shift"] == pytest.approx((last["bco/mean_up"] + last["bco/mean_down"]) / 2, rel=1e-6)
    assert "kl" not in last


def test_loss_of_a_batch_by_hand(make, make_tiny_model, monkeypatch):
    """One batch, first step: delta is the mean of the two class means, and the loss is the mean over the rows."""
    trainer = make(
        per_device_train_batch_size=8,
        max_steps=1,
        ref_model=make_tiny_model(seed=5),
        starts_at_reference=False,
        loss=Loss.of("bco", beta=0.2),
    )
    captured = []

    def spy(rows, tokens, policy, reference, *rest):
        captured.append((policy, reference))
        return batch_sums(rows, tokens, policy, reference, *rest)

    monkeypatch.setattr(thumbs, "batch_sums", spy)
    (log,) = steps(trainer)
    ((policy, reference),) = captured
    rewards = 0.2 * (policy.sequence.total.detach() - reference.total).double()
    up = policy.label
    delta = (rewards[up].mean() + rewards[~up].mean()) / 2
    assert log["bco/shift"] == pytest.approx(delta.item(), rel=1e-6)
    terms = torch.where(up, rewards - delta, delta - rewards)
    assert log["loss"] == pytest.approx(-torch.nn.functional.logsigmoid(terms).mean().item(), rel=1e-5)
    assert log["rewards/chosen"] == pytest.approx(rewards[up].mean().item(), rel=1e-5)
    assert log["thumbs/accuracy"] == pytest.approx((terms > 0).double().mean().item())


@pytest.mark.parametrize("order", ["sequential", "random"])
def test_batches_of_one_row_have_one_thumb_and_train(make, order):
    log = steps(make(per_device_train_batch_size=1, train_sampling_strategy=order, max_steps=8))
    assert all(math.isfinite(entry["loss"]) for entry in log)
    assert all(("rewards/chosen" in entry) != ("rewards/rejected" in entry) for entry in log)
    assert {"bco/mean_up", "bco/mean_down"} <= set(log[-1])


def test_one_evaluation_loss_on_batches_of_one_thumb(make):
    trainer = make(eval_dataset=Dataset.from_list(ROWS[:2]), per_device_eval_batch_size=1)
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_accumulation_equals_one_batch(make, make_tiny_model):
    """2 x 2 rows, the first two up and the other two down, give shift, loss and gradient of 4 rows at once."""
    logs = []
    for batch, accumulate in ((4, 1), (2, 2)):
        trainer = make(
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            ref_model=make_tiny_model(seed=5),
            starts_at_reference=False,
        )
        logs.append(steps(trainer))
    assert abs(logs[0][0]["bco/shift"]) > 1e-3
    # Adam divides gradients by their size, which makes of rounding at the first step more at the next.
    for one, other, tolerance in zip(*logs, (1e-5, 1e-3, 1e-3), strict=True):
        for name in ("bco/shift", "bco/mean_up", "bco/mean_down", "loss", "grad_norm"):
            assert other[name] == pytest.approx(one[name], rel=tolerance), name


def test_the_order_of_micro_batches_does_not_matter(make, make_tiny_model):
    logs = []
    for rows in (ROWS, [*ROWS[2:4], *ROWS[:2]]):
        trainer = make(
            rows,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            ref_model=make_tiny_model(seed=5),
            starts_at_reference=False,
            max_steps=1,
        )
        logs.append(steps(trainer)[0])
    assert logs[0]["grad_norm"] == pytest.approx(logs[1]["grad_norm"], rel=1e-4)
    assert logs[0]["bco/shift"] == pytest.approx(logs[1]["bco/shift"], rel=1e-6)


def test_evaluation_leaves_the_shift_alone(make):
    trainer = make(eval_dataset=Dataset.from_list(ROWS))
    steps(trainer)
    before = trainer.shift.value
    assert before != 0
    found = trainer.evaluate()
    assert trainer.shift.value == before
    assert found["eval_bco/shift"] == pytest.approx(before.item())


def test_pooled_shift_is_the_mean_of_all_rewards(make, make_tiny_model):
    trainer = make(shift="pooled", ref_model=make_tiny_model(seed=5), starts_at_reference=False, max_steps=2)
    seen = []
    update = trainer.shift.update
    trainer.shift.update = lambda rewards, label: (seen.append(rewards), update(rewards, label))
    steps(trainer)
    assert trainer.shift.value.item() == pytest.approx(torch.cat(seen).double().mean().item(), rel=1e-6)


# --- checkpoints


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumed_equals_uninterrupted_bit_for_bit(make, tmp_path, accumulate):
    settings = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": accumulate,
        "train_sampling_strategy": "random",
        "peft_config": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    }
    whole = make(**settings)
    log = steps(whole)
    again = make(**settings)
    resumed = steps(again, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, value in whole.shift.state_dict().items():
        assert torch.equal(value, again.shift.state_dict()[name]), name
    weights = dict(whole.model.named_parameters())
    for name, value in again.model.named_parameters():
        assert torch.equal(value, weights[name]), name
    for one, other in zip(log, resumed, strict=True):
        assert one["loss"] == other["loss"]
        assert one["bco/shift"] == other["bco/shift"]


def test_a_checkpoint_without_the_shift_of_this_mode_is_refused(make, tmp_path):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    steps(make(**settings))
    checkpoint = tmp_path / "checkpoint-1"
    with pytest.raises(AlignError, match="no reward shift of mode pooled"):
        make(**settings, shift="pooled").train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / "reward_shift.safetensors").unlink()
    with pytest.raises(AlignError, match="no reward shift of mode balanced_ema"):
        make(**settings).train(resume_from_checkpoint=str(checkpoint))


def test_the_best_model_comes_with_its_shift(make, tmp_path):
    trainer = make(
        max_steps=4,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the first checkpoint counts as the best
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=1,
        eval_steps=1,
        load_best_model_at_end=True,
        eval_dataset=Dataset.from_list(ROWS),
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-4"
    other = RewardShift()
    from safetensors.torch import load_file

    other.load_state_dict(load_file(best / "reward_shift.safetensors"))
    assert trainer.shift.value == other.value


# --- data and arguments


def test_pairs_are_unpaired(make, caplog):
    pairs = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": " no no"} for r in ROWS]
    trainer = make(pairs, loss="kto", per_device_train_batch_size=2)
    assert len(trainer.train_dataset) == 16
    assert sum(trainer.train_dataset["label"]) == 8
    assert math.isfinite(steps(trainer)[-1]["loss"])
    assert (
        trainer.train_dataset["label"] != [True, False] * 8
    )  # shuffled: the answers of a pair do not stay neighbours


@pytest.mark.parametrize(("label", "missing"), [(True, "down"), (False, "up")])
def test_one_thumb_missing_is_an_error(make, label, missing):
    with pytest.raises(AlignError, match=f"no thumb {missing} among 8"):
        make([{**row, "label": label} for row in ROWS])


def test_bad_rows_are_named_and_left_out(make, caplog):
    rows = [*ROWS, {"prompt": "p", "completion": "", "label": True}]
    with caplog.at_level(logging.WARNING):
        assert len(make(rows).train_dataset) == 8
    assert "row 9  completion  empty completion" in caplog.text


def test_what_cannot_be_served_is_refused(make, tmp_path):
    for changes, what in (
        ({"loss": "dpo"}, "dpo is not a loss on thumbs: it takes a prompt, the answer that was preferred"),
        ({"loss": "kto", "match_prompts": True}, "kto takes no weights; bco does"),
        ({"loss_type": "apo_zero_unpaired"}, "name the loss"),
        ({"desirable_weight": 2.0}, "Loss.of"),
        ({"precompute_ref_log_probs": True}, "the reference is scored with each batch"),
        ({"density_ratio": (2.0, 1.0), "match_prompts": True}, "0 < least <= most"),
        ({"density_ratio": (1.0,), "match_prompts": True}, "0 < least <= most"),
        ({"density_ratio": None, "match_prompts": True}, "0 < least <= most"),
        ({"density_ratio": ("a", "b"), "match_prompts": True}, "0 < least <= most"),
        ({"density_prompts": 2.5, "match_prompts": True}, "density_prompts is 2.5: it must be a whole number"),
        ({"shift": "mean"}, "shift is 'mean': it must be balanced_ema or pooled"),
        ({"density_ratio": (1.0, math.inf), "match_prompts": True}, "0 < least <= most"),
        ({"density_prompts": 1, "match_prompts": True}, "two prompts of each thumb or more"),
        ({"decay": 1.0}, r"decay is 1.0: it must be in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=what):
            make(**changes)
    tokenised = Dataset.from_list([{"prompt_ids": [5], "completion_ids": [6], "label": 3}])
    with pytest.raises(ValueError, match=r"label\[0\] is 3: true or false"):
        make(tokenised)


def test_a_wrong_reference_is_seen_at_the_first_step(make, make_tiny_model):
    with pytest.raises(AlignError, match="policy and reference differ by up to"):
        make(ref_model=make_tiny_model(seed=5)).train()


def test_beta_of_the_arguments_counts(make):
    assert make(beta=0.4).loss.settings["beta"] == 0.4
    assert make(loss=Loss.of("bco", beta=0.2), beta=0.4).loss.settings["beta"] == 0.2


# --- weights of prompts


def domains(n: int = 12) -> list[dict]:
    """Prompts of two kinds: "apple" is mostly up, "garden" mostly down."""
    rows = []
    for number in range(n):
        often, seldom = (True, False) if number % 4 else (False, True)
        rows.append({"prompt": f"an apple {number}", "completion": " one", "label": often})
        rows.append({"prompt": f"the garden {number}", "completion": " two", "label": seldom})
    return rows


def by_word(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[float("apple" in text), float("garden" in text), 1.0] for text in texts])


def test_weights_of_a_users_encoder(make, tmp_path, tiny_tokenizer):
    """Apples are 9 of the 12 ups and 3 of the 12 downs: a thumb down weighs about 3 there, and 1/3 on a garden."""
    trainer = make(domains(), match_prompts=by_word, max_steps=2)
    log = steps(trainer)
    data = trainer.train_dataset
    for prompt, label, weight in zip(data["prompt_ids"], data["label"], data["weight"], strict=True):
        if label:
            assert weight == 1.0
        elif "apple" in tiny_tokenizer.decode(prompt):
            assert 1.2 < weight < 3.5
        else:
            assert 0.5 <= weight < 0.9
    assert log[0]["bco/density_accuracy"] == pytest.approx(0.75)
    assert "bco/density_accuracy" not in log[1]
    assert 0.5 <= log[0]["bco/weight_down"] <= 3.5
    assert json.loads((tmp_path / "density.json").read_text())["maximum"] == 10.0


def test_a_weighted_loss_is_a_mean_over_rows(make):
    """All rewards are 0, so the loss is log 2 times the mean weight over all rows, thumbs up at 1."""
    trainer = make(domains(), match_prompts=by_word, max_steps=1, per_device_train_batch_size=24)
    (log,) = steps(trainer)
    mean = sum(trainer.train_dataset["weight"]) / 24
    assert mean != pytest.approx(1, abs=1e-3)
    assert log["loss"] == pytest.approx(mean * math.log(2), rel=1e-4)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_weights_of_the_models_own_hidden_states(make, lora):
    """Embeddings are those of the model before training, and the same after it."""
    peft = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    trainer = make(domains(), match_prompts=True, max_steps=2, peft_config=peft)
    prompts = trainer.train_dataset["prompt_ids"]
    with trainer._embedding() as embed:
        before = embed(prompts)
    assert before.shape == (24, 32)
    with torch.no_grad():
        inner = trainer.model.get_base_model() if lora else trainer.model
        alone = inner.base_model(input_ids=torch.tensor([prompts[3]])).last_hidden_state[0].mean(0)
    torch.testing.assert_close(before[3], alone, rtol=1e-4, atol=1e-4)
    steps(trainer)
    with trainer._embedding() as embed:
        torch.testing.assert_close(embed(prompts), before, rtol=1e-5, atol=1e-5)
    assert set(trainer.train_dataset["weight"]) != {1.0}
    held_out = trainer._prepare_dataset(Dataset.from_list(domains(4)), trainer.processing_class, trainer.args, "eval")
    assert "weight" in held_out.column_names


def test_a_resumed_run_keeps_its_density_ratio(make, tmp_path):
    settings = {"match_prompts": by_word, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    first = make(domains(), **settings)
    steps(first)
    checkpoint = str(tmp_path / "checkpoint-1")
    path = tmp_path / "density.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "coefficients": [0.0, 0.0, 0.0], "intercept": math.log(2)}))
    again = make(domains(), **settings)
    steps(again, resume_from_checkpoint=checkpoint)
    weights = {w for w, up in zip(again.train_dataset["weight"], again.train_dataset["label"], strict=True) if not up}
    assert sorted(weights) == [pytest.approx(2.0)]

    path.write_text(json.dumps({**stored, "coefficients": [0.0, 0.0]}))
    with pytest.raises(AlignError, match="fitted on embeddings of 2 dimensions, and these have 3"):
        make(domains(), **settings).train(resume_from_checkpoint=checkpoint)
    path.unlink()
    with pytest.raises(AlignError, match="of the run that is gone on with cannot be had"):
        make(domains(), **settings).train(resume_from_checkpoint=checkpoint)


def test_one_fit_a_trainer_and_none_kept_by_evaluation(make, tmp_path):
    calls = []

    def counted(texts):
        calls.append(len(texts))
        return by_word(texts)

    path = tmp_path / "density.json"
    trainer = make(domains(), match_prompts=counted, max_steps=1, eval_dataset=Dataset.from_list(domains()))
    trainer.evaluate()
    assert not path.exists()
    fitted, embedded = trainer.density, len(calls)
    trainer.train()
    assert trainer.density is fitted
    assert len(calls) == embedded
    kept = path.read_text()

    other = make(
        domains(),
        match_prompts=by_word,
        max_steps=1,
        eval_dataset=Dataset.from_list(domains()),
        density_ratio=(0.9, 1.1),
    )
    other.evaluate()
    assert path.read_text() == kept


def test_other_bounds_are_refused_on_resume(make, tmp_path):
    settings = {"match_prompts": by_word, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make(domains(), **settings).train()
    with pytest.raises(AlignError, match=r"density_ratio is \[0.2, 3.0\], and the run was started with \[0.5, 10.0\]"):
        make(domains(), density_ratio=(0.2, 3.0), **settings).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-1")
        )


def test_weights_that_the_loss_would_not_read_are_refused(make):
    tokenized = make(domains()).train_dataset
    weighted = tokenized.add_column("weight", [2.0] * len(tokenized))
    make(weighted)
    with pytest.raises(ValueError, match="a column weight, and kto takes no weights; bco does"):
        make(weighted, loss="kto")


def test_an_encoder_that_gives_something_else_is_named(make):
    with pytest.raises(AlignError, match=r"gave \(3,\) for \d+ prompts: a tensor \(N, D\) is wanted"):
        make(domains(), match_prompts=lambda texts: torch.zeros(3)).train()
    with pytest.raises(AlignError, match=r"match_prompts, or bco.encoder in a recipe\) fails: KeyError: 'no'"):
        make(domains(), match_prompts=lambda texts: {}["no"]).train()
