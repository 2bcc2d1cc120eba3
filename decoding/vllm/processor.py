"""The logits processor that draws inside vLLM's engine, for both of its model runners.

Load it by class path, ``logits_processors=["align.decoding.vllm.processor:AlignProcessor"]`` with
``logprobs_mode="processed_logits"`` and ``worker_extension_cls="align.decoding.vllm.processor.AlignWorker"``: a
request's tokens are then those that ``extra_args["align"]`` (see ``settings``) asks for, and the log-probability that
vLLM reports for a token is its log-weight. Requests without it are not touched. There is no entry point of vLLM's
group for processors on purpose: it would load this one into every engine on the machine.

In the engine's process alone; ``additional_config["align"]`` may hold

- ``ends``             ids of end tokens, those of the tokenizer and of the model's generation settings by default;
- ``predicates``       names of the Python functions that constraints may call, none by default;
- ``allowance``        what a constraint may compute, see ``rows.Rows``;
- ``end_with_parent``  whether an engine in a process of its own is killed with the one that started it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from multiprocessing import parent_process
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from vllm.v1.sample import sampler
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as FirstRunner
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as SecondRunner

from align.decoding.constraints import Vocabulary
from align.decoding.constraints.worker import end_with

from .rows import Row, Rows
from .settings import KEY, read, validate

_here: WeakSet[Rows] = WeakSet()
"""What draws in this process: of each engine that lives."""


class AlignProcessor(FirstRunner, SecondRunner):  # type: ignore[misc]
    """Draws the tokens of requests that carry our settings.

    vLLM has two model runners with an interface each, told apart by what the constructor is given: the first is that
    of the CPU, the second the default on a GPU, where this has not been run. Nothing of the state is worth keeping
    for its own sake: a row that comes back, after preemption or in another place, is brought to where its tokens are.

    Raises:
        ValueError: the engine is set up so that tokens or weights would be wrong.
    """

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse what would make tokens or weights wrong; what is raised reaches whoever sent the request."""
        validate(sampling_params)

    def __init__(self, vllm_config: Any, place: Any, is_pin_memory: bool | None = None) -> None:
        if vllm_config.speculative_config is not None:
            raise ValueError("align: speculative decoding draws tokens before they are weighed; switch it off")
        mode = str(getattr(vllm_config.model_config.logprobs_mode, "value", vllm_config.model_config.logprobs_mode))
        if mode != "processed_logits":
            raise ValueError(
                f"align: logprobs_mode is {mode!r}, so that weights would not come out; start with 'processed_logits'"
            )
        config = (vllm_config.additional_config or {}).get(KEY, {})
        if config.get("end_with_parent") and parent_process() is not None:
            end_with(os.getppid())  # an engine whose server was killed would keep its memory for ever
        vocabulary = vocabulary_of(vllm_config.model_config, config.get("ends"))
        self._rows = Rows(vocabulary, config.get("predicates", ()), config.get("allowance"))
        _here.add(self._rows)
        if is_pin_memory is not None and torch.device(place).type == "cpu":
            sampler.batched_count_greater_than = ranks
        self._state: LogitsProcRequestState | None = None if is_pin_memory is not None else place
        self._first: dict[int, tuple[Row, list[int]]] = {}  # by row of the batch, with the live list of its tokens
        self._second: dict[int, Row] = {}  # by slot

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """First runner: rows that left, came and moved, in this order."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._first.pop(index, None)
        for index, params, prompt, tokens in batch_update.added:
            self._first.pop(index, None)
            settings = read(params)
            if settings is not None:
                self._first[index] = (self._rows.open(settings, prompt or ()), tokens)
        for one, other, direction in batch_update.moved:
            moving, there = self._first.pop(one, None), self._first.pop(other, None)
            if moving is not None:
                self._first[other] = moving
            if there is not None and direction == MoveDirectionality.SWAP:
                self._first[one] = there

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Second runner: a request enters the slot."""
        self._second.pop(req_idx, None)
        settings = read(sampling_params)
        if settings is None:
            return False
        self._second[req_idx] = self._rows.open(settings, ())
        return True

    def apply(self, logits: Tensor, ctx: LogitsContext | None = None) -> Tensor:
        """Leave one token of each of our rows."""
        if ctx is not None:
            rows = self._second_rows(ctx)
        else:
            rows = {index: found for index, found in self._first.items() if index < len(logits)}
        if rows:
            self._rows.draw(logits, rows)
        return logits

    def _second_rows(self, ctx: LogitsContext) -> dict[int, tuple[Row, Sequence[int]]]:
        """Rows that are past their prompt, with their tokens; one row a request, as there is no speculation."""
        assert self._state is not None
        found: dict[int, tuple[Row, Sequence[int]]] = {}
        for number, slot in enumerate(ctx.idx_mapping_np.tolist()):
            row = self._second.get(slot)
            if row is None:
                continue
            asked, length = int(self._state.prompt_len.np[slot]), int(ctx.seq_lens_upper_bound_np[number])
            if length < asked:
                continue  # in the middle of its prompt: what is sampled is thrown away
            begin = asked - row.settings.prefix
            tokens = self._state.all_token_ids.gpu[slot, begin:length].tolist()
            found[number] = (row, tokens)
        return found


class AlignWorker:
    """What a worker can be asked besides, through ``collective_rpc``."""

    def align_pop(self, names: list[str]) -> list[dict[str, Any] | None]:
        """What these requests took (``rows.Record``); they are forgotten."""
        found: list[dict[str, Any] | None] = [None] * len(names)
        for rows in _here:
            found = [one or other for one, other in zip(found, rows.pop(names), strict=True)]
        return found

    def align_refused(self, since: dict[str, int]) -> list[tuple[str, int, list[int]]]:
        """Tokens that were refused in these requests, each from a position of its answer on."""
        return [one for rows in _here for one in rows.refused(since)]

    def align_waiting(self) -> int:
        """How many records wait to be fetched."""
        return sum(len(rows.records) for rows in _here)


def ranks(logprobs: Tensor, of: Tensor) -> Tensor:
    """How many log-probabilities of each row, (B, V), are at least that of (B, 1): (B,).

    vLLM counts them for every token whose log-probability it reports. Its own code for it is meant for a compiler; on
    a CPU without one it takes as long as some layers of a small model, and this a quarter of that.
    """
    return (logprobs >= of).view(torch.uint8).sum(-1, dtype=torch.int32).long()


def vocabulary_of(model: Any, ends: Sequence[int] | None = None) -> Vocabulary:
    """The vocabulary of an engine's model, from vLLM's configuration of it; ``ends`` as in ``additional_config``."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        model.tokenizer, revision=model.tokenizer_revision, trust_remote_code=model.trust_remote_code
    )
    if ends is None:
        own = (model.try_get_generation_config() or {}).get("eos_token_id")
        given = own if isinstance(own, list) else [own]
        ends = [end for end in {*given, tokenizer.eos_token_id} if end is not None]
    return Vocabulary.of(tokenizer, size=model.get_vocab_size(), ends=ends)
