"""The head of a causal model, and a forward pass that scores given tokens instead of building logits."""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from align.losses.layouts import model_inputs
from align.losses.logprobs import Head, TokenLogps, all_logps, token_logps
from align.losses.rows import Rows, answer_rows
from align.losses.types import SequenceLogps


def head_of(model: PreTrainedModel) -> Head:
    """The last layer of a Hugging Face causal model, with its logit scale and soft cap."""
    layer = model.get_output_embeddings()
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None)
    if scale is None:
        divisor = getattr(config, "logits_scaling", None)
        scale = 1.0 if divisor is None else 1.0 / divisor
    return Head(layer.weight, layer.bias, scale, getattr(config, "final_logit_softcapping", None))


def attach_scoring(model: PreTrainedModel) -> None:
    """Let ``model(..., score_source=, score_target=)`` return ``TokenLogps`` of those tokens.

    ``score_source`` (N,) indexes the flattened (rows * positions) hidden states and ``score_target`` (N,) names the
    tokens predicted there; with ``score_source`` alone it returns the log-probs of the whole vocabulary there, (N, V).
    Without both the forward is the original one. It goes through the model's own ``forward``, so that wrappers (PEFT,
    DDP, autocast, gradient checkpointing) see an ordinary call.

    Args:
        model: a causal model, the inner one where PEFT wraps it.

    Raises:
        ValueError: its log-probs cannot be had from its hidden states and head.
    """
    original = model.forward

    # The wrapped signature is the class's: `generate` checks its arguments against it.
    @functools.wraps(type(model).forward)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        score_source: torch.Tensor | None = None,
        score_target: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if score_source is None:
            return original(*args, **kwargs)
        states = self.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state
        hidden = states.reshape(-1, states.shape[-1])[score_source]
        if score_target is None:
            return all_logps(hidden, head_of(self))
        return token_logps(hidden, score_target, head_of(self))

    model.forward = types.MethodType(forward, model)
    _check_head(model)


def _check_head(model: PreTrainedModel) -> None:
    """One short row through the model's own logits and through ours: a head that does more than ``Head`` says is told.

    Raises:
        ValueError: the log-probs differ.
    """
    if model.config.get_text_config()._attn_implementation not in ("sdpa", "eager"):
        return  # other kernels take half precision alone, on their own devices, and the head is the same
    ids = [token % model.config.get_text_config().vocab_size for token in (1, 2, 3, 4)]
    rows = answer_rows([ids[:1]], [ids[1:]], pad_token_id=0).to(model.device)
    training = model.training
    model.eval()
    with torch.no_grad():
        ours = score(model, rows).logps
        logits = model(input_ids=rows.input_ids).logits[0, :-1]
    model.train(training)
    theirs = logits.float().log_softmax(-1).gather(1, rows.target[:, None])[:, 0]
    # What accelerate has prepared may round its own logits under an autocast of its own, whatever its weights are.
    exact = model.dtype in (torch.float32, torch.float64) and not hasattr(model, "_original_forward")
    tolerance = 1e-3 if exact else 0.25
    if not bool(((ours - theirs).abs() <= tolerance * theirs.abs().clamp(min=1)).all()):
        raise ValueError(
            f"{type(model).__name__}: log-probs from its hidden states and head differ from those of its logits; "
            "its head does more than a product, a bias, a scale and a soft cap, and is not supported"
        )


def score(model: Any, rows: Rows) -> TokenLogps:
    """Log-probs of every answer token of ``rows`` under a model that ``attach_scoring`` has seen.

    Args:
        model: the causal model, or what wraps it.
    """
    out = model(**model_inputs(model, rows), score_source=rows.source, score_target=rows.target)
    return TokenLogps(*out)


def final_states(model: PreTrainedModel, rows: Rows) -> torch.Tensor:
    """Hidden states after the last norm, at every position of ``rows``, flat: (R * T, H). The head is not asked.

    Args:
        model: the causal model itself, without a wrapper.
    """
    states: torch.Tensor = model.base_model(**model_inputs(model, rows), use_cache=False).last_hidden_state
    return states.reshape(-1, states.shape[-1])


def sequence_logps(
    model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], *, pad_token_id: int
) -> SequenceLogps:
    """Log-probs of one answer a prompt, without gradients.

    Args:
        model: a causal model that ``attach_scoring`` has seen, or what wraps it.
        prompts, answers: token ids.
        pad_token_id: fills the rows; it changes nothing.
    """
    rows = answer_rows(prompts, answers, pad_token_id=pad_token_id).to(model.device)
    with torch.no_grad():
        return SequenceLogps(rows.totals(score(model, rows).logps), rows.lengths())


def first_token_logps(model: Any, prompts: Sequence[Sequence[int]], *, pad_token_id: int) -> torch.Tensor:
    """Log-probs of every token as the first of an answer to each prompt, (N, V), nats, without gradients.

    Args:
        model: a causal model that ``attach_scoring`` has seen, or what wraps it.
        prompts: token ids.
        pad_token_id: fills the rows; it changes nothing.
    """
    rows = answer_rows(prompts, [[pad_token_id]] * len(prompts), pad_token_id=pad_token_id).to(model.device)
    with torch.no_grad():
        logps: torch.Tensor = model(**model_inputs(model, rows), score_source=rows.source)
    return logps
