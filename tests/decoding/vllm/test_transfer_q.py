"""Transfer-Q* on vLLM: the choices are those of the same models outside of it, from one engine or from two."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner

from align import inside
from align.baselines import Place, rollouts_of
from align.cli import app
from align.decoding.constraints import Vocabulary
from align.decoding.engines import TransformersEngine
from align.decoding.engines.vllm import VLLMEngine
from align.decoding.law import Law
from align.decoding.transfer_q import Guided, Query, TransferQ, best_of, transfer_q

QUERIES = [Query([seed % 3] * (30 + 9 * seed), seed=seed, max_new_tokens=9) for seed in range(5)]
RANGE = (0.0, 1.0)
SETTINGS = {
    "plain": TransferQ(candidates=4, length=4, alpha=0.3),
    "to the end, known range": TransferQ(candidates=5, length=None, alpha=0.3, reward_range=RANGE),
    "one at a time": TransferQ(candidates=4, length=4, alpha=0.3, reward_range=RANGE, at_once=1),
    "drawn, soft": TransferQ(candidates=4, rollouts=3, length=3, alpha=0.3, value="soft", choice="drawn"),
    "a flat law": TransferQ(candidates=4, rollouts=2, law=Law(1.5), rollout_law=Law(0.7, top_k=3), length=5),
    "blocks": TransferQ(candidates=3, block=3, length=4, reward_range=RANGE),
    "ARGS": TransferQ(candidates=4, length=0, alpha=0.3),
    "best of n": best_of(5),
}


@pytest.fixture(scope="module")
def adapted(model: Any) -> Any:
    """The model with an adapter that changes much."""
    torch.manual_seed(5)
    config = LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    return get_peft_model(deepcopy(model), config).eval()


@pytest.fixture(scope="module")
def adapter(adapted: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def second(engine: VLLMEngine, folder: Path) -> VLLMEngine:
    """Beside the first in this process, as long as that lives, and with room for an adapter."""
    options = {"block_size": 32, "kv_cache_memory_bytes": 1 << 26, "enable_lora": True, "max_lora_rank": 8}
    made = rollouts_of(Place("engine", "", str(folder), options), engine, None)
    assert isinstance(made, VLLMEngine)
    return made


def reward(numbers: Sequence[int], answers: Sequence[Sequence[int]]) -> list[float]:
    """A number from 0 to 1 that hangs on every token; answers of few tokens that repeat have more."""
    return [
        0.5 / len(set(answer))
        + 0.5 * (sum((place + 1) * token for place, token in enumerate(answer)) * 37 % 101) / 101
        for answer in answers
    ]


def answers(policy: Any, baseline: Any, vocabulary: Vocabulary, settings: TransferQ, **given: Any) -> list[Guided]:
    return transfer_q(policy, baseline, reward, QUERIES, vocabulary, settings, **given)


def assert_same(found: Sequence[Guided], expected: Sequence[Guided]) -> None:
    """The same tokens by the same choices among the same candidates, at the same costs."""
    for one, other in zip(found, expected, strict=True):
        assert (one.tokens, one.finished, one.reward, one.reason) == (
            other.tokens,
            other.finished,
            other.reward,
            other.reason,
        )
        for step, right in zip(one.steps, other.steps, strict=True):
            assert (step.candidates, step.chosen, step.values) == (right.candidates, right.chosen, right.values)
            assert step.log_probs == pytest.approx(right.log_probs, abs=1e-5)
        for name in ("rollouts", "rollout_tokens", "cut_rollouts", "reward_calls", "gated_steps", "policy_tokens"):
            assert getattr(one.costs, name) == getattr(other.costs, name)


@pytest.mark.parametrize("name", SETTINGS)
def test_choices_of_one_engine_are_those_of_transformers(
    name: str, engine: VLLMEngine, outside: TransformersEngine, vocabulary: Vocabulary
) -> None:
    baseline = None if SETTINGS[name].length == 0 else engine
    found = answers(engine, baseline, vocabulary, SETTINGS[name])
    assert_same(found, answers(outside, outside if baseline else None, vocabulary, SETTINGS[name]))
    assert all(one.reward is not None for one in found)


def test_indirect_transfer(engine: VLLMEngine, outside: TransformersEngine, vocabulary: Vocabulary) -> None:
    settings = TransferQ(candidates=4, rollouts=3, length=4, alpha=0.5)

    def other(numbers: Sequence[int], found: Sequence[Sequence[int]]) -> list[float]:
        return [0.1 * answer.count(1) for answer in map(list, found)]

    found, expected = (answers(it, it, vocabulary, settings, baseline_reward=other) for it in (engine, outside))
    assert_same(found, expected)
    assert [one.ess for one in found] == pytest.approx([one.ess for one in expected])


def test_rollouts_follow_the_adapter(
    second: VLLMEngine, outside: TransformersEngine, adapted: Any, adapter: Path
) -> None:
    """In turns with the model's own, whose cache they must not take."""
    aligned, baseline = TransformersEngine(adapted), rollouts_of(Place("adapter", "", str(adapter)), second, None)
    prompts = [[0] * 70, [0] * 69 + [1], [2, 1, 0], [0] * 70]
    for law in (Law(top_k=1), Law(), Law(0.7)):
        settings: dict[str, Any] = {"max_new_tokens": 12, "law": law, "seeds": [1, 2, 3, 4], "ends": {4}}
        for _ in range(2):
            made = [it.rollouts(prompts, **settings) for it in (second, baseline, outside, aligned)]
            plain, own, right, other = ([(one.tokens, one.ended) for one in found] for found in made)
            assert (plain, own) == (right, other)
            assert plain != own


