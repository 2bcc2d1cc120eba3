"""What requests get back."""

from __future__ import annotations

import codecs
import math
import time
from typing import Any

from align.decoding.constraints import Vocabulary
from align.decoding.request import Answer, Request

from .errors import RefusedError

Json = dict[str, Any]


def answer_json(answer: Answer, vocabulary: Vocabulary, request: Request) -> Json:
    """What is to be known of an answer; weights of ``rejection`` say nothing, and are left out."""
    result = answer.result
    drawn = result.drawn if result is not None else None
    weighted = request.method != "rejection"
    return {
        "text": vocabulary.text(drawn.tokens) if drawn is not None else None,
        "tokens": list(drawn.tokens) if drawn is not None else [],
        "finished": drawn is not None and drawn.tokens[-1] in vocabulary.ends,
        "valid": answer.valid,
        "reason": as_asked(answer.reason),
        "seed": request.seed,
        "log_weight": number(drawn.log_weight) if weighted and drawn is not None else None,
        "log_normaliser": number(result.log_normaliser) if weighted and result is not None else None,
        "ess": result.ess if result is not None else None,
        "resamplings": result.resamplings if result is not None else None,
        "dead_ends": result.dead_ends if result is not None else None,
        "samples": [
            {"text": vocabulary.text(sample.tokens), "log_weight": number(sample.log_weight)}
            for sample in (result.samples if result is not None else ())
        ],
        "usage": usage(answer, len(request.prompt)),
    }


def as_asked(reason: str) -> str:
    """What went wrong, with the names that requests have for things."""
    return reason.replace("max_new_tokens", "max_tokens")


def usage(answer: Answer, prompt_tokens: int) -> Json:
    """Counts: OpenAI's for the answer that is given, and what all particles took."""
    drawn = answer.result.drawn if answer.result is not None else None
    completion = len(drawn.tokens) if drawn is not None else 0
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": prompt_tokens + completion,
        "drawn_tokens": len(answer.evaluations),
        "evaluations": sum(answer.evaluations),
        "masks": answer.masks,
    }


def refusal(answer: Json) -> RefusedError | None:
    """Why an answer is none; None where it is one."""
    if answer["valid"]:
        return None
    return RefusedError(
        422,
        f"no valid answer: {answer['reason']}. Ask for more tokens or particles, or a constraint that the model finds "
        "easier; /v1/align/smc shows what there was",
    )


def openai_json(answer: Json, *, name: str, model: str, chat: bool) -> Json:
    """The reply of a completion, with our object beside the choices."""
    choice: Json = {"index": 0, "finish_reason": finish(answer), "logprobs": None}
    if chat:
        choice["message"] = {"role": "assistant", "content": answer["text"]}
    else:
        choice["text"] = answer["text"]
    return {
        "id": name,
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
        "usage": counts(answer),
        "align": beside(answer),
    }


def finish(answer: Json) -> str:
    """As OpenAI says why an answer ended."""
    return "stop" if answer["finished"] else "length"


def counts(answer: Json) -> Json:
    """OpenAI's usage."""
    return {key: answer["usage"][key] for key in ("prompt_tokens", "completion_tokens", "total_tokens")}


def beside(answer: Json) -> Json:
    """The answer without its text, which stands in the choice."""
    return {key: value for key, value in answer.items() if key not in ("text", "tokens")}


def chunk_json(text: str | None, *, name: str, model: str, chat: bool, first: bool, finish: str | None = None) -> Json:
    """A piece of a stream of OpenAI's kind."""
    choice: Json = {"index": 0, "finish_reason": finish, "logprobs": None}
    if chat:
        choice["delta"] = {**({"role": "assistant"} if first else {}), **({} if text is None else {"content": text})}
    else:
        choice["text"] = text or ""
    kind = "chat.completion.chunk" if chat else "text_completion"
    return {"id": name, "object": kind, "created": int(time.time()), "model": model, "choices": [choice]}


def number(value: float) -> float | None:
    """What JSON can say; None for the logarithm of 0."""
    return value if math.isfinite(value) else None


class Text:
    """Tokens to text as they come: a character that is not whole yet waits for its other bytes."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, token: int) -> str:
        """What the token adds."""
        return self._decoder.decode(self._vocabulary.tokens[token] or b"")

    def rest(self) -> str:
        """What was never made whole."""
        return self._decoder.decode(b"", final=True)
