"""Embeddings on disk: equal to what the model says, computed once, and never another model's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from align.errors import AlignError
from align.models.embeddings import EmbeddingCache
from align.rewards.models import RewardModel

PROMPTS = ["Say the word.", "Say another.", "Say the word."]
ANSWERS = ["the word", "another thing there", "the word"]


@pytest.fixture
def model(tiny_model_dir: Path) -> RewardModel:
    return RewardModel.create(tiny_model_dir, frozen=True)


def test_equal_to_the_models_own(tmp_path: Path, model: RewardModel):
    cache = EmbeddingCache(tmp_path, model)
    told: list[int] = []
    found = cache.embed(PROMPTS, ANSWERS, advance=told.append)
    for states, expected in zip(found, model.embed(PROMPTS, ANSWERS), strict=True):
        torch.testing.assert_close(states, expected, atol=1e-5, rtol=0)
    assert cache.computed == len(cache) == 2  # one of the three stands twice
    assert sum(told) == 3


def test_computed_once(tmp_path: Path, model: RewardModel):
    first = EmbeddingCache(tmp_path, model).embed(PROMPTS, ANSWERS)
    again = EmbeddingCache(tmp_path, model)
    second = again.embed([*PROMPTS, "New."], [*ANSWERS, "thing"])
    assert again.computed == 1
    assert torch.equal(first[0], second[0][:3])
    assert torch.equal(first[1], second[1][:3])


def test_another_limit_is_another_row(tmp_path: Path, tiny_model_dir: Path, model: RewardModel):
    """Cut at 20 tokens the longer answer is another one; what fits is the same."""
    EmbeddingCache(tmp_path, model).embed(PROMPTS, ANSWERS)
    short = EmbeddingCache(tmp_path, RewardModel.create(tiny_model_dir, frozen=True, max_length=20))
    short.embed(PROMPTS, ANSWERS)
    assert short.computed == 1


def test_another_backbone_has_its_own_folder(tmp_path: Path, model: RewardModel):
    cache = EmbeddingCache(tmp_path, model)
    cache.embed(PROMPTS, ANSWERS)
    with torch.no_grad():
        model.carrier.score.weight.add_(1)  # the head is not read
    assert len(EmbeddingCache(tmp_path, model)) == 2
    with torch.no_grad():
        next(iter(model.carrier.model.parameters())).add_(0.01)
    other = EmbeddingCache(tmp_path, model)
    assert len(other) == 0
    assert other.folder != cache.folder


def test_a_torn_file_is_no_row(tmp_path: Path, model: RewardModel):
    cache = EmbeddingCache(tmp_path, model)
    cache.embed(PROMPTS, ANSWERS)
    (cache.folder / ".0123.partial").write_bytes(b"half")
    assert len(EmbeddingCache(tmp_path, model)) == 2
    next(cache.folder.glob("*.safetensors")).write_bytes(b"half")
    with pytest.raises(AlignError, match="delete it"):
        EmbeddingCache(tmp_path, model)


def test_rows_that_cannot_be_embedded(tmp_path: Path, model: RewardModel):
    cache = EmbeddingCache(tmp_path, model)
    assert cache.embed([], [])[0].shape == (0, 32)
    with pytest.raises(ValueError, match="3 prompts and 1 completions"):
        cache.embed(PROMPTS, ANSWERS[:1])
    with pytest.raises(ValueError, match="row 1"):
        cache.embed(PROMPTS[:2], ["the", ""])
