"""The pair trainer on a tiny model: equal to TRL's own where TRL has the loss, and right where it has not."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Gemma2Config, Gemma2ForCausalLM
from transformers.trainer_pt_utils import find_batch_size
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from align.data.pairs import pair_table
from align.data.tokenize import tokenize_pairs
from align.errors import AlignError
from align.losses import LOSSES, Loss, LossOutput, PairLogps, SequenceLogps, ln_dpo, pairwise_loss, sft
from align.trainers.pair import PairTrainer

ROWS = [
    {"prompt": "the inner", "chosen": " thing is there", "rejected": " cat"},
    {"prompt": "an apple", "chosen": " fell", "rejected": " in the garden, then another"},
    {"prompt": "there", "chosen": " she is", "rejected": " they are an ant"},
    {"prompt": "a hint then:", "chosen": " think again", "rejected": " no"},
]
# TRL's name of the loss, ours, beta.
PARITY = [
    ("sigmoid", "dpo", 0.3),
    ("sigmoid_norm", "ln_dpo", 4.0),
    ("ipo", "ipo_per_token", 0.4),
    ("hinge", "slic", 0.2),
]
# TRL's robust loss has settings beside beta.
FORMULAS = [(*row, {}) for row in PARITY] + [
    ("robust", "robust_dpo", 0.3, {"label_smoothing": 0.1}),
    ("robust", "robust_dpo", 1.5, {"label_smoothing": 0.4}),
    ("sigmoid", "robust_dpo", 0.3, {"label_smoothing": 0.0}),
]


def arguments(tmp_path, **changes) -> DPOConfig:
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
    return DPOConfig(**{**settings, **changes})


def steps(trainer) -> list[dict[str, float]]:
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def dataset() -> Dataset:
    return Dataset.from_list(ROWS)


@pytest.mark.parametrize(("theirs", "ours", "beta", "settings"), FORMULAS)
def test_formula_equals_trls_on_the_same_log_probs(
    tmp_path, tiny_tokenizer, make_tiny_model, dataset, theirs, ours, beta, settings
):
    """TRL's own ``_compute_loss`` is given log-probs instead of a model; to 1e-6 relative."""
    trainer = DPOTrainer(
        model=make_tiny_model(),
        ref_model=make_tiny_model(),
        args=arguments(tmp_path, loss_type=[theirs], beta=beta, **settings),
        train_dataset=dataset,
        processing_class=tiny_tokenizer,
    )
    generator = torch.Generator().manual_seed(1)
    mask = torch.zeros(6, 9, dtype=torch.long)
    for row, (start, end) in enumerate([(2, 5), (1, 9), (3, 4), (2, 9), (1, 3), (3, 6)]):
        mask[row, start:end] = 1
    tokens = [torch.randn(6, 8, generator=generator) * mask[:, 1:] for _ in range(2)]

    def stand_in(**_) -> FusedCausalLMOutput:
        zeros = torch.zeros(6, 8)
        return FusedCausalLMOutput(
            loss=None, log_probs=tokens[0], entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), label_mask=None
        )

    trainer.precompute_ref_logps = True
    batch = {
        "input_ids": torch.ones(6, 9, dtype=torch.long),
        "attention_mask": torch.ones(6, 9, dtype=torch.long),
        "completion_mask": mask,
        "ref_chosen_logps": tokens[1][:3].sum(1),
        "ref_rejected_logps": tokens[1][3:].sum(1),
    }
    expected = trainer._compute_loss(stand_in, batch, False).item()

    lengths = mask[:, 1:].sum(1)
    policy, reference = (
        PairLogps(SequenceLogps(t[:3].sum(1), lengths[:3]), SequenceLogps(t[3:].sum(1), lengths[3:])) for t in tokens
    )
    ours = Loss.of(ours, beta=beta, **settings)(policy, reference)
    assert ours.loss.mean().item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(("theirs", "ours", "beta"), PARITY)
