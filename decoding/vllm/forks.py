"""A scheduler of vLLM's in which a request can go on from where another one runs.

vLLM's prefix cache holds whole blocks: of a copied particle's beginning up to a block less one token would be computed
again, for every copy. A request that names its source (``source`` in our settings) takes this last, partly filled
block from it instead: it gets a block of its own, into which vLLM copies the source's before the next step, as it does
for models whose cache is finer than its blocks. Only what was asked for by its name and has the same tokens, adapter
and salt is taken, from a request that runs; else the tail is computed, and nothing but time is lost. The copied block
enters the prefix cache when it is full, like any other.

Load it by ``scheduler_cls="align.decoding.vllm.forks.scheduler"``. vLLM's connectors for keys and values could do the
same, but a process has one of them for all its engines, and engines without one fail beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request, RequestStatus

from .settings import KEY

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class Forks(Scheduler):  # type: ignore[misc]
    """On a CPU, and wherever else vLLM does not schedule ahead."""

    def __init__(self, *args: Any, **others: Any) -> None:
        super().__init__(*args, **others)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        self._blocks = managers[0] if len(managers) == 1 and type(managers[0]) is FullAttentionManager else None
        self._by_name: WeakValueDictionary[str, Request] = WeakValueDictionary()
        self._ran: set[str] = set()

    def add_request(self, request: Request) -> None:
        name = _own(request).get("name")
        if name:
            self._by_name[name] = request
        super().add_request(request)

    def schedule(self, *args: Any, **others: Any) -> Any:
        # What is let in from now on has yet to be computed, or to be copied itself.
        self._ran = {request.request_id for request in self.running}
        return super().schedule(*args, **others)

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[Any, ...]:
        """What of a request is there: whole blocks of the prefix cache, and then a part of the source's block."""
        found, length, *others = super()._get_local_prefix_cache_hit(request)
        source = self._by_name.get(_own(request).get("source", ""))
        if (
            source is not None
            and source.request_id in self._ran
            and source.status == RequestStatus.RUNNING
            and self._blocks is not None
            and self.kv_cache_manager.prefix_cache_lookup_enabled(request)
        ):
            size = self._blocks.block_size
            until = min(request.num_tokens - 1, request.num_prompt_tokens, source.num_computed_tokens)
            if length < until < length + size and _same(request, source, until):
                block = self._blocks.req_to_blocks[source.request_id][length // size]
                return KVCacheBlocks(([*found.blocks[0], block],)), until, *others
        return found, length, *others


class AsyncForks(Forks, AsyncScheduler):  # type: ignore[misc]
    """Where vLLM schedules a step while the one before is computed. No GPU has run it."""


def scheduler(vllm_config: VllmConfig, **others: Any) -> Scheduler:
    """The scheduler that goes with the configuration."""
    kind = AsyncForks if vllm_config.scheduler_config.async_scheduling else Forks
    return kind(vllm_config=vllm_config, **others)


def _own(request: Request) -> Mapping[str, Any]:
    """Our settings, where they came as an object: over HTTP they are a text, and nobody is forked there."""
    params = request.sampling_params
    own = ((params and params.extra_args) or {}).get(KEY)
    return own if isinstance(own, Mapping) else {}


def _same(one: Request, other: Request, until: int) -> bool:
    """Whether keys and values of the first tokens must be the same."""
    return (
        one.all_token_ids[:until] == other.all_token_ids[:until]
        and one.lora_request == other.lora_request
        and one.cache_salt == other.cache_salt
        and all(it.prompt_embeds is None and not it.mm_features for it in (one, other))
    )
