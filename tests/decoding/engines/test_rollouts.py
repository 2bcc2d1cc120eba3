"""Rollouts against one token at a time by plain forward passes, in float32; what is shared, kept and closed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Mamba2Config

from align.decoding.engines import Rollout, TransformersEngine, rollouts
from align.decoding.law import Law
from align.decoding.lazy import Draws, Live

END = 7
LAWS = {"greedy": Law(top_k=1), "drawn": Law(), "warm, cut": Law(temperature=1.5, top_k=20, top_p=0.9)}
SIZES: dict[str, Any] = {"vocab_size": 30, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.3}
FAMILIES = {
    "llama": LlamaConfig(**SIZES, intermediate_size=48, num_attention_heads=4, max_position_embeddings=48),
    "mamba2, recurrent": Mamba2Config(**SIZES, num_heads=4, head_dim=16, n_groups=1, state_size=8, chunk_size=8),
}
SHARED = [3, 9, 4, 4, 11, 2]


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(FAMILIES[request.param]).eval()


@pytest.fixture
def llama() -> Any:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(FAMILIES["llama"]).eval()


def alone(model: Any, prompt: Sequence[int], law: Law, seed: int, most: int) -> tuple[int, ...]:
    """One rollout by forward passes without a cache."""
    tokens: list[int] = []
    while len(tokens) < most and END not in tokens:
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, -1].float()
        tokens.append(Live(law.log_probs(logits)).draw(Draws(seed, len(tokens)).uniform()))
    return tuple(tokens)


def tokens_of(made: Sequence[Rollout]) -> list[tuple[int, ...]]:
    return [rollout.tokens for rollout in made]


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_a_rollout_is_what_the_model_says_alone(model: Any, law: Law) -> None:
    """Candidates of one prompt, the same one twice, another prompt, one that begins another: all in one call."""
    prompts = [[*SHARED, 1], [*SHARED, 5], [*SHARED, 5], [8] * 25, SHARED, [2]]
    seeds = [4, 4, 5, 0, 2**63 - 1, 1]
    made = TransformersEngine(model).rollouts(prompts, max_new_tokens=9, law=law, seeds=seeds, ends=[END])
    want = [alone(model, prompt, law, seed, 9) for prompt, seed in zip(prompts, seeds, strict=True)]
    assert tokens_of(made) == want
    assert [rollout.ended for rollout in made] == [tokens[-1] == END for tokens in want]


def test_what_is_in_the_batch_and_how_many_at_once_changes_nothing(model: Any, monkeypatch: Any) -> None:
    prompts = [[*SHARED[:size], token] for size in range(1, 6) for token in (1, 5, 6)]
    settings: dict[str, Any] = {"max_new_tokens": 6, "law": Law(), "ends": [END]}
    engine = TransformersEngine(model)
    together = engine.rollouts(prompts, seeds=range(15), **settings)
    one_by_one = [engine.rollouts([p], seeds=[seed], **settings)[0].tokens for seed, p in enumerate(prompts)]
    assert tokens_of(together) == one_by_one
    monkeypatch.setattr(rollouts, "ROWS", 4)
    assert tokens_of(engine.rollouts(prompts, seeds=range(15), **settings)) == one_by_one
    assert len({rollout.tokens for rollout in together}) > 5, "they are not all the same anyway"


def test_common_beginnings_are_computed_once_and_kept_for_the_next_call(llama: Any) -> None:
    """Seven tokens each: the first of a call pays for the six in common and its own, the others for their own alone.

    The next call goes on from a candidate: six of its seven common tokens are kept.
    """
    engine = TransformersEngine(llama)
    settings: dict[str, Any] = {"max_new_tokens": 3, "law": Law(top_k=1), "ends": [END]}
    first = engine.rollouts([[*SHARED, token] for token in (1, 5, 1)], seeds=[0] * 3, **settings)
    assert [rollout.cached_tokens for rollout in first] == [0, 6, 7]
    second = engine.rollouts([[*SHARED, 5, token] for token in (3, 4)], seeds=[0] * 2, **settings)
    assert [rollout.cached_tokens for rollout in second] == [6, 7]
    assert tokens_of(second) == [alone(llama, [*SHARED, 5, token], Law(top_k=1), 0, 3) for token in (3, 4)]
    far = engine.rollouts([[2] * 20, [2, *[3] * 20]], seeds=[0] * 2, **settings)
    assert [rollout.cached_tokens for rollout in far] == [0, 0], "too far apart to add token by token"
    assert len(engine._sequences) == 2, "only what is kept is open"
    for prompts, cached in (([[*SHARED, 1]], [0]), ([[*SHARED, 5]], [6]), ([[*SHARED, 5, 2]] * 2, [6, 8])):
        one = engine.rollouts(prompts, seeds=[0] * len(prompts), **settings)
        assert [rollout.cached_tokens for rollout in one] == cached, "alone, one after the other"


def test_a_rollout_stops_where_the_context_is_full(llama: Any) -> None:
    engine = TransformersEngine(llama)
    made = engine.rollouts([[3] * 45, [3] * 48], max_new_tokens=9, law=Law(), seeds=[0, 0], ends=[])
    assert [(len(rollout.tokens), rollout.ended) for rollout in made] == [(3, False), (0, False)]


def test_what_cannot_be_rolled_out_is_said(llama: Any) -> None:
    engine = TransformersEngine(llama)
    good: dict[str, Any] = {"prompts": [[1]], "max_new_tokens": 1, "law": Law(), "seeds": [0], "ends": [END]}
    for change, said in (
        ({"prompts": [[1], []], "seeds": [0, 0]}, r"prompts\[1\] has no tokens"),
        ({"seeds": []}, "0 seeds for 1 prompts"),
        ({"max_new_tokens": 0}, "must be 1 or more"),
    ):
        with pytest.raises(ValueError, match=said):
            engine.rollouts(**{**good, **change})
    assert engine.rollouts(**{**good, "prompts": [], "seeds": []}) == []


def test_where_the_model_fails_everything_is_closed(llama: Any, monkeypatch: Any) -> None:
    engine = TransformersEngine(llama)
    good: dict[str, Any] = {"prompts": [SHARED, [1]], "law": Law(), "seeds": [0, 0], "ends": []}
    want = tokens_of(engine.rollouts(max_new_tokens=2, **good))
    with monkeypatch.context() as broken:
        broken.setattr(engine, "next_logits", lambda handles: (torch.full((1, 30), torch.nan), [0] * len(handles)))
        with pytest.raises(ValueError, match="NaN"):
            engine.rollouts(max_new_tokens=2, **good)
    assert not engine._sequences
    assert tokens_of(engine.rollouts(max_new_tokens=2, **good)) == want
