"""A policy's weights in a running vLLM: its laws become those of the policy, and a push that went wrong is refused."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import TrainingArguments

from align.data.prompts import ROW_ID
from align.decoding.engines.vllm import VLLMEngine
from align.errors import AlignError
from align.rewards.annotators import Verdicts
from align.trainers.online import Drawing, OnlineTrainer
from align.trainers.pushed import Pushed, merged, start

PROMPTS = [[0], [0, 1, 2], [2] * 40, [0, 1, 2, 2, 1]]
LORA = {"r": 4, "lora_alpha": 32, "init_lora_weights": False, "lora_dropout": 0.5}


@pytest.fixture(scope="module")
def adapted(model: Any) -> Any:
    """The engine's model, all weights moved a little, with an adapter that changes much, in training mode."""
    torch.manual_seed(7)
    moved = deepcopy(model)
    for weight in moved.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    made = get_peft_model(moved, LoraConfig(target_modules="all-linear", **LORA))
    made.add_adapter("ref", LoraConfig(target_modules=["q_proj"], **LORA))
    return made.train()


@pytest.fixture
def pushed(engine: VLLMEngine, model: Any) -> Iterator[Pushed]:
    """The session's engine, which gets its own weights back."""
    yield Pushed(engine)
    Pushed(engine).push(model)
    assert_computes(engine, model)


@torch.no_grad()
def assert_computes(engine: VLLMEngine, model: Any, prompts: list[list[int]] = PROMPTS, atol: float = 1e-5) -> None:
    """The engine's laws are the model's."""
    handles = engine.open(prompts)
    found, places = engine.next_logits(handles)
    for handle, place, prompt in zip(handles, places, prompts, strict=True):
        engine.close(handle)
        expected = model(torch.tensor([prompt])).logits[0, -1].float().log_softmax(-1)
        torch.testing.assert_close(found[place].log_softmax(-1), expected, atol=atol, rtol=0)


def test_the_engine_computes_what_the_policy_does(pushed: Pushed, engine: VLLMEngine, adapted: Any) -> None:
    """With its adapter, then without it, then with another, while the prefix cache knows the prompts."""
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    pushed.push(adapted)
    assert adapted.training
    assert {name for name, value in adapted.state_dict().items() if not torch.equal(value, before[name])} == set()
    adapted.eval()
    assert_computes(engine, adapted)
    with adapted.disable_adapter():
        pushed.push(adapted)
        assert_computes(engine, adapted)
    adapted.set_adapter("ref")
    pushed.push(adapted)
    assert_computes(engine, adapted)
    adapted.set_adapter("default")
    adapted.train()


def test_answers_are_of_the_pushed_policy(pushed: Pushed, adapted: Any) -> None:
    """4,000 first tokens against the policy's law: chi-square of 5 tokens passes 23.5 once in 10,000 times."""
    pushed.push(adapted)
    with torch.no_grad():
        law = adapted.eval()(torch.tensor([[0, 1, 2]])).logits[0, -1].double().softmax(0)
    adapted.train()
    count = 4000
    drawn = pushed([[0, 1, 2]] * count, seeds=range(count), max_new_tokens=1)
    seen = Counter(sample.tokens[0] for sample in drawn)
    assert sum((seen[token] - count * float(p)) ** 2 / (count * float(p)) for token, p in enumerate(law)) < 23.5
    long = pushed([[0]] * 40, seeds=range(40), max_new_tokens=6)
    assert {sample.finished for sample in long} == {True, False}
    assert all(sample.finished == (sample.tokens[-1] == 4) for sample in long)
    assert all(len(sample.tokens) == 6 for sample in long if not sample.finished)
    assert pushed([[0]] * 40, seeds=range(40), max_new_tokens=6) == long


def wrong(change: Callable[[str, Tensor], Tensor | None], weights: Iterator[tuple[str, Tensor]]) -> Any:
    for name, weight in weights:
        changed = change(name, weight.clone())
        if changed is not None:
            yield name, changed


