"""The reference cache: the same training as without, computed once, and never another model's numbers."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig

from align.errors import AlignError
from align.losses import Loss
from align.trainers import reference_cache, reference_host
from align.trainers.collate import PairCollator, by_answer, rows_of
from align.trainers.logp_shards import LogpShards, row_key
from align.trainers.pair import PairTrainer

WORDS = ["the", "inner", "thing", "there", "an", "apple", "fell", "in", "garden", "then", "another", "hint", "think"]
ROWS = [
    {
        "prompt": " ".join(WORDS[i % 7 : i % 7 + 1 + i % 4]),
        "chosen": " " + " ".join(WORDS[i % 5 : i % 5 + 1 + i % 3]),
        "rejected": " " + " ".join(WORDS[(3 * i) % 11 : (3 * i) % 11 + 1 + (i // 2) % 4]) + " no",
    }
    for i in range(12)
]
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
KINDS = ("lora", "full", "continued")
TIMED = ("perf/tokens_per_s", "perf/peak_rss_gb")
Make = Callable[..., PairTrainer]


@pytest.fixture
def make(tmp_path, tiny_tokenizer, make_tiny_model) -> Make:
    """``make(kind, cache=, loss=, **arguments)``: a trainer of six steps of four of the twelve rows."""
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(5)
    get_peft_model(make_tiny_model(), config).save_pretrained(tmp_path / "adapter")

    def trainer(kind: str = "lora", cache: Path | None = None, seed: int = 0, **changes) -> PairTrainer:
        torch.manual_seed(11)
        model = make_tiny_model(seed).to(changes.pop("dtype", torch.float32))
        if kind == "continued":
            model = PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True)
        ours = {"loss": changes.pop("loss", "dpo"), "reference_cache": cache}
        for name in ("shared_prompt", "eval_dataset", "ref_model", "train_dataset"):
            if name in changes:
                ours[name] = changes.pop(name)
        settings = {
            "output_dir": str(tmp_path / changes.pop("folder", "out")),
            "per_device_train_batch_size": 4,
            "max_steps": 6,
            "learning_rate": 1e-3,
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
        return PairTrainer(
            model=model,
            args=DPOConfig(**{**settings, **changes}),
            processing_class=tiny_tokenizer,
            peft_config=LORA if kind == "lora" else None,
            **{"train_dataset": Dataset.from_list(ROWS), **ours},
        )

    return trainer


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """Pairs of each forward pass of the reference."""
    seen: list[int] = []
    real = reference_host.score

    def score(model, rows):
        seen.append(rows.answers // 2)
        return real(model, rows)

    monkeypatch.setattr(reference_host, "score", score)
    return seen


def logged(trainer: PairTrainer, **options) -> list[dict[str, float]]:
    trainer.train(**options)
    return [{k: v for k, v in e.items() if k not in TIMED} for e in trainer.state.log_history if "loss" in e]


def counts(trainer: PairTrainer) -> tuple[int, int]:
    assert trainer.references is not None
    return trainer.references.rows["cached"], trainer.references.rows["computed"]


def shards(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/*.safetensors"))


def columns(trainer: PairTrainer) -> list[list[float]]:
    return [side for row in trainer.train_dataset for side in (row["reference_chosen"], row["reference_rejected"])]


# --- equal


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_as_without(tmp_path, make, asked, kind):
    """Two epochs: the same logs step by step, and one pass of the reference for both runs that have the cache."""
    cache = tmp_path / "cache"
    plain = logged(make(kind))
    assert sum(asked) == 24
    asked.clear()
    first = make(kind, cache)
    assert sorted(asked) == [4, 4, 4]
    assert first.keeps_no_reference == (kind == "full")
    log = logged(first)
    again = make(kind, cache)
    assert logged(again) == log
    assert len(asked) == 3
    assert (counts(first), counts(again)) == ((0, 12), (12, 0))
    assert len(plain) == len(log) == 6
    for one, other in zip(plain, log, strict=True):
        assert one.keys() == other.keys()
        # Of equal models they say how rounding fell.
        rounding = {"rewards/accuracies", "displacement/frac_chosen_down"} if one is plain[0] else set()
        for name, value in one.items():
            if name not in rounding:
                # Log-probs of an answer add up to -60 nats, which float32 knows to 4e-6.
                assert other[name] == pytest.approx(value, rel=1e-5, abs=1e-6 if name == "loss" else 2e-5), name
    assert log[0]["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert abs(log[5]["loss"] - log[0]["loss"]) > 1e-3


@pytest.mark.parametrize("shared", [True, False])
def test_the_collator_puts_log_probs_where_their_tokens_are(shared):
    """Columns that hold the token ids themselves come out as the targets."""
    rows = [
        {"prompt_ids": [9] * n, "chosen_ids": [10 + n, 20 + n, 2], "rejected_ids": [30 + n] * n + [2]}
        for n in range(1, 5)
    ]
    for row in rows:
        row |= {f"reference_{side}": [float(i) for i in row[f"{side}_ids"]] for side in ("chosen", "rejected")}
    collate = PairCollator(0, shared)
    batch = collate(rows)
    assert batch["reference_logps"].tolist() == batch["target"].tolist()
    answers = by_answer(batch["answer"], batch["reference_logps"])
    assert [part.tolist() for part in answers[4:]] == [row["reference_rejected"] for row in rows]
    assert rows_of(batch).answers == 8
    rows[2]["reference_chosen"] = None
    partly = collate(rows)
    answers = by_answer(partly["answer"], partly["reference_logps"])
    assert [bool(part.isnan().all()) for part in answers] == [n % 4 == 2 for n in range(8)]
    assert not any(answers[n].isnan().any() for n in (0, 1, 3, 4, 5, 7))
    key = row_key(rows[1]["prompt_ids"], rows[1]["chosen_ids"], rows[1]["rejected_ids"])
    assert bytes(partly["reference_keys"][1].tolist()) == key
    for row in rows:
        row["reference_chosen"] = None
    assert "reference_logps" not in collate(rows)


def test_a_key_is_of_the_three_lists():
    keys = {row_key([1, 2], [3], [4]), row_key([1], [2, 3], [4]), row_key([1, 2], [4], [3]), row_key([1], [2], [3, 4])}
    assert len(keys) == 4


# --- what is read


def test_the_loss_its_settings_and_the_adapter_do_not_matter(tmp_path, make):
    make("lora", tmp_path / "cache", beta=0.1)
    others = (
        make("lora", tmp_path / "cache", loss=Loss.of("ln_dpo", beta=2.0), learning_rate=5e-4, seed=0),
        make("full", tmp_path / "cache"),
        make(
            "full", tmp_path / "cache", ref_model=AutoModelForCausalLM.from_config(make().model.config), loss="simpo"
        ),
        make("lora", tmp_path / "cache", train_dataset=Dataset.from_list(ROWS[5:8]), max_length=60),
    )
    assert counts(others[0]) == counts(others[1]) == (12, 0)
    assert others[2].references is None
    assert counts(others[3]) == (3, 0)
    assert len(list(tmp_path.glob("cache/*/context.json"))) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"dtype": torch.bfloat16},
        {"bf16": True},
        {"shared_prompt": False},
        {"kind": "continued"},
        {"max_length": 8},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_reference_or_other_rows_read_nothing(tmp_path, make, change):
    """max_length is not in the context: what it cuts has other token ids."""
    make("lora", tmp_path / "cache")
    found = make(**{"kind": "lora", "cache": tmp_path / "cache", **change})
    if "max_length" not in change:
        assert counts(found) == (0, 12)
        return
    known = [[row[name] for name in reference_cache.IDS] for row in make("lora").train_dataset]
    cut = sum([row[name] for name in reference_cache.IDS] not in known for row in found.train_dataset)
    assert 0 < cut < len(found.train_dataset)
    assert counts(found) == (len(found.train_dataset) - cut, cut)


def test_what_a_config_or_an_adapters_settings_change(tmp_path, make):
    """Equal weights, another function of them."""
    first = make("continued", tmp_path / "cache")
    told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**told, "lora_alpha": 99}))
    assert counts(make("continued", tmp_path / "cache")) == (0, 12)
    contexts = [json.loads(path.read_text()) for path in tmp_path.glob("cache/*/context.json")]
    assert contexts[0]["weights"] == contexts[1]["weights"]
    assert contexts[0]["adapters"] != contexts[1]["adapters"]
    model = first.accelerator.unwrap_model(first.model)
    before = reference_cache.context_of(model, [], rows="separate", autocast="no")
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 5.0}
    after = reference_cache.context_of(model, [], rows="separate", autocast="no")
    assert {name for name in before if before[name] != after[name]} == {"config"}


def test_an_adapter_is_no_part_of_the_base_weights(make_tiny_model):
    """Nor are modules that are trained beside it; both have the names of the plain model."""
    plain = make_tiny_model()
    wanted = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    config = LoraConfig(
        r=2, target_modules=["q_proj", "embed_tokens"], modules_to_save=["norm"], task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(make_tiny_model(), config)
    found = dict(reference_cache._base_weights(adapted))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


# --- what is on the disk


@pytest.fixture
def small_shards(monkeypatch) -> None:
    monkeypatch.setattr(reference_cache, "ROWS_IN_SHARD", 4)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def named(path: Path, **changes: torch.Tensor) -> None:
    """A shard of other tensors whose name agrees with its bytes."""
    content = save({**load_file(path), **changes})
    path.unlink()
    path.with_name(f"{hashlib.sha256(content).hexdigest()}.safetensors").write_bytes(content)


def drop_a_token(path: Path) -> None:
    named(path, logps=load_file(path)["logps"][:-1])


def move_a_token(path: Path) -> None:
    lengths = load_file(path)["lengths"]
    lengths[0, 0] += 1
    lengths[0, 1] -= 1
    named(path, lengths=lengths)


def not_finite(path: Path) -> None:
    named(path, logps=load_file(path)["logps"].index_fill(0, torch.tensor([1]), float("nan")))


@pytest.mark.parametrize("harm", [truncate, flip, Path.write_bytes, drop_a_token, move_a_token, not_finite])
def test_a_damaged_shard_is_told_and_its_rows_are_computed_anew(tmp_path, make, small_shards, caplog, harm):
    whole = columns(make("lora", tmp_path / "cache"))
    names = shards(tmp_path / "cache")
    assert len(names) == 3
    if harm is Path.write_bytes:
        names[1].write_bytes(b"")
    else:
        harm(names[1])
    (damaged,) = set(shards(tmp_path / "cache")) - {names[0], names[2]}
    with caplog.at_level(logging.WARNING):
        again = make("lora", tmp_path / "cache")
    (told,) = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    assert told.startswith(f"{damaged}: damaged: ")
    assert told.endswith("it is removed, and its rows are computed anew")
    assert counts(again) == (8, 4)
    assert columns(again) == whole
    assert shards(tmp_path / "cache") == names  # the same rows in one batch, the same bytes, the same name
    assert counts(make("lora", tmp_path / "cache")) == (12, 0)


def test_a_pass_that_was_killed_goes_on(tmp_path, make, small_shards, fork):
    """Killed as the second shard is written: the first stays, and in the end all numbers are those of one pass."""
    whole = columns(make("lora", tmp_path / "whole"))
    real = LogpShards.write

    def killed() -> None:
        def write(self: LogpShards, rows) -> None:
            if shards(tmp_path / "killed"):
                os.kill(os.getpid(), signal.SIGKILL)
            real(self, rows)

        LogpShards.write = write
        make("lora", tmp_path / "killed")

    process = fork(killed)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert len(shards(tmp_path / "killed")) == 1
    again = make("lora", tmp_path / "killed")
    assert counts(again) == (4, 8)
    assert columns(again) == whole


def test_two_runs_at_once(tmp_path, make, small_shards, fork, caplog):
    """In one folder, with batches of other sizes: nothing is lost, torn or left behind."""
    processes = [
        fork(lambda size=size: make(cache=tmp_path / "cache", per_device_train_batch_size=size)) for size in (1, 3)
    ]
    for process in processes:
        process.join(120)
        assert process.exitcode == 0, process.said.read_text()
    with caplog.at_level(logging.WARNING):
        assert counts(make("lora", tmp_path / "cache")) == (12, 0)
    assert "damaged" not in caplog.text
    (folder,) = {path.parent for path in shards(tmp_path / "cache")}
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_after_the_cache_was_deleted(tmp_path, make, kind):
    """The missing rows are computed with the weights that training started from: bitwise equal weights in the end."""
    settings = {"save_strategy": "steps", "save_steps": 3}
    whole = make(kind, tmp_path / "cache", folder="whole", **settings)
    log = logged(whole)
    shutil.rmtree(tmp_path / "cache")
    resumed = make(kind, tmp_path / "cache", folder="resumed", **settings)
    assert counts(resumed) == (0, 12)
    assert logged(resumed, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3")) == log
    for (name, one), (_, other) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name


# --- what is computed


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_short_run_computes_what_it_uses(tmp_path, make, asked, kind):
    """One step of four of twelve rows: these four, with the batch; the next such run reads them."""
    plain = logged(make(kind, max_steps=1))
    asked.clear()
    first = make(kind, tmp_path / "cache", max_steps=1)
    assert (first.ref_model is None) == (kind == "lora")
    assert asked == []
    assert logged(first) == plain
    assert asked == [4]
    again = make(kind, tmp_path / "cache", max_steps=1)
    assert logged(again) == plain
    assert asked == [4]
    assert (counts(first), counts(again)) == ((0, 4), (4, 0))
    assert counts(make(kind, tmp_path / "cache")) == (4, 8)


def test_a_batch_that_is_partly_known(tmp_path, make):
    """What was kept is used as it is, so that a run that goes on computes on with the same numbers."""
    cache, three = tmp_path / "cache", Dataset.from_list(ROWS[:3])
    known = make("lora", cache, train_dataset=three, per_device_train_batch_size=1).train_dataset
    first = make("lora", cache, max_steps=1, train_sampling_strategy="sequential")
    log = logged(first)
    assert counts(first) == (3, 1)
    again = make("lora", cache, max_steps=1, train_sampling_strategy="sequential")
    assert again.train_dataset[:3]["reference_chosen"] == known["reference_chosen"]
    assert [row["reference_chosen"] is None for row in again.train_dataset] == [False] * 4 + [True] * 8
    assert logged(again) == log
    assert log[0]["loss"] == pytest.approx(0.693147, abs=1e-6)


def test_rows_that_stand_twice_are_computed_once(tmp_path, make, asked):
    found = make("lora", tmp_path / "cache", train_dataset=Dataset.from_list(ROWS + ROWS[:5]))
    assert sum(asked) == 12
    assert columns(found)[:10] == columns(found)[24:]


def test_without_a_reference_nothing_is_computed(tmp_path, make, asked):
    trainer = make("lora", tmp_path / "cache", loss=Loss.of("simpo", beta=2.0))
    logged(trainer)
    assert asked == []
    assert trainer.references is None
    assert not (tmp_path / "cache").exists()


def test_held_out_rows(tmp_path, make, asked):
    """Computed before the first step where the run evaluates, and where no copy of the reference is kept."""
    held_out = Dataset.from_list(ROWS[:3])
    one = make("lora", tmp_path / "a", eval_dataset=held_out, train_dataset=Dataset.from_list(ROWS[3:]))
    assert counts(one) == (0, 9)
    settings = {"eval_strategy": "steps", "eval_steps": 2, "train_dataset": Dataset.from_list(ROWS[3:])}
    two = make("lora", tmp_path / "a", eval_dataset={"first": held_out, "last": held_out.select([2])}, **settings)
    assert counts(two) == (9 + 1, 3)
    asked.clear()
    two.train()
    assert asked == []
    plain = make("lora", eval_dataset={"first": held_out, "last": held_out.select([2])}, **settings)
    plain.train()
    found, wanted = ([e for e in t.state.log_history if "eval_last_loss" in e] for t in (two, plain))
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours["eval_last_loss"] == pytest.approx(theirs["eval_last_loss"], abs=1e-6)


def test_full_training_evaluates_what_it_was_given_and_nothing_else(tmp_path, make):
    trainer = make(
        "full", tmp_path / "cache", eval_dataset=Dataset.from_list(ROWS[:3]), train_dataset=Dataset.from_list(ROWS[3:])
    )
    assert counts(trainer) == (0, 12)
    before = trainer.evaluate(Dataset.from_list(ROWS[:2]))  # the policy still is the reference
    assert before["eval_loss"] == pytest.approx(0.693147, abs=1e-6)
    trainer.train()
    assert trainer.evaluate()["eval_displacement/chosen_delta"] != 0
    with pytest.raises(AlignError, match="keeps no copy of the reference, and these rows were not there"):
        trainer.evaluate(Dataset.from_list(ROWS[:2]))


def test_a_loss_without_a_reference_evaluates_other_rows_after_training(make):
    trainer = make("full", loss=Loss.of("simpo", beta=2.0), max_steps=1)
    trainer.train()
    assert trainer.evaluate(Dataset.from_list(ROWS[:2]))["eval_loss"] > 0


# --- what is refused


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bf16"])
def test_wrong_numbers_end_the_run_at_its_first_step(tmp_path, make, half):
    """Shards of another model under this one's context: the check of the first step sees it; it lets rounding pass."""
    this, other = (tmp_path / name for name in ("this", "other"))
    log = logged(make("lora", this, bf16=half, per_device_train_batch_size=2))
    assert log[0]["loss"] == pytest.approx(0.693147, abs=1e-2 if half else 1e-6)
    make("lora", other, bf16=half, seed=1)
    (wrong,), (context,) = shards(other), {path.parent for path in shards(this)}
    for path in shards(this):
        path.unlink()
    shutil.copy(wrong, context)
    trainer = make("lora", this, bf16=half)
    assert counts(trainer) == (12, 0)
    by = r"\S+ nats a token on average" if half else r"up to \S+ nats a token"
    with pytest.raises(
        AlignError, match=rf"policy and reference differ by {by} .*was read from {context}, delete that"
    ):
        trainer.train()


