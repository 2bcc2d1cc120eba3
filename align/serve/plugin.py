"""What vLLM's server loads beside its own routes (``vllm.endpoint_plugins``), where ``VLLM_PLUGINS`` names it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from argparse import Namespace
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import State

from align.decoding.vllm.processor import vocabulary_of

from .admission import Admission
from .checker import Checker
from .gate import Drain, Gate
from .launch import KEY_VARIABLE
from .metrics import Metrics
from .options import Options
from .plain import Plain
from .rewards import Rewards
from .routes import attach
from .structured import read_no_more
from .wire import KEY
from .work import Service

logger = logging.getLogger(__name__)


class AlignEndpoints:
    """Our routes, and what comes before all routes."""

    name = "align"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._drain = Drain()

    def attach_router(self, app: FastAPI) -> None:
        """Enter routes, middleware, and what is done when the server starts and ends."""
        attach(app)
        options = _options(app.state.args)
        keys = os.environ.get(KEY_VARIABLE)

        def refused(status: int) -> None:
            app.state.align.metrics.refused(status)

        def done(outcome: str, seconds: float) -> None:
            app.state.align.metrics.done("plain", outcome, seconds)

        app.add_middleware(Plain, most=options.max_plain, seconds=options.timeout, done=done)
        app.add_middleware(  # the last one comes first
            Gate,
            keys=[keys] if keys else [],
            max_body=options.max_body,
            seconds=options.timeout,
            drain=self._drain,
            on_refused=refused,
        )
        inner = app.router.lifespan_context

        @asynccontextmanager
        async def lifespan(app: Any) -> AsyncIterator[Any]:
            async with inner(app) as state:
                self._stop_gently(options.grace)  # vLLM's own handlers stand by now
                await app.state.align.checker.start()
                try:
                    yield state
                finally:
                    await app.state.align.checker.close()

        app.router.lifespan_context = lifespan

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Load rewards and the vocabulary; a reward that cannot be loaded ends the start."""
        options = _options(args)
        read_no_more()
        admission = Admission(options.max_running, options.max_waiting)
        state.align = Service(
            engine_client,
            await asyncio.to_thread(vocabulary_of, engine_client.model_config),
            options,
            admission=admission,
            metrics=Metrics(lambda: admission.running, lambda: admission.waiting),
            checker=Checker(options.compile_seconds, options.predicates),
            rewards=await asyncio.to_thread(Rewards.load, options.rewards),
        )

    def _stop_gently(self, grace: float) -> None:
        """On SIGTERM finish what is under way, and then stop as vLLM does on SIGINT; a second one stops at once."""
        loop = asyncio.get_running_loop()
        tasks = set[asyncio.Task[None]]()

        async def stop() -> None:
            logger.info("stopping: %d requests under way have %g s to finish", self._drain.running, grace)
            if not await self._drain.finish(grace):
                logger.warning("stopping: %d requests are cut off", self._drain.running)
            os.kill(os.getpid(), signal.SIGINT)

        def told() -> None:
            if self._drain.begun:
                os.kill(os.getpid(), signal.SIGINT)
            else:
                self._drain.begun = True
                tasks.add(loop.create_task(stop()))

        loop.add_signal_handler(signal.SIGTERM, told)


def _options(args: Namespace) -> Options:
    return Options.of((args.additional_config or {}).get(KEY, {}).get("server", {}))
