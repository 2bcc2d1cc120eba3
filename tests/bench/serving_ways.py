"""What is measured in one process with one engine of vLLM: ways to generate, at so many requests at a time."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.data.tokenize import encode_prompt
from align.decoding.constraints import Built, Vocabulary, build
from align.decoding.engines.vllm import VLLMEngine
from align.decoding.request import Answer, Request
from align.models.hardware import has_bf16_cpu
from align.models.load import load_tokenizer
from align.models.packaged import packaged_model

MODEL = "smollm2-135m-instruct"
DTYPE = "bfloat16" if has_bf16_cpu() else "float32"  # what an engine has here by default: emulated, bf16 is slow
ROWS = 256
RECORD = r'\{"name": "[A-Z][a-z]+", "age": [1-9][0-9]?, "city": "[A-Z][a-z]+"\}'
ANYTHING = r"(.|\n)*"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 1, "maximum": 99},
        "city": {"type": "string", "maxLength": 30},
    },
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}
PLACES = ["Lisbon", "Cairo", "Lima", "Oslo", "Delhi", "Quito", "Rabat", "Seoul", "Tunis", "Perth", "Kyoto", "Sofia"]
LONGEST = 48


def story(number: int) -> str:
    """A request that is answered at length."""
    return f"Tell a long story about {number + 2} ships on a dark and stormy sea."


def person(number: int) -> str:
    """A request that a record answers."""
    return f"Write a JSON record of a person who lives in {PLACES[number % len(PLACES)]}, number {number}."


@dataclass(frozen=True)
class Way:
    """How answers are drawn.

    Args:
        prompt: of request number n.
        plain: vLLM's own ``SamplingParams`` beside the length; None for ours.
        spec: constraint of ours.
        method, particles: of ours.
    """

    prompt: Callable[[int], str] = story
    plain: dict[str, Any] | None = None
    spec: dict[str, Any] | None = None
    method: Any = "awrs"
    particles: int = 1


FREE = "unconstrained, temperature 1"
GREEDY = "unconstrained, greedy"
WAYS: dict[str, Way] = {
    FREE: Way(plain={"temperature": 1.0}),
    GREEDY: Way(plain={"temperature": 0.0}),
    "structured output, cheap regex": Way(plain={"temperature": 1.0, "structured": {"regex": ANYTHING}}),
    "AWRS, cheap regex": Way(spec={"regex": ANYTHING}),
    "structured output, record regex": Way(person, plain={"temperature": 1.0, "structured": {"regex": RECORD}}),
    "AWRS, record regex": Way(person, spec={"regex": RECORD}),
    "structured output, JSON schema": Way(person, plain={"temperature": 1.0, "structured": {"json": SCHEMA}}),
    "AWRS, JSON schema": Way(person, spec={"json": SCHEMA}),
    "AWRS-SMC, 8 particles, cheap regex": Way(spec={"regex": ANYTHING}, method="awrs-smc", particles=8),
    "AWRS-SMC, 8 particles, record regex": Way(person, spec={"regex": RECORD}, method="awrs-smc", particles=8),
    "AWRS-SMC, 24 particles, cheap regex": Way(spec={"regex": ANYTHING}, method="awrs-smc", particles=24),
    "AWRS-SMC, 24 particles, record regex": Way(person, spec={"regex": RECORD}, method="awrs-smc", particles=24),
}


@dataclass
class Made:
    """What a measurement came to: seconds of the clock and of the processor, and what each request waited."""

    tokens: int = 0
    wall: float = 0.0
    cpu: float = 0.0
    waits: list[float] = field(default_factory=list)
    evaluations: int = 0
    masks: int = 0
    valid: int = 0
    resamplings: int = 0
    log_normaliser: float | None = None
    lengths: list[int] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


class Watch:
    """Waits of requests of which ``at`` are under way at any time: the next is sent when one is answered."""

    def __init__(self, at: int) -> None:
        self._at, self.began, self.worked = at, time.perf_counter(), time.process_time()
        self._ends: list[float] = []
        self._sent: dict[int, float] = {}

    def answered(self, number: int, *_: object) -> None:
        """Request ``number`` is."""
        self._ends.append(time.perf_counter())
        self._sent[number] = self._ends[-1]

    def made(self) -> Made:
        """Seconds and waits, once all are."""
        made = Made(wall=time.perf_counter() - self.began, cpu=time.process_time() - self.worked)
        starts = [self.began] * self._at + self._ends
        made.waits = [self._sent[number] - starts[number] for number in sorted(self._sent)]
        return made


class Bench:
    """The engine, and what answers are made by."""

    def __init__(self, dtype: str = DTYPE, **options: Any) -> None:
        self.folder: Path = packaged_model(MODEL)
        self.tokenizer = load_tokenizer(MODEL)
        self.engine = VLLMEngine(
            self.folder, dtype=dtype, max_model_len=1024, max_num_seqs=ROWS, kv_cache_memory_bytes=1 << 30, **options
        )
        self.vocabulary = Vocabulary.of(self.tokenizer, size=self.engine.columns, ends={self.tokenizer.eos_token_id})
        self._built: dict[str, Built] = {}

    def prompt(self, text: str) -> list[int]:
        """A user's message, up to where the answer begins."""
        return encode_prompt([{"role": "user", "content": text}], self.tokenizer)

    def constraint(self, spec: dict[str, Any] | None) -> Built | None:
        """The constraint, made once."""
        if spec is None:
            return None
        return self._built.setdefault(str(spec), build(spec, self.vocabulary))

    def requests(self, way: Way, count: int, seed: int, longest: int = LONGEST) -> list[Request]:
        """Requests of one of our ways."""
        return [
            Request(
                self.prompt(way.prompt(number)),
                self.constraint(way.spec),
                way.method,
                way.particles,
                seed=1000 * seed + number,
                max_new_tokens=longest,
            )
            for number in range(count)
        ]

    def run(self, way: Way, at: int, count: int, seed: int, longest: int = LONGEST) -> Made:
        """``count`` requests, ``at`` of them at a time, from an empty prefix cache."""
        prepared = None if way.plain is not None else self.requests(way, count, seed, longest)
        self.engine.llm.reset_prefix_cache()
        gc.collect()
        if prepared is None:
            return self.plain(way, at, count, longest)
        return self.ours(prepared, at * way.particles, at)

    def ours(self, requests: Sequence[Request], rows: int, at: int) -> Made:
        """Answers that are drawn inside."""
        watch = Watch(at)
        answers = self.engine.generate(requests, self.vocabulary, rows=min(ROWS, rows), on_answer=watch.answered)
        made = watch.made()
        for answer in answers:
            _add(made, answer)
        return made

    def plain(self, way: Way, at: int, count: int, longest: int | Sequence[int]) -> Made:
        """Requests without us in them, in a loop that is as short; ``longest`` may be of each."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        given = dict(way.plain or {})
        structured = given.pop("structured", None)
        engine = self.engine.llm.llm_engine
        waiting: Iterator[tuple[int, list[int]]] = iter([(n, self.prompt(way.prompt(n))) for n in range(count)])
        made, running = Made(), 0
        watch = Watch(at)
        while True:
            while running < at and (one := next(waiting, None)) is not None:
                params = SamplingParams(
                    **given,
                    max_tokens=longest if isinstance(longest, int) else longest[one[0]],
                    ignore_eos=structured is None,
                    detokenize=False,
                    structured_outputs=StructuredOutputsParams(**structured) if structured else None,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                    skip_clone=True,
                )
                engine.add_request(str(one[0]), {"prompt_token_ids": one[1]}, params)
                running += 1
            if not running:
                break
            for output in engine.step():
                if output.finished:
                    running -= 1
                    watch.answered(int(output.request_id))
                    made.tokens += len(output.outputs[0].token_ids)
                    made.valid += output.outputs[0].finish_reason == "stop" or structured is None
        measured = watch.made()
        made.wall, made.cpu, made.waits = measured.wall, measured.cpu, measured.waits
        return made


def _add(made: Made, answer: Answer) -> None:
    made.tokens += len(answer.evaluations)
    made.evaluations += sum(answer.evaluations)
    made.masks += answer.masks
    made.valid += answer.valid
    if answer.reason:
        made.reasons.append(answer.reason)
    if answer.result is not None:
        made.resamplings += answer.result.resamplings
        made.log_normaliser = answer.result.log_normaliser
        made.lengths += [len(sample.tokens) for sample in answer.result.samples]
