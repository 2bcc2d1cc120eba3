"""The routes: vLLM's two with our settings in them, and our own."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any
from uuid import uuid4

from fastapi import Depends, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from vllm.entrypoints.openai.chat_completion.api_router import create_chat_completion
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.api_router import create_completion
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.exception_handling.handlers.vllm_error import vllm_error_handler
from vllm.entrypoints.serve.utils.api_utils import validate_json_request
from vllm.exceptions import GracefulHTTPError

from align.decoding.constraints import ConstraintError
from align.decoding.drawing import check_tokens

from . import replies, wire
from .errors import HungUpError, RefusedError
from .events import lines, pieces
from .streams import Events
from .work import Drawing, Job, Service, outcome, unless_gone

PAGE = Path(__file__).parent / "page.html"
OpenAI = Any
"""A ``ChatCompletionRequest`` or a ``CompletionRequest`` of vLLM's, which has no types where it is not installed."""
GONE = 499
"""Status of a reply that nobody reads."""


def attach(app: FastAPI) -> None:
    """Enter the routes; ``app.state.align`` is the ``Service`` by the time that they are used."""
    checks: dict[str, Any] = {"dependencies": [Depends(validate_json_request)], "methods": ["POST"]}
    app.add_api_route("/v1/chat/completions", chat_completions, **checks)
    app.add_api_route("/v1/completions", completions, **checks)
    app.add_api_route("/v1/align/smc", smc, **checks)
    app.add_api_route("/v1/align/score", score, **checks)
    app.add_api_route("/v1/align", about, methods=["GET"])
    app.add_api_route("/", page, methods=["GET"], include_in_schema=False)
    app.add_exception_handler(GracefulHTTPError, refused)


async def chat_completions(request: ChatCompletionRequest, raw_request: Request) -> Response:
    """OpenAI's, with our settings as JSON text in ``vllm_xargs.align``; without them vLLM's own."""
    if wire.KEY not in (request.vllm_xargs or {}):
        return await create_chat_completion(request=request, raw_request=raw_request)
    return await _measured(raw_request, lambda: _openai(request, raw_request))


async def completions(request: CompletionRequest, raw_request: Request) -> Response:
    """OpenAI's older one, likewise."""
    if wire.KEY not in (request.vllm_xargs or {}):
        return await create_completion(request=request, raw_request=raw_request)
    return await _measured(raw_request, lambda: _openai(request, raw_request))


async def smc(raw_request: Request) -> Response:
    """Particles, with everything that is known of them: as JSON, or as events while they grow."""
    return await _measured(raw_request, lambda: _smc(raw_request))


async def score(raw_request: Request) -> Response:
    """Rewards of answers."""
    raw_request.state.method = "score"

    async def work() -> Response:
        body = wire.read(wire.ScoreBody, await _json(raw_request))
        service: Service = raw_request.app.state.align
        scores = await unless_gone(raw_request, service.rewards.score(body, service.options.timeout))
        return JSONResponse({"object": "align.score", "reward": body.reward, "scores": scores})

    return await _measured(raw_request, work)


async def about(raw_request: Request) -> Response:
    """What this server has: its model, the rewards and predicates that its operator named, and a limit."""
    options = raw_request.app.state.align.options
    model = raw_request.app.state.openai_serving_models.model_name()
    names = {"rewards": sorted(options.rewards), "predicates": sorted(options.predicates)}
    return JSONResponse({"object": "align", "model": model, **names, "max_particles": options.max_particles})


async def page() -> Response:
    """A page to try it all."""
    return FileResponse(PAGE, headers={"Cache-Control": "no-cache"})


async def refused(http: Request, error: Exception) -> Response:
    """What vLLM's handlers met that is a refusal of ours, with the headers that vLLM has no room for."""
    if isinstance(error.__cause__, RefusedError):
        return _refusal(error.__cause__)
    reply: Response = await vllm_error_handler(http, error)
    return reply


def _refusal(refused: RefusedError) -> Response:
    return JSONResponse(refused.body, status_code=refused.status, headers=refused.headers)


async def _measured(http: Request, work: Callable[[], Awaitable[Response]]) -> Response:
    """Refusals as JSON, and a line in the metrics; streams write theirs when they end."""
    began = time.monotonic()
    error: BaseException | None = None
    streamed = False
    try:
        response = await work()
        streamed = isinstance(response, Events)
        return response
    except RefusedError as refused:
        error = refused
        return _refusal(refused)
    except HungUpError as gone:
        error = gone
        return Response(status_code=GONE)
    except BaseException as other:
        error = other
        raise
    finally:
        if not streamed:
            method = getattr(http.state, "method", "none")
            http.app.state.align.metrics.done(method, _outcome(http, error), time.monotonic() - began)


