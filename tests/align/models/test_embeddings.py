"""Embeddings on disk: equal to what the model says, computed once, and never another model's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from align.errors import AlignError
from align.models.embeddings import EmbeddingCache
from align.rewards.encoding import encode_rows
from align.rewards.models import RewardModel

PROMPTS = ["Say the word.", "Say another.", "Say the word."]
ANSWERS = ["the word", "another thing there", "the word"]


def ids(model: RewardModel, prompts: list[str] = PROMPTS, answers: list[str] = ANSWERS) -> tuple[list[list[int]], ...]:
    return encode_rows(model.tokenizer, prompts, answers)


@pytest.fixture
def model(tiny_model_dir: Path) -> RewardModel:
    return RewardModel.create(tiny_model_dir, frozen=True)


def test_equal_to_the_models_own(tmp_path: Path, model: RewardModel):
    cache = EmbeddingCache(tmp_path, model)
    told: list[int] = []
    found = cache.embed_ids(*ids(model), advance=told.append)
    for states, expected in zip(found, model.embed(PROMPTS, ANSWERS), strict=True):
        torch.testing.assert_close(states, expected, atol=1e-5, rtol=0)
    assert cache.computed == len(cache) == 2  # one of the three stands twice
    assert sum(told) == 3


def test_computed_once(tmp_path: Path, model: RewardModel):
    first = EmbeddingCache(tmp_path, model).embed_ids(*ids(model))
    again = EmbeddingCache(tmp_path, model)
    second = again.embed_ids(*ids(model, [*PROMPTS, "New."], [*ANSWERS, "thing"]))
    assert again.computed == 1
    assert torch.equal(first[0], second[0][:3])
    assert torch.equal(first[1], second[1][:3])


def test_another_limit_is_another_row(tmp_path: Path, tiny_model_dir: Path, model: RewardModel):
    """Cut at 20 tokens the longer answer is another one; what fits is the same."""
    EmbeddingCache(tmp_path, model).embed_ids(*ids(model))
    short = EmbeddingCache(tmp_path, RewardModel.create(tiny_model_dir, frozen=True, max_length=20))
    short.embed_ids(*ids(model))
    assert short.computed == 1


def test_another_backbone_has_its_own_folder(tmp_path: Path, model: RewardModel):
    cache = EmbeddingCache(tmp_path, model)
    cache.embed_ids(*ids(model))
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
    cache.embed_ids(*ids(model))
    (cache.folder / ".0123.partial").write_bytes(b"half")
    assert len(EmbeddingCache(tmp_path, model)) == 2
    next(cache.folder.glob("*.safetensors")).write_bytes(b"half")
    with pytest.raises(AlignError, match="delete it"):
        EmbeddingCache(tmp_path, model)


def test_no_rows_are_no_states(tmp_path: Path, model: RewardModel):
    assert EmbeddingCache(tmp_path, model).embed_ids([], [])[0].shape == (0, 32)
