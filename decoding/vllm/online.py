"""The loop around vLLM's ``AsyncLLM``, or any client of its engine: one request of ours, beside whatever else runs."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any

from align.decoding.constraints import Vocabulary
from align.decoding.engines.vllm import drawn, sampling
from align.decoding.request import Answer, Request

from .particles import Abort, Add, Drawn, Event, Happened, Lost, Particles, merged

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

KEPT_WAITING = 5.0
"""Seconds that the engine may take to give what a request took, once it is stopped from outside."""
REFUSED_EVERY = 0.2
"""Seconds between two looks at the tokens that were refused."""


async def run(
    client: EngineClient,
    request: Request,
    vocabulary: Vocabulary,
    name: str,
    *,
    trace: bool = False,
    happened: Happened | None = None,
    executor: Executor | None = None,
) -> Answer:
    """Answer a request. Where this is cancelled, its particles are aborted.

    Args:
        client: of an engine that runs our processor.
        request: its constraint is one of ``constraints.build``.
        vocabulary: of the model.
        name: different from that of any other request that runs.
        trace: fetch the tokens that were refused, too, every so often.
        happened: told of every event and action, in order, as they come, in the loop's thread.
        executor: where a potential is evaluated; None: in asyncio's own threads.

    Raises:
        ConstraintError: the prompt cannot be used, or the constraint cannot be sent to the engine.
    """
    context = client.vllm_config.model_config.max_model_len
    told: list[Event] = []
    particles = Particles(request, vocabulary, context, name, trace=trace, happened=told.append)
    events: asyncio.Queue[list[Drawn | Lost] | Exception] = asyncio.Queue()
    running: dict[int, asyncio.Task[None]] = {}
    ending: list[asyncio.Task[None]] = []

    def do(actions: Sequence[Add | Abort]) -> None:
        for action in actions:
            if isinstance(action, Add):
                work = _follow(client, f"{name}/{action.particle}", action, events)
                running[action.particle] = asyncio.create_task(work)
            elif (task := running.pop(action.particle, None)) is not None:
                task.cancel()  # which aborts it in the engine
                ending.append(task)

    def tell() -> None:
        if happened is not None:
            for one in told:
                happened(one)
        told.clear()

    async def finish() -> list[Mapping[str, Any] | None] | Exception:
        """Abort what still runs, and fetch what all have taken."""
        for task in (*running.values(), *ending):
            task.cancel()
        await asyncio.gather(*running.values(), *ending, return_exceptions=True)
        try:
            return merged(await client.collective_rpc("align_pop", args=(particles.names,)))
        except Exception as error:
            return error

    loop = asyncio.get_running_loop()
    looked = -math.inf
    try:
        do(particles.start())
        while not particles.done:
            waiting = [await events.get()]
            while not events.empty():
                waiting.append(events.get_nowait())
            came: list[Drawn | Lost] = []
            for event in waiting:
                if isinstance(event, Exception):
                    raise event
                came += event
            if request.potential is None:
                do(particles.receive(came))
            else:
                do(await loop.run_in_executor(executor, particles.receive, came))
            if trace and not particles.done and loop.time() > looked + REFUSED_EVERY:
                for found in await client.collective_rpc("align_refused", args=(particles.unknown,)):
                    particles.refused(found)
                looked = loop.time()
            tell()
        records = await finish()
    except asyncio.CancelledError:
        await asyncio.wait([asyncio.create_task(finish())], timeout=KEPT_WAITING)
        raise
    except Exception as error:
        do(particles.stop(f"{type(error).__name__}: {error}"))
        records = await finish()
    if isinstance(records, Exception):
        particles.stop(particles.failed or f"{type(records).__name__}: {records}")
        records = []
    answer = await asyncio.to_thread(particles.answer, records)  # it asks the constraint about the whole text
    tell()
    return answer


async def _follow(
    client: EngineClient, name: str, action: Add, events: asyncio.Queue[list[Drawn | Lost] | Exception]
) -> None:
    """Pass on what the particle's request draws."""
    from vllm.sampling_params import RequestOutputKind

    params = sampling(action.max_tokens, dict(action.settings), action.stops, weights=True)
    params.output_kind = RequestOutputKind.DELTA
    try:
        async for output in client.generate({"prompt_token_ids": list(action.prompt)}, params, name):
            found = drawn(action.particle, output)
            if found:
                events.put_nowait(found)
    except Exception as error:
        events.put_nowait(error)
