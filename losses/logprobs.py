"""Log-probs of given tokens from hidden states and the head's weight.

Only the positions that are scored meet the head, in tiles of tokens, so that the (positions, vocabulary) logits of a
batch never stand in memory at once. With a frozen head (LoRA) the gradient with respect to the hidden state is one
vector a token, found in the forward pass while the tile's softmax is there: the backward is then a multiplication.
With a trained head the tiles are kept where they are few, and computed anew where they are not.

Products run in the dtype of the inputs (bf16 stays bf16), reductions in float32. Where the product's output is rounded
to bf16, the target's own logit is computed once more in float32: a logit of 16 has a spacing of 1/8 in bf16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Elements of a float32 tile of logits: 16 MiB, a few of which live at once. With a frozen head of 49,152 480 tokens
# take a core 0.71 s forward and backward; 0.68 with 2**23, 0.71 with 2**24, but 0.95 with 2**21, 1.3 with 2**20.
TILE_ELEMENTS = 2**22
# Elements of all tiles of a trained head that are kept for the backward pass, 128 MiB in float32: the same tokens take
# 1.7 s in place of 2.1. Of more tokens they are computed anew.
KEPT_ELEMENTS = 2**25


@dataclass(frozen=True)
class Head:
    """The last layer of a language model: ``logits = cap(scale * (hidden @ weight.T + bias))``.

    Args:
        weight: (V, H).
        bias: (V,) or None.
        scale: multiplies the logits (Cohere, Granite), before the cap.
        soft_cap: ``cap(x) = soft_cap * tanh(x / soft_cap)`` (Gemma 2); None for no cap.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None


class TokenLogps(NamedTuple):
    """What the head says of N tokens.

    Args:
        logps: ``log pi(target)``, nats, (N,), float32, with gradient.
        entropy: of the next-token distribution, nats, (N,), float32, without gradient.
        top: whether the target was the most likely token, (N,), bool.
    """

    logps: Tensor
    entropy: Tensor
    top: Tensor


def token_logps(hidden: Tensor, target: Tensor, head: Head) -> TokenLogps:
    """Log-probs of ``target`` under the head.

    Args:
        hidden: hidden states at the positions that predict, (N, H).
        target: token ids, (N,).
        head: the model's last layer; gradients reach its weight and bias where these ask for them.

    Raises:
        ValueError: shapes that do not match.
    """
    if hidden.ndim != 2 or target.shape != hidden.shape[:1] or head.weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"hidden (N, H), target (N,) and weight (V, H) do not match: "
            f"{tuple(hidden.shape)}, {tuple(target.shape)}, {tuple(head.weight.shape)}"
        )
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
    with torch.autocast(device, enabled=False):
        arguments = (hidden.to(dtype), target, head.weight, head.bias, head.scale, head.soft_cap)
        return TokenLogps(*_TokenLogps.apply(*arguments))  # type: ignore[no-untyped-call]


def all_logps(hidden: Tensor, head: Head) -> Tensor:
    """Log-probs of every token of the vocabulary, (N, V), float32 (or float64), without gradient.

    Args:
        hidden: hidden states at the positions that predict, (N, H).
        head: the model's last layer.
    """
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        logits = _logits(hidden.to(head.weight.dtype), head.weight, head.bias, head.scale, head.soft_cap)
        return logits.log_softmax(dim=1)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, cap: float | None) -> Tensor:
    """Capped logits in float32 (or float64), ``hidden`` (M, H) against ``weight`` (V, H) -> (M, V)."""
    logits = hidden @ weight.T
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    if bias is not None:
        logits += bias.to(logits.dtype)
    if scale != 1.0:
        logits *= scale
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits


