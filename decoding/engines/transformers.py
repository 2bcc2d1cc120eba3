"""A transformers model as an engine: a cache of keys and values that forks and reorders.

Rows are padded on the left, so the newest token of every row is in the last column, and rows of any lengths can be put
together, taken apart and repeated. What was computed is never changed but replaced: a fork is another reference to the
same row, until a token parts the two; sequences that are still equal are computed once.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


@dataclass(frozen=True, eq=False)
class _Block:
    """Rows that were computed together.

    Args:
        logits: of the next token, (B, V) float32.
        layers: keys and values of each layer, (B, heads, columns, size); the last column is the newest token.
        lengths: tokens of each row; what is further left is padding.
    """

    logits: Tensor
    layers: list[tuple[Tensor, Tensor]]
    lengths: list[int]


@dataclass
class _Sequence:
    """Where a sequence is, and the token that was added since."""

    block: _Block
    row: int
    token: int | None = None


class TransformersEngine:
    """Next-token logits of a causal model, the same as those of a plain forward pass up to rounding.

    In float32 that is some 1e-5, whatever else is in the batch; in bfloat16 another batch rounds otherwise, and long
    answers may then take another turn.

    Args:
        model: any causal model with a cache of keys and values, full or with a sliding window; in evaluation mode.

    Raises:
        ValueError: the model's cache has other states (recurrent or linear attention), which cannot be padded.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._config = plain.config
        known = inspect.signature(plain.forward).parameters
        self._takes_positions = "position_ids" in known
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self._sequences: dict[int, _Sequence] = {}
        self._opened = 0
        for layer in DynamicCache(config=self._config).layers:
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
                raise ValueError(
                    f"{type(plain).__name__} keeps a cache of {type(layer).__name__}: states that cannot be padded "
                    "and forked here; use a model with full or sliding-window attention"
                )

    @property
    def context(self) -> int | None:
        """The model's ``max_position_embeddings``."""
        found: int | None = getattr(self._config.get_text_config(), "max_position_embeddings", None)
        return found

    def open(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """A sequence for each prompt; equal prompts are computed once.

        Raises:
            ValueError: a prompt has no tokens.
        """
        if not prompts:
            return []
        for number, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompts[{number}] has no tokens")
        distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        lengths = [len(prompt) for prompt in distinct]
        width = max(lengths)
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in distinct])
        block = self._forward(ids, lengths, None)
        return [self._add(_Sequence(block, distinct[tuple(prompt)])) for prompt in prompts]

    def extend(self, handle: int, token: int) -> None:
        """One more token.

        Raises:
            ValueError: the token before was not computed yet.
        """
        sequence = self._sequences[handle]
        if sequence.token is not None:
            raise ValueError(f"sequence {handle} has a token that is not computed yet: ask for next_logits first")
        sequence.token = token

    def fork(self, handle: int) -> int:
        """A sequence that has the same tokens so far."""
        source = self._sequences[handle]
        return self._add(_Sequence(source.block, source.row, source.token))

    def close(self, handle: int) -> None:
        """Forget the sequence."""
        del self._sequences[handle]

    def next_logits(self, handles: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Logits of the next token, (U, V) float32, and the row of each handle."""
        sequences = [self._sequences[handle] for handle in handles]
        waiting = [sequence for sequence in sequences if sequence.token is not None]
        if waiting:
            self._advance(waiting)
        rows: dict[tuple[_Block, int], int] = {}
        places = [rows.setdefault((s.block, s.row), len(rows)) for s in sequences]
        first = sequences[0].block
        if list(rows) == [(first, row) for row in range(len(first.lengths))]:
            return first.logits, places
        return torch.stack([block.logits[row] for block, row in rows]), places

    def _add(self, sequence: _Sequence) -> int:
        self._sequences[self._opened] = sequence
        self._opened += 1
        return self._opened - 1

    def _advance(self, waiting: Sequence[_Sequence]) -> None:
        """Compute the tokens that were added, those of equal sequences once."""
        blocks: dict[_Block, int] = {}
        for sequence in waiting:
            blocks.setdefault(sequence.block, len(blocks))
        keys = [(blocks[sequence.block], sequence.row, sequence.token) for sequence in waiting]
        distinct = {key: row for row, key in enumerate(sorted(set(keys)))}  # block by block, so that joining is a cat
        of_block: list[list[int]] = [[] for _ in blocks]
        for number, row, _ in distinct:
            of_block[number].append(row)
        lengths = [block.lengths[row] for block, number in blocks.items() for row in of_block[number]]
        cache = self._cache(_joined(list(blocks), of_block, max(lengths)), max(lengths))
        ids = torch.tensor([[token] for _, _, token in distinct])
        block = self._forward(ids, [length + 1 for length in lengths], cache)
        for sequence, key in zip(waiting, keys, strict=True):
            sequence.block, sequence.row, sequence.token = block, distinct[key], None

    def _cache(self, layers: Sequence[tuple[Tensor, Tensor]], width: int) -> DynamicCache:
        cache = DynamicCache(config=self._config)
        for layer, (keys, values) in zip(cache.layers, layers, strict=True):
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            if type(layer) is DynamicSlidingWindowLayer:
                layer.cumulative_length = width
        return cache

    @torch.inference_mode()
    def _forward(self, ids: Tensor, lengths: list[int], cache: DynamicCache | None) -> _Block:
        device = self._model.device
        width, size = max(lengths), torch.tensor(lengths)
        positions = (torch.arange(width - ids.shape[1], width) - (width - size)[:, None]).clamp(min=0)
        padded = min(lengths) < width
        mask = (torch.arange(width) >= (width - size)[:, None]).long().to(device) if padded else None
        given = {"position_ids": positions.to(device)} if self._takes_positions else {}
        output = self._model(
            input_ids=ids.to(device),
            attention_mask=mask,
            past_key_values=cache if cache is not None else DynamicCache(config=self._config),
            use_cache=True,
            **given,
            **self._options,
        )
        layers = [(layer.keys, layer.values) for layer in output.past_key_values.layers]
        return _Block(output.logits[:, -1].float(), layers, lengths)


def _joined(blocks: Sequence[_Block], rows: Sequence[Sequence[int]], width: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of these rows of the blocks, one below the other, with no more columns than they need."""
    return [
        (
            _stacked([block.layers[number][0] for block in blocks], rows, width),
            _stacked([block.layers[number][1] for block in blocks], rows, width),
        )
        for number in range(len(blocks[0].layers))
    ]


def _stacked(states: Sequence[Tensor], rows: Sequence[Sequence[int]], width: int) -> Tensor:
    columns = min(width, max(state.shape[2] for state in states))
    parts = []
    for state, wanted in zip(states, rows, strict=True):
        if list(wanted) != list(range(state.shape[0])):
            state = state.index_select(0, torch.tensor(wanted, device=state.device))
        excess = state.shape[2] - columns
        parts.append(state[:, :, excess:] if excess >= 0 else F.pad(state, (0, 0, -excess, 0)))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