async def _openai(request: OpenAI, http: Request) -> Response:
    service: Service = http.app.state.align
    settings = wire.settings_of(request.vllm_xargs or {})
    http.state.method = settings.method
    wire.check_openai(request)
    wire.check_limits(settings, service.options)
    if request.stream and (settings.method, settings.particles) not in (("awrs", 1), ("mask", 1), ("rejection", 1)):
        raise RefusedError(
            400,
            "stream: which particle is the answer is known when all are done; stream with method awrs and "
            "particles 1, or see them all grow at /v1/align/smc",
        )
    chat = isinstance(request, ChatCompletionRequest)
    asked = request.max_completion_tokens if isinstance(request, ChatCompletionRequest) else None
    drawing = Drawing(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_k=request.top_k if request.top_k is not None and request.top_k > 0 else None,
        top_p=request.top_p,
        seed=request.seed if request.seed is None else request.seed & ((1 << 63) - 1),
        max_tokens=asked if asked is not None else _max_tokens(request),
    )
    name = f"{'chatcmpl' if chat else 'cmpl'}-{uuid4().hex}"
    job = await unless_gone(http, _admitted(http, request, settings, drawing, name))
    model = http.app.state.openai_serving_models.model_name()
    if request.stream:
        usage = bool(request.stream_options is not None and request.stream_options.include_usage)
        return _stream(http, job, pieces(service, job, model=model, chat=chat, usage=usage))
    answer = await unless_gone(http, service.answer(job))
    if (refused := replies.refusal(answer)) is not None:
        raise refused
    return JSONResponse(replies.openai_json(answer, name=name, model=model, chat=chat))


async def _smc(http: Request) -> Response:
    service: Service = http.app.state.align
    body = wire.read(wire.SmcBody, await _json(http))
    http.state.method = body.method
    wire.check_limits(body, service.options)
    if (body.messages is None) == (body.prompt is None):
        raise RefusedError(400, "messages, prompt: give one of them")
    given = {"model": body.model, **({"messages": body.messages} if body.messages is not None else {})}
    kind = ChatCompletionRequest if body.messages is not None else CompletionRequest
    try:
        request: OpenAI = kind.model_validate(given if body.messages is not None else {**given, "prompt": body.prompt})
    except ValueError as error:
        raise RefusedError(400, f"messages: {error}") from None
    drawing = Drawing(body.temperature, body.top_k, body.top_p, body.seed, body.max_tokens)
    name = f"smc-{uuid4().hex}"
    job = await unless_gone(http, _admitted(http, request, body, drawing, name))
    model = http.app.state.openai_serving_models.model_name()
    if body.stream:
        return _stream(http, job, _noting(http, lines(service, job, model)))
    answer = await unless_gone(http, service.answer(job))
    http.state.valid = answer["valid"]
    return JSONResponse({"id": name, "object": "align.smc", "model": model, **answer})


async def _noting(http: Request, lines: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[dict[str, Any], None]:
    """The same lines, with a note for the metrics of whether the answer was one."""
    async with aclosing(lines):
        async for line in lines:
            if line["event"] == "answer":
                http.state.valid = line["valid"]
            yield line


def _outcome(http: Request, error: BaseException | None) -> str:
    """What the metrics call it: also a reply that says that there is no valid answer."""
    return outcome(error) if error is not None or getattr(http.state, "valid", True) else "no_answer"


async def _admitted(http: Request, request: OpenAI, settings: wire.Settings, drawing: Drawing, name: str) -> Job:
    """A place among the particles, once everything about the request is known to be right."""
    service: Service = http.app.state.align
    seconds = service.options.timeout
    deadline = asyncio.get_running_loop().time() + seconds
    try:
        async with asyncio.timeout_at(deadline):
            ids, said = await _rendered(http, request)
            return await service.admit(name, settings, drawing, ids, said, deadline)
    except TimeoutError:
        raise RefusedError(
            504,
            f"the prompt was not rendered and the constraint compiled, in its turn, within {seconds:g} s; try again",
        ) from None


async def _rendered(http: Request, request: OpenAI) -> tuple[list[int], Any]:
    """The prompt's tokens by vLLM's own rendering, and what a reward sees of it."""
    said: Any
    serving = http.app.state.openai_serving_completion
    try:
        if isinstance(request, ChatCompletionRequest):
            rendered = await http.app.state.openai_serving_chat.render_chat_request(request)
            said = request.messages
            inputs = rendered[1] if isinstance(rendered, tuple) else rendered
        else:
            inputs = await serving.render_completion_request(request)
            said = request.prompt
    except Exception as error:
        inputs = serving.create_error_response(error)  # vLLM's handlers would say the same, but count it as a failure
        if inputs.error.code >= 500:
            raise
    if not isinstance(inputs, list):
        raise RefusedError(inputs.error.code, inputs.error.message)
    if len(inputs) != 1 or "prompt_token_ids" not in inputs[0]:
        raise RefusedError(400, "prompt: give one text, or the tokens of one")
    ids = inputs[0]["prompt_token_ids"]
    vocabulary = http.app.state.align.vocabulary
    try:
        check_tokens(ids, vocabulary)
    except ConstraintError as error:
        raise RefusedError(400, str(error)) from None
    if not isinstance(said, str) and not isinstance(request, ChatCompletionRequest):
        said = vocabulary.text(ids)
    return ids, said


def _max_tokens(request: OpenAI) -> int | None:
    """OpenAI's completions have 16 where nothing is said, which cuts most answers; ours have what chats have."""
    return request.max_tokens if "max_tokens" in request.model_fields_set else None


def _stream(http: Request, job: Job, lines: AsyncGenerator[dict[str, Any], None]) -> Events:
    """Lines as events; their job gives its places back when they end."""
    metrics = http.app.state.align.metrics
    began = time.monotonic()

    def over(error: BaseException | None) -> None:
        job.ticket.leave()
        metrics.done(job.settings.method, _outcome(http, error), time.monotonic() - began)

    return Events(lines, over)


async def _json(http: Request) -> Any:
    try:
        return json.loads(await http.body())
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, f"body: not JSON: {error}") from None
