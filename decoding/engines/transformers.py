"""A transformers model as an engine: a cache of keys and values that forks and reorders.

Rows are padded on the left, so the newest token of every row is in the last column, and rows of any lengths can be put
together, taken apart and repeated. What was computed is never changed but replaced: a fork is another reference to the
same row, until a token parts the two; sequences that are still equal are computed once.

Recurrent states (linear attention, state spaces, convolutions) would read the padding: models that have them, alone or
beside attention, get rows of one length at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from align.decoding.law import Law

from .protocol import Rollout
from .rollouts import roll_out

T = TypeVar("T")
ATTENTION = (DynamicLayer, DynamicSlidingWindowLayer)
RECURRENT = (
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)


@dataclass(frozen=True)
class _Layer:
    """What a layer of the cache keeps: (keys, values) if it attends, and its recurrent states if it has any."""

    attended: tuple[Tensor, ...]
    recurrent: tuple[Tensor | None, ...]


@dataclass(frozen=True, eq=False)
class _Block:
    """Rows that were computed together.

    Args:
        logits: of the next token, (B, V) float32.
        layers: what each layer keeps. Keys and values, (B, heads, columns, size), have the newest token in the last
            column; recurrent states, (B, ...), have no columns, and None stands for one that the model does not use.
        lengths: tokens of each row; what is further left is padding.
    """

    logits: Tensor
    layers: list[_Layer]
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
        model: a causal model in evaluation mode, whose cache is made of attention (full or with a sliding window),
            recurrent states (Mamba, linear attention, short convolutions) or both. Two short rows are tried at once:
            side by side they must have the logits that they have alone.

    Raises:
        ValueError: the model is in training mode; it has no cache that transformers' ``DynamicCache`` holds (RWKV,
            xLSTM, RecurrentGemma, XLNet); or the two rows disturb each other, as with learned positions that cannot
            be told to the model (BART, Marian) or that do not begin at 0 (RoBERTa).
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._config = plain.config
        known = inspect.signature(plain.forward).parameters
        self._name = type(plain).__name__
        self._takes_positions = "position_ids" in known
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self._sequences: dict[int, _Sequence] = {}
        self._opened = 0
        self._kept: dict[tuple[int, ...], int] = {}  # of the last rollouts
        if model.training:
            raise ValueError(f"{self._name} is in training mode, its logits would be random: call model.eval() first")
        layers = DynamicCache(config=self._config).layers
        self._recurrent = any(type(layer) in RECURRENT for layer in layers)
        self._cache_name = "past_key_values" if "past_key_values" in known else "cache_params"
        for layer in layers:
            if type(layer) not in (*ATTENTION, *RECURRENT):
                raise ValueError(f"{self._name} keeps a cache of {type(layer).__name__}, which cannot be forked here")
        attends = any(type(layer) is not LinearAttentionLayer for layer in layers)
        if self._cache_name not in known or (attends and self._cache_name == "cache_params"):
            raise ValueError(f"{self._name} takes no cache of transformers' DynamicCache: it cannot be served here")
        try:
            off = self._off()
        except ValueError:
            raise
        except Exception as error:  # a model's code is anyone's
            raise ValueError(
                f"{self._name} cannot be run on transformers' DynamicCache: {type(error).__name__}: {error}"
            ) from error
        if not off < (0.005 if model.dtype in (torch.float32, torch.float64) else 0.03):
            raise ValueError(
                f"{self._name} gives a short row another law beside a longer one than alone, {100 * off:.1f} % of the "
                "probability elsewhere: it takes no position_ids, or counts positions in a way of its own; use a "
                "model with rotary, ALiBi or learned positions from 0"
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
        distinct = list(dict.fromkeys(map(tuple, prompts)))
        places: dict[tuple[int, ...], tuple[_Block, int]] = {}
        for together in self._grouped(distinct, [len(prompt) for prompt in distinct]):
            lengths = [len(prompt) for prompt in together]
            width = max(lengths)
            ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in together])
            block = self._forward(ids, lengths, None)
            places |= {prompt: (block, row) for row, prompt in enumerate(together)}
        return [self._add(_Sequence(*places[tuple(prompt)])) for prompt in prompts]

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
        for together in self._grouped(waiting, [s.block.lengths[s.row] for s in waiting]):
            self._advance(together)
        rows: dict[tuple[_Block, int], int] = {}
        places = [rows.setdefault((s.block, s.row), len(rows)) for s in sequences]
        first = sequences[0].block
        if list(rows) == [(first, row) for row in range(len(first.lengths))]:
            return first.logits, places
        return torch.stack([block.logits[row] for block, row in rows]), places

    def rollouts(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        law: Law,
        seeds: Sequence[int],
        ends: Collection[int],
    ) -> list[Rollout]:
        """One rollout a prompt, see ``Rollouts``; what prompts have in common is kept until the next call."""
        return roll_out(self, self._kept, prompts, max_new_tokens=max_new_tokens, law=law, seeds=seeds, ends=ends)

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

    def _grouped(self, items: Sequence[T], lengths: Sequence[int]) -> list[list[T]]:
        """What goes through the model together: all, or those of one length where there may be no padding."""
        groups: dict[int, list[T]] = {}
        for item, length in zip(items, lengths, strict=True):
            groups.setdefault(length if self._recurrent else 0, []).append(item)
        return list(groups.values())

    def _cache(self, layers: Sequence[_Layer], width: int) -> DynamicCache:
        cache = DynamicCache(config=self._config)
        for layer, kept in zip(cache.layers, layers, strict=True):
            if kept.attended:
                DynamicLayer.lazy_initialization(layer, *kept.attended)
                layer.keys, layer.values = kept.attended
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = width
            if kept.recurrent:
                _restore(layer, kept.recurrent)
        return cache

    def _off(self) -> float:
        """Share of the probability that a row's next token has elsewhere when it is computed beside a longer row.

        Its total variation distance from a plain forward pass, after a step from the cache.
        """
        pad = getattr(self._config.get_text_config(), "pad_token_id", None)
        one, other = [token for token in range(3) if token != pad][:2]
        with torch.inference_mode():
            ids = torch.tensor([[one, other]], device=self._model.device)
            alone = self._model(input_ids=ids, use_cache=False).logits[0, -1].float()
        short, long = self.open([[one], [other, one] * 4])
        self.extend(short, other)
        self.extend(long, one)
        logits, rows = self.next_logits([short, long])
        self.close(short)
        self.close(long)
        return float((logits[rows[0]].softmax(-1) - alone.softmax(-1)).abs().sum() / 2)

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
            **{self._cache_name: cache if cache is not None else DynamicCache(config=self._config)},
            use_cache=True,
            **given,
            **self._options,
        )
        kept = getattr(output, self._cache_name, None)
        if not isinstance(kept, DynamicCache):
            raise ValueError(f"{self._name} gives no cache back: it cannot be served here")
        return _Block(output.logits[:, -1].float(), [_kept(layer) for layer in kept.layers], lengths)


def _kept(layer: Any) -> _Layer:
    recurrent = isinstance(layer, LinearAttentionLayer)
    return _Layer(
        (layer.keys, layer.values) if isinstance(layer, DynamicLayer) else (),
        (*layer.conv_states.values(), *layer.recurrent_states.values()) if recurrent else (),
    )


def _restore(layer: Any, states: Sequence[Tensor | None]) -> None:
    """Recurrent states back into a new layer. They are copies: the layer writes into them."""
    half = len(states) // 2
    for number, (conv, recurrent) in enumerate(zip(states[:half], states[half:], strict=True)):
        layer.lazy_initialization(conv_states=conv, recurrent_states=recurrent, state_idx=number)
        layer.has_previous_state[number] = True
        if conv is not None:
            layer.conv_states[number].copy_(conv)
        if recurrent is not None:
            layer.recurrent_states[number].copy_(recurrent)


def _joined(blocks: Sequence[_Block], rows: Sequence[Sequence[int]], width: int) -> list[_Layer]:
    """What the layers keep of these rows of the blocks, one below the other, with no more columns than they need."""
    joined = []
    for layers in zip(*(block.layers for block in blocks), strict=True):
        attended = zip(*(layer.attended for layer in layers), strict=True)
        recurrent = zip(*(layer.recurrent for layer in layers), strict=True)
        joined.append(
            _Layer(
                tuple(_stacked(states, rows, width) for states in attended),
                tuple(None if states[0] is None else _stacked(states, rows, None) for states in recurrent),
            )
        )
    return joined


def _stacked(states: Sequence[Tensor], rows: Sequence[Sequence[int]], width: int | None) -> Tensor:
    """These rows of the states; with a width the columns are cut or padded to be as many, and no more than that."""
    columns = None if width is None else min(width, max(state.shape[2] for state in states))
    parts = []
    for state, wanted in zip(states, rows, strict=True):
        if list(wanted) != list(range(state.shape[0])):
            state = state.index_select(0, torch.tensor(wanted, device=state.device))
        excess = 0 if columns is None else state.shape[2] - columns
        parts.append(state if not excess else state[:, :, excess:] if excess > 0 else F.pad(state, (0, 0, -excess, 0)))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
