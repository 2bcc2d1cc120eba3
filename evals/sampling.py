"""Answers sampled from a causal model, or from its mixture with a reference, each with its own randomness."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from align.losses.selfplay import mixture_logps

BASE = "__base__"
"""The name by which peft calls a model without its adapters."""


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


@dataclass(frozen=True)
class Mixture:
    """What each next token is drawn from: ``model^(1 - c) reference^c / Z``, one token at a time, which is not the
    geometric mixture of whole answers (``align.losses.selfplay.mixture_logps``; Nash-MD and IPO-MD draw from it).

    Both models read every token, each with a KV cache of its own. An adapter's name makes that one forward pass of
    twice the rows. A token that either rules out (-inf) is never drawn.

    Args:
        reference: another model with the same vocabulary, or the name of another LoRA adapter of the same peft model:
            ``"__base__"`` for none.
        coefficient: weight c of the reference; at 0 it is not run, at 1 it alone is.
    """

    reference: PreTrainedModel | str
    coefficient: float

    def __post_init__(self) -> None:
        if not 0 <= self.coefficient <= 1:
            raise ValueError(f"coefficient is {self.coefficient}: the reference's weight must be in [0, 1]")


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
    mixture: Mixture | None = None,
    keys: Sequence[int] | None = None,
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
    models answers that part late. A prompt that is listed twice gets two independent answers; within a batch it is
    read once for all of them.

    Args:
        model: a transformers causal LM, or a peft model around one; put in eval mode for the time of the call.
        tokenizer: decodes the answers.
        prompts: token ids, one list per prompt, generation prompt included.
        eos_ids: tokens that end an answer.
        max_new_tokens: longest answer, in tokens.
        temperature: 0 for the most likely token at each step.
        seed: at least 0; the same seed before and after.
        batch_size: prompts decoded together; they are batched by length, longest first, and equal ones side by side.
        mixture: draw from the mixture of the model and a reference, by default from the model.
        keys: a number a prompt, at least 0, which sets its stream apart from those of equal prompts in other calls.
        on_batch: called after each batch with ``{row in prompts: answer}``, to keep what is done if the rest is
            interrupted, and to show progress.

    Returns:
        The answers in the order of ``prompts``.

    Raises:
        ValueError: an empty prompt, a setting out of range, logits that are NaN, or a reference that has another
            vocabulary, is no adapter of the model, or shares layers with it.
    """
    if temperature < 0 or max_new_tokens < 1 or batch_size < 1 or seed < 0:
        raise ValueError(
            "sampling needs temperature >= 0, max_new_tokens >= 1, batch_size >= 1 and seed >= 0, not "
            f"{temperature}, {max_new_tokens}, {batch_size} and {seed}"
        )
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompts[{row}] has no tokens")
    streams = _streams(prompts, seed, keys)
    readers = _readers(model, mixture)
    order = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), tuple(prompts[row])))
    samples: dict[int, Sample] = {}
    with ExitStack() as modes, torch.no_grad():
        for reader, _ in readers:
            modes.enter_context(_evaluating(reader))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            answers = _decode(
                [_Reading(reader, adapters) for reader, adapters in readers],
                0.0 if mixture is None else mixture.coefficient,
                [prompts[row] for row in rows],
                [streams[row] for row in rows],
                eos_ids,
                max_new_tokens,
                temperature,
                model.device,
            )
            batch = {
                row: Sample(tokens, tokenizer.decode(tokens, skip_special_tokens=True), tokens[-1] in eos_ids)
                for row, tokens in zip(rows, answers, strict=True)
            }
            samples.update(batch)
            if on_batch is not None:
                on_batch(batch)
    return [samples[row] for row in range(len(prompts))]


def _streams(
    prompts: Sequence[Sequence[int]], seed: int, keys: Sequence[int] | None = None
) -> list[np.random.Generator]:
    """One random stream per prompt, from the seed, its key and tokens, and how often both came before."""
    seen: Counter[tuple[int, ...]] = Counter()
    streams = []
    for row, prompt in enumerate(prompts):
        name = tuple(prompt) if keys is None else (keys[row], *prompt)
        streams.append(np.random.default_rng([seed, seen[name], *name]))
        seen[name] += 1
    return streams


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _readers(model: PreTrainedModel, mixture: Mixture | None) -> list[tuple[PreTrainedModel, tuple[str | None, ...]]]:
    """The models that read, and with which of their adapters each does (None: as it stands); the policy first."""
    if mixture is None or mixture.coefficient == 0:
        return [(model, (None,))]
    both = mixture.coefficient < 1
    if isinstance(mixture.reference, str):
        policy = _adapter(model, mixture.reference)
        return [(model, (policy, mixture.reference) if both else (mixture.reference,))]
    if set(map(id, model.modules())) & set(map(id, mixture.reference.modules())):
        raise ValueError(
            "the reference shares layers with the model, so that an adapter which is on in one is on in both; name "
            f"the adapter instead: {BASE!r} for none"
        )
    ours, theirs = (reader.config.get_text_config().vocab_size for reader in (model, mixture.reference))
    if ours != theirs:
        raise ValueError(f"the model has {ours:,} tokens and the reference {theirs:,}: they must share a vocabulary")
    reference: tuple[PreTrainedModel, tuple[str | None, ...]] = (mixture.reference, (None,))
    return [(model, (None,)), reference] if both else [reference]


