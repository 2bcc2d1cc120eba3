"""A model of a suite: its answers to the prompts, kept as they come, and its log-probs of answers."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from align.answering import Answers, Kept
from align.evals.sampling import Sample
from align.heldout import answer_logps
from align.losses.rows import answer_rows
from align.models.fingerprint import weights_hash
from align.models.load import LoadedModel

from .models import computing_in, let_score
from .prompts import Prompts


class Reader:
    """A loaded model and the prompts.

    Args:
        name: of the model, for bars.
        loaded: the model.
        compute: dtype of its products.
        prompts: that it answers.
        kept: where its answers are kept: by its weights, the prompts' tokens and every setting, so that a model that
            was trained anew or a setting that was changed has others.
        seed: of the draws.
    """

    def __init__(
        self, name: str, loaded: LoadedModel, compute: torch.dtype, prompts: Prompts, kept: Kept, seed: int
    ) -> None:
        self.name, self.loaded, self.compute, self.kept, self.seed = name, loaded, compute, kept, seed
        self.max_new_tokens = prompts.max_new_tokens
        self.ids = prompts.encoded(name, loaded)
        let_score(loaded.model)

    @cached_property
    def tokens(self) -> str:
        """By which tokens it reads the prompts and writes answers: log-probs of models are of the same where equal."""
        return _digest([self.ids, self.loaded.tokenizer.get_vocab()])

    @cached_property
    def weights(self) -> str:
        """Which weights these are."""
        return weights_hash(self.loaded.model.state_dict().items())

    def key(self, **settings: Any) -> str:
        """Name of what is made with these settings, in the file of what is kept."""
        about = {
            "weights": self.weights,
            "compute": str(self.compute),
            "prompts": self.ids,
            "max_new_tokens": self.max_new_tokens,
            "seed": self.seed,
            **settings,
        }
        return _digest(about)[:24]

    def answers(self, temperature: float, copies: int | None = None, **settings: Any) -> list[Sample]:
        """An answer a prompt, or ``copies`` independent ones in a row to each.

        Args:
            settings: what else the model differs in.
        """
        ids = [prompt for prompt in self.ids for _ in range(copies or 1)]
        seen: Counter[tuple[int, ...]] = Counter()
        keys = []
        for prompt in ids:
            keys.append(seen[tuple(prompt)])
            seen[tuple(prompt)] += 1
        drawn = Answers(self.kept, self.loaded.tokenizer, ids, max_new_tokens=self.max_new_tokens, seed=self.seed)
        key = self.key(temperature=temperature, copies=copies, **settings)
        with computing_in(self.compute, self.loaded.model):
            return drawn.of(key, self.loaded.model, temperature, what=self.name, keys=keys if any(keys) else None)

    def logps(self, answers: Sequence[Sample], what: str | None = None) -> list[float]:
        """Log-probs of answers to the prompts, in nats, at temperature 1."""
        data = [(prompt, answer.tokens) for prompt, answer in zip(self.ids, answers, strict=True)]
        pad = int(self.loaded.tokenizer.pad_token_id)
        with computing_in(self.compute, self.loaded.model):
            totals, _ = answer_logps(
                self.loaded.model,
                data,
                [len(prompt) + len(tokens) for prompt, tokens in data],
                lambda part: answer_rows([one for one, _ in part], [two for _, two in part], pad_token_id=pad),
                1,
                f"scoring, {what or self.name}",
            )
        return [float(value) for value in totals[0].double()]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