def one_row(name: str, weight: Tensor) -> Tensor:
    """One row of one matrix of twelve is off by a rounding: a key's, in the middle of what vLLM has as one."""
    if name == "model.layers.1.self_attn.k_proj.weight":
        weight[-1] *= 1 + 2e-7
    return weight


def swapped(name: str, weight: Tensor) -> Tensor:
    if name == "model.layers.0.mlp.gate_proj.weight":
        weight = weight.flip(0)
    return weight


def vector(name: str, weight: Tensor) -> Tensor:
    return weight + 1e-6 * (name == "model.norm.weight")


def dropped(name: str, weight: Tensor) -> Tensor | None:
    return None if name == "lm_head.weight" else weight


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (one_row, "model.layers.1.self_attn.qkv_proj.weight is another"),
        (swapped, "model.layers.0.mlp.gate_up_proj.weight is another"),
        (vector, "model.norm.weight is another"),
        (dropped, "lm_head.weight is another"),
    ],
)
def test_what_is_lost_on_the_way_is_seen(
    change: Any, where: str, pushed: Pushed, adapted: Any, engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that vLLM takes without a word are refused, nothing is drawn of them, and the next push mends it."""
    pushed.push(adapted)
    whole = engine.llm.collective_rpc

    def lossy(method: str, kwargs: Any) -> Any:
        return whole(method, kwargs={"weights_iterator": wrong(change, kwargs["weights_iterator"])})

    moved = deepcopy(adapted)
    for weight in moved.parameters():
        weight.data *= 1.01
    with monkeypatch.context() as patch:
        patch.setattr(engine.llm, "collective_rpc", lossy)
        with pytest.raises(AlignError, match=f"does not hold the weights that were sent: {where}; draw"):
            pushed.push(moved)
    with pytest.raises(AlignError, match="push them first"):
        pushed([[0]], seeds=[0], max_new_tokens=1)
    pushed.push(moved)
    assert_computes(engine, moved.eval())


def test_what_cannot_be_pushed(
    pushed: Pushed, model: Any, adapted: Any, engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AlignError, match="push them first"):
        pushed([[0]], seeds=[0], max_new_tokens=1)
    config = partial(LoraConfig, target_modules=["q_proj"], init_lora_weights=False)
    for more in ({"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"lora_bias": True, "bias": "none"}):
        with pytest.raises(AlignError, match="more than a product of two matrices"):
            pushed.push(get_peft_model(deepcopy(model), config(**more)))
    broken = deepcopy(model)
    broken.model.layers[0].mlp.up_proj.weight.data.fill_(float("nan"))
    with pytest.raises(AlignError, match=r"layers\.0\.mlp\.gate_up_proj\.weight is NaN or infinite"):
        pushed.push(broken)
    pushed.push(model)
    engine.llm.llm_engine.add_request("under way", {"prompt_token_ids": [0]}, sampling())
    with pytest.raises(AlignError, match="at work"):
        pushed.push(model)
    engine.llm.llm_engine.abort_request(["under way"])
    pushed.push(model)
    with pytest.raises(AlignError, match=r"prompts\[1\] has 256 tokens and leaves no room"):
        pushed([[0], [0] * 256], seeds=[0, 1], max_new_tokens=1)
    monkeypatch.setattr(engine.llm.llm_engine.vllm_config.parallel_config, "world_size", 2)
    with pytest.raises(AlignError, match="it has 2 workers"):
        Pushed(engine)


def sampling() -> Any:
    from vllm import SamplingParams

    return SamplingParams(max_tokens=3)


def test_weights_are_those_of_a_merged_model(adapted: Any) -> None:
    """Against peft's own merge, in float64 where a rounding to bfloat16 could tell them apart."""
    expected = deepcopy(adapted).merge_and_unload().state_dict()
    found = dict(merged(adapted, torch.float32))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=0)
    assert {value.dtype for _, value in merged(adapted, torch.bfloat16)} == {torch.bfloat16}


