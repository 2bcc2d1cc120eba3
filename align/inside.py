"""Answers that are drawn inside vLLM: ``align generate --engine vllm``."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from align.data.rows import Content
from align.decoding.constraints import Vocabulary
from align.decoding.engines.protocol import Rollout
from align.decoding.law import Law
from align.decoding.vllm.machine import settings as machine
from align.decoding.vllm.machine import vllm_version
from align.errors import AlignError
from align.evals.sampling import Sample

from .baselines import place_of
from .generate import Answerer, Settings
from .serve.models import Served, served

if TYPE_CHECKING:
    from align.controlled import Decode
    from align.decoding.engines.vllm import VLLMEngine

BATCH = 128
"""Rows that are drawn before they are written."""


class Inside(Answerer):
    """A model in vLLM that answers.

    Args:
        settings: the model and how to draw from it.
        baseline: that is to run beside it, see ``baselines``; a line on stderr says where it will.

    Raises:
        AlignError: vLLM is not installed, or the model cannot be loaded.
    """

    def __init__(self, settings: Settings, baseline: str | None = None) -> None:
        try:
            vllm_version()
        except ValueError as error:
            raise AlignError(f"--engine vllm: {error}") from error
        self.settings = settings
        found = machine()
        self.place = None if baseline is None else place_of(settings.model, baseline, found.device)
        if self.place is not None:
            print(f"align generate: baseline: {self.place.why}", file=sys.stderr)
        options = {} if self.place is None else self.place.options
        self.engine = start(served(settings.model, str(found.engine["dtype"])), **options)
        self.tokenizer = self.engine.llm.get_tokenizer()
        self.eos_ids = set(self.engine.vocabulary.ends)
        self.context = self.engine.context
        self.has_template = bool(self.tokenizer.chat_template)

    def stream(self, prompt: Content) -> str:
        """Print an answer, whole, and return it."""
        (made,) = self._rollouts([self.encode(prompt)], self.settings.seed, [0])
        text = self._text(made)
        print(text)
        return text

    def draw(
        self, prompts: Sequence[Sequence[int]], seed: int, on_batch: Callable[[Mapping[int, Sample]], None]
    ) -> None:
        """See ``Answerer``."""
        copies = _copies(prompts)
        for start in range(0, len(prompts), BATCH):
            made = self._rollouts(prompts[start : start + BATCH], seed, copies[start : start + BATCH])
            on_batch({start + n: Sample(list(one.tokens), self._text(one), one.ended) for n, one in enumerate(made)})

    def decoder(self) -> tuple[Vocabulary, Decode]:
        """See ``Answerer``."""
        return self.engine.vocabulary, self.engine.generate

    def _rollouts(self, prompts: Sequence[Sequence[int]], seed: int, copies: Sequence[int]) -> list[Rollout]:
        temperature = self.settings.temperature
        return self.engine.rollouts(
            prompts,
            max_new_tokens=self.settings.max_new_tokens,
            law=Law(temperature) if temperature else Law(top_k=1),
            seeds=[_seed(prompt, seed, copy) for prompt, copy in zip(prompts, copies, strict=True)],
            ends=self.eos_ids,
        )

    def _text(self, made: Rollout) -> str:
        return str(self.tokenizer.decode(list(made.tokens), skip_special_tokens=True))


def start(what: Served, **options: Any) -> VLLMEngine:
    """The engine of a model.

    Raises:
        AlignError: vLLM does not start with it.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from align.decoding.engines.vllm import VLLMEngine

    try:
        return VLLMEngine(what.path, trust_remote_code=what.trusted, max_model_len=-1, **options)
    except (ValueError, OSError, RuntimeError) as error:
        raise AlignError(f"{what.name}: vLLM does not start: {error}") from error


def _copies(prompts: Sequence[Sequence[int]]) -> list[int]:
    """How often each prompt came before."""
    seen: Counter[tuple[int, ...]] = Counter()
    copies = []
    for prompt in prompts:
        copies.append(seen[tuple(prompt)])
        seen[tuple(prompt)] += 1
    return copies


def _seed(prompt: Sequence[int], seed: int, copy: int) -> int:
    """Another for every prompt and every copy of it, so that the batch has no say."""
    told = [seed, *([[copy]] if copy else []), *prompt]
    return int.from_bytes(sha256(json.dumps(told).encode()).digest()[:6])