def test_trainers_agree(tmp_path, tiny_tokenizer, make_tiny_model, dataset, theirs, ours, beta, lora):
    """Three steps of both trainers on the same token ids: loss to 1e-4, gradient norm to 1e-3, float32."""

    def run(kind, **changes):
        torch.manual_seed(0)
        peft = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
        reference = None if lora or kind is PairTrainer else make_tiny_model()
        loss = changes.pop("loss", None)
        return steps(
            kind(
                model=make_tiny_model(),
                ref_model=reference,
                args=arguments(tmp_path, beta=beta, **changes),
                train_dataset=dataset,
                processing_class=tiny_tokenizer,
                peft_config=peft,
                **({"loss": loss} if loss else {}),
            )
        )

    want, got = run(DPOTrainer, loss_type=[theirs]), run(PairTrainer, loss=ours)
    assert len(want) == len(got) == 3
    for theirs_step, ours_step in zip(want, got, strict=True):
        assert ours_step["loss"] == pytest.approx(theirs_step["loss"], rel=1e-4)
        assert ours_step["grad_norm"] == pytest.approx(theirs_step["grad_norm"], rel=1e-3)
        for name in ("logps/chosen", "logps/rejected", "entropy", "mean_token_accuracy"):
            assert ours_step[name] == pytest.approx(theirs_step[name], rel=1e-4), name
    assert want[0]["loss"] != pytest.approx(want[-1]["loss"], rel=1e-3)


def test_drop_in_for_a_trl_script(tmp_path, tiny_tokenizer, make_tiny_model):
    """Messages, a function as the loss, beta from DPOConfig: as a script has it, but for the class and ``loss=``."""
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in ROWS
    ]
    trainer = PairTrainer(
        model=make_tiny_model(),
        args=arguments(tmp_path, beta=5.0, eval_strategy="steps", eval_steps=2),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:2]),
        processing_class=tiny_tokenizer,
        loss=ln_dpo,
    )
    assert trainer.losses[0].settings == {"beta": 5.0}
    log = steps(trainer)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert log[-1]["loss"] < log[0]["loss"]
    evaluated = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert {"eval_rewards/accuracies", "eval_displacement/chosen_delta", "eval_length/chosen_tokens"} <= set(evaluated)


def test_metrics_by_hand(tmp_path, tiny_tokenizer, make_tiny_model, dataset):
    """After a step, the metrics of a batch are what its log-probs say; rewards in LN-DPO's own units."""
    trainer = PairTrainer(
        model=make_tiny_model(),
        args=arguments(tmp_path, beta=5.0, per_device_train_batch_size=4, max_steps=2),
        train_dataset=dataset,
        processing_class=tiny_tokenizer,
        loss="ln_dpo",
    )
    log = steps(trainer)[1]
    assert log["rewards/margins"] == pytest.approx(log["rewards/chosen"] - log["rewards/rejected"], rel=1e-5)
    assert log["rewards/chosen"] == pytest.approx(5.0 * log["displacement/chosen_delta_per_token"], rel=1e-5)
    lengths = [len(tiny_tokenizer(row["prompt"] + row["chosen"]).input_ids) for row in ROWS]
    prompts = [len(tiny_tokenizer(row["prompt"]).input_ids) for row in ROWS]
    expected = sum(n - p + 1 for n, p in zip(lengths, prompts, strict=True)) / 4
    assert log["length/chosen_tokens"] == pytest.approx(expected)
    assert 0 <= log["displacement/frac_chosen_down"] <= 1
    assert log["displacement/rejected_delta"] < log["displacement/rejected_delta_per_token"] < 0
    assert log["perf/tokens_per_s"] > 0
    assert log["perf/peak_rss_gb"] > 0.1


def test_largest_fall_is_the_largest_of_all_batches(tmp_path, tiny_tokenizer, make_tiny_model, dataset):
    """Logged once in two steps of one pair each: it is that of the pair which fell most, and no mean over batches."""

    def trained(logging_steps: int) -> list[dict[str, float]]:
        trainer = PairTrainer(
            model=make_tiny_model(),
            args=arguments(tmp_path, per_device_train_batch_size=1, max_steps=4, logging_steps=logging_steps),
            train_dataset=dataset,
            processing_class=tiny_tokenizer,
            loss="dpo",
        )
        return steps(trainer)

    each, both = trained(1), trained(2)
    falls = [max(0.0, -log["displacement/chosen_delta"]) for log in each]
    assert [log["displacement/largest_fall"] for log in each] == pytest.approx(falls, rel=1e-5)
    assert both[1]["displacement/largest_fall"] == pytest.approx(max(falls[2:]), rel=1e-5)
    assert falls[2] != falls[3]


