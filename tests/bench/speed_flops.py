"""Floating-point operations that a training step on pairs needs, in closed form, for models built as Llama is.

Counted are the products of the trunk's linear layers, of adapters, of the head at the tokens of answers, and of
attention at the keys that a token sees, forward and backward. Not counted is what a way to compute them adds: padding,
activations or logits computed a second time, the head at tokens of prompts, keys that are masked. Sums, norms and
activations are not counted either: they are less than a hundredth. A multiplication and an addition are two.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Size = tuple[int, int, int]
"""Tokens of a prompt, a chosen and a rejected answer."""


@dataclass(frozen=True)
class Shape:
    """What decides a model's products: ``first`` and ``layer`` are (inputs, outputs) of linear layers.

    Attributes:
        first: of those that read the embeddings, in the first layer: queries, keys, values.
        layer: of all in one layer.
        width: of all heads together.
    """

    first: list[tuple[int, int]]
    layer: list[tuple[int, int]]
    layers: int
    width: int
    hidden: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Of a configuration of transformers."""
        hidden, inner = config.hidden_size, config.intermediate_size
        head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
        width, narrow = head * config.num_attention_heads, head * config.num_key_value_heads
        first = [(hidden, width), (hidden, narrow), (hidden, narrow)]
        layer = [*first, (width, hidden), (hidden, inner), (hidden, inner), (inner, hidden)]
        return cls(first, layer, config.num_hidden_layers, width, hidden, config.vocab_size)

    @property
    def trunk(self) -> int:
        """Weights of the linear layers of all layers."""
        return self.layers * sum(i * o for i, o in self.layer)

    def adapter(self, rank: int) -> int:
        """Weights of an adapter on all of them."""
        return self.layers * rank * sum(i + o for i, o in self.layer)


def positions(pairs: Iterable[Size], shared: bool) -> int:
    """Tokens that the trunk computes: prompts once a pair, or once an answer."""
    return sum((1 if shared else 2) * p + w + r for p, w, r in pairs)


def seen(pairs: Iterable[Size], shared: bool) -> int:
    """Keys that all queries see."""

    def causal(n: int) -> int:
        return n * (n + 1) // 2

    return sum(
        causal(p) + p * (w + r) + causal(w) + causal(r) if shared else causal(p + w) + causal(p + r)
        for p, w, r in pairs
    )


def forward(shape: Shape, pairs: list[Size], shared: bool, rank: int | None = None) -> int:
    """One pass that scores the answers; ``rank`` of an adapter that is on."""
    tokens, scored = positions(pairs, shared), sum(w + r for _, w, r in pairs)
    weights = shape.trunk + (shape.adapter(rank) if rank else 0)
    attention = 4 * shape.width * shape.layers * seen(pairs, shared)
    return 2 * tokens * weights + 2 * scored * shape.hidden * shape.vocabulary + attention


def backward(shape: Shape, pairs: list[Size], shared: bool, rank: int | None = None) -> int:
    """From the loss to the gradients of all weights, or with ``rank`` of an adapter's alone.

    With an adapter frozen weights have no gradient, and neither has what the first layer reads.
    """
    tokens, scored = positions(pairs, shared), sum(w + r for _, w, r in pairs)
    attention = 8 * shape.width * shape.layers * seen(pairs, shared)
    if not rank:
        return 4 * tokens * shape.trunk + 4 * scored * shape.hidden * shape.vocabulary + attention
    through = shape.trunk - sum(i * o for i, o in shape.first)
    adapters = 2 * shape.adapter(rank) - rank * sum(i for i, _ in shape.first)
    return 2 * tokens * (through + adapters) + 2 * scored * shape.hidden * shape.vocabulary + attention


def step(shape: Shape, pairs: list[Size], *, shared: bool, rank: int | None, reference: bool) -> int:
    """A step, with the pass of the reference where that is scored in it."""
    scoring = forward(shape, pairs, shared) if reference else 0
    return forward(shape, pairs, shared, rank) + backward(shape, pairs, shared, rank) + scoring
