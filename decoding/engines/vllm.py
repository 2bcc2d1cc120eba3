"""vLLM as an engine: next-token logits and rollouts, and answers that are drawn inside it.

    engine = VLLMEngine("path/to/model")
    vocabulary = Vocabulary.of(tokenizer, size=engine.columns, ends=ends)
    request = Request(prompt_ids, constraint=build({"regex": "[0-9]+"}, vocabulary), particles=8, seed=1)
    (answer,) = engine.generate([request], vocabulary)

``generate`` draws inside vLLM, with particles that run free: it is what to use. The methods of ``Engine`` fetch whole
rows of logits, one request a token; they are for decoders that need those, and cost some three times as much.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.decoding.constraints import ConstraintError, Vocabulary
from align.decoding.law import Law
from align.decoding.request import Answer, Request
from align.decoding.vllm.particles import Abort, Add, Drawn, Lost, Particles, merged
from align.decoding.vllm.settings import KEY

from .protocol import Rollout

logger = logging.getLogger(__name__)

PROCESSOR = "align.decoding.vllm.processor:AlignProcessor"
WORKER = "align.decoding.vllm.processor.AlignWorker"
SCHEDULER = "align.decoding.vllm.forks.scheduler"
GREEDY = Law(top_k=1)


@dataclass
class _Task:
    """A request under way."""

    number: int
    particles: Particles


class VLLMEngine:
    """A model in vLLM, in this process. Of several keep all to the end: the first that goes takes along what vLLM has
    once for them together.

    Attributes:
        llm: vLLM's own.
        columns: of the logits.
        vocabulary: of the model's tokenizer, with ``ends``.

    Args:
        model: folder of a causal model with its tokenizer, or a hub id.
        ends: ids of end tokens; by default those of the tokenizer and of the model's generation settings.
        predicates: Python functions that constraints may call, by name; None for any.
        threads: of torch in this process from now on, on a CPU; None for what ``machine.settings`` finds, or
            ``OMP_NUM_THREADS`` where it is set. The first engine of a process decides.
        options: further arguments of vLLM's ``LLM``, before those that ``machine.settings`` finds.

    Raises:
        ValueError: vLLM is missing or too old, or the options make weights wrong.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        ends: Collection[int] | None = None,
        predicates: Collection[str] | None = None,
        threads: int | None = None,
        **options: Any,
    ) -> None:
        from align.decoding.vllm.machine import settings

        found = settings()
        asked = options if threads is None else {**options, "threads": threads}
        for about, why in found.reasons:
            name = "kv_cache_memory_bytes" if about == "cache" else about
            logger.info("%s: %s", about, f"{asked[name]}: asked for" if name in asked else why)
        found.enter(threads)
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from vllm import LLM

        from align.decoding.vllm.processor import vocabulary_of

        own: dict[str, Any] = {} if ends is None else {"ends": sorted(ends)}
        own["predicates"] = None if predicates is None else sorted(predicates)
        self.llm = LLM(
            model=str(model),
            **{
                **found.engine,
                "disable_log_stats": True,
                "enable_prefix_caching": True,
                **options,
                "logits_processors": [PROCESSOR],
                "worker_extension_cls": WORKER,
                "scheduler_cls": SCHEDULER,
                "logprobs_mode": "processed_logits",
                "additional_config": {KEY: own},
            },
        )
        self._engine = self.llm.llm_engine
        config = self._engine.model_config
        self.columns: int = config.get_vocab_size()
        self.vocabulary: Vocabulary = vocabulary_of(config, own.get("ends"))
        self._context: int = config.max_model_len
        self._names = count()
        self._sequences: dict[int, tuple[int, ...]] = {}
        self._handles = count()
        self._adapters = count(1)

    @property
    def context(self) -> int | None:
        """``max_model_len``."""
        return self._context

    def generate(
        self,
        requests: Sequence[Request],
        vocabulary: Vocabulary,
        *,
        rows: int | None = None,
        on_answer: Callable[[int, Answer], None] | None = None,
    ) -> list[Answer]:
        """Answer all requests, drawing inside the engine; the law is that of ``align.decoding.generate``.

        Args:
            requests: in any mixture of settings; constraints are those of ``align.decoding.constraints.build``.
            vocabulary: of the model's tokenizer.
            rows: particles at once; by default as many as vLLM has rows.
            on_answer: called with the number of a request and its answer as soon as it is there.

        Returns:
            The answers in the order of ``requests``.

        Raises:
            ValueError: the vocabulary is not that of the model, or has other end tokens than the engine.
        """
        from vllm.exceptions import VLLMClientError

        self._check(vocabulary)
        rows = rows or self._engine.vllm_config.scheduler_config.max_num_seqs
        answers: dict[int, Answer] = {}
        waiting, running = deque(enumerate(requests)), dict[str, _Task]()

        def answered(number: int, answer: Answer) -> None:
            answers[number] = answer
            if on_answer is not None:
                on_answer(number, answer)

        try:
            while waiting or running:
                busy = sum(requests[task.number].particles for task in running.values())
                while waiting and (busy + waiting[0][1].particles <= rows or not running):
                    number, request = waiting.popleft()
                    name = f"align-{next(self._names)}"
                    try:
                        particles = Particles(request, vocabulary, self._context, name)
                    except ConstraintError as error:
                        answered(number, Answer(None, (), False, str(error)))
                        continue
                    busy += request.particles
                    task = running[name] = _Task(number, particles)
                    try:
                        self._do(name, particles.start())
                    except (ValueError, VLLMClientError) as error:
                        self._do(name, task.particles.stop(str(error)))
                for name, events in self._step().items():
                    if name in running:
                        self._do(name, running[name].particles.receive(events))
                for name, task in list(running.items()):
                    if task.particles.done:
                        del running[name]
                        answered(task.number, task.particles.answer(self._pop(task.particles.names)))
        finally:
            for name, task in running.items():
                self._do(name, task.particles.stop("interrupted"))
                self._pop(task.particles.names)
        return [answers[number] for number in range(len(requests))]

    def rollouts(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        law: Law,
        seeds: Sequence[int],
        ends: Collection[int],
        adapter: Any = None,
    ) -> list[Rollout]:
        """Go on with every prompt until an end token, the length or the context; see ``Rollouts``.

        Args:
            adapter: vLLM's ``LoRARequest``; see ``adapted``.
        """
        if len(seeds) != len(prompts):
            raise ValueError(f"there are {len(seeds):,} seeds for {len(prompts):,} prompts: each prompt has its own")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}: it must be 1 or more")
        _check_prompts(prompts)
        found: list[Rollout] = [Rollout((), False)] * len(prompts)
        roomy = [number for number, prompt in enumerate(prompts) if len(prompt) < self._context]
        of_name = {f"rollout-{next(self._names)}": number for number in roomy}
        try:
            for name, number in of_name.items():
                length = min(max_new_tokens, self._context - len(prompts[number]))
                own = {"law": asdict(law), "seed": seeds[number], "max_new_tokens": length + 1}
                own_or_none = None if law == GREEDY else own
                self._add(name, prompts[number], length, own_or_none, stops=ends, adapter=adapter)
            while of_name:
                for output in self._engine.step():
                    if output.finished and output.request_id in of_name:
                        tokens = tuple(output.outputs[0].token_ids)
                        ended = bool(tokens) and tokens[-1] in ends
                        number = of_name.pop(output.request_id)
                        found[number] = Rollout(tokens, ended, output.num_cached_tokens or 0)
        finally:
            self._engine.abort_request(list(of_name))
        return found

    def adapted(self, adapter: str | Path) -> Adapted:
        """The model with a LoRA adapter, for rollouts; the engine needs ``enable_lora`` and ``max_lora_rank``.

        On a GPU this spares a second engine's memory. On a CPU a second engine with merged weights is faster.
        """
        return Adapted(self, str(adapter), next(self._adapters))

    def open(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """A sequence for each prompt."""
        _check_prompts(prompts)
        return [self._sequence(tuple(prompt)) for prompt in prompts]

    def extend(self, handle: int, token: int) -> None:
        """One more token."""
        self._sequences[handle] = (*self._sequences[handle], token)

    def fork(self, handle: int) -> int:
        """A sequence that has the same tokens so far; the prefix cache has what was computed for them."""
        return self._sequence(self._sequences[handle])

    def close(self, handle: int) -> None:
        """Forget the sequence."""
        del self._sequences[handle]

    def next_logits(self, handles: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Logits of the next token, (U, V) float32, and the row of each handle."""
        rows: dict[tuple[int, ...], int] = {}
        places = [rows.setdefault(self._sequences[handle], len(rows)) for handle in handles]
        names = [f"logits-{next(self._names)}" for _ in rows]
        waiting = set(names)
        try:
            for name, tokens in zip(names, rows, strict=True):
                self._add(name, tokens, 1, {"capture": True, "name": name, "law": {}})
            while waiting:
                waiting -= {output.request_id for output in self._engine.step() if output.finished}
        finally:
            self._engine.abort_request(list(waiting))
            records = self._pop(names)
        if None in records:
            raise RuntimeError("vLLM has not kept the logits of a sequence: ask for those of fewer at a time")
        logits = [np.frombuffer(record["logits"], dtype=np.float32) for record in records if record is not None]
        return torch.from_numpy(np.stack(logits)), places

    def _check(self, vocabulary: Vocabulary) -> None:
        if vocabulary.size != self.columns:
            raise ValueError(
                f"the vocabulary has {vocabulary.size:,} tokens and the model's logits {self.columns:,} columns: they "
                f"must be as many; build it by Vocabulary.of(tokenizer, size={self.columns}) of the model's tokenizer"
            )
        if vocabulary.ends != self.vocabulary.ends:
            own, theirs = sorted(self.vocabulary.ends), sorted(vocabulary.ends)
            raise ValueError(
                f"the vocabulary ends answers by {theirs} and the engine by {own}; start the engine with ends={theirs}"
            )
        if vocabulary.tokens != self.vocabulary.tokens:
            raise ValueError("the vocabulary has other tokens than the model's tokenizer; use the engine's own")

    def _pop(self, names: list[str]) -> list[Mapping[str, Any] | None]:
        """What these requests took; it is forgotten there."""
        return merged(self.llm.collective_rpc("align_pop", args=(names,)))

    def _sequence(self, tokens: tuple[int, ...]) -> int:
        handle = next(self._handles)
        self._sequences[handle] = tokens
        return handle

    def _do(self, name: str, actions: Sequence[Add | Abort]) -> None:
        for action in actions:
            match action:
                case Add(particle, prompt, own, length, stops):
                    self._add(f"{name}/{particle}", prompt, length, dict(own), stops=stops, weights=True)
                case Abort(particle):
                    self._engine.abort_request([f"{name}/{particle}"])

    def _step(self) -> dict[str, list[Drawn | Lost]]:
        """One step of the engine: what was drawn, by request."""
        events: dict[str, list[Drawn | Lost]] = {}
        for output in self._engine.step():
            name, slash, particle = output.request_id.partition("/")
            if slash:
                events.setdefault(name, []).extend(drawn(int(particle), output))
        return events

    def _add(
        self,
        name: str,
        prompt: Sequence[int],
        length: int,
        own: dict[str, Any] | None,
        *,
        stops: Collection[int] = (),
        weights: bool = False,
        adapter: Any = None,
    ) -> None:
        from vllm.sampling_params import RequestOutputKind

        params = sampling(length, own, stops, weights)
        params.output_kind = RequestOutputKind.DELTA if weights else RequestOutputKind.FINAL_ONLY
        self._engine.add_request(name, {"prompt_token_ids": list(prompt)}, params, lora_request=adapter)


class Adapted:
    """An engine's model with a LoRA adapter, as ``Rollouts``; ``VLLMEngine.adapted`` makes it."""

    def __init__(self, engine: VLLMEngine, folder: str, number: int) -> None:
        from vllm.lora.request import LoRARequest

        self._engine, self._adapter = engine, LoRARequest(f"adapter-{number}", number, folder)

    def rollouts(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        law: Law,
        seeds: Sequence[int],
        ends: Collection[int],
    ) -> list[Rollout]:
        """Go on with every prompt until an end token, the length or the context; see ``Rollouts``."""
        return self._engine.rollouts(
            prompts, max_new_tokens=max_new_tokens, law=law, seeds=seeds, ends=ends, adapter=self._adapter
        )


def sampling(length: int, own: dict[str, Any] | None, stops: Collection[int] = (), weights: bool = False) -> Any:
    """Parameters of a request for vLLM: greedy, so that what our processor leaves is what is taken.

    Args:
        length: most tokens.
        own: our settings, None for none.
        stops: ids that end it.
        weights: whether log-weights are wanted.
    """
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0.0,
        max_tokens=length,
        logprobs=0 if weights else None,
        stop_token_ids=sorted(stops),
        ignore_eos=True,
        detokenize=False,
        extra_args=None if own is None else {KEY: own},
        skip_clone=True,
    )


def drawn(particle: int, output: Any) -> list[Drawn | Lost]:
    """What an output of vLLM, a piece of the whole, says that a particle has drawn."""
    made = output.outputs[0]
    rows = zip(made.token_ids, made.logprobs or [], strict=True)
    found: list[Drawn | Lost] = [Drawn(particle, token, row[token].logprob) for token, row in rows]
    return [*found, Lost(particle, str(made.finish_reason))] if output.finished else found


def _check_prompts(prompts: Sequence[Sequence[int]]) -> None:
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompts[{number}] has no tokens")
