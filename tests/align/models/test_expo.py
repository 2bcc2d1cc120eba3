"""Extrapolated weights: the formula, what it leaves alone, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from align.errors import AlignError, ConfigError
from align.models.expo import _move, extrapolate, moved_tensor
from align.rewards.models import RewardModel

Make = Callable[..., LlamaForCausalLM]


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [(0, (1, -2)), (1, (1.5, -1)), (1.1, (1.55, -0.9)), (1.52, (1.76, -0.48)), (2, (2, 0))],
)
def test_the_formula(alpha: float, expected: tuple[float, float]) -> None:
    """(1, -2) to (1.5, -1): 1 + 0.5 alpha and -2 + alpha (arXiv:2404.16792)."""
    moved = moved_tensor(torch.tensor([1.0, -2.0]), torch.tensor([1.5, -1.0]), alpha)
    assert moved.tolist() == pytest.approx(expected, abs=1e-6)


def test_bfloat16_is_computed_in_float32() -> None:
    """1 and 1 + 1/128 are neighbours in bfloat16: 1.5 of the way is 1.01171875, which it cannot hold."""
    one, next_one = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0078125], dtype=torch.bfloat16)
    assert moved_tensor(one, next_one, 1.5).tolist() == [1.01171875]
    assert torch.equal(moved_tensor(one, next_one, 1.0), next_one.float())


class Normed(nn.Module):
    def __init__(self, weight: float, mean: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1)
        self.counts = nn.Parameter(torch.tensor([int(weight)]), requires_grad=False)
        nn.init.constant_(self.norm.weight, weight)
        nn.init.constant_(self.norm.running_mean, mean)


def test_buffers_and_whole_numbers_stay() -> None:
    """The norm's weight goes from 2 over 4 to 6; its running mean and what is counted stay the aligned model's."""
    start, end = Normed(2.0, 10.0), Normed(4.0, 20.0)
    assert _move(start, end, 2.0, ("a", "b")).tensors == 2  # weight and bias
    assert (end.norm.weight.item(), end.norm.running_mean.item(), end.counts.item()) == (6.0, 20.0, 4)


@pytest.fixture
def save(tmp_path: Path, make_tiny_model: Make, tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., str]:
    def save(name: str, *, dtype: torch.dtype = torch.float32, **settings: Any) -> str:
        make_tiny_model(**settings).to(dtype).save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_once(save: Callable[..., str], tmp_path: Path, tied: bool) -> None:
    """Tied embeddings are moved once: moved twice, they would be at 1 + 2 (0.5 - 1) of the way."""
    init, aligned = (save(f"{seed}", seed=seed, tie_word_embeddings=tied) for seed in (0, 1))
    made = extrapolate(init, aligned, alpha=1.5, output=tmp_path / "out")
    before, after, found = (
        dict(AutoModelForCausalLM.from_pretrained(path).named_parameters())
        for path in (init, aligned, tmp_path / "out")
    )
    assert made.tensors == len(found) == len(before)
    for name, value in found.items():
        torch.testing.assert_close(value, before[name] + 1.5 * (after[name] - before[name]), rtol=1e-5, atol=1e-6)
    record = json.loads((tmp_path / "out" / "expo.json").read_text(encoding="utf-8"))
    assert (record["alpha"], record["init"]["name"], record["parameters"]) == (1.5, init, made.parameters)
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()


def test_alpha_1_gives_the_aligned_model_back_in_its_dtype(save: Callable[..., str], tmp_path: Path) -> None:
    init, aligned = save("init"), save("aligned", seed=1, dtype=torch.bfloat16)
    extrapolate(init, aligned, alpha=1.0, output=tmp_path / "out")
    expected, found = (load_file(Path(path) / "model.safetensors") for path in (aligned, tmp_path / "out"))
    assert expected.keys() == found.keys()
    assert all(
        torch.equal(found[name], value) and value.dtype == found[name].dtype for name, value in expected.items()
    )


def test_adapters_are_merged(save: Callable[..., str], tmp_path: Path, make_tiny_model: Make) -> None:
    """An adapter on INIT itself: its product, times alpha, is what is added."""
    init = save("init")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(init), LoraConfig(r=2, target_modules=["q_proj"]))
    for name, value in model.named_parameters():
        if "lora_B" in name:
            nn.init.ones_(value)
    model.save_pretrained(tmp_path / "adapter")
    extrapolate(init, str(tmp_path / "adapter"), alpha=2.0, output=tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained(init).model.layers[0].self_attn.q_proj.weight
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers[0].self_attn.q_proj.weight
    delta = model.base_model.model.model.layers[0].self_attn.q_proj.get_delta_weight("default")
    torch.testing.assert_close(found, before + 2 * delta, rtol=1e-5, atol=1e-6)


def test_a_regression_and_what_began_from_it(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Regression -> scaled Bradley-Terry -> beyond: scores of the head are linear, so they go on in a line."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"kind": "attributes", "attributes": ["helpful"], "bias": 2.9, "frozen": True}
    RewardModel.create(tiny_model_dir, **settings).save_pretrained(tmp_path / "regression")
    scaled = RewardModel.from_pretrained(tmp_path / "regression").make_scalar()
    before = float(scaled.rewards(["cat"], [" ant"]))
    nn.init.normal_(scaled.carrier.score.weight)
    after = float(scaled.rewards(["cat"], [" ant"]))
    scaled.save_pretrained(tmp_path / "scaled")
    out = tmp_path / "out"
    extrapolate(str(tmp_path / "regression"), str(tmp_path / "scaled"), alpha=1.52, output=out)
    found = float(RewardModel.from_pretrained(out).rewards(["cat"], [" ant"]))
    assert found == pytest.approx(before + 1.52 * (after - before), rel=1e-4)


def test_reward_models_with_adapters(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The adapter is merged; at alpha 1 the scores are those of the aligned model."""
    torch.manual_seed(0)
    first = RewardModel.create(tiny_model_dir)
    first.save_pretrained(tmp_path / "init")
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    second = RewardModel.create(tiny_model_dir, lora=lora)
    second.save_pretrained(tmp_path / "aligned")
    extrapolate(str(tmp_path / "init"), str(tmp_path / "aligned"), alpha=1.0, output=tmp_path / "out")
    expected, found = (
        RewardModel.from_pretrained(tmp_path / name).rewards(["the cat"], [" an ant"]) for name in ("aligned", "out")
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_is_refused(
    save: Callable[..., str], tmp_path: Path, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    init, aligned, out = save("init"), save("aligned", seed=1), tmp_path / "out"
    for alpha in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="--alpha"):
            extrapolate(init, aligned, alpha=alpha, output=out)
    with pytest.raises(AlignError, match="was the vocabulary resized"):
        extrapolate(init, save("resized", seed=1, vocab_size=300), alpha=1.5, output=out)
    with pytest.raises(AlignError, match=r"stand in .* alone"):
        extrapolate(init, save("deeper", seed=1, num_hidden_layers=3), alpha=1.5, output=out)
    with pytest.raises(AlignError, match="equal weights"):
        extrapolate(init, init, alpha=1.5, output=out)
    with pytest.raises(AlignError, match="is there already"):
        extrapolate(init, aligned, alpha=1.5, output=Path(init))
    RewardModel.create(tiny_model_dir).save_pretrained(tmp_path / "rm")
    with pytest.raises(AlignError, match=r"rm is a reward model and .*init is not"):
        extrapolate(init, str(tmp_path / "rm"), alpha=1.5, output=out)
    RewardModel.create(tiny_model_dir, kind="gpm").save_pretrained(tmp_path / "gpm")
    with pytest.raises(AlignError, match="differ in kind scalar and gpm"):
        extrapolate(str(tmp_path / "rm"), str(tmp_path / "gpm"), alpha=1.5, output=out)
    assert not out.exists()
    extrapolate(init, aligned, alpha=2.5, output=out)
    assert "over 2" in caplog.text
