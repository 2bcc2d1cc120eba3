"""The next token of one particle: its law, its constraint, the sampler that was asked for. Free of any engine.

What draws is told everything: the tokens so far, the constraint's state and the row's randomness. So a step that is
repeated gives the same token, whoever repeats it: a batch here, or an engine that had put the sequence aside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import awrs, masking, rejection
from .constraints.memo import Memo
from .constraints.protocol import Constraint, ConstraintError, Masking, Vocabulary
from .law import Law
from .lazy import Draw, Draws, Live, Row, live_of
from .request import Request


@dataclass(frozen=True)
class Step:
    """A token, and what became of the constraint by it.

    Args:
        draw: the token, its weight, and what it took.
        state: the constraint's state after the token; None for an end token and in a dead end.
        ended: whether the sequence is complete with this token.
        cut: in a dead end: whether it is the length limit's.
        why: why there was no token in a dead end that is not.
        refused: tokens that the constraint was asked about one by one and refused, in this order.
    """

    draw: Draw
    state: Any = None
    ended: bool = False
    cut: bool = False
    why: str = ""
    refused: tuple[int, ...] = ()


def check_tokens(prompt: Sequence[int], vocabulary: Vocabulary) -> None:
    """There are some, and all are the model's.

    Raises:
        ConstraintError: not so.
    """
    if not len(prompt):
        raise ConstraintError("prompt: it has no tokens")
    for token in prompt:
        try:
            known = 0 <= index(token) < vocabulary.size
        except TypeError:
            raise ConstraintError(f"prompt: {token!r} is no whole number; give the ids of its tokens") from None
        if not known:
            raise ConstraintError(
                f"prompt: {token} is the id of no token, they are from 0 to {vocabulary.size - 1:,}; encode "
                "it with the model's own tokenizer"
            )


def check_prompt(request: Request, vocabulary: Vocabulary, context: int | None) -> None:
    """The prompt is one of this model, and fits.

    Raises:
        ConstraintError: it does not.
    """
    length = len(request.prompt)
    check_tokens(request.prompt, vocabulary)
    if context is not None and length + request.max_new_tokens > context:
        raise ConstraintError(
            f"prompt: {length:,} tokens and an answer of {request.max_new_tokens:,} are more than the "
            f"{context:,} that the model reads; shorten the prompt or lower max_new_tokens"
        )


def step(
    request: Request, vocabulary: Vocabulary, tokens: tuple[int, ...], state: Any, logq: Row, draws: Draws
) -> Step:
    """Draw the token that follows.

    Args:
        request: its constraint, method and limits count here; its prompt and particles do not.
        vocabulary: of the model.
        tokens: of the answer so far.
        state: the constraint's state after them; None without a constraint.
        logq: the base law, (V,); ``Live`` is used up.
        draws: the row's randomness.

    Raises:
        ConstraintError: the constraint raised, gave something that is no verdict, or contradicts itself.
    """
    constraint = request.constraint
    if constraint is None:
        token = live_of(logq).draw(draws.uniform())
        last = len(tokens) + 1 == request.max_new_tokens
        return Step(Draw(token, 0.0, 0), ended=token in vocabulary.ends or last)
    try:
        return _under(constraint, request, vocabulary, tokens, state, logq, draws)
    except ConstraintError:
        raise
    except (Exception, SystemExit) as error:  # a constraint is anyone's code
        name = type(constraint.constraint if isinstance(constraint, Memo) else constraint).__name__
        said = f"{name} raised {type(error).__name__}: {error}; after {vocabulary.text(tokens)!r}"
        raise ConstraintError("; ".join([said, *getattr(error, "__notes__", [])])) from error


def _under(
    constraint: Constraint,
    request: Request,
    vocabulary: Vocabulary,
    tokens: tuple[int, ...],
    state: Any,
    logq: Row,
    draws: Draws,
) -> Step:
    ends, known = vocabulary.ends, vocabulary.tokens
    after: dict[int, Any] = {}
    refused: list[int] = []

    def accepts(token: int) -> bool:
        if token in ends:
            allowed = constraint.may_end(state)
        else:
            after[token] = constraint.advance(state, token) if known[token] is not None else None
            allowed = after[token] is not None
        if allowed is False:
            refused.append(token)
        return allowed

    def with_ends(allowed: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
        if allowed is not None:
            allowed[list(ends)] = constraint.may_end(state)
        return allowed

    def mask() -> NDArray[np.bool_] | None:
        return with_ends(constraint.allowed(state) if isinstance(constraint, Masking) else None)

    if len(tokens) + 1 == request.max_new_tokens:
        return _last(request, vocabulary, tokens, live_of(logq), constraint.may_end(state), draws)
    live, most = live_of(logq), request.max_draws
    possible = live.size if request.law == Law() else len(live.left)
    if request.method == "mask":
        draw = masking.sample(live, accepts, draws, allowed=mask())
    elif request.method == "rejection":
        draw = rejection.sample(live, accepts, draws, max_draws=most)
    else:
        prefilter = getattr(constraint, "prefilter", None)  # asked at every token, where isinstance costs as much
        cheap = with_ends(prefilter(state)) if prefilter is not None else None
        # Tokens that are not refused one by one but before are out of the measure: their mass is out of the weight.
        live = live if cheap is None else live.only(cheap)
        draw = awrs.sample(live, accepts, draws, max_draws=most, mask=mask)
    if draw.token is None:
        return Step(draw, why=_why(request, vocabulary, tokens, draw, possible), refused=tuple(refused))
    if draw.token not in ends and after.get(draw.token) is None and not accepts(draw.token):
        raise ConstraintError(f"its mask allows token {draw.token}, which it refuses when it is asked for that one")
    return Step(draw, after.get(draw.token), ended=draw.token in ends, refused=tuple(refused))


def _last(
    request: Request, vocabulary: Vocabulary, tokens: tuple[int, ...], live: Live, may_end: bool, draws: Draws
) -> Step:
    """At the last position an end token, or nothing: one question."""
    ends = np.zeros(live.size, dtype=bool)
    ends[list(vocabulary.ends)] = may_end
    possible = live.size if request.law == Law() else len(live.left)
    found = masking.sample(live, lambda token: False, draws, allowed=ends)
    weight = 0.0 if request.method == "rejection" and not found.dead else found.log_weight
    draw = Draw(found.token, weight, 1)
    why = _why(request, vocabulary, tokens, draw, possible) if draw.dead and may_end else ""
    return Step(draw, ended=not draw.dead, cut=draw.dead and not may_end, why=why)


def _why(request: Request, vocabulary: Vocabulary, tokens: tuple[int, ...], draw: Draw, possible: int) -> str:
    """Why there was no token in a dead end that is not the length limit's."""
    said, law, most = repr(vocabulary.text(tokens)), request.law, request.max_draws
    if draw.evaluations == most:
        return f"; after {said} there was no allowed token among the {most:,} of max_draws: raise it"
    changed = {"temperature": law.temperature != 1, "top_k": law.top_k, "top_p": law.top_p}
    settings = ", ".join(f"{name}={getattr(law, name)}" for name, is_set in changed.items() if is_set)
    broken = (
        "either nothing satisfies the constraint, or it is not prefix-closed (constraints.conformance.check says more)"
    )
    if settings and possible < vocabulary.size:
        return (
            f"; after {said} none of the {possible:,} tokens (of {vocabulary.size:,}) to which {settings} leaves a "
            f"probability is allowed: loosen it; if that does not help, {broken}"
        )
    return f"; no token may follow {said}, nor may it end there: {broken}"
