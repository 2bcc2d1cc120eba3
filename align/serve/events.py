"""Particles as they grow, as events for who watches; and one particle as the stream of an answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from align.decoding.constraints import Vocabulary
from align.decoding.smc import Copy, Extended, Resampled, Stop
from align.decoding.vllm.particles import Event, Refused

from . import replies
from .replies import Json, Text
from .work import Job, Service


class Told:
    """What happens, as JSON: texts of tokens instead of their numbers."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._said: dict[int, list[int]] = {}
        self._texts: dict[int, Text] = {}

    def __call__(self, event: Event) -> list[Json]:
        """The events that this one is."""
        match event:
            case Extended(number, step, None):
                return [{"event": "dead", "particle": number, "step": step}]
            case Extended(number, step, token):
                assert token is not None
                self._said.setdefault(number, []).append(token)
                text = self._texts.setdefault(number, Text(self._vocabulary))(token)
                told: Json = {"event": "token", "particle": number, "step": step, "text": text}
                told |= {"log_weight": replies.number(event.log_weight), "ended": event.ended}
                return [told]
            case Copy(source, target, step):
                self._said[target] = self._said[source][: step + 1]
                self._texts[target] = Text(self._vocabulary)
                for token in self._said[target]:
                    self._texts[target](token)
                return [{"event": "copy", "source": source, "target": target, "step": step}]
            case Resampled(step, sources, population):
                return [{"event": "resample", "step": step, "sources": sources, "population": population}]
            case Stop(number):
                return [{"event": "stop", "particle": number}]
            case Refused(number, step, tokens) if tokens:
                texts = [self._vocabulary.text([token]) for token in tokens]
                return [{"event": "refused", "particle": number, "step": step, "texts": texts}]
        return []


async def lines(service: Service, job: Job, model: str) -> AsyncGenerator[Json, None]:
    """What happens, and the answer in the end."""
    told = Told(service.vocabulary)
    async for event in _watched(service, job):
        if isinstance(event, dict):
            yield {"event": "answer", "id": job.name, "object": "align.smc", "model": model, **event}
        else:
            for line in told(event):
                yield line


async def pieces(service: Service, job: Job, *, model: str, chat: bool, usage: bool) -> AsyncGenerator[Json, None]:
    """The one particle of a job as chunks of OpenAI's kind; the last has ``align`` and why it ended.

    Raises:
        RefusedError: after what was said, there is no valid answer.
    """
    text, first = Text(service.vocabulary), True

    def chunk(said: str | None, finish: str | None = None) -> Json:
        return replies.chunk_json(said, name=job.name, model=model, chat=chat, first=first, finish=finish)

    async for event in _watched(service, job):
        if isinstance(event, dict):
            if (refused := replies.refusal(event)) is not None:
                raise refused
            yield {**chunk(text.rest() or None, replies.finish(event)), "align": replies.beside(event)}
            if usage:
                yield {**chunk(None), "choices": [], "usage": replies.counts(event)}
        elif isinstance(event, Extended) and event.token is not None and (said := text(event.token)):
            yield chunk(said)
            first = False


async def _watched(service: Service, job: Job) -> AsyncGenerator[Event | Json, None]:
    """What happens, as it does, and then the answer. Where nobody takes them any more, the job is stopped."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Event | None] = asyncio.Queue()

    def put(event: Event | None) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, event)  # under a reward, from a thread

    task = asyncio.create_task(service.answer(job, put))
    task.add_done_callback(lambda _: put(None))
    try:
        while (event := await queue.get()) is not None:
            yield event
        yield task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
