"""What a vLLM request carries for us, and what is refused beside it.

It stands in ``SamplingParams.extra_args["align"]``, as an object or as its JSON text (over HTTP ``vllm_xargs`` holds
texts). All but ``constraint`` may be left out:

- ``constraint``      as ``align.decoding.constraints.build`` reads it; null for any text.
- ``method``          ``awrs`` (the default), ``mask`` or ``rejection``.
- ``max_draws``       see ``align.decoding.request.Request``.
- ``law``             ``{"temperature", "top_k", "top_p", "target"}``; by default the request's own sampling settings.
- ``seed``            by default the request's own.
- ``particle``        number of the particle: its stream of randomness.
- ``prefix``          how many of the prompt's last tokens belong to the answer already.
- ``max_new_tokens``  longest answer, ``prefix`` included; by default the request's ``max_tokens``.
- ``name``            by which ``AlignWorker.align_pop`` gives what the request took.
- ``source``          name of the request that the prompt is the beginning of: while that runs, what is computed of it
                      need not be computed again (``forks``).
- ``trace``           keep the tokens that were refused, too.
- ``capture``         draw nothing: keep the logits for ``align_pop``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from align.decoding.constraints import ConstraintError
from align.decoding.constraints.wire import check
from align.decoding.law import Law
from align.decoding.request import Request

if TYPE_CHECKING:
    from vllm import SamplingParams

KEY = "align"
DEAD, FAILED = -1e9, -2e9
"""Log-weights of a dead end and of a constraint that failed: finite, since JSON has no infinity."""

LONGEST = 1 << 31
"""Longest answer where the request does not say how long."""
KNOWN = {
    "constraint": (dict, type(None)),
    "method": (str,),
    "max_draws": (int, type(None)),
    "law": (dict,),
    "seed": (int,),
    "particle": (int,),
    "prefix": (int,),
    "max_new_tokens": (int,),
    "name": (str,),
    "source": (str,),
    "trace": (bool,),
    "capture": (bool,),
}


@dataclass(frozen=True)
class Settings:
    """How the tokens of one vLLM request are drawn.

    Args:
        request: law, method and limits, without prompt, particles and constraint.
        constraint: JSON text of the constraint; None for any text.
        particle, prefix, name, trace, capture: see above.
        scale: what weights are multiplied by, since vLLM divides logits by its temperature after us.
    """

    request: Request
    constraint: str | None
    particle: int
    prefix: int
    name: str
    trace: bool
    capture: bool
    scale: float


def read(params: SamplingParams) -> Settings | None:
    """Our settings of a request; None where it has none.

    Raises:
        ValueError: one of them is unknown or out of its range, or there is no seed.
    """
    given = (params.extra_args or {}).get(KEY)
    if given is None:
        return None
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{KEY}: not JSON: {error}") from None
    if not isinstance(given, Mapping):
        raise ValueError(f"{KEY}: {given!r} is no object of settings")
    for name, value in given.items():
        if name not in KNOWN:
            raise ValueError(f"{KEY}.{name}: unknown; there are {', '.join(KNOWN)}")
        if not isinstance(value, KNOWN[name]) or (isinstance(value, bool) and bool not in KNOWN[name]):
            raise ValueError(f"{KEY}.{name} is {value!r}, which is no {KNOWN[name][0].__name__}")
    if given.get("method", "awrs") not in ("awrs", "mask", "rejection"):
        raise ValueError(f"{KEY}.method is {given['method']!r}: a vLLM request draws by awrs, mask or rejection")
    seed = given.get("seed", params.seed)
    if seed is None and not given.get("capture"):
        raise ValueError(f"{KEY}: give a seed: what is drawn is a function of it")
    prefix = given.get("prefix", 0)
    if prefix < 0:
        raise ValueError(f"{KEY}.prefix is {prefix}: it must be 0 or more")
    length = params.max_tokens if params.max_tokens is not None else LONGEST  # vLLM fills it in after it has validated
    longest = given.get("max_new_tokens", prefix + length)
    constraint = given.get("constraint")
    try:
        written = None if constraint is None else json.dumps(constraint)
        request = Request(
            (),
            None,
            method=given.get("method", "awrs"),
            law=_law(given.get("law"), params),
            seed=seed or 0,
            max_new_tokens=longest,
            max_draws=given.get("max_draws"),
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{KEY}: {error}") from None
    return Settings(
        request=request,
        constraint=written,
        particle=given.get("particle", 0),
        prefix=prefix,
        name=given.get("name", ""),
        trace=given.get("trace", False),
        capture=given.get("capture", False),
        scale=params.temperature if params.temperature >= 1e-5 else 1.0,  # vLLM takes less for greedy
    )


def validate(params: SamplingParams) -> None:
    """Refuse what would make tokens or weights wrong.

    Raises:
        ValueError: with the reason.
    """
    settings = read(params)
    if settings is None:
        asked = [name for name in LOGPROBS if getattr(params, name, None) is not None]
        if asked:
            raise ValueError(
                f"{asked[0]}: this engine reports the logits that it draws from (logprobs_mode=processed_logits), "
                "since they carry the weights of constrained answers, so a plain request gets none; ask for them "
                f"without {KEY}'s logits processor"
            )
        return
    for name, plain in PLAIN.items():
        if getattr(params, name, plain) not in (plain, None, []):
            raise ValueError(f"{name}: it does not go with {KEY}, whose weights would not be those of the drawn law")
    if params.structured_outputs is not None:
        raise ValueError(
            f"structured_outputs: they hide the mass that they mask from {KEY}, so its weights would all be 1; give "
            f"the grammar as {KEY}.constraint"
        )
    if params.n != 1:
        raise ValueError(f"n is {params.n}: {KEY} draws one answer a request; send one for each particle")
    if settings.constraint is not None and (reason := _refusal(settings.constraint)):
        raise ValueError(reason)


LOGPROBS = ("logprobs", "prompt_logprobs", "logprob_token_ids", "prompt_logprob_token_ids")
"""vLLM's settings that ask for what carries our weights."""
PLAIN = {
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_tokens": 0,
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": None,
    "thinking_token_budget": None,
    "trace_decode_token_ids": None,
}
"""vLLM's settings that change the law behind our back, and the values with which they do not."""


@lru_cache(maxsize=1024)
def _refusal(constraint: str) -> str:
    """Why the text is no constraint, or nothing. Kept, so that one that was looked at before costs nothing."""
    try:
        check(json.loads(constraint))
    except ConstraintError as error:
        return str(error)
    return ""


def _law(given: Mapping[str, Any] | None, params: SamplingParams) -> Law:
    if given is not None:
        return Law(**given)
    return Law(
        params.temperature,
        params.top_k if params.top_k > 0 else None,
        params.top_p if params.top_p < 1 else None,
    )