def _adapter(model: PreTrainedModel, reference: str) -> str:
    """The adapter that is on, which the policy is; refuses a reference that is no other one."""
    known = sorted(getattr(model, "peft_config", {}))
    if not known:
        raise ValueError(f"the reference is the adapter {reference!r} and the model has none: give the model itself")
    if reference != BASE and reference not in known:
        raise ValueError(f"the model has no adapter {reference!r}; it has {', '.join(known)}, and {BASE!r} is none")
    if any(getattr(layer, "disable_adapters", None) is True for layer in model.modules()):
        raise ValueError("the model's adapters are off, so that there is no policy to mix: sample outside of that")
    active: list[str] = model.active_adapters
    if len(active) != 1:
        raise ValueError(f"{len(active)} adapters are on at once ({', '.join(active)}): a mixture takes one")
    return active[0]


class _Reading:
    """A model that reads a batch, with a KV cache; each row once with each of the adapters, in one forward pass."""

    def __init__(self, model: PreTrainedModel, adapters: tuple[str | None, ...]) -> None:
        self._model, self._adapters = model, adapters
        self._rows = 0
        self._cache: Any = None

    def __call__(self, ids: Tensor, mask: Tensor, positions: Tensor) -> list[Tensor]:
        """Next-token logits with each adapter, (rows, V) float64 on the CPU."""
        self._rows, copies = len(ids), len(self._adapters)
        own = {} if self._adapters == (None,) else {"adapter_names": [n for n in self._adapters for _ in ids]}
        output = self._model(
            input_ids=ids.repeat(copies, 1),
            attention_mask=mask.repeat(copies, 1),
            position_ids=positions.repeat(copies, 1),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            **own,
        )
        self._cache = output.past_key_values
        logits = output.logits[:, -1].cpu().double()
        if bool(torch.isnan(logits).any()):
            raise ValueError(
                "the model's logits are NaN: load it in float32 or bfloat16, and check that training was finite"
            )
        return list(logits.chunk(copies))

    def go_on_with(self, rows: Tensor) -> None:
        """The rows of the next batch are these of the last one; one may stand there several times."""
        self._cache.batch_select_indices(torch.cat([rows + n * self._rows for n in range(len(self._adapters))]))


def _decode(
    readings: Sequence[_Reading],
    coefficient: float,
    prompts: Sequence[Sequence[int]],
    streams: Sequence[np.random.Generator],
    eos_ids: Collection[int],
    max_new_tokens: int,
    temperature: float,
    device: torch.device,
) -> list[list[int]]:
    """Answers of one batch, prompts padded on the left; a row leaves the batch when it ends."""
    places: dict[tuple[int, ...], int] = {}
    # The row of the batch that each answer goes on from: equal prompts are one row until their answers part.
    at = [places.setdefault(tuple(prompt), len(places)) for prompt in prompts]
    width = max(len(prompt) for prompt in places)
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in places], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in places], device=device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    answers: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        laws = [law for reading in readings for law in reading(ids, mask, positions)]
        logits = laws[0] if len(laws) == 1 else mixture_logps(laws[0], laws[1], coefficient=coefficient)
        tokens = _draw(logits[at], [streams[row] for row in alive], temperature)
        for row, token in zip(alive, tokens, strict=True):
            answers[row].append(token)
        going = [place for place, token in enumerate(tokens) if token not in eos_ids]
        if not going:
            break
        kept = [at[place] for place in going]
        if kept != list(range(len(ids))):
            rows = torch.tensor(kept, device=device)
            mask, positions = mask[rows], positions[rows]
            for reading in readings:
                reading.go_on_with(rows)
        alive = [alive[place] for place in going]
        at = list(range(len(alive)))
        ids = torch.tensor([[tokens[place]] for place in going], device=device)
        mask = torch.cat([mask, mask.new_ones(len(going), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return answers


def _draw(logits: Tensor, streams: Sequence[np.random.Generator], temperature: float) -> list[int]:
    """The next token of each row; on the CPU and in float64, so that every device draws from the same noise."""
    if temperature > 0:
        exponential = np.stack([stream.standard_exponential(logits.shape[1]) for stream in streams])
        logits = logits / temperature - torch.from_numpy(exponential).log()  # -log of an exponential is a Gumbel
    picked: list[int] = logits.argmax(dim=1).tolist()
    return picked