def test_shared_and_separate_rows_train_alike(tmp_path, tiny_tokenizer, make_tiny_model, dataset):
    runs = [
        steps(
            PairTrainer(
                model=make_tiny_model(),
                args=arguments(tmp_path),
                train_dataset=dataset,
                processing_class=tiny_tokenizer,
                loss="dpo",
                shared_prompt=shared,
            )
        )
        for shared in (True, False)
    ]
    for one, other in zip(*runs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    assert runs[0][-1]["num_tokens"] < runs[1][-1]["num_tokens"]


def test_accumulation_equals_one_batch(tmp_path, tiny_tokenizer, make_tiny_model, dataset):
    """2 x 2 pairs accumulated give the gradient of 4 pairs at once."""
    norms = []
    for batch, accumulate in ((4, 1), (2, 2)):
        trainer = PairTrainer(
            model=make_tiny_model(),
            args=arguments(
                tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate, max_steps=1
            ),
            train_dataset=dataset,
            processing_class=tiny_tokenizer,
            loss="dpo",
        )
        norms.append(steps(trainer)[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_strength_weighs_a_pair(tmp_path, tiny_tokenizer, make_tiny_model):
    """At the first step every DPO loss is log 2, so the mean is log 2 * (1 + .5) / 2."""
    rows = [{**ROWS[0], "strength": 1.0}, {**ROWS[1], "strength": 0.5}]
    trainer = PairTrainer(
        model=make_tiny_model(),
        args=arguments(tmp_path, max_steps=1),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer,
        loss="dpo",
    )
    assert steps(trainer)[0]["loss"] == pytest.approx(0.75 * math.log(2), abs=1e-5)


# --- soft labels


@pytest.fixture
def hard_loss():
    """A loss in the table that takes sure labels alone."""

    @pairwise_loss("hard", reference=False, default_beta=None, paper="", formula="", purpose="")
    def hard(policy: PairLogps) -> LossOutput:
        return sft(policy)

    yield hard
    del LOSSES["hard"]


def test_soft_labels_reach_the_loss(tmp_path, tiny_tokenizer, make_tiny_model):
    """At the reference the margin is 0, and the soft IPO loss ((p - 1/2) / beta)^2.

    Beta .5, p .9 and .3, and none, which counts as 1: .64, .16 and 1, mean .6.
    """
    rows = [{**ROWS[0], "preference": 0.9}, {**ROWS[1], "preference": 0.3}, {**ROWS[2], "preference": None}]
    trainer = PairTrainer(
        model=make_tiny_model(),
        args=arguments(tmp_path, max_steps=1, per_device_train_batch_size=3),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list([ROWS[3]]),
        processing_class=tiny_tokenizer,
        loss=Loss.of("ipo", beta=0.5),
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(1.0, abs=1e-5)
    assert steps(trainer)[0]["loss"] == pytest.approx(0.6, abs=1e-5)


def test_accuracy_is_against_the_label(tmp_path, tiny_tokenizer, make_tiny_model):
    """A policy that learnt that the rejected answers are the better ones ranks all pairs right; ties do not count."""
    rows = [{**row, "preference": label} for row, label in zip(ROWS, (0.02, 0.02, 0.5, 0.02), strict=False)]
    data = Dataset.from_list(rows)
    trainer = PairTrainer(
        model=make_tiny_model(),
        args=arguments(tmp_path, max_steps=8, per_device_train_batch_size=4, learning_rate=1e-2),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tiny_tokenizer,
        loss=Loss.of("dpo", beta=0.5),
    )
    assert trainer.evaluate()["eval_rewards/accuracies"] == 0.0  # the policy is the reference: all margins are 0
    trainer.train()
    found = trainer.evaluate()
    assert found["eval_rewards/accuracies"] == 1.0
    assert found["eval_rewards/margins"] < 0


def test_a_soft_label_weighs_the_gradients_of_both_orders(tmp_path, tiny_tokenizer, make_tiny_model):
    """DPO at the reference: the gradient of p and 1 - p is (2p - 1) times that of a sure label, so .6 of it at .8."""

    def norm(**label) -> float:
        trainer = PairTrainer(
            model=make_tiny_model(),
            args=arguments(tmp_path, max_steps=1, per_device_train_batch_size=1, max_grad_norm=1e6),
            train_dataset=Dataset.from_list([{**ROWS[0], **label}]),
            processing_class=tiny_tokenizer,
            loss="dpo",
        )
        return steps(trainer)[0]["grad_norm"]

    assert norm(preference=0.8) == pytest.approx(0.6 * norm(), rel=1e-4)
    assert norm(preference=0.5) == pytest.approx(0.0, abs=1e-5)


def test_a_loss_that_is_not_on_pairs_is_refused_before_its_labels_are(tmp_path, tiny_tokenizer, make_tiny_model):
    soft = Dataset.from_list([{**row, "preference": 0.9} for row in ROWS])
    with pytest.raises(ValueError, match=r"plackett_luce is not a loss on pairs.*: it takes K answers to a prompt"):
        PairTrainer(
            model=make_tiny_model(),
            args=arguments(tmp_path),
            train_dataset=soft,
            processing_class=tiny_tokenizer,
            loss=["dpo", "plackett_luce"],
        )


def test_a_loss_of_sure_labels_refuses_soft_ones(tmp_path, tiny_tokenizer, make_tiny_model, dataset, hard_loss):
    soft = Dataset.from_list([{**row, "preference": 0.9} for row in ROWS])
    tokenized = tokenize_pairs(pair_table(("d", 1, row) for row in soft).rows, tiny_tokenizer, 64).dataset()

    def trainer(rows: Dataset, **more) -> PairTrainer:
        return PairTrainer(
            model=make_tiny_model(),
            args=arguments(tmp_path, max_steps=1),
            train_dataset=rows,
            processing_class=tiny_tokenizer,
            loss=["dpo", hard_loss],
            **more,
        )

    for rows in (soft, tokenized):
        with pytest.raises(AlignError, match=r"train: 4 rows have a soft label .*, and hard takes sure labels alone"):
            trainer(rows)
    with pytest.raises(AlignError, match="eval: 4 rows have a soft label"):
        trainer(dataset, eval_dataset=soft)
    nulls = Dataset.from_list([{**row, "preference": None} for row in ROWS])
    assert len(steps(trainer(nulls))) == 1


def test_probabilities_in_tokenised_rows_are_checked_too(tmp_path, tiny_tokenizer, make_tiny_model, dataset):
    rows = tokenize_pairs(pair_table(("d", 1, row) for row in dataset).rows, tiny_tokenizer, 64).dataset()
    trainer = PairTrainer(
        model=make_tiny_model(),
        args=arguments(tmp_path, per_device_train_batch_size=4),
        train_dataset=rows.add_column("preference", [1.0, 0.5, 1.5, 0.0]),
        processing_class=tiny_tokenizer,
    )
    with pytest.raises(ValueError, match=r"preference\[\d\] is 1.5: a probability is in \[0, 1\]"):
        trainer.train()


# --- the reference


def test_full_training_keeps_a_frozen_copy_of_these_very_weights(tmp_path, tiny_tokenizer, make_tiny_model, dataset):
    """A model made in memory has no path to reload from: the copy is of the weights that training starts from."""
    model = make_tiny_model(seed=5)
    before = copy.deepcopy(model.state_dict())
    trainer = PairTrainer(
        model=model, args=arguments(tmp_path), train_dataset=dataset, processing_class=tiny_tokenizer, loss="dpo"
    )
    steps(trainer)
    for name, tensor in trainer.ref_model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert any(not torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_fresh_adapter_is_compared_with_adapters_off(tmp_path, tiny_tokenizer, make_tiny_model, dataset):
    trainer = PairTrainer(
        model=make_tiny_model(),
        args=arguments(tmp_path),
        train_dataset=dataset,
        processing_class=tiny_tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        loss="dpo",
    )
    log = steps(trainer)
    assert trainer.ref_model is None
    assert list(trainer.model.peft_config) == ["default"]
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_continued_adapter_is_compared_with_a_copy_of_itself(tmp_path, tiny_tokenizer, make_tiny_model, dataset):
    """The reference is the adapter as it was, not the base model: the first loss is log 2 all the same."""
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(make_tiny_model(), config).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(make_tiny_model(), tmp_path / "adapter", is_trainable=True)
    trainer = PairTrainer(
        model=model, args=arguments(tmp_path), train_dataset=dataset, processing_class=tiny_tokenizer, loss="dpo"
    )
    log = steps(trainer)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert log[-1]["displacement/chosen_delta"] != 0


@pytest.mark.parametrize("name", [info.name for info in LOSSES.values() if info.kind == "pair" and not info.reference])
def test_reference_free_losses_load_no_reference(tmp_path, tiny_tokenizer, make_tiny_model, dataset, name, caplog):
    trainer = PairTrainer(
        model=make_tiny_model(),
        args=arguments(tmp_path),
        train_dataset=dataset,
        processing_class=tiny_tokenizer,
        loss=Loss.of(name),
    )
    log = steps(trainer)
    assert trainer.ref_model is None
    assert log[-1]["loss"] < log[0]["loss"]
    assert not any(key.startswith("displacement/") for key in log[0])
    assert f"no displacement/* among the metrics of each step: {name} has no reference" in caplog.text


def test_a_wrong_reference_stops_the_run(tmp_path, tiny_tokenizer, make_tiny_model, dataset):
    def trainer(**kwargs) -> PairTrainer:
        return PairTrainer(
            model=make_tiny_model(seed=0),
            ref_model=make_tiny_model(seed=1),
            args=arguments(tmp_path, max_steps=1),
            train_dataset=dataset,
            processing_class=tiny_tokenizer,
            loss="dpo",
            **kwargs,
        )

    with pytest.raises(AlignError, match="before the first step, policy and reference differ by up to"):
        trainer().train()
    assert len(steps(trainer(starts_at_reference=False))) == 1


# --- combinations, rows, refusals


def test_combined_losses(tmp_path, tiny_tokenizer, make_tiny_model, dataset):
    trainer = PairTrainer(
        model=make_tiny_model(),
        args=arguments(tmp_path, max_steps=1),
        train_dataset=dataset,
        processing_class=tiny_tokenizer,
        loss=[Loss.of("dpo", weight=0.8, beta=0.1), Loss.of("sft", weight=0.2)],
    )
    log = steps(trainer)[0]
    assert log["loss/dpo"] == pytest.approx(math.log(2), abs=1e-5)
    assert log["loss"] == pytest.approx(0.8 * log["loss/dpo"] + 0.2 * log["loss/sft"], rel=1e-5)


def test_bad_rows_are_set_aside_and_said(tmp_path, tiny_tokenizer, make_tiny_model, caplog):
    rows = [*ROWS, {"prompt": "x", "chosen": "same", "rejected": "same"}]
    with caplog.at_level(logging.WARNING, logger="align.trainers.pair"):
        trainer = PairTrainer(
            model=make_tiny_model(),
            args=arguments(tmp_path),
            train_dataset=Dataset.from_list(rows),
            processing_class=tiny_tokenizer,
            loss="dpo",
        )
    assert len(trainer.train_dataset) == 4
    assert "1 of 5 rows cannot be used" in caplog.text
    with pytest.raises(AlignError, match="no row can be used"):
        PairTrainer(
            model=make_tiny_model(),
            args=arguments(tmp_path),
            train_dataset=Dataset.from_list(rows[-1:]),
            processing_class=tiny_tokenizer,
        )


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode:FutureWarning")
@pytest.mark.parametrize(
    "change",
    [
        {"label_smoothing": 0.1},
        {"loss_type": ["ipo"]},
        {"precompute_ref_log_probs": True},
        {"truncation_mode": "keep_end"},
        {"ld_alpha": 0.5},
        {"pad_to_multiple_of": 8},
    ],
    ids=lambda change: next(iter(change)),
)
def test_arguments_that_would_be_dropped_are_refused(tmp_path, tiny_tokenizer, make_tiny_model, dataset, change):
    with pytest.raises(ValueError, match=f"does not take:\n  {next(iter(change))}="):
        PairTrainer(
            model=make_tiny_model(),
            args=arguments(tmp_path, **change),
            train_dataset=dataset,
            processing_class=tiny_tokenizer,
        )


def test_only_completion_positions_meet_the_head(tmp_path, tiny_tokenizer, make_tiny_model, dataset, monkeypatch):
    """TRL on CPU scores every prompt and pad position; here the head sees as many positions as there are targets."""
    seen = []
    from align.models import scoring

    real = scoring.token_logps
    monkeypatch.setattr(scoring, "token_logps", lambda h, t, head: seen.append(len(h)) or real(h, t, head))
    trainer = PairTrainer(
        model=make_tiny_model(),
        args=arguments(tmp_path, max_steps=1, per_device_train_batch_size=4),
        train_dataset=dataset,
        processing_class=tiny_tokenizer,
        loss="dpo",
    )
    seen.clear()  # the check of the head at the start
    answers = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in trainer.train_dataset)
    steps(trainer)
    assert seen == [answers, answers]


@pytest.mark.parametrize(
    ("strategy", "stop"), [("random", 3), ("group_by_length", 3), ("random", 5), ("group_by_length", 5)]
)
def test_resume_gives_the_weights_of_an_uninterrupted_run(tmp_path, tiny_tokenizer, make_tiny_model, strategy, stop):
    """Six steps at once, and some steps, another trainer, and the rest: bitwise equal weights and metrics.

    An epoch has four steps: the run stops within the first, or within the second, whose order is another.
    """
    rows = Dataset.from_list(ROWS * 2)

    def trainer(folder: str) -> PairTrainer:
        torch.manual_seed(11)
        return PairTrainer(
            model=make_tiny_model(),
            args=arguments(
                tmp_path / folder,
                save_strategy="steps",
                save_steps=stop,
                max_steps=6,
                train_sampling_strategy=strategy,
            ),
            train_dataset=rows,
            processing_class=tiny_tokenizer,
            peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
            loss="ln_dpo",
        )

    whole = trainer("whole")
    log = steps(whole)
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    for (name, one), (_, other) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    for one, other in zip(log, [e for e in resumed.state.log_history if "loss" in e], strict=True):
        timed = {"perf/tokens_per_s", "perf/peak_rss_gb"}
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient checkpointing"])
def test_bf16_adapters_take_their_inputs_as_they_are(
    tmp_path, tiny_tokenizer, make_tiny_model, dataset, checkpointing
):
    """Under autocast no float32 copy of the activations is made for an adapter; it trains, and stays float32."""
    trainer = PairTrainer(
        model=make_tiny_model().bfloat16(),
        args=arguments(tmp_path, bf16=True, gradient_checkpointing=checkpointing),
        train_dataset=dataset,
        processing_class=tiny_tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        loss="dpo",
    )
    adapter = next(module for name, module in trainer.model.named_modules() if name.endswith("lora_A.default"))
    seen = set()
    adapter.register_forward_pre_hook(lambda _, inputs: seen.add(inputs[0].dtype))
    log = steps(trainer)
    assert seen == {torch.bfloat16}
    assert adapter.weight.dtype == torch.float32
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-2)
    assert log[-1]["loss"] < log[0]["loss"]


def test_a_continued_adapter_resumes_with_what_it_has_learnt(tmp_path, tiny_tokenizer, make_tiny_model):
    """Its checkpoint holds two adapters; both come back: the weights of an uninterrupted run, bit for bit."""
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(make_tiny_model(), config).save_pretrained(tmp_path / "adapter")

    def trainer(folder: str) -> PairTrainer:
        return PairTrainer(
            model=PeftModel.from_pretrained(make_tiny_model(), tmp_path / "adapter", is_trainable=True),
            args=arguments(tmp_path / folder, save_strategy="steps", save_steps=3, max_steps=6),
            train_dataset=Dataset.from_list(ROWS * 2),
            processing_class=tiny_tokenizer,
            loss="ln_dpo",
        )

    whole, resumed = trainer("whole"), trainer("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for (name, one), (_, other) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_beta_of_the_config_counts_unless_it_is_the_default(tmp_path, tiny_tokenizer, make_tiny_model, dataset):
    def beta(**changes) -> float:
        trainer = PairTrainer(
            model=make_tiny_model(),
            args=arguments(tmp_path, **changes),
            train_dataset=dataset,
            processing_class=tiny_tokenizer,
            loss="ln_dpo",
        )
        return trainer.losses[0].settings["beta"]

    assert beta() == 5.0
    assert beta(beta=2.0) == 2.0


def test_what_a_trl_script_may_bring_and_is_not_taken(tmp_path, tiny_tokenizer, make_tiny_model, dataset):
    def build(data, **kwargs) -> PairTrainer:
        return PairTrainer(
            model=make_tiny_model(),
            args=arguments(tmp_path),
            train_dataset=data,
            processing_class=tiny_tokenizer,
            **kwargs,
        )

    with pytest.raises(ValueError, match="columns that are not read here: tools"):
        build(dataset.add_column("tools", [None] * len(dataset)))
    with pytest.raises(ValueError, match="data_collator: the rows of a pair are laid out here"):
        build(dataset, data_collator=lambda rows: rows)


def test_full_training_under_bf16_autocast(tmp_path, dataset, make_tiny_model, tiny_tokenizer):
    """Float32 weights, products in bf16: the reference is wrapped in autocast before its head is checked."""
    args = DPOConfig(str(tmp_path), max_steps=1, bf16=True, use_cpu=True, report_to="none", save_strategy="no")
    trainer = PairTrainer(
        model=make_tiny_model(), args=args, train_dataset=dataset, processing_class=tiny_tokenizer, loss="dpo"
    )
    assert trainer.train().training_loss == pytest.approx(0.6931, abs=0.02)


# --- packing


UNEQUAL = [
    *ROWS,
    {"prompt": "a", "chosen": " b", "rejected": " c"},
    {"prompt": "the", "chosen": " cat", "rejected": " ant"},
    {"prompt": "an inner thing is in the garden, then another", "chosen": " there", "rejected": " hint"},
]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_packed_pairs_train_as_pairs_of_their_own_rows(tmp_path, tiny_tokenizer, make_tiny_model, lora):
    """Losses, gradients and counts of real tokens are the same, in fewer rows with less padding."""

    def run(**layout) -> tuple[PairTrainer, list[dict[str, float]]]:
        torch.manual_seed(0)
        trainer = PairTrainer(
            model=make_tiny_model(),
            args=arguments(tmp_path, per_device_train_batch_size=7),
            train_dataset=Dataset.from_list(UNEQUAL),
            processing_class=tiny_tokenizer,
            peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
            loss="dpo",
            **layout,
        )
        return trainer, steps(trainer)

    (packed, ours), (shared, theirs) = run(), run(packing=False)
    assert packed.layout == {"shared_prompt": True, "row_tokens": 0}
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
        assert one["num_tokens"] == other["num_tokens"]
        assert one["perf/padding"] < other["perf/padding"]
    batch = next(iter(packed.get_train_dataloader()))
    assert len(batch["input_ids"]) < find_batch_size(batch) == 7
    held = sum(len(ids) for name in ("prompt", "chosen", "rejected") for ids in packed.train_dataset[f"{name}_ids"])
    assert ours[-1]["num_tokens"] == 3 * held
    facts = packed.speed_facts
    assert facts["rows"] == "packed"
    assert facts["padding"] == pytest.approx(1 - held / batch["input_ids"].numel(), abs=1e-4)
    assert shared.speed_facts["rows"] == "shared prompt: packing is off"


def test_evaluation_counts_pairs_and_not_rows(tmp_path, tiny_tokenizer, make_tiny_model):
    """Seven pairs in batches of four: the mean over pairs, however many rows they are laid out in."""
    data = Dataset.from_list(UNEQUAL)

    def evaluated(**layout) -> tuple[float, list[float]]:
        trainer = PairTrainer(
            model=make_tiny_model(),
            ref_model=make_tiny_model(seed=5),
            args=arguments(tmp_path, per_device_eval_batch_size=4),
            train_dataset=data,
            eval_dataset=data,
            processing_class=tiny_tokenizer,
            loss=Loss.of("dpo", beta=1.0),
            starts_at_reference=False,
            **layout,
        )
        trainer.model.eval()
        each = []
        for row in trainer.eval_dataset:
            with torch.no_grad():
                each.append(trainer._compute_loss(trainer.model, trainer.data_collator([row]), False).item())
        return trainer.evaluate()["eval_loss"], each

    for layout in ({}, {"packing": False}, {"shared_prompt": False}):
        loss, each = evaluated(**layout)
        assert max(each) - min(each) > 0.01
        assert loss == pytest.approx(sum(each) / 7, rel=1e-5), layout


def test_windows_fall_back_to_separate_rows_in_one_line(tmp_path, tiny_tokenizer, dataset, caplog):
    config = Gemma2Config(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING, logger="align"):
        trainer = PairTrainer(
            model=Gemma2ForCausalLM(config),
            args=arguments(tmp_path, max_steps=1),
            train_dataset=dataset,
            processing_class=tiny_tokenizer,
            loss="dpo",
        )
    lines = [record.getMessage() for record in caplog.records if "separate rows" in record.getMessage()]
    reason = "gemma2 models are not known to take a mask of ours"
    assert lines == [f"separate rows for chosen and rejected answers: {reason}"]
    assert steps(trainer)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert trainer.speed_facts["rows"] == f"separate: {reason}"
    assert 0 < trainer.speed_facts["padding"] < 1
