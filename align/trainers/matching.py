"""Weights of thumbs down by how likely their prompts are among the thumbs up (BCO's underlying distribution matching).

The weights are data: prompts are embedded once, before training, and nothing of them has a gradient. Each process
embeds for itself; the density ratio is fitted on the main process and sent to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import PeftModel
from torch import Tensor

from align.errors import AlignError
from align.rewards.density import DensityRatio, mean_pooled

DENSITY = "density.json"
BATCH = 32  # prompts
_ENCODER = "the encoder of prompts (match_prompts, or bco.encoder in a recipe)"

Encoder = Callable[[list[str]], Tensor]
"""``N texts -> embeddings (N, D)``."""
Embed = Callable[[Sequence[Sequence[int]]], Tensor]
"""``N prompts as token ids -> embeddings (N, D)``, float32 on the CPU."""


def hidden_state_encoder(model: Any, pad_token_id: int) -> Embed:
    """Embed a prompt as the mean of the model's last hidden states over its tokens."""
    causal = model.get_base_model() if isinstance(model, PeftModel) else model

    def batch(prompts: Sequence[Sequence[int]]) -> Tensor:
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), pad_token_id, dtype=torch.long)
        mask = torch.zeros((len(prompts), width), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.as_tensor(prompt)
            mask[row, : len(prompt)] = 1
        ids, mask = ids.to(causal.device), mask.to(causal.device)
        states = causal.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return mean_pooled(states, mask)

    def embed(prompts: Sequence[Sequence[int]]) -> Tensor:
        training = causal.training
        causal.eval()
        with torch.no_grad():
            found = _in_batches(prompts, batch)
        causal.train(training)
        return found

    return embed


def text_encoder(encoder: Encoder, tokenizer: Any) -> Embed:
    """Embed a prompt with a user's encoder of texts: it gets the prompt as text, without special tokens."""

    def batch(prompts: Sequence[Sequence[int]]) -> Tensor:
        try:
            found = encoder([tokenizer.decode(prompt, skip_special_tokens=True) for prompt in prompts])
        except Exception as error:  # anyone's code
            raise AlignError(f"{_ENCODER} fails: {type(error).__name__}: {error}") from error
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(prompts):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise AlignError(f"{_ENCODER} gave {shape} for {len(prompts)} prompts: a tensor (N, D) is wanted")
        return found

    return lambda prompts: _in_batches(prompts, batch)


def _in_batches(prompts: Sequence[Sequence[int]], batch: Callable[[Sequence[Sequence[int]]], Tensor]) -> Tensor:
    """Each different prompt once, the longest first."""
    unique = sorted({tuple(prompt) for prompt in prompts}, key=lambda prompt: (-len(prompt), prompt))
    parts = [batch(unique[start : start + BATCH]).detach().float().cpu() for start in range(0, len(unique), BATCH)]
    place = {prompt: index for index, prompt in enumerate(unique)}
    return torch.cat(parts)[[place[tuple(prompt)] for prompt in prompts]]


def fit_density(
    dataset: Dataset, embed: Embed, *, sample: int, seed: int, bounds: tuple[float, float], main: bool
) -> DensityRatio:
    """The density ratio of a training set's prompts, the same on every process.

    Args:
        dataset: columns prompt_ids and label.
        sample: prompts of each thumb, at most.
        main: whether this process fits.
    """
    found: list[DensityRatio | None] = [None]
    if main:
        generator = torch.Generator().manual_seed(seed)
        label = torch.tensor(dataset["label"], dtype=torch.bool)
        rows = [which.nonzero()[:, 0] for which in (label, ~label)]
        # What is not drawn need not be embedded.
        drawn = [where[torch.randperm(len(where), generator=generator)[:sample]].tolist() for where in rows]
        up, down = (embed(dataset.select(where)["prompt_ids"]) for where in drawn)
        try:
            found[0] = DensityRatio.fit(up, down, sample=sample, seed=seed, minimum=bounds[0], maximum=bounds[1])
        except ValueError as error:
            raise AlignError(f"match_prompts: {error}") from error
    broadcast_object_list(found, from_process=0)
    assert found[0] is not None
    return found[0]


def load_density(path: Path, bounds: tuple[float, float]) -> DensityRatio:
    """The density ratio that a run was started with.

    Raises:
        AlignError: it is not there, is something else, or has other bounds.
    """
    try:
        found = DensityRatio.load(path)
    except (OSError, ValueError) as error:
        raise AlignError(f"{path}: the weights of the run that is gone on with cannot be had ({error})") from error
    if (found.minimum, found.maximum) != tuple(bounds):
        raise AlignError(
            f"density_ratio is {list(bounds)}, and the run was started with {[found.minimum, found.maximum]}: go on "
            "with the same, or start anew"
        )
    return found


def with_weights(dataset: Dataset, density: DensityRatio, embed: Embed) -> Dataset:
    """The data set with a column ``weight``: the density ratio of thumbs down, 1 for thumbs up.

    Raises:
        AlignError: the embeddings are of another dimension than those that the ratio was fitted on.
    """
    if "weight" in dataset.column_names:
        dataset = dataset.remove_columns("weight")
    weight = torch.ones(len(dataset))
    down = [index for index, label in enumerate(dataset["label"]) if not label]
    if down:
        embeddings = embed(dataset.select(down)["prompt_ids"])
        fitted, found = len(density.coefficients), embeddings.shape[1]
        if fitted != found:
            raise AlignError(
                f"match_prompts: the density ratio was fitted on embeddings of {fitted} dimensions, and these have "
                f"{found}: go on with the encoder that the run was started with, or start anew"
            )
        weight[down] = density.weights(embeddings).float()
    return dataset.add_column("weight", weight.tolist())