def test_a_log_prob_that_is_not_finite_is_not_kept(tmp_path):
    shard = LogpShards(tmp_path / "cache", {"weights": "a"})
    with pytest.raises(AlignError, match="a log-prob that is not finite"):
        shard.write({row_key([1], [2], [3]): (torch.tensor([-1.0]), torch.tensor([float("-inf")]))})
    assert shards(tmp_path / "cache") == []


def test_what_does_not_go_together(tmp_path, make):
    with pytest.raises(ValueError, match="leave it out, or sync_ref_model"):
        make("full", tmp_path / "cache", sync_ref_model=True)
    with pytest.raises(ValueError, match=r"precompute_ref_log_probs=True: PairTrainer\(reference_cache=FOLDER\)"):
        make("lora", tmp_path / "cache", precompute_ref_log_probs=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(AlignError, match=r"reference log-probs cannot be kept here \(Not a directory\)"):
        make("lora", tmp_path / "file")


def of_processes(model: Path, output: Path, cache: Path, batch: int, settings, write) -> None:
    for name, peft in (("full", None), ("lora", LORA)):
        trainer = PairTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
            args=DPOConfig(str(output / name), per_device_train_batch_size=batch, **settings),
            train_dataset=Dataset.from_list(ROWS),
            processing_class=AutoTokenizer.from_pretrained(model),
            peft_config=peft,
            reference_cache=cache / name,
        )
        write(trainer, output / f"{name}.json")


def test_two_processes_share_a_pass(tmp_path, tiny_model_dir, small_shards, two_processes, three_steps, train_and_log):
    """Each shard is written by one of them, and the losses are those of one process."""
    one, two = (tmp_path / name for name in ("one", "two"))
    of_processes(tiny_model_dir, one, tmp_path / "first", 4, three_steps, train_and_log)
    cache = tmp_path / "second"
    two_processes(lambda: of_processes(tiny_model_dir, two, cache, 2, three_steps, train_and_log))
    for kind in ("full", "lora"):
        whole, halves = (json.loads((output / f"{kind}.json").read_text()) for output in (one, two))
        assert [e["loss"] for e in halves] == pytest.approx([e["loss"] for e in whole], rel=1e-4, abs=1e-6)
        keys = [bytes(key) for path in shards(cache / kind) for key in load_file(path)["keys"].tolist()]
        assert len(keys) == len(set(keys)) == 12