class Followed(Pushed):
    """Compares the engine with the policy before each drawing."""

    policy: Any

    def __init__(self, engine: VLLMEngine) -> None:
        super().__init__(engine)
        self.laws: list[Tensor] = []

    def push(self, model: Any) -> None:
        super().push(model)
        self.policy = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.policy.eval()
        assert_computes(self._engine, self.policy)
        with torch.no_grad():
            self.laws.append(self.policy(torch.tensor([[0]])).logits)
        self.policy.train()
        return super().__call__(*args, **kwargs)


class LongerIsBetter:
    name = "longer"

    def __call__(self, prompts: Any, answers: Sequence[Sequence[str]], columns: Any = None) -> Verdicts:
        size = torch.tensor([[float(len(answer)) for answer in own] for own in answers], dtype=torch.float64)
        scores = size[:, :, None] - size[:, None, :]
        return Verdicts(scores.sigmoid(), scores, [])


def test_online_training_draws_from_the_policy_of_each_step(
    pushed: Pushed, engine: VLLMEngine, model: Any, tmp_path: Path
) -> None:
    """Through the trainer, with an adapter: in three steps vLLM draws thrice, each time with other weights."""
    draws = Followed(engine)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, learning_rate=0.1, use_cpu=True, report_to="none", disable_tqdm=True, seed=1
    )
    trainer = OnlineTrainer(
        deepcopy(model),
        arguments,
        loss="ipo",
        annotator=LongerIsBetter(),
        drawing=Drawing(max_new_tokens=5),
        tokenizer=engine.llm.get_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        train_dataset=Dataset.from_dict({"prompt": ["a b", "ab", "b b a", "b"] * 2, ROW_ID: list("12345678")}),
        draw=draws,
    )
    trainer.train()
    assert len(draws.laws) == 3
    assert all(float((one - other).abs().max()) > 0.01 for one, other in pairwise(draws.laws))
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 24
    assert all(1 <= tokens <= 5 for row in rows for tokens in row["tokens"])


@pytest.fixture(scope="session")
def kept() -> list[VLLMEngine]:
    """Engines that live to the end: the first that goes takes along what all of a process need."""
    return []


def test_an_engine_for_weights_to_come(
    engine: VLLMEngine, kept: list[VLLMEngine], model: Any, folder: Path, tmp_path: Path
) -> None:
    """A second one, in bfloat16, whose head is its embeddings; random states are what they were.

    Of bfloat16 a law keeps two digits, and the bounds of a model of two layers are wide for a wrong one.
    """
    config = deepcopy(model.config)
    config.tie_word_embeddings = True
    torch.manual_seed(11)
    tied = type(model)(config)
    for source in folder.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    config.save_pretrained(tmp_path)
    random.seed(1)
    np.random.seed(1)
    states = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1]
    made = start(
        tmp_path, dtype="bfloat16", ends={4, 3}, max_model_len=64, block_size=32, kv_cache_memory_bytes=1 << 26
    )
    kept.append(made)
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    draws = Pushed(made)
    policy = get_peft_model(tied, LoraConfig(target_modules=["q_proj", "down_proj"], **LORA)).eval()
    draws.push(policy)
    rounded = deepcopy(policy).merge_and_unload().to(torch.bfloat16).float()
    assert_computes(made, rounded, atol=0.03)
    drawn = draws([[0]] * 30, seeds=range(30), max_new_tokens=8)
    assert {sample.tokens[-1] for sample in drawn if sample.finished} == {3, 4}
    wider = deepcopy(config)
    wider.intermediate_size = 48
    with pytest.raises(AlignError, match=r"gate_up_proj\.weight is another; .*down_proj\.weight is another \(.*48"):
        draws.push(type(model)(wider))
    draws.push(policy)
    assert_computes(made, rounded, atol=0.03)
    with pytest.raises(AlignError, match="vLLM does not start"):
        start(tmp_path / "nowhere", dtype="float32", ends={4})
