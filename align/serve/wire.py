"""What requests may say: the settings in ``vllm_xargs.align``, and the bodies of our own routes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from align.decoding.request import Method

from .errors import RefusedError
from .options import Options

KEY = "align"
LONGEST = 256
"""Tokens of an answer where a request does not say."""
ROWS = 256
"""Most rows to score in one request."""
Messages = list[dict[str, Any]]


class Settings(BaseModel):
    """How an answer is drawn; see ``align.decoding.request.Request`` for each."""

    model_config = ConfigDict(extra="forbid", strict=True)

    constraint: dict[str, Any] | None = None
    method: Method = "awrs-smc"
    particles: Annotated[int, Field(ge=1)] = 8
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    resampling: Literal["systematic", "multinomial"] = "systematic"
    max_draws: Annotated[int, Field(ge=1)] | None = None
    reward: str | None = None
    reward_strength: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    reward_every: Annotated[int, Field(ge=0)] = 0
    trace: bool = False


class SmcBody(Settings):
    """Body of POST /v1/align/smc."""

    model: str | None = None
    messages: Messages | None = None
    prompt: str | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool = False


class ScoreRow(BaseModel):
    """A prompt and an answer; other columns go to the rule."""

    model_config = ConfigDict(extra="allow", strict=True)

    prompt: str | Messages
    completion: str


class ScoreBody(BaseModel):
    """Body of POST /v1/align/score."""

    model_config = ConfigDict(extra="forbid", strict=True)

    reward: str
    rows: Annotated[list[ScoreRow], Field(min_length=1, max_length=ROWS)]


Body = TypeVar("Body", bound=BaseModel)


def read(kind: type[Body], given: Any, where: str = "") -> Body:
    """A body or a part of one.

    Raises:
        RefusedError: 400, with every fault and its place.
    """
    if not isinstance(given, Mapping):
        raise RefusedError(400, f"{where or 'body'}: it must be a JSON object")
    try:
        return kind.model_validate(dict(given))
    except ValidationError as error:
        faults = []
        for fault in error.errors():
            place = ".".join(str(part) for part in (*((where,) if where else ()), *fault["loc"]))
            known = ", ".join(kind.model_fields)
            what = f"unknown; there are {known}" if fault["type"] == "extra_forbidden" else fault["msg"]
            faults.append(f"{place}: {what}")
        raise RefusedError(400, "; ".join(faults)) from None


def settings_of(xargs: Mapping[str, Any]) -> Settings:
    """Our settings in ``vllm_xargs``, which holds texts: JSON as a text.

    Raises:
        RefusedError: 400.
    """
    where = f"vllm_xargs.{KEY}"
    text = xargs[KEY]
    try:
        given = json.loads(text) if isinstance(text, str) else text
    except (json.JSONDecodeError, RecursionError) as error:
        raise RefusedError(400, f"{where}: not JSON: {error}") from None
    return read(Settings, given, where)


def check_limits(settings: Settings, options: Options) -> None:
    """What the operator allows, and what goes together.

    Raises:
        RefusedError: 400.
    """
    if settings.particles > options.max_particles:
        raise RefusedError(
            400, f"particles: {settings.particles:,} are over this server's limit of {options.max_particles:,}"
        )
    if settings.reward is None:
        for name in ("reward_strength", "reward_every"):
            if name in settings.model_fields_set:
                raise RefusedError(400, f"{name}: it goes with reward")
    elif settings.reward not in options.rewards:
        known = ", ".join(sorted(options.rewards)) or "none; its operator names them by --reward NAME=REWARD"
        raise RefusedError(400, f"reward: this server has no {settings.reward!r}; it has {known}")
    if settings.constraint is None and settings.reward is None:
        raise RefusedError(400, "give a constraint or a reward; a request without either needs no settings of ours")


PLAIN: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "n": (1,),
    "best_of": (1,),
    "response_format": ({"type": "text"},),
}
"""Settings of OpenAI's or vLLM's that we do not follow, and values with which they change nothing."""
FOLLOWED = {
    *("model", "messages", "prompt", "temperature", "top_p", "top_k", "seed", "max_tokens", "max_completion_tokens"),
    *("stream", "stream_options", "vllm_xargs", "user", "request_id", "metadata", "store", "chat_template_kwargs"),
    *("add_generation_prompt", "continue_final_message", "add_special_tokens", "documents", "session_id"),
}


def check_openai(request: BaseModel) -> None:
    """A request of OpenAI's kind asks for nothing beside that we would not follow.

    Raises:
        RefusedError: 400.
    """
    for name in sorted(request.model_fields_set - FOLLOWED):
        value = getattr(request, name)
        if isinstance(value, BaseModel):
            value = value.model_dump(exclude_unset=True)
        field = type(request).model_fields.get(name)
        default = field.get_default(call_default_factory=True) if field is not None else None
        if value is None or value in ([], {}) or value == default or value in PLAIN.get(name, ()):
            continue
        raise RefusedError(400, f"{name}: it does not go with vllm_xargs.{KEY}; leave it out")
