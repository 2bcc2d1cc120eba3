"""Online training on a tiny model: what a step learns, and that nothing of how it is laid out changes it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from align.data.prompts import ROW_ID
from align.errors import AlignError
from align.losses import Loss
from align.rewards.annotators import Verdicts
from align.trainers.judging import labelled, less_cut
from align.trainers.online import OnlineTrainer
from align.trainers.windows import Windows

TrainerOf = Callable[..., OnlineTrainer]
PROMPTS = ["the cat", "an inn", "her hat", "then", "a thin man", "other", "in there", "tea"]
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
EMBEDDING = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
ONLINE = ["ipo", "dpo", "slic", "nash_md_pg", "gpo", "gpo_pointwise", "sppo", "sppo_pointwise", "mdpo"]


@pytest.mark.parametrize("loss", ONLINE)
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_every_loss_trains(trainer_of: TrainerOf, weights: Any, samples: Any, loss: str, lora: Any) -> None:
    own = {"inner_steps": 2} if loss == "mdpo" else {"drawing": {"mixture": 0.25}}
    trainer = trainer_of(loss=loss, peft_config=lora, **own)
    before = weights(trainer)
    trainer.train()
    assert any(not torch.equal(value, before[name]) for name, value in weights(trainer).items())
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == [1, 2]
    assert all(math.isfinite(value) for entry in logs for value in entry.values())
    assert logs[0]["kl/k1"] == pytest.approx(0, abs=1e-4)  # at the first step the policy is the reference
    assert {"entropy", "length/tokens", "length/truncated", "preference/decided"} <= logs[0].keys()
    kept = samples(trainer)
    assert len(kept) == (4 if loss == "mdpo" else 8)
    decided = [abs(2 * line["preference"][0][1] - 1) for line in kept if line["step"] == 1]
    assert logs[0]["preference/decided"] == pytest.approx(sum(decided) / len(decided))


@pytest.mark.parametrize("loss", ["ipo", "gpo", "nash_md_pg", "mdpo"])
def test_accumulation_changes_nothing(trainer_of: TrainerOf, assert_equal: Any, by_letters: Any, loss: str) -> None:
    """Four prompts in one batch, or two and two, or one at a time; some pairs have no verdict.

    By plain SGD: Adam makes a step of the rate out of a gradient that is rounding alone.
    """
    sgd = {"optim": "sgd", "learning_rate": 0.05}
    settings: dict[str, Any] = {"loss": loss, "annotator": by_letters(silent=["then", "tea", "an inn"])}
    settings |= {"drawing": {"mixture": 0.5 if loss in ("ipo", "nash_md_pg") else 0.0}}
    settings |= {"inner_steps": 1 if loss == "nash_md_pg" else 2}
    one = trainer_of("one", arguments=sgd, **settings)
    one.train()
    for batch, accumulated in ((2, 2), (1, 4)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        other = trainer_of(f"by {batch}", arguments={**sgd, **sizes}, **settings)
        other.train()
        assert_equal(one, other, 2e-5)
        ours, theirs = one.state.log_history, other.state.log_history
        for left, right in zip(ours[:-1], theirs[:-1], strict=True):
            assert left.keys() == right.keys()
            for name in left.keys() - {"perf/tokens_per_s", "perf/peak_rss_gb", "perf/padding"}:
                assert right[name] == pytest.approx(left[name], rel=2e-3, abs=2e-5), name


def test_a_shared_row_is_as_good_as_rows_of_their_own(trainer_of: TrainerOf, assert_equal: Any) -> None:
    """By plain SGD: Adam makes a step of the rate out of a gradient that is rounding alone."""
    sgd = {"optim": "sgd", "learning_rate": 0.1}
    settings: dict[str, Any] = {"drawing": {"answers": 3}, "arguments": sgd}
    one, other = trainer_of("one", **settings), trainer_of("other", shared_prompt=False, **settings)
    assert one.layout == {"shared_prompt": True, "row_tokens": 0}
    assert other.layout == {"shared_prompt": False, "row_tokens": None}
    one.train()
    other.train()
    assert_equal(one, other, 2e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_mdpo_meets_the_log_probs_of_its_own_tokens(trainer_of: TrainerOf, shared: bool) -> None:
    """At the first inner step every ratio is 1, whatever the layout: the reward d / t is 0."""
    trainer = trainer_of(loss="mdpo", shared_prompt=shared, inner_steps=2, drawing={"answers": 3})
    trainer.train()
    batch = trainer.lay_out(trainer._window[1][0])  # type: ignore[index]
    trainer.model.load_state_dict(trainer.ref_model.state_dict())
    from align.losses.rows import Rows
    from align.models.scoring import score

    with torch.no_grad():
        logps = score(trainer.model.eval(), Rows.of(batch, batch["win_rates"].numel())).logps
    torch.testing.assert_close(logps, batch["behaviour"], rtol=0, atol=1e-4)


def test_the_gradient_is_that_of_the_loss(
    trainer_of: TrainerOf, weights: Any, by_letters: Any, make_tiny_model: Callable[..., LlamaForCausalLM]
) -> None:
    """One step of plain SGD is the gradient of the mean IPO loss over the pairs, by logits and by hand."""
    trainer = trainer_of(
        arguments={"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0},
        annotator=by_letters(silent=["then", "tea", "an inn", "other", "her hat"]),
        loss=Loss.of("ipo", beta=2.0),
        drawing={"answers": 3},
    )
    before = weights(trainer)
    trainer.train()
    assert trainer._window is not None
    (groups,) = trainer._window[1]
    model = make_tiny_model()

    def logp(group: Any, answer: int) -> Tensor:
        ids = torch.tensor([[*group.prompt_ids, *group.answer_ids[answer]]])
        logps = model(ids).logits[0].log_softmax(-1)
        start = len(group.prompt_ids)
        return sum(logps[at - 1, ids[0, at]] for at in range(start, ids.shape[1]))  # type: ignore[return-value]

    terms = []
    for group in groups:
        totals = [logp(group, answer) for answer in range(3)]
        for i, j in ((0, 1), (0, 2), (1, 2)):
            p = float(group.preference[i, j])
            if not math.isnan(p):
                h = (totals[i] - totals[i].detach()) - (totals[j] - totals[j].detach())  # the policy is the reference
                terms.append((h - (p - 0.5) / 2.0) ** 2)
    assert 8 <= len(terms) < 12  # of four prompts; five of all eight have a pair without a verdict
    torch.stack(terms).mean().backward()  # type: ignore[no-untyped-call]
    after = weights(trainer)
    for name, value in model.named_parameters():
        if name in before and value.grad is not None:
            torch.testing.assert_close(before[name] - after[name], value.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("loss", ["ipo", "gpo", "nash_md_pg", "mdpo"])
def test_a_step_without_a_verdict_leaves_the_weights(
    trainer_of: TrainerOf, weights: Any, samples: Any, by_letters: Any, loss: str
) -> None:
    """Of the second step, whose prompts are the other half of the eight; without any verdict ever the run ends."""
    sgd = {"optim": "sgd", "learning_rate": 0.1}
    one = trainer_of("one", loss=loss, arguments={**sgd, "max_steps": 1})
    one.train()
    first = {line["prompt"] for line in samples(one)}
    annotator = by_letters(silent=[prompt for prompt in PROMPTS if prompt not in first])
    two = trainer_of("two", loss=loss, annotator=annotator, arguments=sgd)
    two.train()
    assert all(torch.equal(value, weights(one)[name]) for name, value in weights(two).items())
    assert [entry["preference/set_aside"] for entry in two.state.log_history[:2]] == [0, 1]
    never = trainer_of("never", loss=loss, annotator=by_letters(silent=PROMPTS))
    with pytest.raises(
        AlignError, match="at step 2: it has nothing to say of any pair, 2 times in a row: nothing to say"
    ):
        never.train()


@pytest.mark.parametrize(("kind", "settings"), [("ema", {"decay": 0.5}), ("previous", {"every": 2})])
@pytest.mark.parametrize("lora", [None, LORA, EMBEDDING], ids=["full", "lora", "lora of embeddings"])
def test_the_reference_follows(trainer_of: TrainerOf, weights: Any, kind: str, settings: Any, lora: Any) -> None:
    """After three steps: half of the last policy, a quarter of the one before, ...; or the policy of step 2."""
    trainer = trainer_of(reference=kind, peft_config=lora, arguments={"max_steps": 3}, **settings)
    policies = [weights(trainer)]

    def reference() -> dict[str, Tensor]:
        if lora is None:
            return {name: value.detach() for name, value in trainer.ref_model.named_parameters()}
        named = dict(trainer.model.named_parameters())
        return {name: named[name.replace(".default", ".ref")].detach() for name in policies[0]}

    follow = trainer.moving.follow

    def followed(*args: Any) -> None:
        policies.append(weights(trainer))
        follow(*args)

    trainer.moving.follow = followed  # type: ignore[method-assign]
    trainer.train()
    for name, value in reference().items():
        own = [policy[name] for policy in policies]
        wanted = own[2] if kind == "previous" else own[3] / 2 + own[2] / 4 + own[1] / 8 + own[0] / 8
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-6)


DROPPING = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.5)


@pytest.mark.parametrize("reference", ["fixed", "ema", "previous"])
@pytest.mark.parametrize("kind", ["full", "lora", "continued"])
def test_neither_policy_nor_reference_has_dropout(
    trainer_of: TrainerOf, make_tiny_model: Callable[..., LlamaForCausalLM], reference: str, kind: str
) -> None:
    model: Any = make_tiny_model(attention_dropout=0.5)
    if kind == "full":
        model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp, nn.Dropout(0.5))
    if kind == "continued":
        model = get_peft_model(model, DROPPING)
    trainer = trainer_of(model=model, reference=reference, peft_config=DROPPING if kind == "lora" else None)
    assert (trainer.ref_model is None) == (kind != "full")
    modules = [module for one in filter(None, (trainer.model, trainer.ref_model)) for module in one.modules()]
    assert {module.p for module in modules if isinstance(module, nn.Dropout)} == {0.0}
    assert {module.attention_dropout for module in modules if hasattr(module, "attention_dropout")} == {0.0}


def test_a_policy_that_is_its_own_reference_has_no_kl(trainer_of: TrainerOf, caplog: Any) -> None:
    """The policy of the step before, at every step: the reference is what the answers are drawn from."""
    trainer = trainer_of(peft_config=DROPPING, reference="previous", every=1, arguments={"max_steps": 3})
    assert "dropout is switched off" in caplog.text
    trainer.train()
    kls = [entry["kl/k1"] for entry in trainer.state.log_history if "loss" in entry]
    assert kls == pytest.approx([0, 0, 0], abs=1e-4)


@pytest.mark.parametrize("bloom", [True, False], ids=["of its layers", "of its config"])
def test_dropout_that_is_a_number(trainer_of: TrainerOf, tiny_tokenizer: PreTrainedTokenizerFast, bloom: bool) -> None:
    """Bloom's layers have it, and it is switched off; Falcon's read it from the config, which is told."""
    ends = {"pad_token_id": tiny_tokenizer.pad_token_id, "eos_token_id": tiny_tokenizer.eos_token_id}
    own = {"vocab_size": len(tiny_tokenizer), "hidden_size": 32, "hidden_dropout": 0.1, **ends}
    torch.manual_seed(0)
    if bloom:
        trainer_of(model=BloomForCausalLM(BloomConfig(n_layer=1, n_head=2, **own))).train()
        return
    model = FalconForCausalLM(FalconConfig(num_hidden_layers=1, num_attention_heads=2, **own))
    with pytest.raises(AlignError, match=r"dropout of the model's config \(hidden_dropout 0.1\): set it to 0"):
        trainer_of(model=model).train()


def test_labels() -> None:
    table = torch.tensor([[0.5, 0.9, 0.5], [0.1, 0.5, math.nan], [0.5, math.nan, 0.5]], dtype=torch.float64)
    assert labelled(table, "soft", "a") is table
    argmax = labelled(table, "argmax", "a")
    assert argmax[0].tolist() == [0.5, 1, 0.5]
    assert argmax[1, 2].isnan()
    drawn = torch.stack([labelled(table, "drawn", f"row {n}") for n in range(2000)])
    assert set(drawn[:, 0, 1].tolist()) == {0.0, 1.0}
    assert float(drawn[:, 0, 1].mean()) == pytest.approx(0.9, abs=0.02)
    assert torch.equal(drawn[:, 0, 1] + drawn[:, 1, 0], torch.ones(2000, dtype=torch.float64))
    assert drawn[:, 2, 1].isnan().all()
    torch.testing.assert_close(labelled(table, "drawn", "row 3"), drawn[3], equal_nan=True)


def test_an_answer_that_was_cut_is_worth_less() -> None:
    """Two nats off against the ones that ended, also of 10 where it was sure; nothing between two that were cut."""
    odds = torch.tensor([[[0, 1, 10, math.nan], [0, 0, 3, -1], [0, 0, 0, 4], [0, 0, 0, 0]]], dtype=torch.float64)
    scores = odds.triu(1) - odds.triu(1).mT
    scores[0, 3, 0] = math.nan
    preference = torch.sigmoid(scores)
    preference[0, 0, 2], preference[0, 2, 0] = 1.0, 0.0
    found = less_cut(Verdicts(preference, scores, []), torch.tensor([[True, False, False, True]]), 2.0)
    wanted = [-1, 8, math.nan, 3, 1, 6]
    first, second = torch.triu_indices(4, 4, 1)
    assert found.scores[0, first, second].tolist() == pytest.approx(wanted, nan_ok=True)
    torch.testing.assert_close(found.scores, -found.scores.mT, equal_nan=True)
    torch.testing.assert_close(found.preference, torch.sigmoid(found.scores), equal_nan=True)
    none = less_cut(Verdicts(preference, scores, []), torch.ones(1, 4, dtype=torch.bool), 2.0)
    torch.testing.assert_close(none.preference, preference, equal_nan=True)


def test_a_cut_is_learnt_and_the_verdict_kept(trainer_of: TrainerOf, samples: Any) -> None:
    """Labels have the penalty; ``samples.jsonl`` has what the annotator said."""
    trainer = trainer_of(cut_penalty=2.0, arguments={"max_steps": 1}, drawing={"answers": 3, "max_new_tokens": 120})
    trainer.train()
    assert trainer._window is not None
    seen = 0
    for group, kept in zip(trainer._window[1][0], samples(trainer), strict=True):
        for i, j in ((0, 1), (0, 2), (1, 2)):
            off = 2.0 * (kept["finished"][i] - kept["finished"][j])
            said = torch.tensor(kept["scores"][i][j], dtype=torch.float64)
            assert kept["preference"][i][j] == pytest.approx(float(torch.sigmoid(said)))
            assert float(group.preference[i, j]) == pytest.approx(float(torch.sigmoid(said + off)))
            seen += off != 0
    assert seen


def test_windows() -> None:
    """Ten rows by three, twice each: three windows an epoch, one row left out, another order in the next epoch."""
    windows = Windows(10, 3, 2, seed=1)
    first = list(windows)
    assert len(first) == len(windows) == 18
    for start in range(0, 18, 6):
        assert first[start : start + 3] == first[start + 3 : start + 6]
    assert len(set(first)) == 9
    windows.set_epoch(1)
    assert list(windows) != first
    assert list(Windows(10, 3, 2, seed=1)) == first
    with pytest.raises(ValueError, match="2 prompts, and a step takes 3"):
        Windows(2, 3, 1, seed=0)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"loss": "orpo", "labels": "soft"}, None),
        ({"loss": "bco"}, "on groups of answers"),
        ({"labels": "hard"}, "soft, drawn, argmax"),
        ({"inner_steps": 0}, "at least 1"),
        ({"cut_penalty": -1.0}, "0 or more"),
        ({"loss": "nash_md_pg", "drawing": {"answers": 3}}, "takes 2"),
        ({"drawing": {"answers": 1}}, "two or more"),
        ({"draw": object(), "drawing": {"mixture": 0.5}}, "draw: it has the policy"),
        ({"drawing": {"mixture": 1.5}}, r"\[0, 1\]"),
        ({"loss": "mdpo", "drawing": {"mixture": 0.5}}, "mixture"),
        ({"loss": "nash_md_pg", "inner_steps": 2}, "as it is"),
        ({"loss": "gpo", "labels": "argmax"}, "learns from scores"),
        ({"reference": "moving"}, "fixed, ema, previous"),
        ({"reference": "ema", "decay": 1.0}, r"\[0, 1\)"),
        ({"reference": "previous", "every": 0}, "at least 1"),
    ],
)
def test_what_cannot_be(trainer_of: TrainerOf, settings: Any, what: str | None) -> None:
    if what is None:
        trainer_of(**settings)
        return
    with pytest.raises(ValueError, match=what):
        trainer_of(**settings)


def test_an_average_takes_float32(trainer_of: TrainerOf, make_tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    """Of all weights; an adapter on a model in bfloat16 is in float32."""
    with pytest.raises(ValueError, match=r"ema in torch.bfloat16: its small steps would be lost"):
        trainer_of(model=make_tiny_model().bfloat16(), reference="ema")
    trainer_of(model=make_tiny_model().bfloat16(), reference="ema", peft_config=LORA)
    trainer_of(model=make_tiny_model().bfloat16(), reference="previous")


@pytest.mark.parametrize("kind", ["full", "continued"])
def test_nothing_is_compared_with_a_reference_that_moved(
    trainer_of: TrainerOf, make_tiny_model: Callable[..., LlamaForCausalLM], prompts: Dataset, kind: str
) -> None:
    """Neither as it trains nor when it is asked."""
    model = make_tiny_model() if kind == "full" else get_peft_model(make_tiny_model(), LORA)
    settings: dict[str, Any] = {"model": model, "reference": "previous", "eval_dataset": prompts}
    with pytest.raises(ValueError, match="of which nothing is kept where the reference moves"):
        trainer_of(arguments={"eval_strategy": "steps", "eval_steps": 1}, **settings)
    trainer = trainer_of(**settings)
    with pytest.raises(ValueError, match="of which nothing is kept where the reference moves"):
        trainer.evaluate()


def test_rows_have_ids_of_their_own(trainer_of: TrainerOf) -> None:
    with pytest.raises(ValueError, match="rows with the same 'id of the row'"):
        trainer_of(train_dataset=Dataset.from_dict({"prompt": PROMPTS, ROW_ID: list("abcdefga")}))
