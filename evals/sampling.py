"""Answers sampled from a causal model, each with its own randomness."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sample:
    """One answer.

    Args:
        tokens: the answer's token ids, with the end-of-sequence token when it was reached.
        text: the tokens decoded, special tokens left out.
        finished: ended by itself, and not by ``max_new_tokens``.
    """

    tokens: list[int]
    text: str
    finished: bool


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    eos_ids: Collection[int],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int = 16,
    on_batch: Callable[[Mapping[int, Sample]], None] | None = None,
) -> list[Sample]:
    """One answer per prompt from ``softmax(logits / temperature)``: no top-p, top-k or penalty, whatever the model's
    own generation settings say.

    Each prompt has a random stream of its own, and the next token is the argmax of ``logits / temperature`` plus one
    Gumbel draw per token of the vocabulary, which is an exact sample (the Gumbel-max trick, arXiv 1411.0030). So an
    answer depends on the model, the prompt and the seed, and not on the batch size, the order or the other prompts, up
    to rounding: the same tokens in float32, while in bfloat16 another batch shape rounds the logits otherwise and some
    long answers then take another turn (keep the batch size for a comparison to the token).

    Two models that are asked with the same seed share their noise: equal models give equal answers, and similar
    models answers that part late. A prompt that is listed twice gets two independent answers.

    Args:
        model: a transformers causal LM, or a peft model around one; put in eval mode for the time of the call.
        tokenizer: decodes the answers.
        prompts: token ids, one list per prompt, generation prompt included.
        eos_ids: tokens that end an answer.
        max_new_tokens: longest answer, in tokens.
        temperature: 0 for the most likely token at each step.
        seed: at least 0; the same seed before and after.
        batch_size: prompts decoded together; they are batched by length, longest first.
        on_batch: called after each batch with ``{row in prompts: answer}``, to keep what is done if the rest is
            interrupted, and to show progress.

    Returns:
        The answers in the order of ``prompts``.

    Raises:
        ValueError: an empty prompt, a setting out of range, or logits that are NaN.
    """
    if temperature < 0 or max_new_tokens < 1 or batch_size < 1 or seed < 0:
        raise ValueError(
            "sampling needs temperature >= 0, max_new_tokens >= 1, batch_size >= 1 and seed >= 0, not "
            f"{temperature}, {max_new_tokens}, {batch_size} and {seed}"
        )
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompts[{row}] has no tokens")
    streams = _streams(prompts, seed)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]), reverse=True)
    samples: dict[int, Sample] = {}
    with _evaluating(model), torch.no_grad():
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            answers = _decode(
                model,
                [prompts[row] for row in rows],
                [streams[row] for row in rows],
                eos_ids,
                max_new_tokens,
                temperature,
            )
            batch = {
                row: Sample(tokens, tokenizer.decode(tokens, skip_special_tokens=True), tokens[-1] in eos_ids)
                for row, tokens in zip(rows, answers, strict=True)
            }
            samples.update(batch)
            if on_batch is not None:
                on_batch(batch)
    return [samples[row] for row in range(len(prompts))]


def _streams(prompts: Sequence[Sequence[int]], seed: int) -> list[np.random.Generator]:
    """One random stream per prompt, from the seed, its tokens and how often it came before."""
    seen: Counter[tuple[int, ...]] = Counter()
    streams = []
    for prompt in prompts:
        key = tuple(prompt)
        streams.append(np.random.default_rng([seed, seen[key], *key]))
        seen[key] += 1
    return streams


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    streams: Sequence[np.random.Generator],
    eos_ids: Collection[int],
    max_new_tokens: int,
    temperature: float,
) -> list[list[int]]:
    """Answers of one batch, prompts padded on the left; a row leaves the batch when it ends."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    answers: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    cache = None
    for _ in range(max_new_tokens):
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        tokens = _draw(output.logits[:, -1], [streams[row] for row in alive], temperature)
        for row, token in zip(alive, tokens, strict=True):
            answers[row].append(token)
        going = [place for place, token in enumerate(tokens) if token not in eos_ids]
        if not going:
            break
        cache = output.past_key_values
        if len(going) < len(alive):
            cache.batch_select_indices(torch.tensor(going, device=model.device))
            mask, positions = mask[going], positions[going]
            alive = [alive[place] for place in going]
        ids = torch.tensor([[tokens[place]] for place in going], device=model.device)
        mask = torch.cat([mask, mask.new_ones(len(going), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return answers


def _draw(logits: Tensor, streams: Sequence[np.random.Generator], temperature: float) -> list[int]:
    """The next token of each row; on the CPU and in float64, so that every device draws from the same noise."""
    scores = logits.cpu().double()
    if bool(torch.isnan(scores).any()):
        raise ValueError(
            "the model's logits are NaN: load it in float32 or bfloat16, and check that training was finite"
        )
    if temperature > 0:
        exponential = np.stack([stream.standard_exponential(scores.shape[1]) for stream in streams])
        scores = scores / temperature - torch.from_numpy(exponential).log()  # -log of an exponential is a Gumbel
    picked: list[int] = scores.argmax(dim=1).tolist()
    return picked