def _target_logits(
    hidden: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None, scale: float, cap: float | None
) -> Tensor:
    """The logit of each row's own target in full precision, (M,)."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logit = torch.linalg.vecdot(hidden.to(wide), weight[target].to(wide))
    if bias is not None:
        logit = logit + bias[target].to(wide)
    logit = logit * scale
    return logit if cap is None else cap * torch.tanh(logit / cap)


def _error(
    hidden: Tensor,
    target: Tensor,
    cast: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    cap: float | None,
) -> Tensor:
    """``onehot(target) - softmax``, times the slope of the cap, (M, V); ``cast``: the weight as it computes."""
    logits = _logits(hidden, cast, bias, scale, cap)
    logits.scatter_(1, target[:, None], _target_logits(hidden, target, weight, bias, scale, cap)[:, None])
    slope = None if cap is None else 1 - (logits / cap) ** 2
    error = logits.softmax(dim=1).neg_()
    error.scatter_add_(1, target[:, None], torch.ones_like(error[:, :1]))
    return error if slope is None else error.mul_(slope)


def _wide_zeros(like: Tensor) -> Tensor:
    """Where tiles add up, float32 or better: in bf16 a small tile would vanish beside the sum so far."""
    return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        target: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        cap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        cast = weight.to(hidden.dtype)
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        count, vocabulary = len(hidden), len(weight)
        logps = torch.empty(count, dtype=wide, device=hidden.device)
        entropy = torch.empty_like(logps)
        top = torch.empty(count, dtype=torch.bool, device=hidden.device)
        train_hidden, _, train_weight, train_bias, *_ = ctx.needs_input_grad
        train_head = train_weight or train_bias
        direction = kept = None
        if train_hidden and not train_head:
            direction = torch.empty(hidden.shape, dtype=wide, device=hidden.device)
        elif train_head and count * vocabulary <= KEPT_ELEMENTS:
            kept = torch.empty(count, vocabulary, dtype=hidden.dtype, device=hidden.device)
            masses, slopes = torch.empty_like(logps), torch.ones_like(logps)

        rows = max(1, TILE_ELEMENTS // vocabulary)
        for start in range(0, count, rows):
            part = slice(start, start + rows)
            h, t = hidden[part], target[part]
            logits = _logits(h, cast, bias, scale, cap)
            own = _target_logits(h, t, weight, bias, scale, cap)
            logits.scatter_(1, t[:, None], own[:, None])
            slope = None if cap is None or not (train_hidden or train_head) else 1 - (logits / cap) ** 2
            peak = logits.amax(dim=1)
            top[part] = own >= peak
            logits -= peak[:, None]
            weights = logits.exp()
            mass = weights.sum(dim=1)
            log_mass = mass.log()
            logps[part] = own - peak - log_mass
            entropy[part] = log_mass - torch.linalg.vecdot(weights, logits) / mass
            if slope is not None:
                weights *= slope
            if kept is not None:
                kept[part], masses[part] = weights, mass
                if slope is not None:
                    slopes[part] = slope.gather(1, t[:, None])[:, 0]
            if direction is not None:
                # d logp / d hidden = slope_t W_t - sum_v p_v slope_v W_v
                own_row = weight[t].to(wide)
                if slope is not None:
                    own_row = own_row * slope.gather(1, t[:, None])
                mean_row = (weights.to(hidden.dtype) @ cast).to(wide) / mass[:, None]
                direction[part] = scale * (own_row - mean_row)
        ctx.mark_non_differentiable(entropy, top)
        ctx.scale, ctx.cap, ctx.hidden_dtype = scale, cap, hidden.dtype
        if direction is not None:
            ctx.save_for_backward(direction)
        elif kept is not None:
            ctx.save_for_backward(hidden, target, weight, bias, kept, masses, slopes)
        else:
            ctx.save_for_backward(hidden, target, weight, bias, None, None, None)
        return logps, entropy, top

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        if len(ctx.saved_tensors) == 1:
            (direction,) = ctx.saved_tensors
            return (grad[:, None] * direction).to(ctx.hidden_dtype), None, None, None, None, None

        hidden, target, weight, bias, kept, masses, slopes = ctx.saved_tensors
        scale, cap = ctx.scale, ctx.cap
        cast = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = _wide_zeros(weight) if ctx.needs_input_grad[2] else None
        grad_bias = _wide_zeros(bias) if bias is not None and ctx.needs_input_grad[3] else None
        rows = max(1, TILE_ELEMENTS // len(weight))
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            h, t = hidden[part], target[part]
            push = scale * grad[part, None]
            # d logp / d logits = onehot(target) - softmax, through the cap and the scale
            if kept is not None:
                own = push * slopes[part, None]
                push = kept[part] * (push / -masses[part, None])
                push.scatter_add_(1, t[:, None], own)
            else:
                push = _error(h, t, cast, weight, bias, scale, cap).mul_(push)
            if grad_bias is not None:
                grad_bias += push.sum(dim=0)
            narrow = push.to(hidden.dtype)
            grad_hidden[part] = narrow @ cast
            if grad_weight is not None:
                grad_weight += narrow.T @ h
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, None, grad_weight, grad_bias, None, None