@pytest.mark.parametrize("name", ["plain", "one at a time", "drawn, soft", "blocks"])
def test_two_engines_in_a_process(
    name: str,
    engine: VLLMEngine,
    second: VLLMEngine,
    outside: TransformersEngine,
    adapted: Any,
    adapter: Path,
    vocabulary: Vocabulary,
) -> None:
    found = answers(engine, second.adapted(adapter), vocabulary, SETTINGS[name])
    assert_same(found, answers(outside, TransformersEngine(adapted), vocabulary, SETTINGS[name]))


def test_what_is_common_is_computed_once(engine: VLLMEngine, vocabulary: Vocabulary) -> None:
    """Blocks of 32 tokens: of a prompt of 70 two are found, by all but what is first to compute them."""
    engine.llm.reset_prefix_cache()
    (answer,) = transfer_q(
        engine, engine, reward, [Query([1] * 70, max_new_tokens=4)], vocabulary, TransferQ(candidates=3, length=3)
    )
    assert answer.costs.cached_tokens == 64 * answer.costs.rollouts


def test_the_command(
    engine: VLLMEngine, second: VLLMEngine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``align generate --transfer-q`` answers with ``--engine vllm`` as without, and says where the baseline runs."""
    baseline = shutil.copytree(folder, tmp_path / "aligned")
    engines = {str(folder): engine, str(baseline): second}
    monkeypatch.setattr(inside, "start", lambda what, **_: engines[what.path])
    monkeypatch.setattr("align.models.hardware.has_bf16_cpu", lambda: False)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "few_letters.py").write_text("def few(prompts, completions): return [-len(x) for x in completions]")
    places = {
        (baseline, 4): "align generate: baseline: a second engine in this process: on a CPU",
        (folder, 4): "align generate: baseline: the policy's own engine",
        (baseline, 0): "",
    }
    for (name, length), place in places.items():
        command = ["generate", "-m", folder, "--raw", "-p", "a b ab", "--max-new-tokens", 9, "--reward"]
        command += ["few_letters:few", "--transfer-q", name, "--q-length", length, "--q-candidates", 4]
        inner, outer = (
            CliRunner().invoke(app, [*map(str, command), "--engine", which]) for which in ("vllm", "transformers")
        )
        assert inner.exit_code == 0, inner.output
        assert inner.stdout == outer.stdout
        assert place in inner.stderr
        assert ("baseline:" in inner.stderr) == bool(place)
        assert "rollout_tokens" in inner.stderr or not length
